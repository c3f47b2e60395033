"""Several seeds of one experiment: real studies in processes of their own, killed and taken up again."""

import math
import os
import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import psutil
import pytest
import torch

from forkserver import Program
from helpers import ROOT, TrackedRun, read_runs, wait_until
from mnist_lab.errors import LabError
from mnist_lab.running import run as runner
from mnist_lab.running import workers
from mnist_lab.running.job import Job, read_declaration
from mnist_lab.running.progress import Progress, RunResult, StudyResult
from mnist_lab.running.study import study as run_study
from mnist_lab.running.workers import Failed, SeedTask, local
from mnist_lab.tracking.store import FinishedRun, open_store
from mnist_lab.verdicts.statistics import judge_mean

NO_CHANGES: dict[str, object] = {}
# As users write them too: nothing guards the call of main, and a lambda can't be sent to another process.
SCRIPT = """
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn

from mnist_lab import Experiment, Targets, main


class Net(nn.Module):
    def __init__(self, dropout=0.1):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(784, 10))

    def forward(self, images):
        return self.layers(images)


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
    """A study that was started from a shell, in a process group of its own."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.folder, self.database = folder, folder / "runs.db"
        flags = ("--limit", "256", "--tracking-uri", "sqlite:///runs.db", *flags)
        self.process = Program("my_idea.py", *flags, cwd=folder)

    def runs(self) -> list[TrackedRun]:
        return read_runs(self.database)

    def processes(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if _group(process.pid) == self.process.pid]


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid) if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE else None
    except (ProcessLookupError, psutil.NoSuchProcess):
        return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    (folder / "my_idea.py").write_text(SCRIPT)
    return folder


def states(runs: list[TrackedRun]) -> list[tuple[str, str]]:
    """Return kind and status of each run: the study, or the number of the seed."""
    return sorted((run.params.get("seed", "study"), run.status) for run in runs)


@pytest.fixture(scope="module")
def story(folder: Path) -> Iterator[SimpleNamespace]:
    """Give the same command four times; seeds 1 and 2 wait for the file `go`, seed 3 fails.

    What stood in the store after the study was killed, interrupted, orphaned, and let through at last.
    """
    started: list[Study] = []

    def start(workers: int, after: int, *running: str) -> Study:
        """Start the study, and wait until these of its runs are in training, those of earlier studies left out."""
        study = Study(folder, "--seeds", "0,1,2,3", "--workers", str(workers))
        started.append(study)
        if running:
            there = sorted([*((one, "RUNNING") for one in running), *([] if after else [("0", "FINISHED")])])
            wait_until(lambda: states(study.runs()[after:]) == there, study.process)
        return study

    try:
        study = start(1, 0, "study", "1")
        os.killpg(study.process.pid, signal.SIGKILL)
        study.process.wait()
        wait_until(lambda: not study.processes())
        killed = study.runs()

        study = start(2, 3, "study", "1", "2")
        os.killpg(study.process.pid, signal.SIGINT)
        interrupted_code, interrupted_stderr = study.process.wait(), study.process.stderr
        interrupted = study.runs()
        assert not study.processes()

        study = start(2, 6, "study", "1", "2")
        study.process.kill()  # it alone, as when memory runs out
        wait_until(lambda: not study.processes())
        study.process.wait()
        orphaned = study.runs()

        (folder / "go").touch()
        study = start(2, 9)
        code = study.process.wait()
        stdout, stderr, runs = study.process.stdout, study.process.stderr, study.runs()
        newest = [run for run in runs if "study" in run.tags][-1]
        finished = [run for run in runs if run.status == "FINISHED"]
        yield SimpleNamespace(**locals())
    finally:
        for study in started:
            for process in study.processes():
                process.kill()
            study.process.wait()


def test_the_runs_of_a_study_that_is_killed_interrupted_or_orphaned_are_closed(story: SimpleNamespace) -> None:
    assert states(story.killed) == [("0", "FINISHED"), ("1", "RUNNING"), ("study", "RUNNING")]
    assert [run.status for run in story.runs[:3]] == ["KILLED", "FINISHED", "KILLED"]  # by the next one
    assert states(story.interrupted[3:]) == [("1", "KILLED"), ("2", "KILLED"), ("study", "KILLED")]
    assert story.interrupted_code == 130
    assert story.interrupted_stderr == (
        "\nInterrupted. Runs that had begun are marked KILLED; "
        "the same command trains only the seeds that are missing.\n"
    )
    assert states(story.orphaned[6:]) == [("1", "KILLED"), ("2", "KILLED"), ("study", "RUNNING")]


def test_the_same_command_trains_only_what_is_missing(story: SimpleNamespace) -> None:
    assert sorted(run.params["seed"] for run in story.finished) == ["0", "1", "2"]
    assert story.finished[0].run_id == story.killed[1].run_id
    assert "finished already, and not trained again: 0\n" in story.stdout
    assert "training seeds 1, 2, 3 (2 at a time, on cpu)\n" in story.stdout
    assert re.search(r"^seed 1  epoch 1/1  train loss .*  test loss .*, accuracy [\d.]+ %  lr ", story.stdout, re.M)
    assert re.search(r"^seed 2  done: test accuracy \d\d\.\d\d % in the last epoch; .*seeds\)$", story.stdout, re.M)
    assert "\r" not in story.stdout


def test_all_seeds_are_children_of_the_newest_study_and_one_that_fails_is_reported(story: SimpleNamespace) -> None:
    study = story.newest
    children = [run for run in story.runs if run.tags.get(PARENT) == study.run_id]

    assert study.name == "my_idea 4 seeds [limit=256]"
    assert "seed" not in study.params
    assert (study.params["epochs"], study.tags["study"], study.tags["seeds"]) == ("1", "my_idea", "0 1 2 3")
    assert states(children) == [("0", "FINISHED"), ("1", "FINISHED"), ("2", "FINISHED"), ("3", "FAILED")]
    assert story.code == 1
    assert re.search(r"^seed 3  failed: training: seed 3 is not lucky \(my_idea\.py, line \d+\)$", story.stdout, re.M)
    assert story.stderr == "Failed: seed 3; the same command tries again.\n"
    assert (study.status, study.tags["seeds_failed"]) == ("FAILED", "3")
    assert study.metrics["seeds"] == [(0, 3)]


def test_the_aggregates_are_those_of_the_seeds(story: SimpleNamespace) -> None:
    study = story.newest
    last = [run.metrics["final_test_accuracy"][0][1] for run in story.finished]

    def logged(name: str) -> float:
        return study.metrics[f"final_test_accuracy_{name}"][0][1]

    assert logged("mean") == pytest.approx(np.mean(last))
    assert logged("sd") == pytest.approx(np.std(last, ddof=1))
    assert (logged("minimum"), logged("median")) == (min(last), pytest.approx(np.median(last)))
    assert logged("share_at_target") == np.mean(np.array(last) >= 50)
    half = 4.302652729 * np.std(last, ddof=1) / math.sqrt(3)  # t at 97.5 %, 2 degrees of freedom
    assert (logged("low"), logged("high")) == pytest.approx((np.mean(last) - half, np.mean(last) + half))
    assert study.metrics["p"][0][1] == judge_mean(last, 50.0).p
    assert study.tags["verdict_accuracy"] == judge_mean(last, 50.0).word
    assert f"last epoch, test       {np.mean(last):.2f}" in story.stdout
    assert study.metrics["last"] == [(0, round(logged("mean"), 2))]
    assert study.metrics["sd"] == [(0, round(logged("sd"), 3))]


def test_a_study_keeps_its_verdict_its_figures_and_the_mean_curves(story: SimpleNamespace) -> None:
    study = story.newest
    text = study.tags["mlflow.note.content"]

    assert (study.artifacts / "verdict.md").read_text() == text + "\n"
    mean = np.mean([run.metrics["last"][0][1] for run in story.finished])
    assert f"mean at least 50 % | {mean:.2f} %" in " ".join(text.split())
    assert all(run.run_id in text for run in story.finished)
    assert {file.name for file in (study.artifacts / "figures").iterdir()} == {"training.png"}
    for name in ("test_accuracy", "test_loss", "train_accuracy", "train_loss"):
        ((epoch, value),) = study.metrics[name]
        assert (epoch, value) == (1, pytest.approx(np.mean([run.metrics[name][0][1] for run in story.finished])))


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


class Began(Exception):
    """With the seeds that are to be trained."""


class Heard(Progress):
    def on_study(self, name: str, seeds: object, missing: Sequence[int], *_: object) -> None:
        if missing:
            raise Began(list(missing))


def study_of(job: Job, seeds: Sequence[int]) -> StudyResult:
    return run_study(job, seeds, Heard(), local(job))


def test_finished_seeds_need_no_training_but_those_of_another_declaration_do(
    story: SimpleNamespace, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    script, uri = folder / "my_idea.py", f"sqlite:///{folder}/runs.db"

    result = study_of(job_of(script, uri), [2, 0])

    assert ([run.seed for run in result.runs], result.reused) == ([2, 0], [2, 0])
    assert result.aggregates["final_test_accuracy"].n == 2
    study = next(run for run in read_runs(folder / "runs.db") if run.run_id == result.run_id)
    assert (study.name, study.status) == ("my_idea 2 seeds [limit=256]", "FINISHED")
    for changes, limit in [({"epochs": 2}, 256), ({"lr": 0.2}, 256), ({"dropout": 0.2}, 256), ({}, 255)]:
        with pytest.raises(Began, match=re.escape("[0, 1]")):
            study_of(job_of(script, uri, changes, limit), [0, 1])
    assert mlflow.active_run() is None


# ---- without training


def test_on_a_gpu_the_seeds_train_here_one_after_another(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, ended = [], []

    def train(job: Job, seed: int, listener: object, **_: object) -> RunResult:
        trained.append(seed)
        if seed == 4:
            raise LabError("lr: too high")
        return RunResult(f"run {seed}", [], {"best_epoch": 1}, [])

    monkeypatch.setattr(workers, "run", train)
    job = job_of(ROOT / "experiments" / "step2_dropout.py", uri).replaced(device=torch.device("meta"))
    tasks = iter([SeedTask(job, seed, "parent", again=True) for seed in (3, 4, 5)])

    trainers = local(job)
    assert trainers.room() == 1
    trainers.train(open_store(uri), "parent", tasks, Progress(), lambda task, outcome: ended.append(outcome))

    assert trained == [3, 4, 5]
    run3, run5 = (FinishedRun(f"run {seed}", seed, {"best_epoch": 1}) for seed in (3, 5))
    assert ended == [run3, Failed("lr: too high"), run5]


def test_a_script_that_never_calls_main_is_refused(tmp_path: Path) -> None:
    script = tmp_path / "empty.py"
    script.write_text("x = 1\n")

    with pytest.raises(LabError, match=r"^script: .*empty\.py came to its end without calling main\(EXPERIMENT\)$"):
        read_declaration(script)
