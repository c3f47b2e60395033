"""Tracked runs as DataFrames, read from MLflow, as by `results.run_table("step3_gap")`. Accuracies are in percent."""

from __future__ import annotations

import logging
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict, Unpack

import mlflow
import numpy as np
import pandas as pd
from mlflow.entities import Run
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from scipy import special

from mnist_lab.data import load_mnist
from mnist_lab.errors import LabError, did_you_mean, text_of, without_password
from mnist_lab.experiment import MAX_COUNT, quoted
from mnist_lab.measures import FOLDED, HELD_OUT, MEASURES, TESTED, protocol
from mnist_lab.paths import EXPERIMENT_NAME, script_named
from mnist_lab.paths import tracking_uri as resolve_uri
from mnist_lab.tracking.connection import environment_variables
from mnist_lab.tracking.sqlite import check_readable, follow_move, read_points
from mnist_lab.tracking.store import MAX_RUNS, Store, check_not_deleted, find_run
from mnist_lab.verdicts.comparison import step_order

logger = logging.getLogger(__name__)
_say_left_out = cache(partial(logger.warning, "left out: run %s: %s"))  # once, however often a store is read

OF_THE_LAB = "tags.step LIKE '%' AND params.seed LIKE '%'"  # a study's own run, the parent of its seeds', has no seed
TARGETS = ("accuracy", "params", "epochs")
MISTAKES = "mistakes.csv"  # an artifact of a restored run: image, prediction, confidence
Steps = Iterable[str] | str | None
Seeds = Iterable[int] | int | None


class Kind(NamedTuple):
    """The values of a column: their type (or a format of dates), and the bounds or form of those that can be right."""

    dtype: str
    low: float = -math.inf
    high: float = math.inf
    form: str = r"[\s\S]*"

    def __str__(self) -> str:
        kinds = {"Int64": "a whole number", "float64": "a number", "str": f"text like {self.form}"}
        bounds = "" if math.isinf(self.low) else f" from {self.low:,} to {self.high:,}"
        return kinds.get(self.dtype, f"a time like {self.dtype}") + bounds

    def excludes(self, values: pd.Series[Any]) -> pd.Series[bool]:
        """Say of each value whether it can't be right; one that is missing can be."""
        if self.dtype == "str":
            return ~values.str.fullmatch(self.form)
        if self.dtype.startswith("%"):
            return ~pd.to_datetime(values, format=self.dtype, errors="coerce").between("1970", "2200")
        number = pd.to_numeric(values, errors="coerce").astype("float64")
        right = number.between(self.low, self.high) & (number.mod(1).eq(0) | (self.dtype != "Int64"))
        return values.notna() & ~right


TEXT, PERCENTAGE, LOSS = Kind("str"), Kind("float64", 0, 100), Kind("float64")
SEED, COUNT, STATED = Kind("Int64", 0, 2**53), Kind("Int64", 1, 2**62), Kind("float64", 1, MAX_COUNT)
TIME = Kind("Int64", 0, 32_503_680_000_000)  # milliseconds from 1970 to the year 3000
# The columns of the run table. The hyperparameters, which differ from run to run, follow `folds`.
COLUMNS = {
    **{"step": TEXT, "seed": SEED, "holdout": SEED, "folds": SEED, "num_params": COUNT},
    **dict.fromkeys(("final_train_accuracy", "final_validation_accuracy", "best_validation_accuracy"), PERCENTAGE),
    **{"final_validation_loss": LOSS, "final_test_accuracy": PERCENTAGE, "best_test_accuracy": PERCENTAGE},
    **{"best_epoch": COUNT, "epochs_at_target": SEED, "final_test_loss": LOSS, "targets": TEXT},
    **{f"verdict_{name}": TEXT for name in TARGETS},
    **{"target_accuracy": PERCENTAGE, "target_params": STATED, "target_epochs": STATED},
    **{f"reported_{name}": PERCENTAGE if name.endswith("_accuracy") else LOSS for name in TESTED.summary},
    **dict.fromkeys(("device", "hardware", "torch", "git_commit"), TEXT),
    "git_dirty": Kind("boolean"),
    **dict.fromkeys(("code_sha256", "teacher_sha256", "overrides", "restored", "status", "failed"), TEXT),
    **{"start_time": Kind("datetime64[ms, UTC]"), "minutes": LOSS, "run_id": TEXT},
}
NUMBERS = {
    **{name: kind for name, kind in COLUMNS.items() if kind.dtype in ("Int64", "float64")},
    **{"epochs": Kind("Int64", 1, MAX_COUNT), "start_time": TIME, "end_time": TIME},
}
# What a reader needs most: of the last two accuracies a table has one. The others stand only where a run has any.
USEFUL_COLUMNS = (
    *("step", "seed", "num_params", "epochs", "final_test_accuracy", "best_test_accuracy", "best_validation_accuracy"),
    *("targets", "run_id", "overrides", "restored"),
)


@dataclass(frozen=True)
class LoadedRuns:
    """The lab's runs in one store, newest first, as they were when the store was read.

    runs: COLUMNS, typed, and all hyperparameters as text. found: the runs as MLflow gives them, by run id.
    """

    uri: str
    runs: pd.DataFrame
    found: Mapping[str, Run]

    @property
    def name(self) -> str:
        return without_password(self.uri)

    @property
    def tested(self) -> pd.DataFrame:
        """The runs of the write-ups' protocol: on all training images, and tested after each epoch."""
        return self.runs[(self.runs[["holdout", "folds"]] == 0).all(axis=1)]


ALLOWED = {
    "status": ("FINISHED", "RUNNING", "FAILED", "KILLED", None),
    "include_overrides": (False, True, "if_none"),
    **{name: range(60_000) for name in ("holdout", "folds")},
}


class RunFilter(TypedDict, total=False):
    """Which runs are in a table, beside their steps and seeds.

    include_overrides: also runs with overrides from the command line, which are not counted as the step otherwise.
        "if_none" takes them only for a step that has no run as declared: those with the newest run's overrides.
    status: "FINISHED" (the default), "RUNNING", "FAILED" or "KILLED", or None for all.
    holdout, folds: only the runs that hold out so many training images, or a fold of so many; 0, the default, is the
        write-ups' protocol, which tests after each epoch. Two protocols are never in one table.
    tracking_uri: the store; the usual one if not given. loaded: what `load_runs` gave, so that it is not read again.
    """

    include_overrides: bool | Literal["if_none"]
    status: str | None
    holdout: int
    folds: int
    tracking_uri: str | None
    loaded: LoadedRuns | None


def run_table(
    steps: Steps = None, seeds: Seeds = None, *, columns: Literal["all"] | None = None, **which: Unpack[RunFilter]
) -> pd.DataFrame:
    """Return one row per run, by step and seed, with typed columns; of several runs of one seed the newest first.

    steps, seeds: only these. A step is named by its script, e.g. "step3_gap", or "step3" for short.
    columns: "all" for every column; else the eight most useful ones, and `overrides` and `restored` if used.
    include_overrides, status, holdout, folds, tracking_uri, loaded: as in `runs.RunFilter`.

    All columns: step, seed, holdout, folds, every hyperparameter (missing where a run has none of that name),
    num_params, accuracies in percent, verdicts, targets, reported figures, device, versions, commit, times, run_id.
    `final_` is the last epoch; `best_` was picked on the test images, or on the validation images where there are any.
    `failed`: the seeds of the same code and protocol that have a failed run but no finished one; no mean has them.
    `restored` is the commit whose docs/results a run was restored from; of runs that were trained here it is missing.

    Raises LabError if the store is missing or foreign, a step has no such run, or an argument is out of range.
    """
    if columns not in (None, "all"):
        raise LabError(f'columns: {columns!r} is not "all", nor None for the most useful ones')
    found = _find_runs(steps, seeds, **which).runs
    other_protocol = [name for name in COLUMNS if "validation" in name]
    if which.get("holdout") or which.get("folds"):  # each epoch is validated, and the test images are read at the end
        other_protocol = ["best_test_accuracy", "epochs_at_target"]
    names = [name for name in COLUMNS if name not in other_protocol]
    shown = found if found.empty else found.dropna(axis="columns", how="all")
    hyperparameters = {str(name): _typed(found[name]) for name in shown if name not in COLUMNS}
    table = found.assign(**hyperparameters)[[*names[:4], *hyperparameters, *names[4:]]]
    table = table.sort_values("seed", kind="stable").sort_values("step", key=places, kind="stable", ignore_index=True)
    if columns == "all":
        return table
    table["restored"] = table["restored"].str[:7]  # as git shortens a commit
    unused = [name for name in ("overrides", "restored") if table[name].fillna("").eq("").all()]
    return table[[name for name in USEFUL_COLUMNS if name in table and name not in unused]]


def epoch_history(
    steps: Steps = None, seeds: Seeds = None, *, metrics: Sequence[str] | None = None, **which: Unpack[RunFilter]
) -> pd.DataFrame:
    """Return one row per run and epoch, for the runs that `run_table` gives for the same arguments.

    metrics: names of metrics with a point per epoch, in place of the usual ones below.

    Columns: run_id, step, overrides, seed, epoch, train_loss, train_accuracy, test_loss, test_accuracy, lr,
    epoch_seconds; validation_loss and validation_accuracy instead of test_ where images are held out.
    """
    found = _find_runs(steps, seeds, **which)
    usual = protocol(which.get("holdout", 0), which.get("folds", 0)).each_epoch
    metrics = [metrics] if isinstance(metrics, str) else list(metrics or usual)
    epochs = {str(run_id): int(number) for run_id, number in found.runs[["run_id", "epochs"]].to_numpy()}
    with reading(found.uri):
        rows = read_points(found.uri, epochs, metrics)  # `epochs` bounds what a server is asked for at a time
    points = pd.DataFrame(rows, columns=["run_id", "metric", "epoch", "value"]).astype({"value": "float64"})
    largest = sys.float_info.max  # which MLflow keeps for infinity
    points = points.replace({"value": {largest: math.inf, -largest: -math.inf}})
    # Should a point have been logged twice, its latest value counts.
    wide = points.pivot_table(index=["run_id", "epoch"], columns="metric", values="value", aggfunc="last")
    identity = ["run_id", "step", "overrides", "seed"]
    history = found.runs[identity].merge(wide.reindex(columns=metrics).reset_index(), on="run_id")
    return history.astype({"epoch": "Int64"})[[*identity, "epoch", *metrics]]


def load_runs(tracking_uri: str | None = None, *, artifacts: bool = False) -> LoadedRuns:
    """Read every run of the lab in the store; one whose values can't be right is left out, and a warning names it.

    artifacts: whether these will be read too; then the paths of a moved store are corrected.
    Raises LabError if the store is missing, foreign or can't be read, or its experiment is deleted.
    """
    uri = resolve_uri(tracking_uri)
    check_readable(uri)
    if artifacts:
        follow_move(uri)
    with reading(uri):
        client = mlflow.MlflowClient(uri)
        experiment = client.get_experiment_by_name(EXPERIMENT_NAME)
        found: list[Run] = []
        if experiment is not None:
            check_not_deleted(uri, experiment)
            ids, order = [experiment.experiment_id], ["attributes.start_time DESC"]
            found += client.search_runs(ids, OF_THE_LAB, max_results=MAX_RUNS, order_by=order)
    rows = [_row(run) for run in found]
    raw = pd.DataFrame(rows, columns=None if rows else [*COLUMNS, "epochs", "end_time"], dtype=object)
    reasons = _why_left_out(raw)
    for place, reason in reasons.items():
        _say_left_out(raw["run_id"][place], reason)
    right = raw.drop(index=list(reasons))
    numbers = right[[*NUMBERS]].apply(pd.to_numeric, errors="coerce")
    runs = right.assign(**numbers).assign(
        start_time=pd.to_datetime(numbers["start_time"], unit="ms", utc=True),
        minutes=(numbers["end_time"] - numbers["start_time"]) / 60_000,
        git_dirty=right["git_dirty"].map({"true": True, "false": False}),
    )
    kinds = {name: kind.dtype for name, kind in COLUMNS.items()}
    runs = runs.drop(columns="end_time").astype({**kinds, "epochs": "Int64"})
    for _, alike in runs.groupby(["step", "overrides", "code_sha256", "holdout", "folds"], dropna=False):
        by_status = {status: {*of_status["seed"]} for status, of_status in alike.groupby("status")}
        failed = sorted(by_status.get("FAILED", set()) - by_status.get("FINISHED", set()))
        runs.loc[alike.index, "failed"] = ", ".join(map(str, failed))
    return LoadedRuns(uri, runs, {run.info.run_id: run for run in found})


def _row(run: Run) -> dict[str, object]:
    tags, params, metrics = run.data.tags, run.data.params, run.data.metrics
    # The last points of these are figures of the run too.
    last = {f"final_{name}": metrics.get(name) for name in ("train_accuracy", "test_loss", "validation_loss")}
    figures = last | metrics
    return {
        **params,
        **{name: (figures if name in MEASURES else tags).get(name) for name in COLUMNS},
        **{name: params.get(name) for name in ("seed", "epochs", "device")},
        **{name: params.get(name, "0") for name in ("holdout", "folds")},
        # Without the hold-out: that is a protocol, with a column of its own.
        "overrides": re.sub(r"(^| )holdout=\d+(?= |$)", "", tags.get("overrides", "")).strip(),
        **{name: getattr(run.info, name) for name in ("status", "run_id", "start_time", "end_time")},
    }


def _why_left_out(raw: pd.DataFrame) -> dict[Any, str]:
    """Return the first thing that can't be right about a run, by its place in the table."""
    best = raw[TESTED.best].where((raw["holdout"] == "0") & (raw["folds"] == "0"), raw[HELD_OUT.best])
    judged = raw[TESTED.judged].where(raw["folds"] == "0", raw[FOLDED.judged])
    no_result = raw[["num_params"]].assign(best=best, judged=judged).isna().any(axis=1)
    last, most = (pd.to_numeric(raw[name], errors="coerce") for name in (TESTED.judged, TESTED.best))
    reasons: dict[Any, str] = {}
    for found, name, reason in (
        (raw["step"].astype("str").str.strip() == "", "step", "its step has no name"),
        *((raw[name].isna(), name, f"it has no {name}") for name in ("epochs", "device")),
        *((kind.excludes(raw[name]), name, f"its {name} is {{}}, not {kind}") for name, kind in NUMBERS.items()),
        (last > most, TESTED.judged, f"its {TESTED.judged}, {{}}, is above its best"),
        (no_result & (raw["status"] == "FINISHED"), "status", "it is FINISHED but has no parameters or accuracy"),
    ):
        for place, value in raw.loc[found, name].items():
            reasons.setdefault(place, reason.format(quoted(value)))
    return reasons


def _find_runs(steps: Steps, seeds: Seeds, **which: Unpack[RunFilter]) -> LoadedRuns:
    loaded = which.get("loaded") or load_runs(which.get("tracking_uri"))
    status, overridden = which.get("status", "FINISHED"), which.get("include_overrides", False)
    for name, given in which.items():
        if name not in RunFilter.__annotations__:
            known = ("steps", "seeds", "columns", *RunFilter.__annotations__)
            raise LabError(f"{name}: unknown{did_you_mean(name, known)}; allowed are {', '.join(known)}")
        if name in ALLOWED and given not in ALLOWED[name]:
            raise LabError(f"{name}: {given!r} is none of {ALLOWED[name]}")
    runs = _of_protocol(loaded, which.get("holdout", 0), which.get("folds", 0))
    named = None if steps is None else full_names(steps, loaded)
    if named is not None:
        runs = runs[runs["step"].isin(named)]
    if status is not None:
        runs = runs[runs["status"] == status]
    if overridden == "if_none":
        by_step = runs.groupby("step")["overrides"]
        runs = runs[runs["overrides"] == by_step.transform(lambda texts: "" if "" in set(texts) else texts.iloc[0])]
    elif not overridden:
        runs = runs[runs["overrides"] == ""]
    if status == "FINISHED" and (missing := {*(named or ())} - {*runs["step"]}):
        step = min(missing)
        kinds = _kinds(loaded.runs[loaded.runs["step"] == step])
        raise LabError(f"steps: no finished run of {step!r} as declared and asked for; train one. There are: {kinds}")
    if seeds is not None:
        runs = runs[runs["seed"].isin(list(seeds) if isinstance(seeds, Iterable) else [seeds])]
    return replace(loaded, runs=runs)


def _of_protocol(loaded: LoadedRuns, holdout: int, folds: int) -> pd.DataFrame:
    if loaded.runs.empty:
        raise LabError(f"no runs yet in {loaded.name}; train first, e.g. `make step1`")
    runs = loaded.runs[(loaded.runs["holdout"] == holdout) & (loaded.runs["folds"] == folds)]
    if runs.empty:
        wanted = f"folds {folds}" if folds else f"holdout {holdout:,}"
        kinds = _kinds(loaded.runs)
        raise LabError(f"{wanted.split()[0]}: {loaded.name} has no run with {wanted}; its runs are: {kinds}")
    return runs


def _kinds(runs: pd.DataFrame) -> str:
    kinds = {
        f"{status} with {f'folds {folds}' if folds else f'holdout {holdout:,}'}{', overridden' if overrides else ''}"
        for status, overrides, holdout, folds in runs[["status", "overrides", "holdout", "folds"]].to_numpy()
    }
    return "; ".join(sorted(kinds))


def full_names(steps: Iterable[str] | str, loaded: LoadedRuns, others: Iterable[str] = ()) -> list[str]:
    """Return the steps by the names that their runs have: "step4" is short for "step4_augment_steplr".

    others: names allowed without a run. Raises LabError if another step has no run, or a short name fits several.
    """
    known, names = sorted({*loaded.runs["step"], *others}), []
    for step in map(str, [steps] if isinstance(steps, str) or not isinstance(steps, Iterable) else steps):
        short = re.fullmatch(r"step\d+", step)
        alike = [name for name in known if name in (step, script_named(step))]
        alike = alike[:1] or [name for name in known if short and name.startswith(f"{step}_")]
        if len(alike) != 1:
            problem = f"{step!r} is not clear" if alike else f"no run of {step!r} in {loaded.name}"
            there = ", ".join(alike or sorted({*loaded.runs["step"]}))
            raise LabError(f"steps: {problem}{did_you_mean(step, [] if alike else known)}; there are runs of {there}")
        names += alike
    return names


def places(steps: pd.Series[Any]) -> pd.Series[Any]:
    """Return the place of each step in the order of steps."""
    return steps.map({step: place for place, step in enumerate(sorted(steps.unique(), key=step_order))})


def _typed(column: pd.Series[Any]) -> pd.Series[Any]:
    """Return hyperparameters as integers or numbers where every value is one, else as text."""
    text = column.astype("str")
    number = pd.to_numeric(text, errors="coerce", dtype_backend="numpy_nullable")
    if (number.isna() & text.notna()).any():
        return text
    return number if number.dtype == "Int64" else number.astype("float64")


@contextmanager
def reading(uri: str) -> Iterator[None]:
    """Turn what MLflow and the database raise on a store that can't be read into a sentence."""
    retries = os.environ.get("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # the default, 7, waits for minutes
    asked = environment_variables({"MLFLOW_HTTP_REQUEST_MAX_RETRIES": retries})
    with Store(uri, experiment_id="").failures("can't be read"), asked:
        yield


# ---- what a trained network says of each test image


def predictions(run_id: str, *, tracking_uri: str | None = None) -> pd.DataFrame:
    """Return what a run's trained network predicts for each of the 10,000 test images, in their order.

    For a fold, it is for the fold's images; the index has their numbers among the 60,000 training images.

    Columns: truth, prediction, confidence (softmax of the predicted digit), logit_0 to logit_9. Of a restored run, only
    mistakes are known: other images have no confidence, and there are no logits.

    Raises LabError if there is no such run, or it has not finished, or stored no predictions that can be read.
    """
    uri = resolve_uri(tracking_uri)
    check_readable(uri)
    follow_move(uri)
    with reading(uri):
        run = find_run(uri, run_id)
    if run is None:
        raise LabError(f"run_id: there is no run {run_id!r} in {without_password(uri)}")
    return predictions_of(run, uri)


def predictions_of(run: Run, uri: str) -> pd.DataFrame:
    run_id = run.info.run_id
    if run.info.status != "FINISHED":
        raise LabError(f"run {run_id} is {run.info.status}, not FINISHED: it has no predictions")
    name, read = (MISTAKES, _from_mistakes) if "restored" in run.data.tags else ("predictions.npz", _from_logits)
    with tempfile.TemporaryDirectory() as folder, reading(uri):
        artifacts = get_artifact_repository(run.info.artifact_uri, tracking_uri=uri)
        if name not in {artifact.path for artifact in artifacts.list_artifacts()}:
            raise LabError(f"run {run_id} has no predictions: there is no {name} among its artifacts")
        file = Path(artifacts.download_artifacts(name, folder))  # type: ignore[no-untyped-call]
        try:
            return read(file)
        except Exception as error:  # a file from elsewhere breaks zip, zlib, numpy and pandas in many ways
            raise LabError(f"run {run_id}: its {name} can't be read: {text_of(error)}") from error


@cache
def _test_labels() -> np.ndarray:
    return load_mnist().test_labels.numpy()


def _from_mistakes(file: Path) -> pd.DataFrame:
    mistakes = pd.read_csv(file, index_col="image")
    truth = _test_labels()
    table = pd.DataFrame({"truth": truth, "prediction": truth, "confidence": math.nan})
    table.loc[mistakes.index, ["prediction", "confidence"]] = mistakes[["prediction", "confidence"]]
    return table.astype({"prediction": "int64"})


def _from_logits(file: Path) -> pd.DataFrame:
    with np.load(file, allow_pickle=False) as arrays:
        truth, prediction, logits = arrays["truth"], arrays["prediction"], arrays["logits"]
        images = pd.Index(arrays["image"], name="image") if "image" in arrays else pd.RangeIndex(len(truth))
    shapes = truth.size and truth.shape == prediction.shape and logits.shape == (truth.size, 10)
    if not shapes or not np.isin([truth, prediction], range(10)).all() or not np.isfinite(logits).all():
        raise ValueError("truth (N,) and prediction (N,) must be a digit from 0 to 9, logits (N, 10) finite")
    table = pd.DataFrame({"truth": truth, "prediction": prediction}, images).astype("int64")
    table["confidence"] = special.softmax(logits, axis=1).max(axis=1)
    return table.join(pd.DataFrame(logits, images, columns=[f"logit_{digit}" for digit in range(10)]))
