"""Searches: what is drawn, trained, pruned and taken up again, and that no trial is given the test images."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from filelock import FileLock
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from torch import nn

from forkserver import Program, run_program
from helpers import TINY, read_runs, read_value, wait_until, write_search
from mnist_lab import Experiment, Targets
from mnist_lab.data import Mnist
from mnist_lab.errors import LabError
from mnist_lab.objectives import distillation
from mnist_lab.running import checkpoint
from mnist_lab.running import run as runner
from mnist_lab.running import search as module
from mnist_lab.running.job import Job
from mnist_lab.running.progress import Progress, SearchResult
from mnist_lab.running.search import check_space, paste_lines, search
from mnist_lab.running.workers import Failed, SeedTask, Trainers
from mnist_lab.tracking.models import Teacher
from mnist_lab.tracking.store import Store, open_store
from mnist_lab.verdicts.statistics import chance_of_best

PARENT = "mlflow.parentRunId"
FIGURE = "final_validation_accuracy"
SPACE: dict[str, BaseDistribution] = {"lr": FloatDistribution(0.001, 1.0, log=True), "width": IntDistribution(4, 12)}
TOO_WIDE = 13  # of which the network says no


def net_of(width: int = 8) -> nn.Module:
    if width == TOO_WIDE:
        raise ValueError("this width brings bad luck")
    return nn.Sequential(nn.MaxPool2d(4), nn.Flatten(), nn.Linear(49, width), nn.ReLU(), nn.Linear(width, 10))


class Poison:
    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the test images were read: {name}")

    __len__ = __getitem__ = __iter__ = __getattr__


class Listener(Progress):
    def __init__(self) -> None:
        self.outcomes: list[str] = []

    def on_search(self, name: str, wanted: int, done: int, workers: int, device: torch.device) -> None:
        self.done_before = done

    def on_trial(self, number: int, values: Mapping[str, object], outcome: str, stand: SearchResult) -> None:
        self.outcomes.append(outcome)


@pytest.fixture
def few(small_mnist: Mnist, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned = dataclasses.replace(small_mnist, test_images=Poison(), test_labels=Poison())
    monkeypatch.setattr(runner, "load_mnist", lambda *_: poisoned)


@pytest.fixture
def job(uri: str) -> Job:
    """Return a job whose target leaves no room for a width of 15."""
    optimizer, targets = partial(torch.optim.SGD, lr=0.1, momentum=0.9), Targets(accuracy=50.0, params=900)
    experiment = Experiment(net=net_of, epochs=4, batch_size=50, optimizer=optimizer, targets=targets)
    return Job(script=TINY, experiment=experiment, tracking_uri=uri, holdout=200, threads=1)


def search_for(job: Job, count: int, space: Mapping[str, BaseDistribution] = SPACE, **settings: Any) -> SearchResult:
    listener = settings.pop("listener", Listener())
    return search(job, space, count, listener, Trainers(), **settings)


def trials_of(job: Job) -> list[optuna.trial.FrozenTrial]:
    storage = f"sqlite:///{Path(job.tracking_uri.removeprefix('sqlite:///')).parent / 'searches.db'}"
    name = max(optuna.get_all_study_names(storage))
    return optuna.load_study(study_name=name, storage=storage).get_trials()


@pytest.mark.usefixtures("few")
def test_trials_are_trained_or_pruned_and_never_see_the_test_images(job: Job, database: Path) -> None:
    job = dataclasses.replace(job, experiment=dataclasses.replace(job.experiment, epochs=8))
    listener = Listener()
    result = search_for(job, 10, listener=listener)

    assert result.done == 10 == len(listener.outcomes)
    assert result.pruned == listener.outcomes.count("pruned") >= 1
    assert result.best[0].accuracy == max(trial.accuracy for trial in result.best) > 15
    parent, *children = read_runs(database)
    assert (parent.run_id, parent.status) == (result.run_id, "FINISHED")
    assert parent.metrics["trials"] == [(10, 10.0)]
    assert {file.name for file in parent.artifacts.iterdir()} == {"trials.csv", "best.txt"}
    for run in children:
        assert (run.tags[PARENT], run.tags["search"], run.status) == (parent.run_id, result.name, "FINISHED")
        assert "step" not in run.tags  # by which tables find runs
        assert not [name for name in run.metrics if "test" in name]
        assert not (run.artifacts / "predictions.npz").exists()
        epochs = len(run.metrics["validation_accuracy"])
        assert run.tags.get("pruned") == (None if FIGURE in run.metrics else f"after epoch {epochs} of 8")
        assert epochs in (2, 4, 8)  # a quarter, a half, all
    assert len([run for run in children if "pruned" in run.tags]) == result.pruned
    assert not list((database.parent / "checkpoints").glob("*.pt"))

    # What is to be pasted is short, and was trained.
    (pasted, *_) = (parent.artifacts / "best.txt").read_text().splitlines()
    rate = pasted.removeprefix("lr=").removesuffix(",  # optimizer")
    assert len(rate.removeprefix("0.").lstrip("0")) <= 4
    assert float(rate) == result.best[0].values["lr"]
    assert rate in {run.params["lr"] for run in children}
    assert paste_lines(job, {"lr": 0.25, "epochs": 3}) == ["lr=0.25,  # optimizer", "epochs=3,  # EXPERIMENT"]


@pytest.mark.usefixtures("few")
def test_all_trials_of_a_search_have_one_teacher(job: Job, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = iter(Teacher(f"m-{number}", f"run {number}", "0" * 64) for number in range(9))
    monkeypatch.setattr(runner, "find_teacher", lambda *_: next(newest))
    monkeypatch.setattr(runner, "load_teacher", lambda *_: net_of(16))
    objective = partial(distillation, teacher="large", temperature=2.0, weight=0.5)
    taught = dataclasses.replace(job, experiment=dataclasses.replace(job.experiment, objective=objective))

    search_for(taught, 3, {"lr": SPACE["lr"]})

    assert {run.tags["teacher_run_id"] for run in read_runs(database)} == {"run 0"}


@pytest.mark.usefixtures("few")
def test_trials_that_fail_are_too_large_or_repeat_another_count(job: Job, database: Path) -> None:
    listener = Listener()
    result = search_for(job, 10, {"width": CategoricalDistribution([TOO_WIDE, 14, 16])}, listener=listener)

    assert result.done == 10
    assert result.failed == sum("this width brings bad luck" in outcome for outcome in listener.outcomes) >= 1
    assert result.too_large > 0  # and not trained
    sizes = {run.metrics["num_params"][0][1] for run in read_runs(database) if "num_params" in run.metrics}
    assert sizes == {49 * 14 + 14 + 10 * 14 + 10}
    assert [trial.values for trial in result.best] == [{"width": 14}]  # the same values are shown once
    finished = [trial for trial in trials_of(job) if trial.state == optuna.trial.TrialState.COMPLETE]
    (whole,) = [run for run in read_runs(database) if FIGURE in run.metrics]  # and trained once
    assert len(finished) > 1
    assert listener.outcomes.count(f"{finished[0].value:.2f} %") == len(finished)
    assert {trial.user_attrs["run"] for trial in finished} == {whole.run_id}
    assert whole.tags[PARENT] == result.run_id


class Lost(Trainers):
    """Trainers whose processes are gone before they have said anything."""

    def train(self, store: Store, parent_run_id: str, tasks: Iterator[SeedTask], progress: Progress) -> Any:
        yield from ((task, Failed("its process ended early", lost=True)) for task in tasks)


@pytest.mark.usefixtures("few")
def test_a_trial_whose_process_is_lost_has_failed(job: Job) -> None:
    listener = Listener()
    result = search(job, SPACE, 3, listener, Lost())

    assert (result.failed, result.done) == (3, 3)
    assert listener.outcomes == ["failed: its process ended early"] * 3


@pytest.mark.usefixtures("few")
def test_the_same_command_goes_on(job: Job, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = optuna.Trial.report

    def interrupt(self: optuna.Trial, value: float, step: int) -> None:
        report(self, value, step)
        if (self.number, step) == (1, 1):
            raise KeyboardInterrupt

    monkeypatch.setattr(optuna.Trial, "report", interrupt)
    with pytest.raises(KeyboardInterrupt):
        search_for(job, 3)
    assert sorted(run.status for run in read_runs(database)) == ["FINISHED", "KILLED", "KILLED"]
    monkeypatch.setattr(optuna.Trial, "report", report)
    with pytest.raises(LabError, match="there is no interrupted run"):  # the search goes on with it
        checkpoint.find(job.tracking_uri, step="tiny")

    listener = Listener()
    result = search_for(job, 3, listener=listener)

    assert listener.done_before == 1
    assert result.done == len(trials_of(job)) == 3
    parent, *children = read_runs(database)
    assert len(children) == 3  # one a trial: the interrupted run went on, each epoch once
    assert parent.run_id == result.run_id
    for run in children:
        assert (run.tags[PARENT], run.status) == (result.run_id, "FINISHED")
        epochs = [epoch for epoch, _ in run.metrics["validation_accuracy"]]
        assert epochs == [*range(1, len(epochs) + 1)]

    more = search_for(job, 4)
    assert (more.name, more.run_id, more.done) == (result.name, result.run_id, 4)
    parent, *_ = read_runs(database)
    assert (parent.name, parent.status) == ("tiny search of 4 trials", "FINISHED")
    assert parent.metrics["trials"] == [(3, 3.0), (4, 4.0)]
    other = {**SPACE, "width": IntDistribution(4, 10)}
    with pytest.raises(LabError, match="width .* --again"):
        search_for(job, 5, other)
    open_store(job.tracking_uri).client.delete_run(result.run_id)
    with pytest.raises(LabError, match="deleted in MLflow"):
        search_for(job, 5)
    assert search_for(job, 1, other, again=True).name != result.name


def test_a_search_whose_run_is_gone_goes_on_with_a_new_one(job: Job, database: Path) -> None:
    first = search_for(job, 1)
    study = optuna.load_study(study_name=first.name, storage=f"sqlite:///{database.parent / 'searches.db'}")
    study.set_user_attr("run_id", "0" * 32)
    study.ask({"lr": SPACE["lr"]})  # and the process was killed before it drew the width
    more = search_for(job, 3)
    assert (more.name, more.done, more.failed) == (first.name, 3, 1)
    assert more.run_id not in (first.run_id, "0" * 32)


def test_a_space_that_can_not_be_drawn_from(job: Job) -> None:
    job = dataclasses.replace(job, overrides={"momentum": 0.8})
    spaces: list[tuple[dict[str, Any], str]] = [
        ({}, "search: {} "),
        ({**SPACE, "lr": (0.1, 0.5)}, "search: {'lr': (0.1, 0.5)} is no space"),
        ({"wdth": IntDistribution(4, 8)}, "search: wdth: "),
        ({"width": FloatDistribution(4.5, 8)}, "search: width: 4.5 is not a whole number"),
        ({"epochs": IntDistribution(0, 3)}, "search: epochs: 0 "),
        ({"momentum": FloatDistribution(0.5, 0.9)}, "search: momentum is searched, so"),
    ]
    for space, said in spaces:
        with pytest.raises(LabError, match=f"^{re.escape(said)}"):
            check_space(job, space)


@pytest.mark.usefixtures("few")
def test_what_has_no_effect_is_not_searched_and_what_to_do_is_said(job: Job) -> None:
    scheduler = partial(torch.optim.lr_scheduler.StepLR, step_size=6, gamma=0.5)
    job = dataclasses.replace(job, experiment=dataclasses.replace(job.experiment, scheduler=scheduler))
    with pytest.raises(LabError, match=r"^search: gamma: .*more --epochs, or leave gamma out"):
        search_for(job, 1, {"gamma": FloatDistribution(0.1, 0.9)})


def test_one_search_at_a_time_and_a_damaged_database(job: Job, database: Path) -> None:
    lock = database.parent / "locks" / f"search-{module._digest(job)}.lock"
    lock.parent.mkdir()
    with FileLock(lock), pytest.raises(LabError, match="search: another process"):
        search_for(job, 1)
    (database.parent / "searches.db").write_bytes(b"no database" * 100)
    with pytest.raises(LabError, match=r"search: .*searches.db"):
        search_for(job, 1)


def test_the_best_of_n_is_too_good() -> None:
    lifted = [chance_of_best(99.0, 10_000, n) for n in (1, 2)]
    assert lifted == [pytest.approx(0), pytest.approx(0.0995 * math.pi**-0.5, rel=1e-3)]


def test_a_search_in_a_process_that_is_killed_goes_on(database: Path, tmp_path: Path) -> None:
    script = write_search(tmp_path, "LOW = 0.01")
    flags = ("--search", "3", "--limit", "300", "--workers", "1", "--tracking-uri", f"sqlite:///{database}")
    program = Program(script, *flags, cwd=tmp_path)
    wait_until(lambda: any("validation_accuracy" in run.metrics for run in read_runs(database)), program)
    program.kill()
    program.wait()

    process = run_program(script, *flags, cwd=tmp_path)

    assert process.returncode == 0, process.stderr
    assert "3 trials: " in process.stdout
    assert "on 10,000 images" in process.stdout
    runs = read_runs(database)
    assert not [run for run in runs if run.status == "RUNNING"]
    (parent,) = [run for run in runs if PARENT not in run.tags]
    ended = [run for run in runs if run.tags.get(PARENT) == parent.run_id and run.status == "FINISHED"]
    assert len(ended) == len({run.params["lr"] for run in ended}) == 3

    unfinished = "SELECT COUNT(*) FROM trials WHERE state IN ('RUNNING', 'WAITING')"
    assert not read_value(database.parent / "searches.db", unfinished)
