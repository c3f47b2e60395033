"""Tracked runs as DataFrames, read from MLflow. Accuracies are in percent.

from mnist_lab import results
results.run_table(steps="step3_gap")
"""

from __future__ import annotations

import logging
import math
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

warnings.filterwarnings("ignore", message="IProgress not found")  # MLflow's bars in a notebook; they are off

import mlflow
import numpy as np
import pandas as pd
import sqlalchemy
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from scipy import special

from mnist_lab.data import load_mnist
from mnist_lab.errors import LabError, one_line, text_of, without_password
from mnist_lab.experiment import MAX_COUNT, SUMMARY_METRICS, quoted
from mnist_lab.numerals import finite_number
from mnist_lab.paths import EXPERIMENT_NAME
from mnist_lab.paths import tracking_uri as resolve_uri
from mnist_lab.tracking.points import read_points
from mnist_lab.tracking.sqlite import check_readable, follow_move
from mnist_lab.tracking.store import check_not_deleted
from mnist_lab.verdicts.comparison import step_order

logger = logging.getLogger(__name__)

EPOCH_METRICS = ["train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr", "epoch_seconds"]
HELD_OUT_METRICS = [name.replace("test_", "validation_") for name in EPOCH_METRICS]  # of runs that hold images out
MISTAKES = "mistakes.csv"  # an artifact of a restored run: image, prediction, confidence
STATUSES = ("FINISHED", "RUNNING", "FAILED", "KILLED")
RUNS_PER_PAGE = 1000
OF_THE_LAB = "tags.step LIKE '%' AND params.seed LIKE '%'"  # a study's own run, the parent of its seeds', has no seed
LAST_TIME = 32_503_680_000_000  # milliseconds from 1970 to the year 3000

REPORTED = [f"reported_{name}" for name in SUMMARY_METRICS]
COUNTS = {"num_params": 1, "best_epoch": 1, "epochs_at_target": 0}  # metrics that are whole numbers from these on
# The columns of the run table and their types. The hyperparameters, which differ from run to run, follow `holdout`.
COLUMNS = {
    "step": "str",
    "seed": "Int64",
    "holdout": "Int64",
    "num_params": "Int64",
    "final_train_accuracy": "float64",
    "final_validation_accuracy": "float64",
    "best_validation_accuracy": "float64",
    "final_validation_loss": "float64",
    "final_test_accuracy": "float64",
    "best_test_accuracy": "float64",
    "best_epoch": "Int64",
    "epochs_at_target": "Int64",
    "final_test_loss": "float64",
    "targets": "str",
    **{f"verdict_{name}": "str" for name in ("accuracy", "params", "epochs")},
    **{f"target_{name}": "float64" for name in ("accuracy", "params", "epochs")},
    **dict.fromkeys(REPORTED, "float64"),
    "device": "str",
    "hardware": "str",
    "torch": "str",
    "git_commit": "str",
    "git_dirty": "boolean",
    "code_sha256": "str",
    "teacher_sha256": "str",
    "overrides": "str",
    "restored": "str",
    "status": "str",
    "start_time": "datetime64[ms, UTC]",
    "minutes": "float64",
    "run_id": "str",
}
# With a hold-out each epoch is validated on the held-out images, and the test images are read once, at the end.
TESTED_COLUMNS = ("best_test_accuracy", "epochs_at_target")
VALIDATION_COLUMNS = ("final_validation_accuracy", "best_validation_accuracy", "final_validation_loss")
# What a reader needs most: of the last two accuracies a table has one.
USEFUL_COLUMNS = (
    *("step", "seed", "num_params", "epochs", "final_test_accuracy", "best_test_accuracy", "best_validation_accuracy"),
    *("targets", "run_id"),
)
USUAL_HYPERPARAMETERS = ("batch_size", "epochs", "optimizer", "lr")  # of a table without runs


@dataclass(frozen=True)
class LoadedRuns:
    """The lab's runs in one store, newest first, as they were when the store was read; and how many were left out.

    runs: COLUMNS and all hyperparameters, one row per run; values are checked, and columns not typed yet.
    found: the runs as MLflow gives them, by run id.
    """

    uri: str
    runs: pd.DataFrame
    left_out: int = 0
    found: Mapping[str, Run] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The URI without its password, for messages."""
        return without_password(self.uri)


class Which(TypedDict, total=False):
    """Which runs are in a table, beside their steps and seeds.

    include_overrides: also runs whose declaration was overridden on the command line; they are not that step any more.
        "if_none" takes them only for a step that has no run as declared: the newest, and those overridden alike.
    status: "FINISHED" (the default), "RUNNING", "FAILED" or "KILLED", or None for all.
    holdout: only the runs that hold out so many training images; 0, the default, is the write-ups' protocol, which
        tests after each epoch. The two are never in one table.
    tracking_uri: the store; the usual one if not given.
    loaded: what `load_runs` gave, so that the store is not asked again.
    """

    include_overrides: bool | Literal["if_none"]
    status: str | None
    holdout: int
    tracking_uri: str | None
    loaded: LoadedRuns | None


def run_table(
    steps: Iterable[str] | str | None = None,
    seeds: Iterable[int] | int | None = None,
    *,
    columns: Literal["all"] | None = None,
    **which: Unpack[Which],
) -> pd.DataFrame:
    """Return one row per run, by step and seed, with typed columns; of several runs of one seed the newest first.

    steps, seeds: only these. A step is named by its script, e.g. "step3_gap".
    columns: "all" for every column; else the eight that a reader needs most, and `overrides` and `restored` where a run
        has any.
    include_overrides, status, holdout, tracking_uri, loaded: as in `runs.Which`.

    All columns: step, seed, holdout, every hyperparameter (missing where a run has none of that name), num_params,
    accuracies in percent, verdicts, targets, reported figures, device, versions, commit, times, run_id. `final_` is the
    last epoch; `best_` was picked on the test images, or on the validation images where there are any. `restored` is
    the commit whose docs/results a run was restored from, and missing of runs that were trained into this store.

    Raises:
        LabError: if the store is missing or foreign, a step is unknown to it, or an argument is out of range.
    """
    if columns not in (None, "all"):
        raise LabError(f'columns: {columns!r} is not "all", nor None for the most useful ones')
    found = _find_runs(steps, seeds, **which).runs
    other_protocol = TESTED_COLUMNS if which.get("holdout") else VALIDATION_COLUMNS
    kinds = {name: kind for name, kind in COLUMNS.items() if name not in other_protocol}
    shown = found if found.empty else found.dropna(axis="columns", how="all")
    hyperparameters = [str(name) for name in shown if name not in COLUMNS]
    first, rest = list(kinds)[:3], list(kinds)[3:]
    table = found[[*first, *hyperparameters, *rest]].astype(kinds)
    table = table.assign(**{name: _typed(found[name]) for name in hyperparameters})
    order = {step: place for place, step in enumerate(sorted(table["step"].unique(), key=step_order))}
    by_seed = table.assign(place=table["step"].map(order)).sort_values(["place", "seed"], kind="stable")
    table = by_seed.drop(columns="place").reset_index(drop=True)
    if columns == "all":
        return table
    useful = [name for name in USEFUL_COLUMNS if name in table]
    marks = [name for name in ("overrides", "restored") if table[name].fillna("").ne("").any()]
    return table[[*useful[:2], *marks, *useful[2:]]]


def epoch_history(
    steps: Iterable[str] | str | None = None,
    seeds: Iterable[int] | int | None = None,
    *,
    metrics: Sequence[str] | None = None,
    **which: Unpack[Which],
) -> pd.DataFrame:
    """Return one row per run and epoch, for the runs that `run_table` gives for the same arguments.

    metrics: names of metrics with a point per epoch, in place of the usual ones below.

    Columns: run_id, step, overrides, seed, epoch, train_loss, train_accuracy, test_loss, test_accuracy, lr,
    epoch_seconds; validation_loss and validation_accuracy instead of test_ where images are held out.

    Raises:
        LabError: as `run_table`.
    """
    found = _find_runs(steps, seeds, **which)
    metrics = list(metrics or (HELD_OUT_METRICS if which.get("holdout") else EPOCH_METRICS))
    points = _points(found.uri, dict(zip(found.runs["run_id"], found.runs["epochs"], strict=True)), metrics)
    # Should a point have been logged twice, its latest value counts.
    wide = points.pivot_table(index=["run_id", "epoch"], columns="metric", values="value", aggfunc="last")
    identity = {name: COLUMNS[name] for name in ("run_id", "step", "overrides", "seed")}
    history = found.runs[[*identity]].astype(identity).merge(wide.reindex(columns=metrics).reset_index(), on="run_id")
    return history.astype({"epoch": "Int64"})[[*identity, "epoch", *metrics]]


def predictions(run_id: str, *, tracking_uri: str | None = None) -> pd.DataFrame:
    """Return what a run's trained network says of each of the 10,000 test images, in their order.

    Columns: truth, prediction, confidence (softmax of the predicted digit), logit_0 to logit_9. Of a restored run, only
    mistakes are known: other images have no confidence, and there are no logits.

    Raises:
        LabError: if there is no such run, or it has not finished, or stored no predictions that can be read.
    """
    uri = resolve_uri(tracking_uri)
    check_readable(uri)
    follow_move(uri)
    with tempfile.TemporaryDirectory() as folder, _reading(uri):
        client = mlflow.MlflowClient(uri)
        try:
            run = client.get_run(run_id)
        except MlflowException as error:
            raise LabError(f"run_id: there is no run {run_id!r} in {without_password(uri)}") from error
        if run.info.status != "FINISHED":
            raise LabError(f"run {run_id} is {run.info.status}, not FINISHED: it has no predictions")
        if "restored" in run.data.tags:
            return _restored_predictions(client, run, Path(folder))
        if "predictions.npz" not in {artifact.path for artifact in client.list_artifacts(run_id)}:
            raise LabError(f"run {run_id} has no predictions: there is no predictions.npz among its artifacts")
        file = client.download_artifacts(run_id, "predictions.npz", folder)
        try:
            truth, prediction, logits = _read_predictions(Path(file))
        except Exception as error:  # a file from elsewhere breaks zip, zlib and numpy in many ways
            raise LabError(f"run {run_id}: its predictions.npz can't be read: {text_of(error)}") from error
    table = pd.DataFrame({"truth": truth, "prediction": prediction}).astype("int64")
    table["confidence"] = special.softmax(logits, axis=1).max(axis=1)
    return table.join(pd.DataFrame(logits, columns=[f"logit_{digit}" for digit in range(10)]))


def keeps_predictions(run_id: str, *, tracking_uri: str | None = None) -> bool:
    """Say whether `predictions` has something to tell of a run; of some published ones it was not kept."""
    try:
        predictions(run_id, tracking_uri=tracking_uri)
    except LabError:
        return False
    return True


def _restored_predictions(client: mlflow.MlflowClient, run: Run, folder: Path) -> pd.DataFrame:
    """Return what a restored run's network said, as far as it is known: by its mistakes, and the labels of MNIST."""
    run_id = run.info.run_id
    if MISTAKES not in {artifact.path for artifact in client.list_artifacts(run_id)}:
        raise LabError(f"run {run_id} was restored, and which images it got wrong was not kept when it was published")
    truth = load_mnist().test_labels.numpy()
    try:
        mistakes = pd.read_csv(client.download_artifacts(run_id, MISTAKES, str(folder)), index_col="image")
        table = pd.DataFrame({"truth": truth, "prediction": truth, "confidence": math.nan})
        table.loc[mistakes.index, ["prediction", "confidence"]] = mistakes[["prediction", "confidence"]]
        return table.astype({"prediction": "int64"})
    except (ValueError, KeyError) as error:
        raise LabError(f"run {run_id}: its {MISTAKES} can't be read: {one_line(error)}") from error


def _read_predictions(file: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return truth (N,), prediction (N,) and logits (N, 10); a damaged file raises errors of many kinds."""
    loaded = np.load(file, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        raise ValueError("it is one array, not an archive of several")
    with loaded as arrays:
        truth, prediction, logits = arrays["truth"], arrays["prediction"], arrays["logits"]
    for name, digits in (("truth", truth), ("prediction", prediction)):
        if digits.dtype.kind not in "iu" or digits.ndim != 1 or not len(digits):
            raise ValueError(f"{name} is {digits.dtype} {digits.shape}, not whole numbers (N,)")
        if digits.min() < 0 or digits.max() > 9:
            raise ValueError(f"{name} has values that are not digits from 0 to 9")
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction has the shape {prediction.shape} and truth {truth.shape}")
    if logits.dtype.kind != "f" or logits.shape != (len(truth), 10):
        raise ValueError(f"logits is {logits.dtype} {logits.shape}, not floats ({len(truth)}, 10)")
    if not np.isfinite(logits).all():
        raise ValueError("logits has values that are not finite")
    return truth, prediction, logits


def load_runs(tracking_uri: str | None = None) -> LoadedRuns:
    """Read every run of the lab in the store, and no other program's runs beside them.

    A run whose values can't be right is left out, and a warning of the logger names it.

    Raises:
        LabError: if the store is missing, foreign or can't be read, or its experiment is deleted.
    """
    uri = resolve_uri(tracking_uri)
    check_readable(uri)
    found, rows = _search(uri), []
    for run in found:
        try:
            rows.append(_row(run))
        except ValueError as error:
            _say_left_out(run.info.run_id, str(error))
    runs = pd.DataFrame(rows, columns=None if rows else [*COLUMNS, *USUAL_HYPERPARAMETERS], dtype=object)
    return LoadedRuns(uri, runs, left_out=len(found) - len(runs), found={run.info.run_id: run for run in found})


@cache  # once in each program, however often a store is read
def _say_left_out(run_id: str, reason: str) -> None:
    logger.warning("left out: run %s: %s", run_id, reason)


def _search(uri: str) -> list[Run]:
    """Return the runs in the store that have a step and a seed, newest first."""
    with _reading(uri):
        client = mlflow.MlflowClient(uri)
        experiment = client.get_experiment_by_name(EXPERIMENT_NAME)
        if experiment is None:
            return []
        check_not_deleted(uri, experiment)
        search = partial(
            client.search_runs,
            [experiment.experiment_id],
            OF_THE_LAB,
            order_by=["attributes.start_time DESC"],
            max_results=RUNS_PER_PAGE,
        )
        page = search()
        runs = list(page)
        while page.token:
            page = search(page_token=page.token)
            runs += page
    return runs


def _find_runs(
    steps: Iterable[str] | str | None,
    seeds: Iterable[int] | int | None,
    *,
    include_overrides: bool | Literal["if_none"] = False,
    status: str | None = "FINISHED",
    holdout: int = 0,
    tracking_uri: str | None = None,
    loaded: LoadedRuns | None = None,
) -> LoadedRuns:
    """Return the runs asked for, newest first."""
    loaded = loaded or load_runs(tracking_uri)
    name = loaded.name
    if status is not None and status not in STATUSES:
        raise LabError(f"status: {status!r} is none of {', '.join(STATUSES)}, nor None for all")
    if loaded.runs.empty and not loaded.left_out:
        raise LabError(f"no runs yet in {name}; train first, e.g. `make step1`")
    runs = loaded.runs[loaded.runs["holdout"] == holdout]
    if runs.empty and not loaded.runs.empty:
        held = " or ".join(f"{number:,}" for number in sorted(loaded.runs["holdout"].unique()))
        raise LabError(f"holdout: no run in {name} holds out {holdout:,} training images; there are runs with {held}")
    known = sorted(runs["step"].unique())
    wanted = known if steps is None else [steps] if isinstance(steps, str) else list(steps)
    for step in wanted:
        if step not in known:
            raise LabError(f"steps: no run of {step!r} in {name}; there are runs of {', '.join(known)}")
    runs = runs[runs["step"].isin(wanted)]
    if seeds is not None:
        runs = runs[runs["seed"].isin(list(seeds) if isinstance(seeds, Iterable) else [seeds])]
    if status is not None:
        runs = runs[runs["status"] == status]
    counted: str | pd.Series[str] = ""
    if include_overrides == "if_none":
        by_step = runs.groupby("step")["overrides"]
        counted = by_step.transform(lambda of_step: "" if "" in set(of_step) else of_step.iloc[0])
    return replace(loaded, runs=runs if include_overrides is True else runs[runs["overrides"] == counted])


def _row(run: Run) -> dict[str, object]:
    """Return a run's row of the table with its values read and checked.

    Raises:
        ValueError: if a value can't be right; it names the first one.
    """
    tags, params, metrics, info = run.data.tags, run.data.params, run.data.metrics, run.info
    holdout = _count("holdout", params.get("holdout", "0"))
    if not tags["step"].strip():
        raise ValueError("its step has no name")
    for name in ("epochs", "device"):
        if name not in params:
            raise ValueError(f"it has no {name}")
    if info.status == "FINISHED":
        for name in ("num_params", "final_test_accuracy", f"best_{'validation' if holdout else 'test'}_accuracy"):
            if name not in metrics:
                raise ValueError(f"it is FINISHED but has no result: {name} is missing")
    started = _time("start_time", info.start_time)
    row: dict[str, Any] = {
        **{name: tags.get(name) if kind == "str" else None for name, kind in COLUMNS.items()},
        **{name: _number(name, tags[name]) for name in ("target_accuracy", *REPORTED) if name in tags},
        **{name: _count(name, tags[name], 1, MAX_COUNT) for name in ("target_params", "target_epochs") if name in tags},
        **{name: metrics[name] for name in (*TESTED_COLUMNS, *VALIDATION_COLUMNS) if name in metrics},
        "final_test_accuracy": metrics.get("final_test_accuracy"),
        "final_train_accuracy": metrics.get("train_accuracy"),  # MLflow gives the latest value
        "final_test_loss": metrics.get("final_test_loss", metrics.get("test_loss")),  # the former with a hold-out
        "final_validation_loss": metrics.get("validation_loss"),
        **{name: _count(name, metrics[name], least) for name, least in COUNTS.items() if name in metrics},
        "git_dirty": {"true": True, "false": False}.get(tags.get("git_dirty", "")),
        "start_time": started,
        "minutes": None if info.end_time is None else (_time("end_time", info.end_time) - started).total_seconds() / 60,
    }
    for name, value in row.items():
        if name.endswith("_accuracy") and isinstance(value, float) and not 0 <= value <= 100:
            raise ValueError(f"its {name} is {value:g}, not a percentage")
    return {
        **row,
        **{name: text for name, text in params.items() if name not in COLUMNS},  # the hyperparameters
        "epochs": _count("epochs", params["epochs"], 1, MAX_COUNT),
        "seed": _count("seed", params["seed"]),
        "holdout": holdout,
        # Without the hold-out: that is a protocol, with a column of its own.
        "overrides": re.sub(r"(^| )holdout=\d+(?= |$)", "", tags.get("overrides", "")).strip(),
        "device": params["device"],
        "status": info.status,
        "run_id": info.run_id,
    }


def _count(name: str, value: str | float, least: int = 0, most: int = 2**63 - 1) -> int:
    """Return a param's text or a metric's value as a whole number; raises ValueError if it is none in these bounds."""
    if isinstance(value, str):
        number = int(value) if re.fullmatch(r"[0-9]{1,19}", value) else None
    else:
        number = int(value) if value.is_integer() else None
    if number is None or not least <= number <= most:
        raise ValueError(f"its {name} is {quoted(value)}, not a whole number from {least} to {most:,}")
    return number


def _number(name: str, text: str) -> float:
    """Return a tag's text as a number; raises ValueError if it is none, or not finite."""
    try:
        return finite_number(text)
    except ValueError:
        raise ValueError(f"its {name} is {quoted(text)}, not a number") from None


def _time(name: str, milliseconds: int | None) -> pd.Timestamp:
    if milliseconds is None or not 0 <= milliseconds <= LAST_TIME:
        raise ValueError(f"its {name} is {quoted(milliseconds)}, not a time before the year 3000")
    return pd.Timestamp(milliseconds, unit="ms", tz="UTC")


def _typed(column: pd.Series[Any]) -> pd.Series[Any]:
    """Return a column of hyperparameters as integers or numbers where every value is one, else as text."""
    text = column.astype("str")
    if text.dropna().str.fullmatch(r"[+-]?[0-9]{1,18}").all():
        return text.astype("Int64")
    try:
        return pd.to_numeric(text).astype("float64")
    except (ValueError, OverflowError):
        return text


def _points(uri: str, epochs: dict[str, int], metrics: list[str]) -> pd.DataFrame:
    """Return every point of these metrics as run_id, metric, epoch, value, in the order of logging.

    epochs: the runs' numbers of epochs by run id; they bound what a server is asked for at a time.
    """
    with _reading(uri):
        points = pd.DataFrame(read_points(uri, epochs, metrics), columns=["run_id", "metric", "epoch", "value"])
    # MLflow keeps the largest float for infinity.
    largest = sys.float_info.max
    return points.astype({"value": "float64"}).replace({"value": {largest: math.inf, -largest: -math.inf}})


@contextmanager
def _reading(uri: str) -> Iterator[None]:
    """Turn what MLflow and the database raise on a store that can't be read into a sentence."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # the default, 7, waits for minutes
    try:
        yield
    except LabError:
        raise
    except (MlflowException, sqlalchemy.exc.SQLAlchemyError, OSError) as error:
        raise LabError(f"tracking store {without_password(uri)!r} can't be read: {one_line(error)}") from error
