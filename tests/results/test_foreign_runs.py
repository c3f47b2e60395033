"""Runs of other programs in the lab's MLflow experiment: what can't be right is left out and named, the rest shows."""

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from mlflow.entities import Metric, Param

from mnist_lab import figures, results
from mnist_lab.errors import LabError
from mnist_lab.results.report import write_report
from mnist_lab.tracking.store import Store, open_store
from run_writer import T0, write_run

PARAMS = {"seed": "0", "epochs": "1", "device": "cpu", "lr": "0.1"}
TAGS = {"step": "foreign", "overrides": ""}
METRICS = {
    **{"train_loss": 0.1, "train_accuracy": 99.0, "test_loss": 0.05, "test_accuracy": 99.1, "lr": 0.1},
    **{"num_params": 7852.0, "final_test_accuracy": 99.1, "best_test_accuracy": 99.1, "best_epoch": 1.0},
}
MEASURED_ONCE = ("num_params", "final_test_accuracy", "best_test_accuracy")
NASTY_NAMES = ["a$\\frac{$", "a|b <b>", "../x\ntwo lines", "_x\x01", "step" + "9" * 5000, "é"]


def write_foreign_run(
    store: Store,
    params: Mapping[str, str] = PARAMS,
    tags: Mapping[str, str] = TAGS,
    metrics: Mapping[str, float] = METRICS,
    *,
    start_time: int = T0 + 10,
    end_time: int = T0 + 20,
    status: str = "FINISHED",
) -> str:
    client = mlflow.MlflowClient(store.uri)
    run_id: str = client.create_run(store.experiment_id, start_time=start_time, tags=dict(tags)).info.run_id
    client.log_batch(
        run_id,
        metrics=[Metric(name, value, T0, 1) for name, value in metrics.items()],
        params=[Param(name, value) for name, value in params.items()],
    )
    client.set_terminated(run_id, status=status, end_time=end_time)
    return run_id


def write_two_runs(store: Store) -> Store:
    write_run(store, "step1", 0, [98.0, 99.0], start_time=T0)
    write_run(store, "step1", 1, [98.0, 99.1], start_time=T0 + 1)
    return store


@pytest.fixture
def store(uri: str) -> Store:
    return write_two_runs(open_store(uri))


NO_EPOCHS, NO_DEVICE = ({key: PARAMS[key] for key in PARAMS if key != name} for name in ("epochs", "device"))
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"params": PARAMS | {"seed": "abc"}}, "its seed is 'abc', not a whole number from 0 to"),
    ({"params": PARAMS | {"seed": "٣"}}, "its seed is '٣'"),
    ({"params": PARAMS | {"epochs": "9" * 30}}, "its epochs is '999999999999999999999999999999', not a whole number"),
    ({"params": NO_EPOCHS}, "it has no epochs"),
    ({"params": NO_DEVICE}, "it has no device"),
    ({"params": PARAMS | {"holdout": "some"}}, "its holdout is 'some'"),
    ({"tags": TAGS | {"step": " "}}, "its step has no name"),
    ({"tags": TAGS | {"target_accuracy": "most"}}, "its target_accuracy is 'most', not a number"),
    ({"tags": TAGS | {"target_accuracy": "994"}}, "its target_accuracy is '994', not a number"),
    ({"tags": TAGS | {"reported_best_test_accuracy": "high"}}, "its reported_best_test_accuracy is 'high', not a num"),
    ({"metrics": METRICS | {"num_params": 10.5}}, "its num_params is 10.5, not a whole number from 1"),
    ({"metrics": METRICS | {"num_params": math.inf}}, "its num_params is 1.79"),
    ({"metrics": METRICS | {"final_test_accuracy": math.nan}}, "it is FINISHED but has no parameters or accuracy"),
    ({"metrics": METRICS | {"best_test_accuracy": 99.0}}, "its final_test_accuracy, 99.1, is above its best"),
    ({"metrics": METRICS | {"best_test_accuracy": 1e300}}, "its best_test_accuracy is 1e+300, not a number"),
    ({"metrics": METRICS | {"train_accuracy": -3.0}}, "its final_train_accuracy is -3"),
    ({"metrics": {"final_test_accuracy": 99.0}}, "it is FINISHED but has no parameters or accuracy"),
    ({"start_time": 10**17}, "its start_time is 100000000000000000, not a whole number"),
    ({"end_time": 10**17}, "its end_time is 100000000000000000"),
]


def test_what_cant_be_right_is_left_out_and_named_once(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    lab = results.run_table(tracking_uri=store.uri), results.epoch_history(tracking_uri=store.uri)
    wrong = {write_foreign_run(store, **run): sentence for run, sentence in WRONG}
    write_foreign_run(store, params={"epochs": "many"})  # without a seed or a step it is no run of the lab
    write_foreign_run(store, tags={"overrides": ""})

    for _ in range(2):
        pd.testing.assert_frame_equal(results.run_table(tracking_uri=store.uri), lab[0])
        pd.testing.assert_frame_equal(results.epoch_history(tracking_uri=store.uri), lab[1])
    assert results.compare_table(tracking_uri=store.uri)["step"].tolist() == ["step1"]

    assert len(caplog.messages) == len(wrong)
    for run_id, sentence in wrong.items():
        (message,) = (message for message in caplog.messages if run_id in message)
        assert message.startswith(f"left out: run {run_id}: {sentence}")


def test_odd_values_replace_nothing_that_is_measured_and_are_text_or_missing(store: Store) -> None:
    names = ("step", "final_test_accuracy", "status", "run_id", "start_time", "facts", "best_validation_accuracy")
    params = PARAMS | dict.fromkeys(names, "high") | {"lr": "high", "momentum": "9" * 400, "gamma": "٣"}
    values = METRICS | {"test_loss": math.nan, "train_loss": math.inf, "lr": math.nan}
    run_id = write_foreign_run(store, params, TAGS | {"git_dirty": "unknown"}, values)
    odd = PARAMS | {"batch_size": "+1", "epochs": "+1", "step_size": "9" * 19}
    write_foreign_run(store, odd, TAGS | {"step": "odd"})

    table = results.run_table(columns="all", tracking_uri=store.uri).set_index("step", drop=False)
    run = table.loc["foreign"]
    shown = ["step", "final_test_accuracy", "status", "run_id", "lr", "momentum", "gamma"]
    assert run[shown].tolist() == ["foreign", 99.1, "FINISHED", run_id, "high", math.inf, "٣"]
    assert run[["git_commit", "git_dirty", "hardware", "final_test_loss"]].isna().all()
    assert table.loc["odd", ["batch_size", "epochs"]].tolist() == [1, 1]
    assert table.loc["step1", "lr"].tolist() == ["0.1", "0.1"]
    epoch = results.epoch_history("foreign", tracking_uri=store.uri).iloc[0]
    assert epoch[["test_loss", "lr"]].isna().all()
    assert epoch["train_loss"] == math.inf


# ---- report, export and figures

HARMLESS_BUT_ODD: list[dict[str, Any]] = [
    *({"tags": TAGS | {"step": step}} for step in NASTY_NAMES),
    {"tags": TAGS | {"overrides": "a$\\frac{$ | <b>"}},
    {"tags": TAGS | {"step": "few"}, "metrics": {name: METRICS[name] for name in MEASURED_ONCE}},
    {"tags": TAGS | {"step": "some"}, "metrics": {name: METRICS[name] for name in (*MEASURED_ONCE, "lr")}},
    {"tags": TAGS | {"step": "lost"}, "metrics": METRICS | {"test_accuracy": math.nan, "train_loss": math.inf}},
    {"tags": TAGS | {"step": "huge"}, "metrics": METRICS | {"test_loss": 1e300, "lr": 1e308, "num_params": 2.0**62}},
    {"tags": TAGS | {"step": "huge"}, "params": PARAMS | {"seed": "1"}, "metrics": METRICS | {"test_loss": 1e308}},
]


@pytest.fixture(scope="module")
def odd_store(new_store: Callable[[], Store]) -> Store:
    store = write_two_runs(new_store())
    for run in [*HARMLESS_BUT_ODD, *(run for run, _ in WRONG)]:
        write_foreign_run(store, **run)
    return store


def test_reports_and_figures_show_others(odd_store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        html, md = write_report(tmp_path / "reports", tracking_uri=odd_store.uri, scripts=tmp_path)
        loaded = results.load_runs(odd_store.uri)
        history = results.epoch_history(include_overrides=True, loaded=loaded)
        figures.plot_learning_rate(history).draw_without_rendering()
        compared = results.compare_table(include_overrides=True, loaded=loaded)
        figures.plot_steps(compared).draw_without_rendering()
        assert "../x two lines" in results.compare_text(compared)

    for page in (html.read_text("utf-8"), md.read_text("utf-8")):
        assert "No training curves: history has no rows" in page
        assert "step1" in page
        assert "not recorded" in page
    assert sum(message.startswith("left out: run ") for message in caplog.messages) == len(WRONG)


def test_an_export_takes_what_can_name_a_file_and_prints_it_whatever_the_locale(
    odd_store: Store, tmp_path: Path, lab: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    printed = io.BytesIO()
    with redirect_stdout(io.TextIOWrapper(printed, "ascii", write_through=True)):
        lab("export", "--folder", tmp_path, "--tracking-uri", odd_store.uri)
        lab("compare", "--tracking-uri", odd_store.uri)
        assert b"\\xe9.csv" in printed.getvalue()

    assert {"step1.csv", "few.csv", "lost.csv", "é.csv"} <= {file.name for file in tmp_path.iterdir()}
    assert "| `step1` | 2 |" in (tmp_path / "README.md").read_text()
    assert "left out: step: 'a|b <b>' can't name a file of figures" in "\n".join(caplog.messages)
    assert re.search(r"not known: which test images \d+ runs got wrong, the first is ", caplog.text)
    assert ",nan" not in (tmp_path / "epochs.csv").read_text()


# ---- one reading of the store


def test_the_store_is_asked_for_the_labs_runs_only_and_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        write_foreign_run(store, params={"number": str(number)}, tags={"other": "x"})
    found = []
    search = mlflow.MlflowClient.search_runs

    def searched(*given: Any, **more: Any) -> Any:
        page = search(*given, **more)
        found.append(len(page))
        return page

    monkeypatch.setattr(mlflow.MlflowClient, "search_runs", searched)
    loaded = results.load_runs(store.uri)
    results.compare_table(loaded=loaded)
    results.compare_pairs(loaded=loaded)
    results.epoch_history(loaded=loaded)
    assert found == [2]


def test_a_deleted_experiment_is_said_to_be_so(store: Store, tmp_path: Path) -> None:
    mlflow.MlflowClient(store.uri).delete_experiment(store.experiment_id)
    for read in (
        lambda: results.run_table(tracking_uri=store.uri),
        lambda: write_report(tmp_path, tracking_uri=store.uri, scripts=tmp_path),
        lambda: open_store(store.uri),  # as writers say
    ):
        with pytest.raises(LabError, match="the experiment 'mnist' is deleted; restore it in MLflow"):
            read()
