"""Which runs are in training: told by a lock that their process holds, whatever container or machine looks."""

import multiprocessing
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from mlflow import MlflowClient

from forkserver import PATIENCE
from helpers import read_runs
from mnist_lab.errors import LabError
from mnist_lab.tracking import store as stores
from mnist_lab.tracking.run import track
from mnist_lab.tracking.store import Store, can_resume, close_abandoned, lock_of, open_store

fork = multiprocessing.get_context("fork")


def train(uri: str, run_ids: object) -> None:
    with track(open_store(uri), "a run", params={}, tags={}) as tracked:
        run_ids.put(tracked.run_id)  # type: ignore[attr-defined]
        signal.pause()


@contextmanager
def in_training(uri: str) -> Iterator[tuple[BaseProcess, str]]:
    run_ids = fork.Queue()
    process = fork.Process(target=train, args=(uri, run_ids))
    process.start()
    try:
        yield process, run_ids.get(timeout=PATIENCE)
    finally:
        process.kill()
        process.join()


def killed(uri: str) -> str:
    with in_training(uri) as (_, run_id):
        return run_id


def status(database: Path) -> str:
    return read_runs(database)[0].status


def test_a_run_is_left_alone_while_its_process_lives_and_closed_when_it_is_killed(uri: str, database: Path) -> None:
    with in_training(uri) as (process, run_id):
        close_abandoned(open_store(uri))
        assert status(database) == "RUNNING"

        process.kill()
        process.join()
        close_abandoned(open_store(uri))

    assert status(database) == "KILLED"
    assert can_resume(open_store(uri), run_id)
    assert list((database.parent / "locks").iterdir()) == []


@pytest.mark.parametrize(
    ("same", "ends"),
    [
        ("boot lock", "KILLED"),  # another container under the same running system
        ("machine host lock", "KILLED"),  # this machine, started again after a power cut
        ("host lock", "RUNNING"),  # another machine of the same name, to which the lock may not show
        ("machine lock", "RUNNING"),  # a copy of this machine
        ("lock", "RUNNING"),
        ("boot machine host", "RUNNING"),  # a copy of the database alone
    ],
)
def test_a_free_lock_counts(same: str, ends: str, uri: str, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = killed(uri)
    for name, place in (("boot", "_boot"), ("machine", "_machine"), ("host", "socket.gethostname")):
        if name not in same:
            monkeypatch.setattr(f"mnist_lab.tracking.store.{place}", lambda: "another")
    if "lock" not in same:
        shutil.rmtree(database.parent / "locks")

    close_abandoned(open_store(uri))

    assert status(database) == ends
    assert can_resume(open_store(uri), run_id) == (ends == "KILLED")


def test_a_run_that_ends_meanwhile_stays_so(store: Store, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with track(store, "a run", params={}, tags={}) as tracked:
        found = stores.search(store, "attributes.status = 'RUNNING'")
    monkeypatch.setattr(stores, "search", lambda *_: found)
    with lock_of(store, tracked.run_id):  # left there, as by a process that is killed before it can remove it
        pass

    close_abandoned(store)

    assert status(database) == "FINISHED"


def test_a_clusters_run_ends_with_its_study(uri: str, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(stores.ON_CLUSTER, "1")
    store = open_store(uri)
    with track(store, "study", params={}, tags={}) as study:
        tags = {"process": stores.process_tag(), "mlflow.parentRunId": study.run_id}
        store.client.create_run(store.experiment_id, tags=tags, run_name="seed 0")
        close_abandoned(store)
        assert [run.status for run in read_runs(database)] == ["RUNNING", "RUNNING"]

    close_abandoned(store)

    assert {run.name: run.status for run in read_runs(database)} == {"study": "FINISHED", "seed 0": "KILLED"}


def test_two_processes_do_not_go_on_with_one_run(uri: str) -> None:
    run_id = killed(uri)
    store = open_store(uri)
    with (
        track(store, "a run", params={}, tags={}, resume_run_id=run_id),
        pytest.raises(LabError, match=f"^resume: run {run_id} is still in training, in another process"),
        track(store, "a run", params={}, tags={}, resume_run_id=run_id),
    ):
        pytest.fail("it went on")


def test_a_run_named_like_a_path_touches_no_file(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database from elsewhere may hold any text as a run's id."""
    victim = tmp_path / "victim.lock"
    victim.write_text("mine")
    run = MlflowClient(store.uri).create_run(store.experiment_id, tags={"process": stores.process_tag()})
    run.info._run_id = "../../victim"
    monkeypatch.setattr(stores, "search", lambda *_: [run])

    close_abandoned(store)

    assert victim.read_text() == "mine"


def test_a_deleted_run_is_refused_by_name(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    run_id = killed(uri)
    MlflowClient(uri).delete_run(run_id)
    store = open_store(uri)

    assert not can_resume(store, run_id)
    assert f"not used: checkpoint of run {run_id}: run {run_id} was deleted in MLflow" in caplog.text
    with (
        pytest.raises(LabError, match=f"^resume: run {run_id} was deleted in MLflow: restore it there, or train anew$"),
        track(store, "a run", params={}, tags={}, resume_run_id=run_id),
    ):
        pytest.fail("it went on")
