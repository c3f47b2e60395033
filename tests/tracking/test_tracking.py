"""Stores that are opened, runs that end in every way, and what one run leaves: all in real MLflow stores."""

import errno
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput

from conftest import FullRun
from forkserver import PATIENCE
from helpers import ROOT, first, read_runs, read_value, wait_until
from mnist_lab.commandline import interrupt_on_signals
from mnist_lab.data import Mnist
from mnist_lab.errors import LabError
from mnist_lab.tracking.connection import environment_variables
from mnist_lab.tracking.run import TrackedRun, track
from mnist_lab.tracking.store import Store, finished_runs, open_store
from mnist_lab.training.loop import normalize
from networks import Linear

NO_TAGS: dict[str, str] = {}
fork = multiprocessing.get_context("fork")  # what is imported here need not be imported again in each process


def begin(target: Callable[..., None], *arguments: object) -> BaseProcess:
    process = fork.Process(target=target, args=arguments)
    process.start()
    return process


def log_a_run(uri: str, name: str) -> None:
    with track(open_store(uri), name, params={"seed": 1}, tags=NO_TAGS) as run:
        run.log_missing({1: {"test_accuracy": 99.0}})
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
    files = {f"mlflow.db{end}" for end in ("", "-wal", "-shm", ".lock")}
    assert {path.name for path in folder.iterdir()} <= {*files, "artifacts", "locks"}
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

    runs = read_runs(database)
    assert sorted((run.name, run.status) for run in runs) == [(f"run {number}", "FINISHED") for number in range(4)]
    assert all(run.metrics == {"test_accuracy": [(1, 99.0)]} for run in runs)
    assert read_value(database, "PRAGMA journal_mode") == "wal"
    assert read_value(database, "PRAGMA integrity_check") == "ok"


def test_a_process_killed_while_it_makes_the_store_blocks_nobody(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    killed = begin(open_store, f"sqlite:///{database}")
    wait_until(lambda: any(file.stat().st_size > 200_000 for file in tmp_path.glob("mlflow.db.new/*.db")))
    killed.kill()
    killed.join()
    assert database.with_name("mlflow.db.new").exists()

    log_a_run(f"sqlite:///{database}", "next")

    assert [(run.name, run.status) for run in read_runs(database)] == [("next", "FINISHED")]
    assert read_value(database, "PRAGMA integrity_check") == "ok"
    assert read_value(database, "PRAGMA journal_mode") == "wal"
    assert not list(tmp_path.glob("mlflow.db.new*"))


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("sqlite:///{folder}/notes.txt", "can't be read: file is not a database"),
        ("sqlite:///{folder}/photos.db", "is not an MLflow database$"),
        ("sqlite:///{folder}/empty.db", "is not an MLflow database$"),
        ("sqlite:///{folder}/cut.db", "can't be read: "),
        ("sqlite:///{folder}/overwritten.db", "can't be read: |is not an MLflow database$"),
        ("sqlite:///{folder}", "is not a file"),
        ("sqlite:///{folder}/notes.txt/mlflow.db", "can't be used: .*(Not a directory|File exists)"),
        ("file://{folder}", ": the URI is none; give sqlite:///"),  # MLflow's own files, which it has given up
        ("foo://x", "can't be used: .*unsupported URI 'foo://x'"),
        ("mssql://nobody@127.0.0.1:1/runs", "can't be used: "),  # its driver is not installed
    ],
)
def test_a_store_that_can_not_be_used_is_refused(uri: str, reason: str, empty_store: Path, tmp_path: Path) -> None:
    whole = empty_store.read_bytes()
    for name, content in (("notes.txt", b"my notes\n" * 1000), ("empty.db", b""), ("cut.db", whole[:20_000])):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "overwritten.db").write_bytes(whole[:100] + bytes(len(whole) - 100))
    with closing(sqlite3.connect(tmp_path / "photos.db")) as connection, connection:
        connection.execute("CREATE TABLE runs (distance REAL)")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    with pytest.raises(LabError, match=f"^tracking store.*({reason})"):
        open_store(uri.format(folder=tmp_path))

    there = [path for path in tmp_path.iterdir() if not path.name.endswith(("-shm", "-wal"))]  # SQLite's own
    assert {path: path.read_bytes() for path in there} == before


def test_telemetry_is_off() -> None:
    program = "import mnist_lab.results; from mlflow.telemetry import get_telemetry_client as get; print(get())"
    environment = {name: os.environ[name] for name in ("PATH", "HOME")}  # MLflow looks for signs of tests in it

    said = subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, env=environment, text=True)

    assert said == "None\n"


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
        tracked.log_missing({1: {"test_accuracy": 98.0}})
        if end is not None:
            raise end

    with nullcontext() if end is None else pytest.raises(type(end)) as raised:
        track_a_run(uri, log_and_end)
    if end is not None:
        assert raised.value is end

    (run,) = read_runs(database)
    assert (run.name, run.status, run.params["lr"], run.tags["step"]) == ("a run", status, "0.1", "a")
    assert run.metrics == {"test_accuracy": [(1, 98.0)]}  # what was logged before the end is kept
    assert mlflow.active_run() is None
    trace = run.artifacts / "traceback.txt"
    assert trace.exists() == isinstance(end, RuntimeError)  # of bugs only
    if trace.exists():
        assert "in log_and_end" in trace.read_text()
        assert trace.read_text().endswith("RuntimeError: a bug\n")


def test_a_signal_at_any_moment_leaves_a_killed_run_or_none(store: Store, database: Path) -> None:
    interrupt_on_signals()  # as `main` does; conftest.py puts the handlers back

    def whole_run() -> None:
        with track(store, "a run", params={"lr": 0.1}, tags={"step": "a"}) as tracked:
            for epoch in range(1, 4):
                tracked.log_missing({epoch: {"test_accuracy": 98.0}})

    def interrupted_run(after: float) -> None:
        timer = threading.Timer(after, os.kill, (os.getpid(), signal.SIGHUP))
        timer.start()
        try:
            whole_run()
        finally:
            timer.join()
            time.sleep(0.001)  # the signal may come after the run

    whole_run()  # the first one takes longer
    start = time.monotonic()
    whole_run()
    length = time.monotonic() - start
    for part in range(20):
        with pytest.raises(KeyboardInterrupt):
            interrupted_run(part / 20 * length)
        assert mlflow.active_run() is None

    statuses = [run.status for run in read_runs(database)]
    assert set(statuses) == {"FINISHED", "KILLED"}
    assert statuses.count("KILLED") >= 5


def fill(database: Path, action: str) -> None:
    """Let the database fail at this action, as one whose disk is full."""
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute(f"CREATE TRIGGER full BEFORE {action} BEGIN SELECT RAISE(ABORT, 'database is full'); END")


@pytest.mark.parametrize(
    ("end", "status"), [(None, "FINISHED"), (KeyboardInterrupt(), "KILLED"), (ZeroDivisionError(), "FAILED")]
)
def test_a_store_that_fails_does_not_hide_what_ended_the_run(
    end: BaseException | None, status: str, uri: str, database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(tracked: TrackedRun) -> None:
        fill(database, "UPDATE ON runs")
        if end is not None:
            raise end

    with pytest.raises(type(end) if end else LabError) as raised:
        track_a_run(uri, fail)

    said = [one.getMessage() for one in caplog.records if one.name == "mnist_lab.tracking.run"]
    (sentence,) = said if end else [str(raised.value)]
    assert re.search(f"the run .* could not be marked {status}: .*database is full", sentence)
    assert end in (None, raised.value)
    assert read_runs(database)[0].status == "RUNNING"


@pytest.mark.parametrize(
    ("params", "tags", "what"),
    [
        ({}, {"step": "a"}, "`--resume {}`"),
        ({"folds": 5}, {"step": "a"}, "the same command"),
        ({}, {"search": "a 1"}, "the same command"),
    ],
)
def test_a_store_that_fails_is_said_without_sql_and_with_what_goes_on(
    params: dict[str, object], tags: dict[str, str], what: str, uri: str, database: Path
) -> None:
    def fail(tracked: TrackedRun) -> None:
        (database.parent / "checkpoints").mkdir()
        (database.parent / "checkpoints" / f"{tracked.run_id}.pt").touch()
        fill(database, "INSERT ON metrics")
        tracked.log_missing({1: {"test_accuracy": 98.0}})

    with pytest.raises(LabError) as raised, track(open_store(uri), "a run", params=params, tags=tags) as tracked:
        fail(tracked)

    said = f"tracking store '{uri}' failed during the run: (sqlite3.IntegrityError) database is full; "
    assert str(raised.value) == f"{said}its checkpoint is kept, and {what.format(tracked.run_id)} goes on with it"
    assert read_runs(database)[0].status == "FAILED"


def test_a_run_whose_lock_can_not_be_made_has_failed(uri: str, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("mnist_lab.tracking.run.take_lock", Mock(side_effect=full))
    with pytest.raises(LabError, match=f"^tracking store '{uri}' can't be written: .*No space left on device$"):
        log_a_run(uri, "a run")
    assert [run.status for run in read_runs(database)] == ["FAILED"]


@pytest.mark.parametrize("fate", ["removed", "moved with its folder", "replaced"])
def test_a_database_that_goes_in_mid_run_ends_it_and_is_not_made_anew(fate: str, uri: str, database: Path) -> None:
    def lose_it_and_go_on(tracked: TrackedRun) -> None:
        tracked.log_missing({1: {"test_accuracy": 98.0}})
        if fate == "moved with its folder":
            database.parent.rename(database.parent.with_name("moved"))
        else:
            shutil.copy(database, database.with_name("new"))
            database.unlink()
        if fate == "replaced":
            database.with_name("new").rename(database)
        tracked.log_missing({2: {"test_accuracy": 98.5}})

    with pytest.raises(LabError, match=f"^tracking store '{uri}': its database was removed, moved or replaced"):
        track_a_run(uri, lose_it_and_go_on)
    assert database.exists() == (fate == "replaced")
    assert database.parent.exists() == (fate != "moved with its folder")


def test_a_clock_that_is_set_back_harms_no_run(uri: str, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time

    def set_back(tracked: TrackedRun) -> None:
        monkeypatch.setattr(time, "time", lambda: now() - 3600)
        tracked.log_missing({1: {"test_accuracy": 98.0}})

    track_a_run(uri, set_back)

    assert read_value(database, "SELECT end_time >= start_time FROM runs") == 1
    assert read_value(database, "SELECT timestamp >= start_time FROM metrics JOIN runs USING (run_uuid)") == 1
    monkeypatch.setattr(time, "time", lambda: -1.0)
    with pytest.raises(LabError, match="^clock: "):
        open_store(uri)


def test_runs_that_are_the_first_to_log_a_data_set_both_do(uri: str) -> None:
    """Two at once, a few dozen times; without a second attempt one in four of them fails."""
    store, together = open_store(uri), threading.Barrier(2)

    def log(run: TrackedRun, number: int) -> None:
        together.wait(PATIENCE)
        run._log_inputs([DatasetInput(Dataset(f"data set {number}", "d", "local", "{}"), [])])

    with (
        track(store, "one", params={}, tags=NO_TAGS) as one,
        track(store, "two", params={}, tags=NO_TAGS) as two,
        ThreadPoolExecutor(2) as pool,
    ):
        for number in range(30):
            list(pool.map(log, (one, two), (number, number)))  # raises what a thread raised

    logged = [MlflowClient(uri).get_run(run.run_id).inputs.dataset_inputs for run in (one, two)]
    assert [len(inputs) for inputs in logged] == [30, 30]


def test_data_sets_of_other_sizes_are_told_apart(uri: str, small_mnist: Mnist) -> None:
    for size in (500, 200):
        with track(open_store(uri), "a run", params={}, tags=NO_TAGS) as run:
            run.log_data(first(small_mnist, size, 300), Path("data"))
        training = MlflowClient(uri).get_run(run.run_id).inputs.dataset_inputs[0].dataset
        assert f"[{size}, 1, 28, 28]" in training.profile


def test_a_run_that_goes_on_elsewhere_is_tagged_with_both_places(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    store, run_id = open_store(uri), None
    for place in ("one", "one", "other", "other"):
        tags = {"hardware": place}
        with suppress(KeyboardInterrupt), track(store, "a run", params={}, tags=tags, resume_run_id=run_id) as run:
            run_id = run.run_id
            raise KeyboardInterrupt
    assert MlflowClient(uri).get_run(run_id).data.tags["hardware"] == "one; other"
    assert caplog.text.count("goes on with other hardware") == 1


def test_a_password_in_an_error_is_not_logged(uri: str, database: Path, caplog: pytest.LogCaptureFixture) -> None:
    tags = {"remote": "https://bob:pass-word@git.example/x.git"}
    caplog.set_level(logging.DEBUG, "mnist_lab")
    with pytest.raises(RuntimeError), track(open_store(uri), "a run", params={}, tags=tags):
        raise RuntimeError("no answer from postgresql://bob:pass-word@host/x")

    (run,) = read_runs(database)
    assert run.tags["remote"] == "https://bob:***@git.example/x.git"
    assert "postgresql://bob:***@host/x" in (run.artifacts / "traceback.txt").read_text()
    assert "pass-word" not in caplog.text + (run.artifacts / "traceback.txt").read_text()


# ---- runs of a study

PARAMS, TAGS = {"lr": "0.1", "device": "cpu"}, {"step": "a", "overrides": "", "code_sha256": "c0de"}


def write(store: Store, seed: int, params: dict[str, str] = NO_TAGS, **tags: str) -> str:
    with track(store, "run", params={**PARAMS, **params, "seed": seed}, tags=TAGS | tags) as run:
        run.log_once({"final_test_accuracy": 99.0})
    return run.run_id


def test_only_finished_runs_of_the_same_declaration_and_code_are_found(store: Store) -> None:
    write(store, 0)
    newest = write(store, 0)
    for seed, params in enumerate([{"lr": "0.2"}, {"device": "cuda"}, {"new": "1"}], start=1):
        write(store, seed, params)
    for seed, tags in enumerate([{"step": "b"}, {"overrides": "epochs=1"}, {"code_sha256": "other"}], start=4):
        write(store, seed, **tags)
    store.client.set_terminated(write(store, 7), "FAILED")
    with track(store, "not measured", params={**PARAMS, "seed": 8}, tags=TAGS):
        pass

    found = finished_runs(store, PARAMS, TAGS)

    assert {seed: run.run_id for seed, run in found.items()} == {0: newest}
    assert found[0].metrics == {"final_test_accuracy": 99.0}


def test_a_restored_run_is_found_on_hardware_that_rounds_alike(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    def found(hardware: str) -> dict[int, str]:
        runs = finished_runs(store, PARAMS, TAGS, seeds=range(6), hardware=hardware)
        return {seed: run.run_id for seed, run in runs.items()}

    own = {seed: write(store, seed, hardware="another, 8 cores, AVX2") for seed in (0, 1)}
    before_instructions_were_noted = "CPU, 2 cores"
    machines = ["CPU, 2 cores, AVX512"] * 2 + [before_instructions_were_noted, "NVIDIA H100", ""]
    of_seeds = enumerate(machines, start=1)
    restored = {seed: write(store, seed, hardware=machine, restored="c0ffee") for seed, machine in of_seeds}

    assert found("CPU, 64 cores, AVX512") == own | {2: restored[2]}
    assert found("other CPU, 2 cores, AVX512") == own
    assert "of seed 3, 4, 5 are not reused: they were made on other hardware" in caplog.text
    assert found("CPU, 2 cores, AVX2") == own
    assert found("NVIDIA H100") == own | {4: restored[4]}
    assert found("") == own


# ---- the trained network


@torch.inference_mode()
def test_the_model_predicts_the_same_for_any_batch_size_without_its_script(full_run: FullRun, mnist: Mnist) -> None:
    with environment_variables({"MLFLOW_TRACKING_URI": f"sqlite:///{full_run.database}"}):
        loaded = mlflow.pytorch.load_model(f"runs:/{full_run.tracked.run_id}/step1_baseline")
    logits = np.load(full_run.tracked.artifacts / "predictions.npz")["logits"]

    for batch_size in (1, 2, 7, 1000):
        again = loaded(normalize(mnist.test_images[-batch_size:].float() / 255)).numpy()

        np.testing.assert_allclose(again, logits[-batch_size:], rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(again.argmax(axis=1), logits[-batch_size:].argmax(axis=1))


def test_the_model_is_kept_without_pickle_and_names_its_inputs_outputs_and_packages(full_run: FullRun) -> None:
    (model,) = (full_run.database.parent / "artifacts" / "models").iterdir()
    folder = model / "artifacts"
    assert not [file for file in folder.rglob("*") if file.suffix in (".pkl", ".pickle", ".pth")]
    (program,) = (file for file in folder.rglob("*") if file.is_file() and zipfile.is_zipfile(file))
    with zipfile.ZipFile(program) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".pkl")]
    signature = mlflow.models.Model.load(str(folder)).signature
    assert signature.inputs.to_dict()[0]["tensor-spec"] == {"dtype": "float32", "shape": (-1, 1, 28, 28)}
    assert signature.outputs.to_dict()[0]["tensor-spec"] == {"dtype": "float32", "shape": (-1, 10)}
    assert np.array(json.loads((folder / "input_example.json").read_text())).shape == (2, 1, 28, 28)
    assert f"torch=={torch.__version__.partition('+')[0]}" in (folder / "requirements.txt").read_text()


@pytest.mark.parametrize("cause", ["data-dependent", "cannot pickle", "TorchScript"])
def test_a_network_that_cannot_be_exported_is_kept_as_weights(
    cause: str, uri: str, database: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    net: Any = Linear(change=lambda logits: logits if logits.sum() > 0 else -logits)  # torch.export can't express it
    if cause == "cannot pickle":
        net.lock = threading.Lock()  # so that it can't be copied
    elif cause == "TorchScript":
        net = torch.jit.trace(Linear(), torch.rand(2, 1, 28, 28))  # type: ignore[no-untyped-call]
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
