"""Run tables read from real stores: a SQLite file and a tracking server over it."""

import math
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from run_writer import STEP4, write_run

from mnist_lab import results
from mnist_lab.errors import LabError
from mnist_lab.tracking import Store, open_store

T0 = 1_700_000_000_000
NO_SCHEDULE = {name: value for name, value in STEP4.items() if name not in ("step_size", "gamma")} | {
    "scheduler": "none",
    "lr": "0.01",
    "dropout": "0.1",
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Return a store with every kind of run that the tables must tell apart."""
    store = open_store(f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}")
    write_run(store, "step4", 0, [99.0, 99.5, 99.4], start_time=T0)
    write_run(store, "step4", 1, [98.9, 99.3, 99.3], start_time=T0 + 1000)
    write_run(store, "step4", 0, [99.1, 99.6, 99.5], start_time=T0 + 2000)  # seed 0 again: this one counts
    write_run(store, "step2", 0, [98.0, 99.0], start_time=T0 + 3000, num_params=6864, params=NO_SCHEDULE)
    write_run(store, "my_idea", 0, [97.0], start_time=T0 + 4000, num_params=20_000, tags={})
    write_run(store, "step4", 0, [99.9], start_time=T0 + 5000, tags={"overrides": "lr=0.2"})
    write_run(store, "step4", 2, [98.0, 98.5], start_time=T0 + 6000, status="FAILED")
    write_run(store, "step4", 3, [98.0], start_time=T0 + 7000, status=None)
    return store


@pytest.fixture(scope="module")
def server(store: Store) -> Iterator[str]:
    """Return the address of a real tracking server over the same store."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--backend-store-uri", store.uri],
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=1)
                break
            except OSError:
                assert process.poll() is None, "the server ended by itself"
                time.sleep(0.2)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def test_run_table_has_one_typed_row_per_finished_run(store: Store) -> None:
    table = results.run_table(tracking_uri=store.uri)
    assert table["step"].tolist() == ["my_idea", "step2", "step4", "step4", "step4"]  # newest first
    assert table["seed"].tolist() == [0, 0, 0, 1, 0]
    newest = table.iloc[2]
    assert newest["final_test_accuracy"] == 99.5
    assert newest["best_test_accuracy"] == 99.6
    assert newest["best_epoch"] == 2
    assert newest["final_train_accuracy"] == pytest.approx(99.4)
    assert newest["num_params"] == 7852
    assert newest["minutes"] == 1
    assert newest["start_time"] == pd.Timestamp(T0 + 2000, unit="ms", tz="UTC")
    kinds = {name: str(kind) for name, kind in table.dtypes.items()}
    assert [kinds[name] for name in ("batch_size", "epochs", "step_size")] == ["Int64"] * 3
    assert [kinds[name] for name in ("lr", "momentum", "gamma", "dropout")] == ["float64"] * 4
    assert kinds["start_time"].startswith("datetime64")
    assert kinds["git_dirty"] == "boolean"
    assert pd.isna(table.iloc[1]["step_size"])  # step 2 has no schedule
    assert table.iloc[1]["dropout"] == 0.1


def test_run_table_filters(store: Store) -> None:
    def ids(**filters: object) -> list[tuple[str, int]]:
        table = results.run_table(tracking_uri=store.uri, **filters)
        return list(zip(table["step"], table["seed"], strict=True))

    assert ids(steps="step2") == [("step2", 0)]
    assert ids(steps=["step2", "my_idea"]) == [("my_idea", 0), ("step2", 0)]
    assert ids(steps="step4", seeds=1) == [("step4", 1)]
    assert ids(seeds=[1, 7]) == [("step4", 1)]
    assert ids(steps="step4", include_overrides=True) == [("step4", 0), ("step4", 0), ("step4", 1), ("step4", 0)]
    assert ids(status="FAILED") == [("step4", 2)]
    assert ids(status="RUNNING") == [("step4", 3)]
    assert len(ids(status=None)) == 7


def test_overridden_runs_stand_in_where_a_step_has_no_run_as_declared(tmp_path: Path) -> None:
    store = open_store(f"sqlite:///{tmp_path / 'mlflow.db'}")
    write_run(store, "step1", 0, [98.0], start_time=T0, tags={"overrides": "epochs=9"})
    write_run(store, "step1", 0, [98.1], start_time=T0 + 1000, tags={"overrides": "epochs=1"})
    write_run(store, "step1", 1, [98.2], start_time=T0 + 2000, tags={"overrides": "epochs=1"})
    write_run(store, "step2", 0, [98.3], start_time=T0 + 3000)
    write_run(store, "step2", 0, [98.4], start_time=T0 + 4000, tags={"overrides": "epochs=1"})
    table = results.run_table(include_overrides="if_none", tracking_uri=store.uri)
    assert table["final_test_accuracy"].tolist() == [98.3, 98.2, 98.1]
    assert table["overrides"].tolist() == ["", "epochs=1", "epochs=1"]
    assert results.run_table(tracking_uri=store.uri)["final_test_accuracy"].tolist() == [98.3]


def test_epoch_history_is_tidy(store: Store) -> None:
    history = results.epoch_history(tracking_uri=store.uri)
    assert list(history.columns) == ["run_id", "step", "overrides", "seed", "epoch", *results.EPOCH_METRICS]
    assert len(history) == 3 + 3 + 3 + 2 + 1
    assert not history.isna().any().any()
    one = history[(history["step"] == "step4") & (history["seed"] == 1)]
    assert one["epoch"].tolist() == [1, 2, 3]
    assert one["test_accuracy"].tolist() == [98.9, 99.3, 99.3]
    assert one["lr"].tolist() == pytest.approx([0.1, 0.1, 0.06])
    assert set(results.epoch_history("step2", tracking_uri=store.uri)["step"]) == {"step2"}


def test_a_server_gives_the_same_tables_as_the_file(store: Store, server: str) -> None:
    pd.testing.assert_frame_equal(results.run_table(tracking_uri=server), results.run_table(tracking_uri=store.uri))
    key = ["run_id", "epoch"]
    over_http = results.epoch_history(status=None, include_overrides=True, tracking_uri=server)
    from_file = results.epoch_history(status=None, include_overrides=True, tracking_uri=store.uri)
    pd.testing.assert_frame_equal(
        over_http.sort_values(key, ignore_index=True), from_file.sort_values(key, ignore_index=True)
    )


def test_the_history_of_many_runs_takes_few_requests(
    store: Store, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    http_request = results.http_request
    monkeypatch.setattr(
        results, "http_request", lambda *given, **more: asked.append(more) or http_request(*given, **more)
    )
    monkeypatch.setattr(results, "RUNS_PER_REQUEST", 3)
    history = results.epoch_history(status=None, include_overrides=True, tracking_uri=server)
    assert history["run_id"].nunique() == 8
    assert len(asked) == math.ceil(8 / 3) * len(results.EPOCH_METRICS)


def test_a_point_logged_twice_counts_once_with_its_latest_value(tmp_path: Path) -> None:
    store = open_store(f"sqlite:///{tmp_path / 'mlflow.db'}")
    run = write_run(store, "step1", 0, [98.0, 99.0], start_time=T0)
    mlflow.MlflowClient(store.uri).log_metric(run.info.run_id, "test_accuracy", 98.5, timestamp=T0 + 500, step=1)
    history = results.epoch_history(tracking_uri=store.uri)
    assert history["test_accuracy"].tolist() == [98.5, 99.0]


def test_compare_takes_the_newest_run_of_each_seed_and_their_mean(store: Store) -> None:
    table = results.compare_table(tracking_uri=store.uri).set_index("step")
    assert table.index.tolist() == ["step2", "step4", "my_idea"]  # the steps first
    step4 = table.loc["step4"]
    assert step4["seeds"] == 2
    assert step4["last"] == pytest.approx((99.5 + 99.3) / 2)
    assert step4["last_sd"] == pytest.approx(np.std([99.5, 99.3], ddof=1))
    assert step4["best"] == pytest.approx((99.6 + 99.3) / 2)
    assert step4["verdict_accuracy"] == "met"  # the mean of the last epochs, 99.40, not one lucky seed
    assert table.loc["step2", "verdict_accuracy"] == "missed"
    assert table.loc["step2", "verdict_params"] == "met"
    assert pd.isna(table.loc["step2", "last_sd"])
    assert table.loc["my_idea", "verdict_accuracy"] == "-"  # no target stated


def test_a_finished_run_without_a_result_is_left_out_with_a_warning(tmp_path: Path) -> None:
    store = open_store(f"sqlite:///{tmp_path / 'mlflow.db'}")
    write_run(store, "step1", 0, [], start_time=T0)
    with pytest.warns(UserWarning, match="has no result: left out"):
        assert results.run_table(tracking_uri=store.uri).empty


def test_an_empty_store_says_what_to_run(tmp_path: Path) -> None:
    store = open_store(f"sqlite:///{tmp_path / 'mlflow.db'}")
    for read in (results.run_table, results.epoch_history, results.compare_table):
        with pytest.raises(LabError, match="no runs yet in .*make step1"):
            read(tracking_uri=store.uri)


def test_no_matching_run_gives_an_empty_table_with_the_columns(store: Store) -> None:
    table = results.run_table(seeds=77, tracking_uri=store.uri)
    assert table.empty
    assert {"step", "seed", "lr", "final_test_accuracy", "run_id"} <= set(table)
    assert results.epoch_history(seeds=77, tracking_uri=store.uri).empty


@pytest.mark.parametrize(
    ("filters", "sentence"),
    [
        ({"steps": "step9"}, "no run of 'step9'.*my_idea, step2, step4"),
        ({"status": "DONE"}, "status: 'DONE' is none of FINISHED"),
    ],
)
def test_a_filter_that_nothing_can_match_is_refused(store: Store, filters: dict[str, str], sentence: str) -> None:
    with pytest.raises(LabError, match=sentence):
        results.run_table(tracking_uri=store.uri, **filters)


def test_a_missing_store_says_what_to_run_and_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="no runs yet: .*make step1"):
        results.run_table(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_database_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "other.db"
    connection = sqlite3.connect(file)
    connection.execute("CREATE TABLE runs (id INTEGER)")
    connection.commit()
    connection.close()
    before = file.read_bytes()
    with pytest.raises(LabError, match="is not an MLflow database"):
        results.run_table(tracking_uri=f"sqlite:///{file}")
    assert file.read_bytes() == before


def test_a_server_that_is_not_there_gives_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(LabError, match="tracking store 'http://127.0.0.1:9' can't be read"):
        results.run_table(tracking_uri="http://127.0.0.1:9")


def test_predictions_come_back_as_they_were_logged(tmp_path: Path) -> None:
    store = open_store(f"sqlite:///{tmp_path / 'mlflow.db'}")
    run = write_run(store, "step1", 0, [98.0], start_time=T0)
    logits = np.random.default_rng(0).normal(size=(50, 10)).astype(np.float32)
    truth = np.arange(50, dtype=np.uint8) % 10
    file = tmp_path / "predictions.npz"
    np.savez_compressed(file, truth=truth, prediction=logits.argmax(axis=1).astype(np.uint8), logits=logits)
    mlflow.MlflowClient(store.uri).log_artifact(run.info.run_id, str(file))
    table = results.predictions(run.info.run_id, tracking_uri=store.uri)
    assert table["truth"].tolist() == truth.tolist()
    assert table["prediction"].tolist() == logits.argmax(axis=1).tolist()
    assert np.array_equal(table.filter(like="logit_").to_numpy(), logits)
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert table["confidence"].to_numpy() == pytest.approx(softmax.max(axis=1), abs=1e-6)


def test_predictions_that_are_not_there_are_refused(store: Store) -> None:
    def run_id(**filters: str) -> str:
        return results.run_table(tracking_uri=store.uri, **filters)["run_id"].iloc[0]

    for wanted, sentence in (
        ("0" * 32, "there is no run '0000"),
        (run_id(status="RUNNING"), "is RUNNING, not FINISHED"),
        (run_id(status="FAILED"), "is FAILED, not FINISHED"),
        (run_id(steps="step2"), "has no predictions"),
    ):
        with pytest.raises(LabError, match=sentence):
            results.predictions(wanted, tracking_uri=store.uri)
