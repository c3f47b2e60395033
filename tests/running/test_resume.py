"""Runs that are killed outright, at random moments and in the midst of writing, end as those that were not."""

import errno
import io
import os
import random
import re
import shutil
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from torch import nn

from forkserver import Program
from helpers import TINY, Evil, TrackedRun, copy_store, read_runs
from mnist_lab.data import Mnist
from mnist_lab.errors import LabError
from mnist_lab.experiment import Experiment
from mnist_lab.running import checkpoint
from mnist_lab.running.run import restore
from mnist_lab.tracking import run as tracking
from mnist_lab.tracking.store import open_store, replace_files
from mnist_lab.training.loop import Training
from networks import FIRST, example

FLAGS = ["--limit", "512", "--epochs", "5", "--seed", "5"]


# ---- where a program kills itself


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_written(file: Path, content: bytes) -> None:
    with file.open("wb") as stream:
        stream.write(content[: len(content) // 2])
    die()


def written_and_dead(contents: dict[Path, bytes]) -> None:
    replace_files(contents)
    die()


POINTS = {
    "in the midst of saving": (Path, "write_bytes", half_written),
    "after the rename": (checkpoint, "replace_files", written_and_dead),
    "before the last figures": (tracking.TrackedRun, "log_once", die),
    "before the model": (tracking.TrackedRun, "log_model", die),
}


def die_at(point: str) -> None:
    setattr(*POINTS[point])


class Lab:
    def __init__(self, folder: Path, empty_store: Path) -> None:
        self.folder = folder
        self.database = copy_store(empty_store, folder / "mlflow.db")
        self.script = shutil.copy(TINY, folder)  # beside it lies no module that would count as its own
        self.said = ""

    def run(self, *flags: str, point: str = "", kill_after: float | None = None) -> int:
        """Return the exit code, negative for a signal; `kill_after` so many seconds the process is killed outright."""
        command = (self.script, *flags, "--threads", "1", "--tracking-uri", f"sqlite:///{self.database}")
        program = Program(*command, cwd=self.folder, first=partial(die_at, point) if point else bool)
        if kill_after is not None:
            time.sleep(kill_after)
            program.kill()
        code = program.wait()
        self.said = program.stderr
        return code

    def unfinished(self) -> list[Path]:
        return list((self.folder / "checkpoints").glob("*"))


@pytest.fixture
def lab(empty_store: Path, tmp_path: Path) -> Lab:
    return Lab(tmp_path, empty_store)


@pytest.fixture(scope="module")
def whole(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrackedRun, float]:
    lab, start = Lab(tmp_path_factory.mktemp("whole"), empty_store), time.monotonic()
    assert lab.run(*FLAGS) == 0
    (run,) = read_runs(lab.database)
    return run, time.monotonic() - start


def check_same(run: TrackedRun, whole: TrackedRun) -> None:
    assert run.status == "FINISHED"
    assert run.params == whole.params
    assert {**run.metrics, "epoch_seconds": []} == {**whole.metrics, "epoch_seconds": []}
    assert [step for step, _ in run.metrics["epoch_seconds"]] == list(range(1, 6))
    with np.load(run.artifacts / "predictions.npz") as mine, np.load(whole.artifacts / "predictions.npz") as theirs:
        assert np.array_equal(mine["logits"], theirs["logits"])  # bit for bit
    assert (run.artifacts / "figures" / "training.png").exists()


@pytest.mark.parametrize("number", [5, pytest.param(20, marks=pytest.mark.long)])
def test_a_run_killed_at_random_moments_ends_alike(lab: Lab, whole: tuple[TrackedRun, float], number: int) -> None:
    moments = random.Random(7)
    kills = 0
    while kills < number:
        flags = ["--resume"] if lab.unfinished() else FLAGS
        code = lab.run(*flags, kill_after=moments.uniform(0.1, 0.7 * whole[1]))
        kills += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL), lab.said
    while lab.unfinished():
        assert lab.run("--resume") == 0, lab.said
    assert lab.run(*FLAGS) == 0, lab.said

    for run in read_runs(lab.database):
        # What was killed before its first checkpoint has no end, but the next start does not leave it as RUNNING.
        if run.status != "KILLED":
            check_same(run, whole[0])


def test_a_run_killed_in_the_midst_of_writing_ends_alike(lab: Lab, whole: tuple[TrackedRun, float]) -> None:
    assert lab.run(*FLAGS, point="after the rename") == -signal.SIGKILL
    for point in POINTS:
        assert lab.run("--resume", point=point) == -signal.SIGKILL, point
    assert lab.run("--resume") == 0, lab.said

    (run,) = read_runs(lab.database)
    check_same(run, whole[0])
    assert lab.unfinished() == []


# ---- the files


def write(file: Path, one: checkpoint.Checkpoint) -> None:
    """Write a checkpoint as `checkpoint.save` does, whatever is in it."""
    buffer = io.BytesIO()
    torch.save({**vars(one), "epochs": [vars(epoch) for epoch in one.epochs]}, buffer)
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(checkpoint.sealed(buffer.getvalue()))


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def test_a_checkpoint_comes_back_as_it_was_and_is_found_by_step_and_run(uri: str) -> None:
    for number, (run_id, script) in enumerate([("a", "/x/one.py"), ("b", "/x/one.py"), ("c", "/x/two.py")]):
        checkpoint.save(example(run_id, script=script), uri)
        os.utime(checkpoint.file_of(uri, run_id), (number, number))
    found = checkpoint.find(uri)
    assert {**vars(found), "training": None} == {**vars(example("c", script="/x/two.py")), "training": None}
    assert torch.equal(found.training["net"]["weight"], torch.ones(3))
    asked = [{"step": "one"}, {"step": "one", "run_id": "a"}, {"run_id": "b"}]
    assert [checkpoint.find(uri, **one).run_id for one in asked] == ["b", "a", "b"]
    with pytest.raises(LabError, match=r"^resume: there is no interrupted run with step 'three' in "):
        checkpoint.find(uri, step="three")


def flipped(content: bytes, place: int, bit: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


def test_each_bit_of_a_checkpoint_counts(uri: str) -> None:
    """torch by itself takes weights with a flipped bit as they are, and those of a "folder" as what memory held."""
    checkpoint.save(example("bad"), uri)
    file = checkpoint.file_of(uri, "bad")
    whole, draw = file.read_bytes(), random.Random(7)
    attributes = [found.start() + 38 for found in re.finditer(b"PK\x01\x02", whole)]  # of each member, in the directory
    damaged = [flipped(whole, place, 4) for place in attributes]
    damaged += [flipped(whole, draw.randrange(len(whole)), draw.randrange(8)) for _ in range(100)]
    damaged += [whole[: draw.randrange(len(whole))] for _ in range(20)] + [whole + b"\0"]

    for content in damaged:
        file.write_bytes(content)
        assert list(checkpoint.newest_first(uri)) == []
    file.write_bytes(whole)
    assert [one.run_id for one in checkpoint.newest_first(uri)] == ["bad"]


NONSENSE: list[dict[str, Any]] = [
    *({"seed": -1}, {"script": "a\0b"}, {"changes": [1]}, {"identity": {"lr": 0.1}}, {"threads": 0}, {"training": []}),
    {"epochs": []},
    {"epochs": [replace(FIRST, epoch=2)]},
    {"epochs": [replace(FIRST, evaluated_on="train")]},  # type: ignore[arg-type]
]


def test_a_file_with_something_else_in_it_is_left_out_by_name(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    file = checkpoint.file_of(uri, "bad")
    for nonsense in NONSENSE:
        write(file, example("bad", **nonsense))
        assert list(checkpoint.newest_first(uri)) == [], nonsense
    assert caplog.text.count(f"not used: checkpoint {file} can't be read: ") == len(NONSENSE)
    write(file, example("bad"))
    assert [one.run_id for one in checkpoint.newest_first(uri)] == ["bad"]


def test_a_state_that_does_not_fit_is_refused_by_the_runs_id(uri: str, small_mnist: Mnist) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    experiment = Experiment(net=lambda: net, optimizer=partial(torch.optim.SGD, lr=0.1), batch_size=100, epochs=1)
    for state in ({}, {"epoch": 1, "net": 3}, {"epoch": 1, "net": {"weight": torch.ones(3)}}):
        training = Training(net, experiment, small_mnist, seed=0)
        with pytest.raises(LabError, match=r"^resume: the checkpoint of run abc does not fit: .*; train it anew$"):
            restore(training, example(training=state), Mock(identity=example().identity))


def test_an_interrupted_run_that_was_deleted_is_left_out(database: Path, caplog: pytest.LogCaptureFixture) -> None:
    uri = f"sqlite:///{database}"
    client, store = MlflowClient(uri), open_store(uri)
    older, deleted = (client.create_run(store.experiment_id).info.run_id for _ in range(2))
    for number, run_id in enumerate((older, deleted)):
        checkpoint.save(example(run_id, seed=number), uri)
        os.utime(checkpoint.file_of(uri, run_id), (number, number))
    assert checkpoint.find(uri).run_id == deleted
    client.delete_run(deleted)

    assert checkpoint.find(uri).run_id == older
    assert f"not used: checkpoint of run {deleted}, which was deleted in MLflow" in caplog.text
    assert checkpoint.find(uri, run_id=deleted).run_id == deleted  # `track` refuses it, and says why
    with pytest.raises(LabError, match=rf"^resume: there is no interrupted run with seed 1 in .*; there are: {older} "):
        checkpoint.find(uri, seed=1)


def test_a_file_that_would_run_code_is_refused(uri: str, tmp_path: Path) -> None:
    file = checkpoint.file_of(uri, "evil")
    write(file, example("evil", training=Evil(tmp_path / "code ran")))
    with pytest.raises(LabError, match=r"checkpoint .*evil\.pt can't be read"):
        checkpoint.load(file)
    assert not (tmp_path / "code ran").exists()


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(example(), uri)
    before = checkpoint.file_of(uri, "abc").read_bytes()
    folder = checkpoint.folder(uri)
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    with pytest.raises(LabError, match=r"abc\.pt can't be written: .*No space left on device"):
        checkpoint.save(example(seed=4), uri)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {"abc.pt": before}
