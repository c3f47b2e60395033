"""Searches: what is drawn, trained, pruned and taken up again, and that no trial is given the test images."""

import dataclasses
import math
import signal
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from torch import Tensor, nn

from forkserver import Program, run_program
from helpers import TINY, read_runs, wait_until
from mnist_lab import Experiment, Targets
from mnist_lab.data import Mnist
from mnist_lab.errors import LabError
from mnist_lab.objectives import distillation
from mnist_lab.running import checkpoint, teaching, workers
from mnist_lab.running import run as runner
from mnist_lab.running import search as module
from mnist_lab.running.job import Job
from mnist_lab.running.search import Counts, SearchResult, check_space, confirm, paste_lines, search
from mnist_lab.tracking.store import open_store
from mnist_lab.tracking.teacher import Teacher
from mnist_lab.verdicts.statistics import expected_maximum, sd_of_accuracy

PARENT = "mlflow.parentRunId"
SPACE: dict[str, BaseDistribution] = {
    "lr": FloatDistribution(0.001, 1.0, log=True),
    "width": IntDistribution(4, 12),
}
TOO_WIDE = 13  # of which the network says no


class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        if width == TOO_WIDE:
            raise ValueError("this width brings bad luck")
        self.layers = nn.Sequential(
            nn.MaxPool2d(4), nn.Flatten(), nn.Linear(49, width), nn.ReLU(), nn.Linear(width, 10)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class Poison:
    """What fails whenever anything of it is read."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the test images were read: {name}")

    __len__ = __getitem__ = __iter__ = __getattr__


class Listener:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.outcomes: list[tuple[int, str]] = []
        self.counts: list[Counts] = []

    def on_search(self, name: str, wanted: int, done: int, workers: int, device: torch.device) -> None:
        self.done_before = done

    def on_trial(self, number: int, values: Mapping[str, object], outcome: str, counts: Counts) -> None:
        self.outcomes.append((number, outcome))
        self.counts.append(counts)

    def on_time(self) -> None: ...


@pytest.fixture
def here(small_mnist: Mnist, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let trials train in this process, on few images, beside test images that must not be read."""
    poisoned = dataclasses.replace(small_mnist, test_images=Poison(), test_labels=Poison())
    monkeypatch.setattr(runner, "load_mnist", lambda *_: poisoned)
    monkeypatch.setattr(workers, "train_tasks", workers.train_here)


@pytest.fixture
def job(uri: str) -> Job:
    """Return a job whose target leaves no room for a width of 16."""
    experiment = Experiment(
        net=Net,
        epochs=4,
        batch_size=50,
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        targets=Targets(accuracy=50.0, params=900),
    )
    return Job(script=TINY, experiment=experiment, tracking_uri=uri, holdout=200, threads=1)


Search = Callable[..., SearchResult]


def trials_of(job: Job) -> list[optuna.trial.FrozenTrial]:
    storage = f"sqlite:///{Path(job.tracking_uri.removeprefix('sqlite:///')).parent / 'searches.db'}"
    name = max(optuna.get_all_study_names(storage))
    return optuna.load_study(study_name=name, storage=storage).get_trials()


@pytest.mark.usefixtures("here")
def test_trials_are_trained_or_pruned_and_never_see_the_test_images(job: Job, database: Path) -> None:
    listener = Listener()
    result = search(job, SPACE, 8, 1, listener)

    assert result.counts.done == 8 == len(listener.outcomes)
    assert result.counts.finished >= 1
    assert result.counts.pruned >= 1
    assert result.best[0].accuracy == max(trial.accuracy for trial in result.best) > 15
    parent, *children = read_runs(database)
    assert parent.run_id == result.run_id
    assert parent.status == "FINISHED"
    assert parent.metrics["trials"] == [(8, 8.0)]
    figures = {file.stem for file in (parent.artifacts / "figures").iterdir()}
    assert figures == {"history", "importances", "parallel_coordinate"}
    assert {file.name for file in parent.artifacts.iterdir()} == {"figures", "trials.csv", "best.txt"}
    for run in children:
        assert run.tags[PARENT] == parent.run_id
        assert run.tags["search"] == result.name
        assert "step" not in run.tags  # by which tables find runs
        assert not [name for name in run.metrics if "test" in name]
        assert not (run.artifacts / "predictions.npz").exists()
        assert run.status == "FINISHED"
    pruned = [run for run in children if "pruned" in run.tags]
    assert len(pruned) == result.counts.pruned
    for run in pruned:
        assert run.tags["pruned"] == f"after epoch {len(run.metrics['validation_accuracy'])} of 4"
        assert "final_validation_accuracy" not in run.metrics
    assert not list((database.parent / "checkpoints").glob("*.pt"))


@pytest.mark.usefixtures("here")
def test_all_trials_of_a_search_have_one_teacher(job: Job, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = iter(Teacher(f"m-{number}", f"run {number}", "0" * 64) for number in range(9))
    monkeypatch.setattr(teaching, "find_teacher", lambda *_: next(newest))
    monkeypatch.setattr(teaching, "load_teacher", lambda *_: Net(16))
    objective = partial(distillation, teacher="large", temperature=2.0, weight=0.5)
    taught = dataclasses.replace(job, experiment=dataclasses.replace(job.experiment, objective=objective))

    search(taught, {"lr": SPACE["lr"]}, 3, 1, Listener())

    assert {run.tags["teacher_run_id"] for run in read_runs(database)} == {"run 0"}


@pytest.mark.usefixtures("here")
def test_a_network_that_breaks_the_target_is_not_trained(job: Job, database: Path) -> None:
    result = search(job, {"width": CategoricalDistribution([14, 15, 16]), "lr": SPACE["lr"]}, 4, 1, Listener())

    sizes = {width: 49 * width + width + 10 * width + 10 for width in (14, 15, 16)}
    assert sizes[14] < 900 < sizes[15]
    assert result.counts.done == 4
    assert result.counts.too_large > 0
    assert {float(run.metrics["num_params"][0][1]) for run in read_runs(database) if "num_params" in run.metrics} == {
        float(sizes[14])
    }


@pytest.mark.usefixtures("here")
def test_a_space_without_a_small_network_is_refused(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_DRAWS", 5)
    with pytest.raises(LabError, match="of the last 5 draws none has fewer than 900 parameters"):
        search(job, {"width": IntDistribution(15, 16)}, 2, 1, Listener())


@pytest.mark.usefixtures("here")
def test_values_that_are_drawn_again_are_not_trained_to_the_end_again(job: Job, database: Path) -> None:
    result = search(job, {"width": CategoricalDistribution([12, 14])}, 6, 1, Listener())

    finished = [trial for trial in trials_of(job) if trial.state == optuna.trial.TrialState.COMPLETE]
    whole = [run for run in read_runs(database) if "final_validation_accuracy" in run.metrics]
    assert result.counts.done == 6
    assert len(finished) > len({trial.params["width"] for trial in finished}) == len(whole)
    assert {run_id for trial in finished for run_id in trial.user_attrs["runs"]} == {run.run_id for run in whole}
    assert {run.tags[PARENT] for run in whole} == {result.run_id}


@pytest.mark.usefixtures("here")
def test_a_trial_that_fails_counts_and_the_others_go_on(job: Job, database: Path) -> None:
    listener = Listener()
    result = search(job, {"width": CategoricalDistribution([TOO_WIDE, 8])}, 6, 1, listener)

    assert result.counts.failed >= 1
    assert result.counts.finished >= 1
    said = next(outcome for _, outcome in listener.outcomes if "failed" in outcome)
    assert said.startswith("failed: net: this width brings bad luck")
    assert result.best[0].values == {"width": 8}
    assert len(result.best) == 1  # the same values are shown once


@pytest.mark.usefixtures("here")
def test_the_same_command_goes_on(job: Job, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = module._Trials.judge

    def interrupt(self: Any, task: Any, metrics: Any) -> bool:
        if task.trial == 1 and metrics.epoch == 1:
            raise KeyboardInterrupt
        return judge(self, task, metrics)

    monkeypatch.setattr(module._Trials, "judge", interrupt)
    with pytest.raises(KeyboardInterrupt):
        search(job, SPACE, 3, 1, Listener())
    assert sorted(run.status for run in read_runs(database)) == ["FINISHED", "KILLED", "KILLED"]
    monkeypatch.setattr(module._Trials, "judge", judge)
    with pytest.raises(LabError, match="resume: there is no interrupted run of tiny"):  # the search goes on with it
        checkpoint.find(job.tracking_uri, "tiny")

    listener = Listener()
    result = search(job, SPACE, 3, 1, listener)

    assert listener.done_before == 1
    assert result.counts.done == 3
    cut, again = trials_of(job)[1:3]
    assert again.user_attrs["replaces"] == cut.number
    assert again.params == cut.params
    runs = read_runs(database)
    assert len(runs) == 1 + 3  # the search's, and one a trial: the interrupted runs went on
    (parent,) = [run for run in runs if PARENT not in run.tags]
    assert parent.run_id == result.run_id
    assert parent.metrics["trials"] == [(3, 3.0)]
    children = [run for run in runs if PARENT in run.tags]
    assert {run.tags[PARENT] for run in children} == {result.run_id}
    assert {run.status for run in children} == {"FINISHED"}

    open_store(job.tracking_uri).client.delete_run(children[0].run_id)
    more = search(job, SPACE, 4, 1, Listener())
    assert more.name == result.name
    assert more.counts.done == 4
    assert more.run_id == result.run_id
    (parent,) = [run for run in read_runs(database) if run.run_id == more.run_id]
    assert parent.name.startswith("tiny search of 4 trials")
    assert parent.status == "FINISHED"
    assert parent.metrics["trials"] == [(3, 3.0), (4, 4.0)]

    open_store(job.tracking_uri).client.delete_run(more.run_id)
    anew = search(job, SPACE, 4, 1, Listener())
    assert anew.run_id != more.run_id
    there = [run for run in read_runs(database) if PARENT in run.tags and run.run_id != children[0].run_id]
    assert {run.tags[PARENT] for run in there} == {anew.run_id}


@pytest.mark.usefixtures("here")
def test_another_space_or_another_number_of_seeds_is_another_search(job: Job) -> None:
    first = search(job, SPACE, 1, 1, Listener())

    other = {**SPACE, "width": IntDistribution(4, 10)}
    with pytest.raises(LabError, match=f"search: width had another range when {first.name} began; .* --again"):
        search(job, other, 1, 1, Listener())
    with pytest.raises(LabError, match="trains 1 seeds a trial, not 2; .* --again"):
        search(job, SPACE, 1, 2, Listener())
    assert search(job, other, 1, 1, Listener(), again=True).name != first.name


@pytest.mark.usefixtures("here")
def test_several_seeds_are_judged_by_their_mean_and_the_best_trained_again_with_others(
    job: Job, database: Path
) -> None:
    with pytest.raises(LabError, match="confirm: there is no search of tiny with these settings"):
        confirm(job, SPACE, 1, range(2), Listener())
    result = search(job, SPACE, 2, 3, Listener())
    best = result.best[0]
    (trial,) = [trial for trial in trials_of(job) if trial.number == best.number]
    runs = {run.run_id: run for run in read_runs(database)}
    own = [runs[run_id] for run_id in trial.user_attrs["runs"]]
    assert [run.params["seed"] for run in own] == ["0", "1", "2"]
    assert math.isclose(sum(run.metrics["final_validation_accuracy"][0][1] for run in own) / 3, best.accuracy)

    with pytest.raises(LabError, match="seeds: 2 was used in the search; give seeds from 3 on"):
        confirm(job, SPACE, 1, [2, 9], Listener())
    (confirmed,) = confirm(job, SPACE, 1, range(2), Listener())
    again = confirm(job, SPACE, 1, range(2), Listener())

    assert confirmed.trial == best
    assert again == [confirmed]
    new = [run for run in read_runs(database) if run.run_id not in runs and PARENT in run.tags]
    assert sorted(run.params["seed"] for run in new) == ["3", "4"]
    assert confirmed.accuracies is not None
    assert confirmed.accuracies.mean == sum(run.metrics["final_validation_accuracy"][0][1] for run in new) / 2


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({}, "search: {} is no space; give a dict of Optuna's distributions by name"),
        ({"lr": (0.1, 0.5)}, "search: lr is (0.1, 0.5), not one of Optuna's distributions"),
        ({"wdth": IntDistribution(4, 8)}, "wdth: not a hyperparameter of this experiment (did you mean 'width'?)"),
        ({"width": FloatDistribution(4.5, 8)}, "width: 4.5 is not a whole number"),
        ({"width": IntDistribution(8, 8)}, "search: width is IntDistribution(high=8, log=False, low=8, step=1), which"),
        ({"epochs": IntDistribution(0, 3)}, "epochs: 0 is not a whole number of at least 1"),
        ({"momentum": FloatDistribution(0.5, 0.9)}, "search: momentum is searched, so it can't be set to 0.8 too"),
    ],
)
def test_a_space_that_can_not_be_drawn_from(job: Job, space: dict[str, Any], said: str) -> None:
    job = dataclasses.replace(job, overrides={"momentum": 0.8})
    with pytest.raises(LabError) as refusal:
        check_space(job, space)
    assert str(refusal.value).startswith(said)


def test_one_search_at_a_time_and_a_damaged_database(job: Job, database: Path) -> None:
    with (
        module._alone(job, module._open_store(job)),
        pytest.raises(LabError, match="another process is searching tiny with these settings"),
    ):
        search(job, SPACE, 1, 1, Listener())
    (database.parent / "searches.db").write_bytes(b"no database" * 100)
    with pytest.raises(LabError, match=r"search: Optuna's database .*searches.db can't be used: "):
        search(job, SPACE, 1, 1, Listener())


def test_processes_are_for_a_cpu(job: Job) -> None:
    with pytest.raises(LabError, match="workers: 2 is for a CPU; on cuda the seeds train in one process"):
        search(dataclasses.replace(job, device=torch.device("cuda")), SPACE, 1, 1, Listener(), workers=2)


def test_lines_to_paste_name_the_part(job: Job) -> None:
    values = {"lr": 0.25, "width": 12, "epochs": 3}
    assert paste_lines(job, values) == ["lr=0.25,  # optimizer", "width=12,  # net", "epochs=3,  # EXPERIMENT"]


def test_the_best_of_n_is_too_good() -> None:
    assert math.isclose(expected_maximum(1), 0.0, abs_tol=1e-9)
    assert math.isclose(expected_maximum(2), 1 / math.sqrt(math.pi), rel_tol=1e-6)
    draws = torch.randn(20_000, 50, generator=torch.Generator().manual_seed(0)).max(dim=1).values
    assert math.isclose(expected_maximum(50), draws.mean().item(), rel_tol=0.01)
    assert math.isclose(sd_of_accuracy(99.0, 10_000), 0.0995, rel_tol=1e-3)


# ---- as users start it


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--search", "0"], "argument --search: '0' is not a whole number of at least 1"),
        (["--search", "2", "--seeds", "2"], "not allowed with argument"),
        (["--search-seeds", "2"], "argument --search-seeds: only allowed with --search"),
        (["--confirm", "2"], "argument --confirm: give --seeds N with it"),
        (
            ["--search", "2"],
            "error: search: tiny.py declares no space; hand one over by main(EXPERIMENT, search=SEARCH)",
        ),
    ],
)
def test_flags_that_do_not_go_together(flags: list[str], said: str, uri: str, tmp_path: Path) -> None:
    process = run_program(TINY, *flags, "--tracking-uri", uri, cwd=tmp_path)
    assert process.returncode in (1, 2)
    assert said in process.stderr
    assert "Traceback" not in process.stderr


def test_a_search_in_processes_that_is_killed_goes_on(database: Path, tmp_path: Path) -> None:
    text = TINY.read_text().replace("main(EXPERIMENT)", "main(EXPERIMENT, search=SEARCH)")
    imported = "from optuna.distributions import FloatDistribution\n"
    space = 'SEARCH = {"lr": FloatDistribution(0.01, 1.0, log=True)}\n\n\n'
    text = text.replace("import torch\n", f"import torch\n{imported}", 1).replace("if __name__", f"{space}if __name__")
    (tmp_path / "idea.py").write_text(text)
    flags = ("--search", "3", "--limit", "300", "--workers", "1", "--tracking-uri", f"sqlite:///{database}")
    program = Program("idea.py", *flags, cwd=tmp_path)
    wait_until(lambda: [run for run in read_runs(database) if "final_validation_accuracy" in run.metrics], program)
    program.send_signal(signal.SIGKILL)
    program.wait()

    process = run_program("idea.py", *flags, cwd=tmp_path)

    assert process.returncode == 0, process.stderr
    assert "3 trials: " in process.stdout
    assert "The test images were not read." in process.stdout
    assert "chance alone lift it on 10,000 images" in process.stdout
    assert "(3/3, " in process.stdout
    runs = read_runs(database)
    assert not [run for run in runs if run.status == "RUNNING"]
    newest = [run for run in runs if PARENT not in run.tags][-1]
    assert len([run for run in runs if run.tags.get(PARENT) == newest.run_id and run.status == "FINISHED"]) >= 3
