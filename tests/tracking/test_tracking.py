"""Stores that are opened, runs that end in every way, and what one run leaves: all in real MLflow stores."""

import json
import logging
import multiprocessing
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from multiprocessing.process import BaseProcess
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from torch import Tensor, nn

from conftest import FullRun
from forkserver import PATIENCE
from helpers import read_runs, read_value
from mnist_lab.commandline import interrupt_on_signals
from mnist_lab.data import Mnist
from mnist_lab.errors import LabError
from mnist_lab.tracking.run import TrackedRun, track
from mnist_lab.tracking.store import finished_runs, open_store
from mnist_lab.training.loop import normalize

NO_TAGS: dict[str, str] = {}
fork = multiprocessing.get_context("fork")  # what is imported here need not be imported again in each process


def begin(target: Callable[..., None], *arguments: object) -> BaseProcess:
    process = fork.Process(target=target, args=arguments)
    process.start()
    return process


def log_a_run(uri: str, name: str) -> None:
    with track(open_store(uri), name, params={"seed": 1}, tags=NO_TAGS) as run:
        run.log_epoch(1, {"test_accuracy": 99.0})
        run.log_text("hello", "hello.txt")


# ---- the store


def test_a_new_store_holds_the_experiment_and_its_artifacts_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    store = open_store("sqlite:///a folder/ünïcödé #1/mlflow.db")

    folder = tmp_path / "a folder" / "ünïcödé #1"
    monkeypatch.chdir("/")
    log_a_run(store.uri, "first")
    assert store.uri == f"sqlite:///{folder}/mlflow.db"
    assert read_value(folder / "mlflow.db", "SELECT name FROM experiments WHERE experiment_id <> 0") == "mnist"
    assert [file.read_text() for file in folder.glob("artifacts/*/artifacts/hello.txt")] == ["hello"]
    client = MlflowClient(store.uri)
    (run,) = client.search_runs([store.experiment_id])
    assert [artifact.path for artifact in client.list_artifacts(run.info.run_id)] == ["hello.txt"]
    assert {path.name for path in folder.iterdir()} <= {f"mlflow.db{end}" for end in ("", "-wal", "-shm", ".lock")} | {
        "artifacts",
        "locks",
    }
    assert list(tmp_path.iterdir()) == [tmp_path / "a folder"]
    assert capfd.readouterr() == ("", "")  # none of the library's remarks on tables and migrations


def test_processes_that_use_a_new_store_at_once_all_succeed(tmp_path: Path) -> None:
    database = tmp_path / "new" / "mlflow.db"
    together = fork.Barrier(4)

    def use(number: int) -> None:
        together.wait(PATIENCE)
        log_a_run(f"sqlite:///{database}", f"run {number}")

    processes = [begin(use, number) for number in range(4)]
    for process in processes:
        process.join(PATIENCE)

    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    runs = read_runs(database)
    assert sorted((run.name, run.status) for run in runs) == [(f"run {number}", "FINISHED") for number in range(4)]
    assert all(run.metrics == {"test_accuracy": [(1, 99.0)]} for run in runs)
    assert read_value(database, "PRAGMA journal_mode") == "wal"
    assert read_value(database, "PRAGMA integrity_check") == "ok"


def test_a_process_killed_while_it_makes_the_store_blocks_nobody(tmp_path: Path) -> None:
    start = time.monotonic()
    process = begin(log_a_run, f"sqlite:///{tmp_path}/whole/mlflow.db", "whole")
    process.join(PATIENCE)
    whole = time.monotonic() - start
    half_made = 0

    for share in (0.3, 0.6, 0.85):
        database = tmp_path / str(share) / "mlflow.db"
        killed = begin(open_store, f"sqlite:///{database}")
        time.sleep(share * whole)
        killed.kill()
        killed.join()
        half_made += database.with_name("mlflow.db.new").exists()
        process = begin(log_a_run, f"sqlite:///{database}", "next")
        process.join(PATIENCE)

        assert process.exitcode == 0
        assert [(run.name, run.status) for run in read_runs(database)] == [("next", "FINISHED")]
        assert read_value(database, "PRAGMA integrity_check") == "ok"
        assert read_value(database, "PRAGMA journal_mode") == "wal"
        assert not list(database.parent.glob("mlflow.db.new*"))
    assert half_made > 0  # else no kill came at a moment that matters


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("sqlite:///{folder}/notes.txt", "can't be read: file is not a database"),
        ("sqlite:///{folder}", "is not a file"),
        ("sqlite:///{folder}/notes.txt/mlflow.db", "can't be used: .*(Not a directory|File exists)"),
        ("foo://x", "can't be used: .*unsupported URI 'foo://x'"),
        ("mssql://nobody@127.0.0.1:1/runs", "can't be used: "),  # its driver is not installed
        ("http://127.0.0.1:9", "can't be used: .*Connection refused"),
    ],
)
def test_a_store_that_cannot_be_used_is_refused(
    uri: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("my notes\n")

    with pytest.raises(LabError, match=f"^tracking store.*{reason}"):
        open_store(uri.format(folder=tmp_path))

    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"notes.txt": "my notes\n"}


def test_another_programs_database_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    database = tmp_path / "photos.db"
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("CREATE TABLE photos (name TEXT)")
    before = database.read_bytes()

    with pytest.raises(LabError, match=f"^tracking store {database} is not an MLflow database$"):
        open_store(f"sqlite:///{database}")

    assert database.read_bytes() == before
    assert list(tmp_path.iterdir()) == [database]


def test_a_deleted_experiment_is_not_written_to(uri: str) -> None:
    MlflowClient(uri).delete_experiment(open_store(uri).experiment_id)

    with pytest.raises(LabError, match="the experiment 'mnist' is deleted; restore it in MLflow"):
        open_store(uri)


@pytest.mark.parametrize("room", ["tracking.store", "results"])
def test_telemetry_is_off_before_mlflow_is_imported(room: str) -> None:
    program = f"""
import importlib.abc, os, sys

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "mlflow":
            print("telemetry disabled:", os.environ.get("MLFLOW_DISABLE_TELEMETRY"))
            sys.stdout.flush()
            os._exit(0)

sys.meta_path.insert(0, Watch())
import mnist_lab.{room}
"""
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_DISABLE_TELEMETRY"}

    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)

    assert done.stdout == "telemetry disabled: true\n"


# ---- how a run ends


def track_a_run(uri: str, block: Callable[[TrackedRun], None]) -> None:
    with track(open_store(uri), "a run", params={"lr": 0.1}, tags={"step": "a"}) as tracked:
        block(tracked)


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (None, "FINISHED"),
        (RuntimeError("a bug"), "FAILED"),
        (LabError("bad input"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(0), "FINISHED"),
        (SystemExit(3), "FAILED"),
    ],
    ids=repr,
)
def test_the_status_says_how_the_block_ended(end: BaseException | None, status: str, uri: str, database: Path) -> None:
    def log_and_end(tracked: TrackedRun) -> None:
        tracked.log_epoch(1, {"test_accuracy": 98.0})
        if end is not None:
            raise end

    if end is None:
        track_a_run(uri, log_and_end)
    else:
        with pytest.raises(type(end)) as raised:
            track_a_run(uri, log_and_end)
        assert raised.value is end

    (run,) = read_runs(database)
    assert (run.name, run.status, run.params["lr"], run.tags["step"]) == ("a run", status, "0.1", "a")
    assert run.metrics == {"test_accuracy": [(1, 98.0)]}  # what was logged before the end is kept
    assert read_value(database, "SELECT end_time - start_time >= 0 FROM runs") == 1
    assert mlflow.active_run() is None
    trace = run.artifacts / "traceback.txt"
    assert trace.exists() == isinstance(end, RuntimeError)  # of bugs only
    if trace.exists():
        assert "in log_and_end" in trace.read_text()
        assert trace.read_text().endswith("RuntimeError: a bug\n")


@pytest.fixture
def _as_in_a_program() -> Iterator[None]:
    """Let SIGTERM and SIGHUP interrupt, as `main` does, and put pytest's own handlers back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where pytest was started by nohup
    interrupt_on_signals(signal.SIGTERM, signal.SIGHUP)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_as_in_a_program")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_at_any_moment_leaves_a_killed_run_or_none(number: signal.Signals, uri: str, database: Path) -> None:
    store = open_store(uri)

    def whole_run() -> None:
        with track(store, "a run", params={"lr": 0.1}, tags={"step": "a"}) as tracked:
            for epoch in range(1, 4):
                tracked.log_epoch(epoch, {"test_accuracy": 98.0})

    whole_run()  # the first one takes longer
    start = time.monotonic()
    whole_run()
    length = time.monotonic() - start
    interrupted = 0
    for part in range(20):
        timer = threading.Timer(part / 20 * length, os.kill, (os.getpid(), number))
        try:
            timer.start()
            try:
                whole_run()
            finally:
                timer.join()
                time.sleep(0.001)  # the signal may come after the run: here, still inside this `try`
        except KeyboardInterrupt:
            interrupted += 1
        assert mlflow.active_run() is None

    statuses = [run.status for run in read_runs(database)]
    assert interrupted == 20
    assert set(statuses) == {"FINISHED", "KILLED"}
    assert statuses.count("KILLED") >= 5


@pytest.mark.usefixtures("_as_in_a_program")
def test_a_second_signal_while_the_run_is_closed_does_not_leave_it_running(uri: str, database: Path) -> None:
    blocker = sqlite3.connect(database, isolation_level=None, check_same_thread=False)

    def interrupt_twice(tracked: TrackedRun) -> None:
        blocker.execute("BEGIN IMMEDIATE")  # so that closing the run waits
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGHUP)).start()  # a closed terminal sends it twice
        threading.Timer(0.6, blocker.execute, ("ROLLBACK",)).start()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        track_a_run(uri, interrupt_twice)

    blocker.close()
    assert [run.status for run in read_runs(database)] == ["KILLED"]


def test_a_store_that_fails_during_the_run_is_one_sentence(uri: str, database: Path) -> None:
    def log_into_a_full_database(tracked: TrackedRun) -> None:
        refuse(database, "INSERT ON metrics")
        tracked.log_epoch(1, {"test_accuracy": 98.0})

    with pytest.raises(LabError, match=f"^tracking store '{uri}' failed during the run: .*database is full"):
        track_a_run(uri, log_into_a_full_database)

    assert [run.status for run in read_runs(database)] == ["FAILED"]


def test_a_store_that_fails_at_the_end_of_the_run_is_one_sentence(uri: str, database: Path) -> None:
    with pytest.raises(LabError, match="^tracking store: the run .* could not be marked FINISHED: .*database is full"):
        track_a_run(uri, lambda tracked: refuse(database, "UPDATE ON runs"))

    assert mlflow.active_run() is None


@pytest.mark.parametrize("fate", ["removed", "moved with its folder", "replaced"])
def test_a_database_that_goes_in_mid_run_ends_it_and_is_not_made_anew(fate: str, uri: str, database: Path) -> None:
    def lose(tracked: TrackedRun) -> None:
        tracked.log_epoch(1, {"test_accuracy": 98.0})
        if fate == "moved with its folder":
            database.parent.rename(database.parent.with_name("moved"))
            return
        content = database.read_bytes()
        database.unlink()
        if fate == "replaced":
            database.with_name("new").write_bytes(content)
            database.with_name("new").rename(database)

    def go_on(tracked: TrackedRun) -> None:
        lose(tracked)
        tracked.log_epoch(2, {"test_accuracy": 98.5})

    with pytest.raises(LabError, match=f"^tracking store '{uri}': its database was removed, moved or replaced"):
        track_a_run(uri, go_on)
    assert database.exists() == (fate == "replaced")
    assert database.parent.exists() == (fate != "moved with its folder")


def test_a_clock_that_is_set_back_leaves_no_run_that_ends_before_it_begins(
    uri: str, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time

    def set_back(tracked: TrackedRun) -> None:
        monkeypatch.setattr(time, "time", lambda: now() - 3600)
        tracked.log_epoch(1, {"test_accuracy": 98.0})

    track_a_run(uri, set_back)

    assert read_value(database, "SELECT end_time >= start_time FROM runs") == 1
    assert read_value(database, "SELECT timestamp >= start_time FROM metrics JOIN runs USING (run_uuid)") == 1
    monkeypatch.setattr(time, "time", lambda: -1.0)
    with pytest.raises(LabError, match="^clock: "):
        open_store(uri)


@pytest.mark.parametrize("end", [KeyboardInterrupt(), ZeroDivisionError("a bug")], ids=repr)
def test_a_store_that_fails_at_the_end_does_not_hide_what_ended_the_run(
    end: BaseException, uri: str, database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(tracked: TrackedRun) -> None:
        refuse(database, "UPDATE ON runs")
        raise end

    with pytest.raises(type(end)) as raised:
        track_a_run(uri, fail)

    assert raised.value is end
    (record,) = [record for record in caplog.records if record.name == "mnist_lab.tracking.run"]
    assert record.levelno == logging.WARNING
    assert "could not be marked" in record.getMessage()
    assert "database is full" in record.getMessage()


def refuse(database: Path, action: str) -> None:
    """Make the database fail as one whose disk is full, from now on."""
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute(f"CREATE TRIGGER full BEFORE {action} BEGIN SELECT RAISE(ABORT, 'database is full'); END")


DATASET = {"source_type": "local", "source": "{}", "digest": "d", "schema": None, "profile": None}


def test_runs_that_are_the_first_to_log_a_data_set_both_do(uri: str) -> None:
    """Two at once, a few dozen times; without a second attempt one in four of them fails."""
    store = open_store(uri)
    failed: list[Exception] = []
    together = threading.Barrier(2)

    def log(run: TrackedRun, number: int) -> None:
        together.wait(PATIENCE)
        try:
            run._log_input("training", {**DATASET, "name": f"data set {number}"})
        except Exception as error:
            failed.append(error)

    with track(store, "one", params={}, tags=NO_TAGS) as one, track(store, "two", params={}, tags=NO_TAGS) as two:
        for number in range(30):
            threads = [threading.Thread(target=log, args=(run, number)) for run in (one, two)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    assert failed == []
    logged = [MlflowClient(uri).get_run(run.run_id).inputs.dataset_inputs for run in (one, two)]
    assert [len(inputs) for inputs in logged] == [30, 30]


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


# ---- runs of a study


def test_a_child_run_may_be_open_inside_its_study_and_the_study_goes_on(uri: str, database: Path) -> None:
    store = open_store(uri)

    with track(store, "study", params={}, tags=NO_TAGS) as study:
        with track(store, "child", params={}, tags=NO_TAGS, parent_run_id=study.run_id) as child:
            child.log_once({"num_params": 1})
        study.log_once({"seeds": 1})
        study.end_status = "FAILED"

    outer, inner = sorted(read_runs(database), key=lambda run: run.name, reverse=True)
    assert (outer.name, outer.status, outer.metrics) == ("study", "FAILED", {"seeds": [(0, 1)]})
    assert (inner.name, inner.status, inner.metrics) == ("child", "FINISHED", {"num_params": [(0, 1)]})
    assert inner.tags["mlflow.parentRunId"] == outer.run_id


def test_only_finished_runs_of_the_same_declaration_and_code_are_found(uri: str) -> None:
    store = open_store(uri)
    tags = {"step": "a", "overrides": "", "code_sha256": "c0de"}
    params = {"lr": "0.1", "device": "cpu"}

    def write(seed: int, finished: bool = True, **changes: object) -> str:
        given = {name: changes.get(name, value) for name, value in (params | tags).items()}
        here = {**{name: given[name] for name in params}, "seed": seed} | ({"new": 1} if "new" in changes else {})
        run_tags = {name: str(given[name]) for name in tags}
        with track(store, "run", params=here, tags=run_tags) as run:
            run.log_once({"final_test_accuracy": 99.0} if finished else {})
            run.end_status = str(changes.get("status", "FINISHED"))
        return run.run_id

    write(0)
    newest = write(0)
    write(1, lr=0.2)
    write(2, device="cuda")
    write(3, step="b")
    write(4, overrides="epochs=1")
    write(5, code_sha256="other")
    write(6, status="FAILED")
    write(7, finished=False)
    write(8, new=1)
    nine = write(9)

    found = finished_runs(store, params, tags)

    assert {seed: run.run_id for seed, run in found.items()} == {0: newest, 9: nine}
    assert found[9].metrics == {"final_test_accuracy": 99.0}


def test_a_restored_run_is_found_where_its_hardware_rounds_alike(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    store = open_store(uri)
    tags = {"step": "a", "overrides": "", "code_sha256": "c0de"}

    def write(seed: int, hardware: str, **more: str) -> str:
        with track(store, "run", params={"lr": "0.1", "seed": seed}, tags=tags | {"hardware": hardware} | more) as run:
            run.log_once({"final_test_accuracy": 99.0})
        return run.run_id

    def found(hardware: str) -> dict[int, str]:
        runs = finished_runs(store, {"lr": "0.1"}, tags, hardware=hardware)
        return {seed: run.run_id for seed, run in runs.items()}

    own = {seed: write(seed, "another, 8 cores, AVX2") for seed in (0, 1)}
    restored = {
        1: write(1, "CPU, 2 cores, AVX512", restored="c0ffee"),
        2: write(2, "CPU, 2 cores, AVX512", restored="c0ffee"),
        3: write(3, "CPU, 2 cores", restored="c0ffee"),  # of before the instructions were noted
        4: write(4, "NVIDIA H100", restored="c0ffee"),
        5: write(5, "", restored="c0ffee"),
    }

    assert found("other CPU, 64 cores, AVX512") == own | {2: restored[2]}
    assert re.search(
        "of seed 3, 4, 5 are not taken over: they were made on '', 'CPU, 2 cores', 'NVIDIA H100'", caplog.text
    )
    assert found("CPU, 2 cores, AVX2") == own
    assert found("NVIDIA H100") == own | {4: restored[4]}
    assert found("") == own


# ---- what a run leaves


def test_the_data_is_an_input_with_its_own_digest(small_mnist: Mnist, uri: str, tmp_path: Path) -> None:
    with track(open_store(uri), "a run", params={}, tags=NO_TAGS) as tracked:
        tracked.log_data(small_mnist, tmp_path)

    inputs = MlflowClient(uri).get_run(tracked.run_id).inputs.dataset_inputs
    by_context = {entry.tags[0].value: entry.dataset for entry in inputs}
    assert {context: dataset.name for context, dataset in by_context.items()} == {
        "training": "MNIST training",
        "test": "MNIST test",
    }
    assert {dataset.digest for dataset in by_context.values()} == {small_mnist.sha256[:36]}
    assert json.loads(by_context["training"].source) == {"uri": str(tmp_path)}
    assert json.loads(by_context["training"].profile)["features_shape"] == [500, 1, 28, 28]
    assert json.loads(by_context["test"].profile)["features_shape"] == [300, 1, 28, 28]


# ---- the trained network


def logged_model(run: FullRun) -> Path:
    (folder,) = (run.database.parent / "artifacts" / "models").iterdir()
    return folder / "artifacts"


@pytest.fixture(scope="module")
def loaded(full_run: FullRun) -> nn.Module:
    """Return the network of the full run as MLflow gives it back to somebody who has not got its script."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    try:
        mlflow.set_tracking_uri(f"sqlite:///{full_run.database}")
        return mlflow.pytorch.load_model(f"runs:/{full_run.tracked.run_id}/step1_baseline")
    finally:
        mlflow.set_tracking_uri(before)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 1000])
@torch.inference_mode()
def test_the_loaded_model_predicts_the_same_for_any_batch_size(
    batch_size: int, loaded: nn.Module, full_run: FullRun, mnist: Mnist
) -> None:
    logits = np.load(full_run.tracked.artifacts / "predictions.npz")["logits"]
    images = normalize(mnist.test_images[-batch_size:].float() / 255)

    again = loaded(images).numpy()

    np.testing.assert_allclose(again, logits[-batch_size:], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(again.argmax(axis=1), logits[-batch_size:].argmax(axis=1))


def test_the_model_is_kept_without_pickle(full_run: FullRun) -> None:
    archives = 0
    for file in (file for file in logged_model(full_run).rglob("*") if file.is_file()):
        assert file.suffix not in (".pkl", ".pickle", ".pth"), file
        if zipfile.is_zipfile(file):
            archives += 1
            with zipfile.ZipFile(file) as archive:
                assert not [name for name in archive.namelist() if name.endswith(".pkl")]
    assert archives == 1  # the exported program


def test_the_model_names_its_inputs_outputs_and_packages(full_run: FullRun) -> None:
    folder = logged_model(full_run)
    signature = mlflow.models.Model.load(str(folder)).signature
    example = json.loads((folder / "input_example.json").read_text())

    assert signature.inputs.to_dict()[0]["tensor-spec"] == {"dtype": "float32", "shape": (-1, 1, 28, 28)}
    assert signature.outputs.to_dict()[0]["tensor-spec"] == {"dtype": "float32", "shape": (-1, 10)}
    assert np.array(example).shape == (2, 1, 28, 28)
    assert f"torch=={torch.__version__.partition('+')[0]}" in (folder / "requirements.txt").read_text()


class DependsOnTheData(nn.Module):
    """What torch.export can't express."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(784, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.linear(images.flatten(1))
        return logits if images.sum() > 0 else -logits


class Locked(DependsOnTheData):
    """What can't be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


@pytest.mark.parametrize(("network", "cause"), [(DependsOnTheData, "data-dependent"), (Locked, "cannot pickle")])
def test_a_network_that_cannot_be_exported_is_kept_as_weights(
    network: type[nn.Module], cause: str, uri: str, database: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    net = network().train()
    with track(open_store(uri), "a run", params={}, tags=NO_TAGS) as tracked:
        capfd.readouterr()
        reason = tracked.log_model("a.step", net, torch.rand(2, 1, 28, 28), (0, 1))

    assert capfd.readouterr() == ("", "")  # torch's own account of it is pages long
    assert cause in str(reason)
    assert "\n" not in str(reason)
    (run,) = read_runs(database)
    weights = torch.load(run.artifacts / "state_dict.pt", weights_only=True)
    assert weights.keys() == net.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in net.state_dict().items())
    assert net.training  # it is the script's own and stays as it was
