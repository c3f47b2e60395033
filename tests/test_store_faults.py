"""Stores on real file systems that are full or read-only, of other users, or locked: refused before any training."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from helpers import default_signals, read_runs, read_value, run_script

from mnist_lab.errors import LabError
from mnist_lab.store import ROOM, follow_move
from mnist_lab.tracking import open_store, track

NOBODY = 65534
LIMIT = 10  # seconds until the sentence, the import of MLflow not counted


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return every file below a folder, and every folder as None; but for what locks and an empty log are kept in."""
    files = {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
    return {
        str(path): content
        for path, content in files.items()
        if not path.name.endswith((".lock", "-shm")) and not (path.name.endswith("-wal") and content == b"")
    }


@contextmanager
def refused_unchanged(database: Path, reason: str) -> Iterator[None]:
    """Check that the block ends in one sentence on this store, in time, and that all beside it is as it was."""
    before, start = contents(database.parent), time.monotonic()
    with pytest.raises(LabError, match=reason) as refusal:
        yield
    assert time.monotonic() - start < LIMIT
    assert str(refusal.value).startswith(
        (f"tracking store {database} can't be ", f"tracking store 'sqlite:///{database}'")
    )
    assert "\n" not in str(refusal.value)
    assert contents(database.parent) == before


def write_run(database: Path) -> None:
    with track(open_store(f"sqlite:///{database}"), "a run", params={"seed": 0}, tags={"step": "a"}) as run:
        run.log_epoch(1, {"test_accuracy": 98.0})
        run.log_text("hello", "hello.txt")


@pytest.fixture(scope="module")
def used(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a store with one run."""
    folder = tmp_path_factory.mktemp("used") / "mlruns"
    folder.mkdir()
    shutil.copy(empty_store, folder)
    write_run(folder / "mlflow.db")
    return folder


def copy_to(used: Path, place: Path) -> Path:
    """Return the database of a copy of the store, which nobody holds open and which finds its own artifacts."""
    shutil.copytree(used, place)
    follow_move(f"sqlite:///{place}/mlflow.db")
    return place / "mlflow.db"


# ---- file systems


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Return a function that makes a file system of so many MiB and returns its folder."""
    mounted: list[Path] = []

    def make(size: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no file system can be mounted here: {getattr(error, 'stderr', error)!r}")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, leave: int = 0) -> Path:
    """Take all the room of a file system but for so many bytes, and return the file that takes it."""
    file = folder / "filler"
    with file.open("wb", buffering=0) as stream, pytest.raises(OSError, match="No space left"):
        while True:
            stream.write(bytes(2**16))
    if leave:
        os.truncate(file, file.stat().st_size - leave)
    return file


@pytest.mark.parametrize("made", [True, False], ids=["a store", "no store yet"])
def test_a_full_disk_is_found_before_the_run(made: bool, used: Path, mount: Callable[[int], Path]) -> None:
    database = mount(16) / "mlruns" / "mlflow.db"
    if made:
        copy_to(used, database.parent)
    filler = fill(database.parent.parent, leave=ROOM // 2)

    with refused_unchanged(database, "No space left on device; a run needs a few megabytes there: make room"):
        open_store(f"sqlite:///{database}")

    assert database.parent.exists() == made
    filler.unlink()
    write_run(database)
    assert [run.status for run in read_runs(database)] == ["FINISHED"] * (1 + made)


def test_a_disk_that_fills_up_while_the_store_is_made_leaves_no_half(
    mount: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    database = mount(8) / "mlflow.db"
    filler = fill(database.parent, leave=2**18)
    monkeypatch.setattr("mnist_lab.store.ROOM", 1)  # there was room when it was asked for

    with refused_unchanged(database, "can't be used: .*database or disk is full"):
        open_store(f"sqlite:///{database}")

    filler.unlink()
    write_run(database)
    assert [run.status for run in read_runs(database)] == ["FINISHED"]


def test_a_read_only_file_system_is_found_before_the_run(used: Path, mount: Callable[[int], Path]) -> None:
    disk = mount(16)
    database = copy_to(used, disk / "mlruns")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)

    with refused_unchanged(database, "make it and its folder writable, copy the folder, or name another store with"):
        open_store(f"sqlite:///{database}")
    with pytest.raises(LabError, match="^tracking store .* Read-only file system; make it"):
        open_store(f"sqlite:///{disk}/new/mlflow.db")
    assert [path.name for path in disk.iterdir()] == ["mlruns"]


def test_artifacts_on_a_read_only_file_system_are_found_before_the_run(
    database: Path, mount: Callable[[int], Path], tmp_path: Path
) -> None:
    disk = mount(1)
    database.with_name("artifacts").symlink_to(disk)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)

    with refused_unchanged(database, f"{database.parent}/artifacts can't be written: Read-only file system"):
        open_store(f"sqlite:///{database}")
