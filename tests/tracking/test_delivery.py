"""Records on their way into a run: each once, to the store that they are for, and none from where it should not be."""

import json
import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest

from forkserver import PATIENCE
from helpers import read_runs
from mnist_lab.errors import LabError
from mnist_lab.tracking import delivery
from mnist_lab.tracking.delivery import sync
from mnist_lab.tracking.outbox import Outbox, Record
from mnist_lab.tracking.run import track
from mnist_lab.tracking.store import open_store

ONE_POINT = Record("metrics", {"step": 1, "timestamp": 1_000, "values": {"test_accuracy": 98.0}})
DATASET = {"source_type": "local", "source": "{}", "digest": "d", "schema": None, "profile": None}


def a_run(uri: str) -> str:
    with track(open_store(uri), "a run", params={}, tags={}) as tracked:
        pass
    return tracked.run_id


# ---- what two runs write first


def test_runs_that_are_the_first_to_log_a_data_set_both_do(uri: str, database: Path) -> None:
    """Two at once, a few dozen times; without a second attempt one in four of them fails."""
    client = mlflow.MlflowClient(uri)
    runs = [client.create_run(open_store(uri).experiment_id).info.run_id for _ in range(2)]
    failed: list[Exception] = []
    together = threading.Barrier(2)

    def log(run_id: str, number: int) -> None:
        together.wait(PATIENCE)
        try:
            content = {"context": "training", "dataset": {**DATASET, "name": f"data set {number}"}}
            delivery.send(client, run_id, Record("dataset", content))
        except Exception as error:
            failed.append(error)

    for number in range(30):
        threads = [threading.Thread(target=log, args=(run_id, number)) for run_id in runs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert failed == []
    logged = [client.get_run(run_id).inputs.dataset_inputs for run_id in runs]
    assert [len(inputs) for inputs in logged] == [30, 30]


# ---- where records may go


def waiting(uri: str, run_id: str, record: Record = ONE_POINT) -> Outbox:
    outbox = Outbox.of_run(uri, run_id)
    outbox.add(uri, record)
    return outbox


def test_records_for_another_store_are_refused_by_its_name_and_stay(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(delivery, "ask", asked.append)
    outbox = waiting(uri, run_id := a_run(uri))
    target = {"uri": "https://bob:pass-word@elsewhere.example", "run_id": run_id}
    (outbox.folder / "target.json").write_text(json.dumps(target))

    (one,) = sync(uri)

    assert (one.sent, one.waiting, asked) == (0, 1, [])
    assert one.reason.startswith("they are for another store, 'https://bob:***@elsewhere.example': name that with --tr")
    with (
        pytest.raises(LabError, match="they are for another store"),
        track(open_store(uri), "a run", params={}, tags={}, resume_run_id=run_id),
    ):
        pytest.fail("it went on")


@pytest.mark.parametrize("target", ["", "{", "[]", "3", "{}", "\xff", '{"uri": 3}', "[" * 100_000])
def test_a_target_that_cannot_be_read_stops_no_other_run(target: str, uri: str) -> None:
    damaged, good = waiting(uri, "0" * 32), waiting(uri, a_run(uri))
    (damaged.folder / "target.json").write_text(target, encoding="latin-1")

    found = {one.run_id: one for one in sync(uri)}

    assert (found["0" * 32].waiting, found[good.run_id].sent) == (1, 1)
    assert found["0" * 32].reason
    assert damaged.waiting()


def test_records_of_another_run_than_their_folder_says_stay(uri: str) -> None:
    outbox = waiting(uri, "0" * 32)
    (outbox.folder / "target.json").write_text(json.dumps({"uri": uri, "run_id": a_run(uri)}))

    (one,) = sync(uri)

    assert (one.sent, one.waiting) == (0, 1)
    assert "names another run than the folder" in one.reason


def test_a_password_is_not_kept_and_the_records_find_their_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mnist_lab.paths.PROJECT_ROOT", tmp_path)
    uri = "postgresql://bob:pass-word@host/runs"

    outbox = waiting(uri, "abc")

    assert not [file for file in tmp_path.rglob("*") if file.is_file() and b"pass-word" in file.read_bytes()]
    assert outbox.target(uri) == "postgresql://bob:***@host/runs"
    with pytest.raises(LabError, match="another store"):
        outbox.target("postgresql://bob:pass-word@host/other")


# ---- what a record may hold


def planted(uri: str, run_id: str, tmp_path: Path) -> tuple[Outbox, Path, Path]:
    """Return an outbox whose one record has a file, its entry, and a file elsewhere."""
    secret, note = tmp_path / "secret.txt", tmp_path / "note.txt"
    secret.write_text("mine")
    note.write_text("note")
    outbox = waiting(uri, run_id, Record("artifact", {"folder": None}, note))
    return outbox, outbox.waiting()[0], secret


def link(entry: Path, secret: Path) -> None:
    (entry / "note.txt").unlink()
    (entry / "note.txt").symlink_to(secret)


def link_in_a_folder(entry: Path, secret: Path) -> None:
    (entry / "note.txt").unlink()
    (entry / "note.txt").mkdir()
    (entry / "note.txt" / "inner").symlink_to(secret)


def linked_entry(entry: Path, secret: Path) -> None:
    shutil.move(entry, secret.parent / "moved")
    entry.symlink_to(secret.parent / "moved")


def pipe(entry: Path, secret: Path) -> None:
    (entry / "note.txt").unlink()
    os.mkfifo(entry / "note.txt")


def record(**changes: object) -> Callable[[Path, Path], None]:
    def write(entry: Path, secret: Path) -> None:
        kept = json.loads((entry / "record.json").read_text())
        given = {name: str(secret) if value == "SECRET" else value for name, value in changes.items()}
        (entry / "record.json").write_text(json.dumps({**kept, **given}))

    return write


def text(content: bytes) -> Callable[[Path, Path], None]:
    return lambda entry, secret: (entry / "record.json").write_bytes(content) and None


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (record(path="SECRET"), "names a file that is not its own"),
        (record(path="../../../../secret.txt"), "names a file that is not its own"),
        (record(path="note.txt/"), "names a file that is not its own"),
        (record(path=".."), "names a file that is not its own"),
        (record(path=""), "names a file that is not its own"),
        (record(path="a\0b"), "names a file that is not its own"),
        (record(path=3), "names a file that is not its own"),
        (record(path="other.txt"), "holds what is no file or folder of its own"),
        (link, "holds what is no file or folder of its own"),
        (link_in_a_folder, "holds what is no file or folder of its own"),
        (linked_entry, "holds what is no file or folder of its own"),
        (pipe, "holds what is no file or folder of its own"),
        (record(kind="shell"), "a record is of an unknown kind, 'shell'"),
        (record(kind=3), "is damaged"),
        (record(content=[1]), "is damaged"),
        (record(content={}), "folder"),
        (record(kind="metrics", content={"timestamp": "x", "step": None, "values": 3}), "."),
        (record(kind="model", content={"name": 3, "step": []}), "."),
        (text(b"{"), "can't be read"),
        (text(b"\xff\xfe"), "can't be read"),
        (text(b"[]"), "can't be read"),
        (text(b"[" * 100_000), "can't be read"),
    ],
)
def test_a_record_that_is_not_as_it_was_written_is_named_and_left(
    damage: Callable[[Path, Path], None], reason: str, uri: str, database: Path, tmp_path: Path
) -> None:
    outbox, entry, secret = planted(uri, a_run(uri), tmp_path)
    damage(entry, secret)

    (one,) = sync(uri)

    assert (one.sent, one.waiting) == (0, 1)
    assert reason in one.reason or reason == "."
    (run,) = read_runs(database)
    assert not [file for file in run.artifacts.rglob("*") if file.is_file()]
    assert outbox.waiting() == [entry]


def test_a_password_in_an_error_or_a_tag_is_not_logged(
    uri: str, database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tags = {"remote": "https://bob:pass-word@git.example/x.git"}
    with (
        caplog.at_level(logging.DEBUG, "mnist_lab"),
        pytest.raises(RuntimeError),
        track(open_store(uri), "a run", params={}, tags=tags),
    ):
        raise RuntimeError("no answer from postgresql://bob:pass-word@host/x")

    (run,) = read_runs(database)
    assert run.tags["remote"] == "https://bob:***@git.example/x.git"
    assert "postgresql://bob:***@host/x" in (run.artifacts / "traceback.txt").read_text()
    assert "pass-word" not in caplog.text + (run.artifacts / "traceback.txt").read_text()
