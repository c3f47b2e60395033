"""Tracked runs as DataFrames, read from MLflow. Accuracies are in percent.

from mnist_lab import results
results.run_table(steps="step3_gap").to_markdown()
"""

from __future__ import annotations

import os
import re
import tempfile
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

warnings.filterwarnings("ignore", message="IProgress not found")  # MLflow's bars in a notebook; they are off

import mlflow
import numpy as np
import pandas as pd
import sqlalchemy
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request

from mnist_lab.errors import LabError
from mnist_lab.experiment import SUMMARY_METRICS
from mnist_lab.tracking.sqlite import EXPERIMENT_NAME, check_readable, follow_move
from mnist_lab.tracking.sqlite import tracking_uri as resolve_uri

EPOCH_METRICS = ["train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr", "epoch_seconds"]
HELD_OUT_METRICS = [name.replace("test_", "validation_") for name in EPOCH_METRICS]  # of runs that hold images out
STATUSES = ("FINISHED", "RUNNING", "FAILED", "KILLED")
RUNS_PER_PAGE = 1000
# The limits of a tracking server's route for the histories of several runs.
HISTORIES = "/ajax-api/2.0/mlflow/metrics/get-history-bulk"
RUNS_PER_REQUEST, POINTS_PER_REQUEST = 100, 25_000

# The columns of the run table and their types. The hyperparameters, which differ from run to run, follow `seed`.
COLUMNS = {
    "step": "str",
    "seed": "Int64",
    "holdout": "Int64",
    "num_params": "Int64",
    "final_train_accuracy": "float64",
    "final_test_accuracy": "float64",
    "best_test_accuracy": "float64",
    "best_epoch": "Int64",
    "epochs_at_target": "Int64",
    "final_test_loss": "float64",
    "targets": "str",
    **{f"verdict_{name}": "str" for name in ("accuracy", "params", "epochs")},
    **{f"target_{name}": "float64" for name in ("accuracy", "params", "epochs")},
    **{f"reported_{name}": "float64" for name in SUMMARY_METRICS},
    "device": "str",
    "hardware": "str",
    "torch": "str",
    "git_commit": "str",
    "git_dirty": "boolean",
    "code_sha256": "str",
    "overrides": "str",
    "status": "str",
    "start_time": "datetime64[ms, UTC]",
    "minutes": "float64",
    "run_id": "str",
}
# Of runs that hold images out, the epochs are validated on those, and the test images are read once, at the end.
VALIDATION_COLUMNS = {
    "final_validation_accuracy": "float64",
    "best_validation_accuracy": "float64",
    "final_validation_loss": "float64",
}


def run_table(
    steps: Iterable[str] | str | None = None,
    seeds: Iterable[int] | int | None = None,
    *,
    include_overrides: bool | Literal["if_none"] = False,
    status: str | None = "FINISHED",
    holdout: int = 0,
    tracking_uri: str | None = None,
) -> pd.DataFrame:
    """Return one row per run, newest first, with typed columns.

    steps, seeds: only these. A step is named by its script, e.g. "step3_gap".
    include_overrides: also runs whose declaration was overridden on the command line; they are not that step any more.
        "if_none" takes them only for a step that has no run as declared: the newest, and those overridden alike.
    status: "FINISHED", "RUNNING", "FAILED" or "KILLED", or None for all.
    holdout: only the runs that hold out so many training images; 0 is the write-ups' protocol, which tests after each
        epoch. The two are never in one table.

    Columns: step, seed, holdout, every hyperparameter (missing where a run has none of that name), num_params,
    accuracies in percent, verdicts, targets, reported figures, device, versions, commit, times, run_id. `final_` is the
    last epoch, `best_` was picked on the test images; where images are held out there is `best_validation_accuracy`
    instead.

    Raises:
        LabError: if the store is missing or foreign, a step is unknown to it, or an argument is out of range.
    """
    return _table(_find_runs(resolve_uri(tracking_uri), steps, seeds, include_overrides, status, holdout), holdout)


def epoch_history(
    steps: Iterable[str] | str | None = None,
    seeds: Iterable[int] | int | None = None,
    *,
    include_overrides: bool | Literal["if_none"] = False,
    status: str | None = "FINISHED",
    holdout: int = 0,
    tracking_uri: str | None = None,
) -> pd.DataFrame:
    """Return one row per run and epoch, for the runs that `run_table` gives for the same arguments.

    Columns: run_id, step, overrides, seed, epoch, train_loss, train_accuracy, test_loss, test_accuracy, lr,
    epoch_seconds; validation_loss and validation_accuracy instead of test_ where images are held out.

    Raises:
        LabError: as `run_table`.
    """
    uri = resolve_uri(tracking_uri)
    runs = _table(_find_runs(uri, steps, seeds, include_overrides, status, holdout), holdout)[
        ["run_id", "step", "overrides", "seed", "epochs"]
    ]
    metrics = HELD_OUT_METRICS if holdout else EPOCH_METRICS
    points = _points(uri, dict(zip(runs["run_id"], runs["epochs"], strict=True)), metrics)
    # Should a point have been logged twice, its latest value counts.
    wide = points.pivot_table(index=["run_id", "epoch"], columns="metric", values="value", aggfunc="last")
    history = runs.drop(columns="epochs").merge(wide.reindex(columns=metrics).reset_index(), on="run_id")
    return history.astype({"epoch": "Int64"})[["run_id", "step", "overrides", "seed", "epoch", *metrics]]


def predictions(run_id: str, *, tracking_uri: str | None = None) -> pd.DataFrame:
    """Return what a run's trained network says of each of the 10,000 test images, in their order.

    Columns: truth, prediction, confidence (softmax of the predicted digit), logit_0 to logit_9.

    Raises:
        LabError: if there is no such run, or it has not finished, or stored no predictions.
    """
    uri = resolve_uri(tracking_uri)
    check_readable(uri)
    follow_move(uri)
    with tempfile.TemporaryDirectory() as folder, _reading(uri):
        client = mlflow.MlflowClient(uri)
        try:
            run = client.get_run(run_id)
        except MlflowException as error:
            raise LabError(f"run_id: there is no run {run_id!r} in {uri}") from error
        if run.info.status != "FINISHED":
            raise LabError(f"run {run_id} is {run.info.status}, not FINISHED: it has no predictions")
        if "predictions.npz" not in {artifact.path for artifact in client.list_artifacts(run_id)}:
            raise LabError(f"run {run_id} has no predictions: there is no predictions.npz among its artifacts")
        file = client.download_artifacts(run_id, "predictions.npz", folder)
        try:
            with np.load(file, allow_pickle=False) as arrays:
                truth, prediction, logits = arrays["truth"], arrays["prediction"], arrays["logits"]
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise LabError(f"run {run_id}: its predictions.npz can't be read: {error}") from error
    table = pd.DataFrame({"truth": truth, "prediction": prediction}).astype("int64")
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    table["confidence"] = odds.max(axis=1) / odds.sum(axis=1)
    return table.join(pd.DataFrame(logits, columns=[f"logit_{digit}" for digit in range(10)]))


def _find_runs(
    uri: str,
    steps: Iterable[str] | str | None,
    seeds: Iterable[int] | int | None,
    include_overrides: bool | Literal["if_none"],
    status: str | None,
    holdout: int,
) -> list[Run]:
    """Return the runs asked for, newest first."""
    if status is not None and status not in STATUSES:
        raise LabError(f"status: {status!r} is none of {', '.join(STATUSES)}, nor None for all")
    runs = all_runs(uri)
    if not runs:
        raise LabError(f"no runs yet in {uri}; train first, e.g. `make step1`")
    protocols = sorted({holdout_of(run) for run in runs})
    runs = [run for run in runs if holdout_of(run) == holdout]
    if not runs:
        held = " or ".join(f"{number:,}" for number in protocols)
        raise LabError(f"holdout: no run in {uri} holds out {holdout:,} training images; there are runs with {held}")
    known = sorted({run.data.tags["step"] for run in runs})
    wanted = {steps} if isinstance(steps, str) else None if steps is None else set(steps)
    for step in wanted or ():
        if step not in known:
            raise LabError(f"steps: no run of {step!r} in {uri}; there are runs of {', '.join(known)}")
    numbers = {seeds} if isinstance(seeds, int) else None if seeds is None else set(seeds)
    chosen = [
        run
        for run in runs
        if (wanted is None or run.data.tags["step"] in wanted)
        and (numbers is None or int(run.data.params["seed"]) in numbers)
        and status in (None, run.info.status)
    ]
    if include_overrides is True:
        return chosen
    counted: dict[str, str] = {}  # by step, what its runs have overridden
    if include_overrides == "if_none":
        for run in reversed(chosen):
            counted[run.data.tags["step"]] = _overrides(run)
    counted |= {run.data.tags["step"]: "" for run in chosen if not _overrides(run)}
    return [run for run in chosen if _overrides(run) == counted.get(run.data.tags["step"], "")]


def holdout_of(run: Run) -> int:
    """Return how many training images the run holds out."""
    return int(run.data.params.get("holdout", 0))


def _overrides(run: Run) -> str:
    """Return what the run has overridden, but for `holdout`: that is a protocol, with a column of its own."""
    return re.sub(r"(^| )holdout=\d+(?= |$)", "", run.data.tags.get("overrides", "")).strip()


def all_runs(uri: str) -> list[Run]:
    """Return every run of the lab in the store, newest first."""
    check_readable(uri)
    with _reading(uri):
        client = mlflow.MlflowClient(uri)
        experiment = client.get_experiment_by_name(EXPERIMENT_NAME)
        if experiment is None:
            return []
        runs: list[Run] = []
        token: str | None = ""
        while token is not None:
            page = client.search_runs(
                [experiment.experiment_id],
                order_by=["attributes.start_time DESC"],
                max_results=RUNS_PER_PAGE,
                page_token=token or None,
            )
            runs += page
            token = page.token
    # A study's own run, the parent of its seeds', has no seed.
    return [run for run in runs if "step" in run.data.tags and "seed" in run.data.params]


def _table(runs: list[Run], holdout: int) -> pd.DataFrame:
    """Return the run table of these runs; a finished run without a result is left out with a warning."""
    columns = _columns(holdout)
    complete = []
    for run in runs:
        if run.info.status == "FINISHED" and "final_test_accuracy" not in run.data.metrics:
            warnings.warn(f"run {run.info.run_id} is FINISHED but has no result: left out", stacklevel=3)
        else:
            complete.append(run)
    rows = [_row(run, columns) for run in complete]
    hyperparameters = list(dict.fromkeys(name for run in runs for name in run.data.params if name not in columns))
    if "epochs" not in hyperparameters:  # an empty table has the columns that every run has
        hyperparameters = ["batch_size", "epochs", "optimizer", "lr"]
    table = pd.DataFrame(rows, columns=["step", "seed", "holdout", *hyperparameters, *list(columns)[3:]])
    typed = {name: _typed(table[name]) for name in hyperparameters}
    return table.astype(columns).assign(**typed)


def _columns(holdout: int) -> dict[str, str]:
    """Return the columns of the run table and their types; with images held out, the best epoch is of validation."""
    if not holdout:
        return COLUMNS
    kept = {name: kind for name, kind in COLUMNS.items() if name not in ("best_test_accuracy", "epochs_at_target")}
    first = list(kept).index("final_test_accuracy")
    return dict([*list(kept.items())[:first], *VALIDATION_COLUMNS.items(), *list(kept.items())[first:]])


def _row(run: Run, columns: dict[str, str]) -> dict[str, object]:
    tags, metrics, info = run.data.tags, run.data.metrics, run.info
    stated = {name: float(value) for name, value in tags.items() if name.startswith(("target_", "reported_"))}
    return {
        **{name: tags.get(name) for name in columns},
        **stated,
        **run.data.params,
        "final_train_accuracy": metrics.get("train_accuracy"),  # MLflow gives the latest value
        "final_test_loss": metrics.get("final_test_loss", metrics.get("test_loss")),  # the former with a hold-out
        "final_validation_loss": metrics.get("validation_loss"),
        **{name: metrics[name] for name in columns if name in metrics},
        "seed": int(run.data.params["seed"]),
        "holdout": holdout_of(run),
        "git_dirty": tags.get("git_dirty") == "true",
        "overrides": _overrides(run),
        "status": info.status,
        "start_time": pd.Timestamp(info.start_time, unit="ms", tz="UTC"),
        "minutes": (info.end_time - info.start_time) / 60_000 if info.end_time else None,
        "run_id": info.run_id,
    }


def _typed(column: pd.Series[str]) -> pd.Series[Any]:
    """Return a column of MLflow's params, which are text, as integers or numbers where every value is one."""
    given = column.dropna()
    if given.str.fullmatch(r"[+-]?\d+").all():
        return column.astype("Int64")
    try:
        return pd.to_numeric(column).astype("float64")
    except ValueError:
        return column.astype("str")


def _points(uri: str, epochs: dict[str, int], metrics: list[str]) -> pd.DataFrame:
    """Return every point of these metrics of these runs: run_id, metric, epoch, value, in the order of logging.

    epochs: the number of epochs by run id, which bounds what a server is asked for at a time.
    """
    with _reading(uri):
        read = _points_over_http if uri.startswith(("http://", "https://")) else _points_by_sql
        return pd.DataFrame(read(uri, epochs, metrics), columns=["run_id", "metric", "epoch", "value"])


def _points_by_sql(uri: str, epochs: dict[str, int], metrics: list[str]) -> list[tuple[str, str, int, float]]:
    query = sqlalchemy.text(
        "SELECT run_uuid, key, step, value FROM metrics WHERE key IN :keys ORDER BY timestamp"
    ).bindparams(sqlalchemy.bindparam("keys", metrics, expanding=True))
    engine = sqlalchemy.create_engine(uri)
    try:
        with engine.connect() as connection:
            return [tuple(row) for row in connection.execute(query) if row.run_uuid in epochs]
    finally:
        engine.dispose()


def _points_over_http(uri: str, epochs: dict[str, int], metrics: list[str]) -> Iterator[tuple[str, str, int, float]]:
    # MLflow's client asks for one run and metric at a time; the route of its own UI takes many runs.
    most = max(epochs.values(), default=1)
    at_a_time = max(1, min(RUNS_PER_REQUEST, POINTS_PER_REQUEST // (2 * most)))
    run_ids = list(epochs)
    for first in range(0, len(run_ids), at_a_time):
        for metric in metrics:
            asked = {"run_id": run_ids[first : first + at_a_time], "metric_key": metric}
            response = http_request(get_default_host_creds(uri), HISTORIES, "GET", params=asked)  # type: ignore[no-untyped-call]
            response.raise_for_status()
            for point in response.json()["metrics"]:
                yield point["run_id"], point["key"], int(point["step"]), float(point["value"])


@contextmanager
def _reading(uri: str) -> Iterator[None]:
    """Turn what MLflow and the database raise on a store that can't be read into a sentence."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # the default, 7, waits for minutes
    try:
        yield
    except LabError:
        raise
    except (MlflowException, sqlalchemy.exc.SQLAlchemyError, OSError) as error:
        raise LabError(f"tracking store {uri!r} can't be read: {' '.join(str(error).split())[:300]}") from error
