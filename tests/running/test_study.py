"""Several seeds of one experiment, and folds: real studies in processes of their own, killed and taken up again."""

import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import mlflow
import numpy as np
import pandas as pd
import psutil
import pytest
import torch

from forkserver import Program
from helpers import ROOT, TINY, TrackedRun, copy_store, first, read_runs, wait_until
from mnist_lab import results
from mnist_lab.data import Mnist, hold_out_fold, images_of_fold
from mnist_lab.errors import LabError
from mnist_lab.experiment import Targets
from mnist_lab.measures import TESTED
from mnist_lab.results import publish as files
from mnist_lab.results.records import read_records
from mnist_lab.running import run as runner
from mnist_lab.running import workers
from mnist_lab.running.job import Job, read_declaration
from mnist_lab.running.machine import available_cores
from mnist_lab.running.progress import Progress, StudyResult
from mnist_lab.running.study import judge_runs
from mnist_lab.running.study import study as run_study
from mnist_lab.running.workers import Failed, SeedTask, Trainers, local
from mnist_lab.tracking.store import FinishedRun, open_store
from mnist_lab.verdicts.statistics import aggregate, judge_mean

NO_CHANGES: dict[str, object] = {}
# As users write them too: nothing guards the call of main, and a lambda can't be sent to another process.
SCRIPT = """
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn

from mnist_lab import Experiment, Targets, main


class Net(nn.Sequential):
    def __init__(self, dropout=0.1):
        super().__init__(nn.Flatten(), nn.Dropout(dropout), nn.Linear(784, 10))


def wait_or_fail(images):
    while torch.initial_seed() in (1, 2) and not Path("go").exists():
        time.sleep(0.05)
    if torch.initial_seed() == 3 and not Path("mended").exists():
        raise ArithmeticError("seed 3 is not lucky")
    return images


declared = Experiment(
    net=lambda dropout=0.1: Net(dropout),
    epochs=1,
    batch_size=64,
    optimizer=partial(torch.optim.SGD, lr=0.1),
    augmentation=wait_or_fail,
    targets=Targets(accuracy=50.0, params=10_000),
)
main(declared)
"""
PARENT = "mlflow.parentRunId"


class Study:
    """A study that was started from a shell, in a process group of its own; what earlier ones left is not its own."""

    def __init__(self, folder: Path, workers: int) -> None:
        self.database = folder / "runs.db"
        self.before = len(read_runs(self.database)) if self.database.exists() else 0
        flags = ("--seeds", "0,1,2,3", "--workers", str(workers), "--limit", "256")
        self.process = Program("my_idea.py", *flags, "--tracking-uri", "sqlite:///runs.db", cwd=folder)

    def states(self) -> set[str]:
        return {f"{run.params.get('seed', 'study')} {run.status}" for run in read_runs(self.database)[self.before :]}

    def processes(self) -> list[psutil.Process]:
        alive = []
        for process in psutil.process_iter(["status"]):
            with suppress(ProcessLookupError):
                if os.getpgid(process.pid) == self.process.pid and process.info["status"] != psutil.STATUS_ZOMBIE:
                    alive.append(process)
        return alive


@contextmanager
def started(folder: Path, workers: int, *states: str) -> Iterator[Study]:
    study = Study(folder, workers)
    try:
        wait_until(lambda: study.states() >= {*states}, study.process)
        yield study
        wait_until(lambda: not study.processes())
        study.process.wait()
    finally:
        for process in study.processes():
            process.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where a study was killed with all its processes; seeds 1 and 2 wait for the file `go`, seed 3 fails."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "my_idea.py").write_text(SCRIPT)
    with started(folder, 1, "0 FINISHED", "1 RUNNING") as study:
        os.killpg(study.process.pid, signal.SIGKILL)
    assert study.states() == {"0 FINISHED", "1 RUNNING", "study RUNNING"}
    return folder


@pytest.fixture(scope="module")
def story(folder: Path) -> SimpleNamespace:
    """Let the study through at last."""
    (folder / "go").touch()
    with started(folder, 2) as study:
        code = study.process.wait()
    stdout, stderr, runs = study.process.stdout, study.process.stderr, read_runs(study.database)
    newest = [run for run in runs if "study" in run.tags][-1]
    finished = [run for run in runs if run.status == "FINISHED"]
    return SimpleNamespace(**locals())


def test_a_seed_finds_modules_as_they_are_read_and_a_run_of_another_network_is_not_its(
    uri: str, tmp_path: Path, mnist: Mnist, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(runner, "load_mnist", lambda *_: first(mnist, 1000, 10_000))
    (tmp_path / "layers.py").write_text("from pathlib import Path\nn = int(Path('n').read_text())\n")
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "layered.py"
    net = "nn.Linear(8, 10), *(nn.Linear(10, 10) for _ in range(layers.n))"
    layered = TINY.read_text().replace("nn.Linear(8, 10)", net)
    script.write_text(layered.replace("import torch\n", "import layers\nimport torch\n\nlayers.n += 1\n", 1))
    for before, layers in ((0, 1), (1, 2), (1, 2)):
        (tmp_path / "n").write_text(f"{before}")
        sys.modules.pop("layers", None)  # as in a process of its own
        job = Job(script=script, experiment=read_declaration(script), tracking_uri=uri, threads=1)
        (tmp_path / "n").write_text("none, so it can't be read again" if before else "0")
        runs = run_study(job, [0, 1], Progress(), Trainers()).runs
        assert [run.metrics["num_params"] for run in runs] == [434 + 110 * layers] * 2
    assert len(read_runs(Path(uri.removeprefix("sqlite:///")))) == 2 + 2 + 3


def test_a_study_that_is_interrupted_closes_its_runs_and_those_of_one_that_was_killed(folder: Path) -> None:
    with started(folder, 2, "1 RUNNING", "2 RUNNING") as study:
        os.killpg(study.process.pid, signal.SIGINT)
        assert study.process.wait() == 130
        assert not study.processes()
    assert [run.status for run in read_runs(study.database)[:3]] == ["KILLED", "FINISHED", "KILLED"]
    assert study.states() == {"1 KILLED", "2 KILLED", "study KILLED"}
    assert study.process.stderr.startswith("\nInterrupted. ")


def test_no_worker_outlives_the_process_of_its_study(folder: Path) -> None:
    with started(folder, 1, "1 RUNNING") as study:
        study.process.kill()  # it alone, as when memory runs out
    assert study.states() == {"1 KILLED", "study RUNNING"}


def test_the_same_command_trains_only_what_is_missing(story: SimpleNamespace) -> None:
    assert sorted(run.params["seed"] for run in story.finished) == ["0", "1", "2"]
    assert story.finished[0].run_id == story.runs[1].run_id
    for line in (
        r"my_idea .*: finished already, and not trained again: seed 0",
        r"my_idea .*: training seeds 1, 2, 3 \(2 at a time, on cpu\)",
        r"seed 1  epoch 1/1  train loss .*  test loss .*, accuracy [\d.]+ %  lr .*",
        r"seed 2  done: test accuracy \d\d\.\d\d % in the last epoch; .*seeds\)",
        r"seed 3  failed: training: seed 3 is not lucky \(my_idea\.py, line \d+\) .*",
    ):
        assert re.search(f"^{line}$", story.stdout, re.MULTILINE), line
    assert "\r" not in story.stdout
    assert (story.code, story.stderr) == (1, "error: seeds: 3 failed; the same command tries again\n")


def test_all_seeds_are_children_of_the_newest_study_and_one_that_fails_is_reported(story: SimpleNamespace) -> None:
    study = story.newest
    children = [run for run in story.runs if run.tags.get(PARENT) == study.run_id]
    assert study.name == "my_idea 4 seeds [limit=256]"
    assert "seed" not in study.params
    assert (study.params["epochs"], study.tags["study"], study.tags["seeds"]) == ("1", "my_idea", "0 1 2 3")
    states = {run.params["seed"]: run.status for run in children}
    assert states == {"0": "FINISHED", "1": "FINISHED", "2": "FINISHED", "3": "FAILED"}
    assert (study.status, study.tags["seeds_failed"]) == ("FAILED", "3")


def test_a_study_keeps_its_figures_its_verdict_and_the_mean_curves(story: SimpleNamespace) -> None:
    study = story.newest
    last = [run.metrics["final_test_accuracy"][0][1] for run in story.finished]
    wanted = {f"final_test_accuracy_{name}": value for name, value in vars(aggregate(last, 50.0)).items()}
    del wanted["final_test_accuracy_n"]
    mean, sd = np.mean(last), np.std(last, ddof=1)
    wanted |= {"p": judge_mean(last, 50.0)[1], "last": round(mean, 2), "sd": round(sd, 3), "seeds": 3}
    once = {name: [(0, pytest.approx(value))] for name, value in wanted.items()}
    assert {name: study.metrics[name] for name in wanted} == once
    for name in ("test_accuracy", "test_loss", "train_accuracy", "train_loss"):
        of_seeds = [run.metrics[name][0][1] for run in story.finished]
        assert study.metrics[name] == [(1, pytest.approx(np.mean(of_seeds)))]
    verdicts = {"accuracy": judge_mean(last, 50.0)[0], "params": "met"}
    assert {name: study.tags[f"verdict_{name}"] for name in verdicts} == verdicts
    text = study.tags["mlflow.note.content"]
    assert (study.artifacts / "verdict.md").read_text() == text + "\n"
    assert f"mean at least 50 % | {mean:.2f} %" in " ".join(text.split())
    assert "too few runs" in text
    assert all(run.run_id in text for run in story.finished)
    assert f"last epoch, test       {mean:.2f}" in story.stdout
    assert {file.name for file in (study.artifacts / "figures").iterdir()} == {"training.png"}


def test_a_seed_of_a_study_is_the_run_of_that_seed(
    story: SimpleNamespace, folder: Path, monkeypatch: pytest.MonkeyPatch, uri: str, database: Path
) -> None:
    monkeypatch.chdir(folder)
    in_study = next(run for run in story.finished if run.params["seed"] == "2")

    runner.run(job_of(folder / "my_idea.py", uri), 2, Progress())

    (alone,) = read_runs(database)
    kept = [np.load(run.artifacts / "predictions.npz")["logits"] for run in (in_study, alone)]
    np.testing.assert_array_equal(*kept)
    assert alone.params == in_study.params
    assert {name for name in in_study.tags if name not in alone.tags} == {PARENT}


def job_of(script: Path, uri: str, changes: Mapping[str, object] = NO_CHANGES, limit: int = 256) -> Job:
    experiment, overrides = read_declaration(script).override(changes)
    return Job(script=script, experiment=experiment, overrides=overrides, tracking_uri=uri, limit=limit)


class Heard(Progress):
    def on_study(self, name: str, seeds: object, missing: Sequence[int], *_: object) -> None:
        assert not missing, f"{missing} are to be trained"


def test_finished_seeds_are_taken_over(story: SimpleNamespace, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    script, uri = folder / "my_idea.py", f"sqlite:///{folder}/runs.db"

    def study_of(job: Job, *seeds: int) -> StudyResult:
        return run_study(job, seeds, Heard(), local(job))

    result = study_of(job_of(script, uri), 2, 0)

    assert [run.seed for run in result.runs] == [2, 0]
    assert result.aggregates["final_test_accuracy"].n == 2
    study = next(run for run in read_runs(folder / "runs.db") if run.run_id == result.run_id)
    named = ("my_idea 2 seeds [limit=256]", "FINISHED", "2 0")
    assert (study.name, study.status, study.tags["seeds_reused"]) == named
    for changes, limit in [({"epochs": 2}, 256), ({"lr": 0.2}, 256), ({"dropout": 0.2}, 256), ({}, 255)]:
        with pytest.raises(AssertionError, match=re.escape("[0, 1] are to be trained")):
            study_of(job_of(script, uri, changes, limit), 0, 1)
    assert mlflow.active_run() is None


# ---- without training


def test_on_a_gpu_the_seeds_train_here_one_after_another(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def train(job: Job, seed: int, listener: object, **_: object) -> FinishedRun:
        trained.append(seed)
        if seed == 4:
            raise LabError("lr: too high")
        return FinishedRun(f"run {seed}", seed, {})

    monkeypatch.setattr(workers, "run", train)
    job = replace(job_of(ROOT / "experiments" / "step2_dropout.py", uri), device=torch.device("meta"))
    tasks = iter([SeedTask(job, seed, "parent", again=True) for seed in (3, 4, 5)])

    with pytest.raises(LabError, match="^workers: 2 .* meta"):
        local(job, 2)
    ended = [outcome for _, outcome in local(job).train(open_store(uri), "parent", tasks, Progress())]

    assert trained == [3, 4, 5]
    assert ended == [FinishedRun("run 3", 3, {}), Failed("lr: too high"), FinishedRun("run 5", 5, {})]


def test_a_study_has_a_worker_for_each_core_that_it_may_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.Process.cpu_affinity", lambda _: [3], raising=False)
    assert available_cores() == 1


def test_a_study_without_a_finished_run_has_no_verdict_and_the_largest_network_counts() -> None:
    assert judge_runs(Targets(accuracy=99.4), 14, "abc", []).verdicts == []
    runs = [FinishedRun("", n, dict.fromkeys(TESTED.over_seeds, 99.0) | {"num_params": n}) for n in (8, 9, 7)]
    assert [verdict.word for verdict in judge_runs(Targets(params=9), 14, "abc", runs).verdicts] == ["missed"]


def test_a_script_that_never_calls_main_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(LabError, match=r"^script: .*empty\.py came to its end without calling main\(EXPERIMENT\)$"):
        read_declaration(tmp_path / "empty.py")


# ---- folds


@pytest.mark.parametrize("folds", [2, 6, 7])
def test_folds_share_the_training_images_out_by_digit(folds: int, mnist: Mnist) -> None:
    parts = [images_of_fold(mnist.train_labels, fold, folds) for fold in range(folds)]

    assert torch.equal(torch.cat(parts).sort().values, torch.arange(60_000))
    counts = torch.stack([mnist.train_labels[part].bincount(minlength=10) for part in parts])
    for of_parts in (counts, counts.sum(dim=1, keepdim=True)):
        assert (of_parts.max(dim=0).values - of_parts.min(dim=0).values).max() <= 1


def test_a_fold_is_not_trained_on_and_nothing_is_tested(mnist: Mnist) -> None:
    images = images_of_fold(mnist.train_labels, 1, 6)
    others = torch.ones(60_000, dtype=torch.bool)
    others[images] = False

    data = hold_out_fold(mnist, 1, 6)

    for part, chosen in (("validation", images), ("train", others)):
        assert torch.equal(getattr(data, f"{part}_images"), mnist.train_images[chosen])
        assert torch.equal(getattr(data, f"{part}_labels"), mnist.train_labels[chosen])
    assert len(data.test_images) == len(data.test_labels) == 0


@pytest.fixture(scope="module")
def few(mnist: Mnist) -> Mnist:
    return first(mnist, 1200, 300)


class Folds:
    def __init__(self, folder: Path, empty_store: Path) -> None:
        self.database = copy_store(empty_store, folder / "runs.db")
        self.uri = f"sqlite:///{self.database}"
        self.studies = {step: self.study(Path(shutil.copy(TINY, folder / f"{step}.py"))) for step in ("one", "other")}

    def job(self, script: Path) -> Job:
        experiment = replace(read_declaration(script), epochs=2 if script.stem == "other" else 1)
        return Job(script=script, experiment=experiment, tracking_uri=self.uri, threads=1, folds=3)

    def study(self, script: Path) -> StudyResult:
        return run_study(self.job(script), range(3), Progress(), Trainers())

    def runs(self) -> list[TrackedRun]:
        return read_runs(self.database)


@pytest.fixture(scope="module")
def folds(tmp_path_factory: pytest.TempPathFactory, empty_store: Path, few: Mnist) -> Iterator[Folds]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "load_mnist", lambda *_: few)
        yield Folds(tmp_path_factory.mktemp("folds"), empty_store)


def right(folds: Folds, step: str) -> "pd.Series[bool]":
    """Return whether each of the 1,200 images was read rightly by the network that had not seen it."""
    tables = [results.predictions(run.run_id, tracking_uri=folds.uri) for run in folds.studies[step].runs]
    table = pd.concat(tables).sort_index()
    assert table.index.tolist() == list(range(1200))
    return table["truth"] == table["prediction"]


def test_each_training_image_is_judged_once_by_a_network_that_has_not_seen_it(folds: Folds, few: Mnist) -> None:
    table = results.run_table("one", columns="all", folds=3, tracking_uri=folds.uri)

    told = [results.predictions(run, tracking_uri=folds.uri) for run in table["run_id"]]
    assert table["seed"].tolist() == [0, 1, 2]
    for fold, (accuracy, of_fold) in enumerate(zip(table["final_validation_accuracy"], told, strict=True)):
        images = images_of_fold(few.train_labels, fold, 3)
        assert of_fold.index.tolist() == images.tolist()
        assert of_fold["truth"].tolist() == few.train_labels[images].tolist()
        assert accuracy == pytest.approx(100 * (of_fold["truth"] == of_fold["prediction"]).mean())
    mean = results.compare_table("one", folds=3, tracking_uri=folds.uri)["last"].item()
    assert mean == pytest.approx(100 * right(folds, "one").mean())


def test_a_fold_has_no_figures_of_the_test_images_and_is_in_no_other_table(folds: Folds) -> None:
    assert all("test" not in metric for run in folds.runs() for metric in run.metrics)
    assert not [tag for run in folds.runs() for tag in run.tags if tag.startswith(("target_", "verdict_"))]
    with pytest.raises(LabError, match="folds 3"):
        results.run_table(tracking_uri=folds.uri)
    with pytest.raises(LabError, match="folds 2"):
        results.run_table(folds=2, tracking_uri=folds.uri)


def test_experiments_are_compared_image_by_image_with_the_folds_as_clusters(folds: Folds) -> None:
    """By Obuchowski (1998), with the t-distribution, as there are few clusters."""
    better = right(folds, "other").astype(int) - right(folds, "one").astype(int)
    parts = [results.predictions(run.run_id, tracking_uri=folds.uri) for run in folds.studies["one"].runs]
    sums = np.array([better[part.index].sum() for part in parts])
    effect = sums.sum() / 1200
    deviation = np.sqrt(3 / 2 * ((sums - 400 * effect) ** 2).sum()) / 1200

    found = results.compare("one", "other", folds=3, tracking_uri=folds.uri)

    assert (found.effect, found.seeds_needed) == (pytest.approx(100 * effect), None)
    assert (found.high - found.effect) / 4.302653 == pytest.approx(100 * deviation, rel=1e-6)  # t of 2 degrees, 97.5 %


def test_whole_cross_validations_are_published_and_read_back(folds: Folds, tmp_path: Path) -> None:
    readme, said = tmp_path / "page.md", list[str]()
    for page in (readme, tmp_path / "README.md"):
        page.write_text("<!-- folds -->\n<!-- /folds -->\n")

    for _ in range(2):
        files.publish(tmp_path, readme, tracking_uri=folds.uri, progress=said.append)

    assert len(said) == 6 + 1
    assert said[-1] == "The published rows are those of the store already."
    table = results.run_table(columns="all", folds=3, tracking_uri=folds.uri)
    rows = read_records(tmp_path).folds
    assert rows[["step", "fold"]].to_numpy().tolist() == table[["step", "seed"]].astype("str").to_numpy().tolist()
    accuracies = table["final_validation_accuracy"]
    assert rows["accuracy"].astype("float64").tolist() == pytest.approx(accuracies.tolist(), abs=5e-4)
    assert f"| `one` | 3 | **{accuracies[:3].mean():.2f}** ±" in readme.read_text()
    effect = results.compare("one", "other", folds=3, tracking_uri=folds.uri).effect
    assert files.compare_folds(rows) == []  # no script declares them
    declared = rows["step"].map({"one": "step7_depth", "other": "step8_averaging"})
    renamed = files.compare_folds(rows.assign(step=declared))
    assert renamed[0].effect == pytest.approx(effect, abs=1e-3)


def test_a_teacher_that_has_seen_all_images_is_refused(folds: Folds) -> None:
    script = ROOT / "experiments" / "step9_distillation.py"
    job = Job(script=script, experiment=read_declaration(script), tracking_uri=folds.uri, folds=3)

    with pytest.raises(LabError, match="folds: the teacher"):
        run_study(job, range(3), Progress(), Trainers())


def test_a_fold_that_is_interrupted_after_its_last_epoch_is_finished_and_then_not_trained_again(folds: Folds) -> None:
    script = Path(shutil.copy(TINY, folds.database.parent / "third.py"))
    with pytest.raises(KeyboardInterrupt):
        runner.run(folds.job(script), 0, Mock(on_epoch=Mock(side_effect=KeyboardInterrupt)))

    finished, again = folds.study(script), folds.study(script)

    killed = [run.run_id for run in folds.runs() if run.name == "third fold 0"]
    assert killed == [finished.runs[0].run_id]
    assert len(results.predictions(killed[0], tracking_uri=folds.uri)) == 400
    assert [run.run_id for run in again.runs] == [run.run_id for run in finished.runs]
