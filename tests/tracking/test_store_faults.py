"""Stores on real file systems that are full, of other users, or locked: refused before any training."""

import os
import re
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from forkserver import Program, run_program
from helpers import ROOT, read_runs, read_value, wait_until, within
from mnist_lab import results
from mnist_lab.errors import LabError
from mnist_lab.tracking.run import track
from mnist_lab.tracking.sqlite import ROOM, follow_move
from mnist_lab.tracking.store import Store, open_store

NOBODY = 65534
LIMIT = 10  # seconds until the sentence, the import of MLflow not counted


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return every file below a folder, and every folder as None; but for what locks and an empty log are kept in."""
    files = {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
    empty_logs = {path for path, content in files.items() if path.endswith("-wal") and not content}
    return {path: files[path] for path in files.keys() - empty_logs if not path.endswith((".lock", "-shm"))}


@contextmanager
def refused_unchanged(database: Path, reason: str) -> Iterator[None]:
    """Check that the block ends in one sentence on this store, in time, and that all beside it is as it was."""
    before = contents(database.parent)
    with within(LIMIT), pytest.raises(LabError, match=rf"^tracking store {database} can't be .*{reason}[^\n]*$"):
        yield
    assert contents(database.parent) == before


def write_run(database: Path) -> None:
    with track(open_store(f"sqlite:///{database}"), "a run", params={"seed": 0}, tags={"step": "a"}) as run:
        run.log_missing({1: {"test_accuracy": 98.0}})
        run.log_text("hello", "hello.txt")


@pytest.fixture(scope="module")
def used(new_store: Callable[[], Store]) -> Path:
    database = Path(new_store().uri.removeprefix("sqlite:///"))
    write_run(database)
    return database.parent


def copy_to(used: Path, place: Path) -> Path:
    """Return the database of a copy of the store, which nobody holds open and which finds its own artifacts."""
    shutil.copytree(used, place)
    follow_move(f"sqlite:///{place}/mlflow.db")
    return place / "mlflow.db"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {getattr(error, 'stderr', error)!r}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, leave: int = 0) -> Path:
    file = folder / "filler"
    with file.open("wb", buffering=0) as stream, suppress(OSError):
        while stream.write(bytes(2**16)):
            pass
    if leave:
        os.truncate(file, file.stat().st_size - leave)
    return file


@pytest.mark.parametrize("made", [True, False], ids=["a store", "no store yet"])
def test_a_full_disk_is_found_before_the_run(made: bool, used: Path, disk: Path) -> None:
    database = disk / "mlruns" / "mlflow.db"
    if made:
        copy_to(used, database.parent)
    filler = fill(disk, leave=ROOM // 2)

    with refused_unchanged(database, "No space left on device; a run needs a few megabytes there: make room"):
        open_store(f"sqlite:///{database}")

    assert database.parent.exists() == made
    filler.unlink()
    write_run(database)
    assert [run.status for run in read_runs(database)] == ["FINISHED"] * (1 + made)


def test_a_run_on_a_disk_that_fills_up_goes_on_when_there_is_room(used: Path, disk: Path, tmp_path: Path) -> None:
    database = copy_to(used, disk / "mlruns")
    (earlier,) = read_runs(database)
    step = ROOT / "experiments" / "step1_baseline.py"
    target = ["--tracking-uri", f"sqlite:///{database}"]
    process = Program(step, *target, "--epochs", "3", "--limit", "256", cwd=tmp_path)
    wait_until(lambda: list(disk.glob("mlruns/checkpoints/*.pt")), process)
    filler = fill(disk)

    process.wait()

    said = process.stderr
    assert process.returncode == 1
    assert "Traceback" not in said
    assert re.search(r"^error: .*\.pt can't be written: .*$|^error: tracking store .* full.*$", said, re.MULTILINE)
    assert read_value(database, "PRAGMA integrity_check") == "ok"
    first, run = read_runs(database)
    assert (first, earlier.artifacts.joinpath("hello.txt").read_text()) == (earlier, "hello")
    points = run.metrics.get("test_accuracy", [])  # none where the disk was full before epoch 1 was logged
    assert [epoch for epoch, _ in points] == list(range(1, len(points) + 1))
    assert [file.stem for file in disk.glob("mlruns/checkpoints/*.pt")] == [run.run_id]

    filler.unlink()
    assert run_program(step, "--resume", *target, cwd=tmp_path).returncode == 0

    _, resumed = read_runs(database)
    assert (resumed.run_id, resumed.status) == (run.run_id, "FINISHED")
    assert resumed.metrics["test_accuracy"][: len(points)] == points
    assert [epoch for epoch, _ in resumed.metrics["test_accuracy"]] == [1, 2, 3]
    assert read_value(database, "PRAGMA integrity_check") == "ok"


@contextmanager
def another_user() -> Iterator[None]:
    """Be a user whom file modes stop; root is stopped by none."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public(used: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        database = copy_to(used, Path(folder) / "mlruns")
        for path in (database.parent, *database.parent.rglob("*")):
            path.chmod(0o777)
        yield database
        database.parent.chmod(0o777)


@pytest.mark.parametrize(
    ("mode", "path", "named"),
    [
        (0o444, "mlflow.db", "mlruns/mlflow.db"),
        (0o555, ".", "mlruns"),
        (0o000, ".", "mlruns/mlflow.db"),
        (0o555, "artifacts", "mlruns/artifacts"),
    ],
    ids=["read-only file", "read-only folder", "closed folder", "read-only artifacts"],
)
def test_a_store_of_another_user_is_found_before_the_run(mode: int, path: str, named: str, public: Path) -> None:
    before = contents(public.parent)
    (public.parent / path).chmod(mode)

    reason = f"{named} can't be written: .*; make it and its folder"
    refusal = pytest.raises(LabError, match=f"^tracking store {public} can't be used: .*{reason}")
    with within(LIMIT), another_user(), refusal:
        open_store(f"sqlite:///{public}")

    (public.parent / path).chmod(0o777)
    assert contents(public.parent) == before
    with another_user():
        open_store(f"sqlite:///{public}")


# ---- programs


def test_a_database_that_another_program_does_not_let_go_is_found_before_the_run(used: Path, tmp_path: Path) -> None:
    database = copy_to(used, tmp_path / "mlruns")
    with closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with refused_unchanged(database, "database is locked; another program has locked it: wait for that program"):
            open_store(f"sqlite:///{database}")

    open_store(f"sqlite:///{database}")


def test_a_store_of_a_newer_mlflow_is_refused_and_left_as_it_was(used: Path, tmp_path: Path) -> None:
    database = copy_to(used, tmp_path / "mlruns")
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")

    sentence = f"^tracking store {database} was last used by a newer MLflow than 3.* install"
    for read in (open_store, lambda uri: results.run_table(tracking_uri=uri)):
        with pytest.raises(LabError, match=sentence):
            read(f"sqlite:///{database}")

    assert read_value(database, "SELECT version_num FROM alembic_version") == "ffffffffffff"
