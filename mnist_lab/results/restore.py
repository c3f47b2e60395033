"""`make restore`: puts the committed runs of docs/results into a store.

Its tags: `restored`, the commit of the files, and `restored_sha256`, their digest, by which a second call does nothing.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, compress, groupby, repeat
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from mlflow.utils import mlflow_tags

from mnist_lab.errors import LabError, counted
from mnist_lab.measures import TESTED, short_figures
from mnist_lab.paths import EXPERIMENTS
from mnist_lab.results import records as files
from mnist_lab.results.compare import stated_targets
from mnist_lab.results.runs import MISTAKES, load_runs
from mnist_lab.running.run import DESCRIPTION, describe, target_tags, verdict_tags
from mnist_lab.running.study import judge_runs, log_curves, log_verdict
from mnist_lab.tracking.connection import short_timeouts
from mnist_lab.tracking.run import track
from mnist_lab.tracking.store import FinishedRun, Store, alone, open_store, search, uninterrupted
from mnist_lab.verdicts.comparison import step_order
from mnist_lab.verdicts.targets import judge

DIGEST = "restored_sha256"
NO_MODEL = "none: this run was restored, and the files that it was restored from keep no network"
NOT_SHARED = {"seed", "step", "targets", "model", DESCRIPTION}


class Restored(NamedTuple):
    """How many runs, and studies over them, a call has written; and how many of its runs were there already."""

    runs: int
    studies: int
    there: int


class Committed(NamedTuple):
    """One run as the files have it; times in milliseconds since 1970."""

    row: Mapping[Any, Any]  # of a run table
    start: int
    end: int
    history: Sequence[Mapping[Any, Any]]  # a record of each epoch
    figures: Mapping[str, float]  # logged once
    params: Mapping[str, str]
    tags: Mapping[str, str]
    mistakes: pd.DataFrame


def restore(folder: Path, *, commit: str, tracking_uri: str | None = None, progress: files.Tell = print) -> Restored:
    """Put the runs of a folder of CSVs into the store, with a study for each step that has several seeds.

    A run that was trained in this store is not added again. If the files have changed since an earlier call, or it
    was interrupted, all restored runs are written anew. All other runs are left alone.
    commit: of the files. progress: is called with a sentence before the runs of each step are written.
    """
    records = files.read_records(folder)
    if records.runs.empty:
        raise LabError(f"folder: {folder} has no CSVs of runs")
    content = b"".join(file.read_bytes() for file in sorted(folder.glob("*.csv")))
    marks = {"restored": commit, DIGEST: hashlib.sha256(content).hexdigest()}
    committed = [*_committed(records, folder, marks)]
    store = open_store(tracking_uri)
    busy = f"another process is restoring runs into {store.name!r}; wait until it is through"
    with store.failures("can't be written"), alone(store.uri, "restore", busy), short_timeouts():
        own = load_runs(store.uri).tested
        own = own[(own["status"] == "FINISHED") & (own["overrides"] == "") & own["restored"].isna()]
        there = files.among(records.runs, files.cells(own, files.RUN_COLUMNS), *files.RUN_COLUMNS)
        steps = {step: [*runs] for step, runs in groupby(compress(committed, ~there), lambda run: run.row["step"])}
        studies, added = sum(len(runs) > 1 for runs in steps.values()), int((~there).sum())
        restored = search(store, f"tags.{DIGEST} LIKE '%'")
        whole = [run for run in restored if run.info.status == "FINISHED" and run.data.tags[DIGEST] == marks[DIGEST]]
        if len(whole) == len(restored) == added + studies:
            return Restored(0, 0, there=len(committed))
        for run in restored:
            with uninterrupted():
                store.client.delete_run(run.info.run_id)
        for number, (step, runs) in enumerate(steps.items(), start=1):
            progress(f"{step}: {counted(len(runs), 'run')} ({number} of {len(steps)})")
            _restore(store, runs)
    return Restored(added, studies, there=len(committed) - added)


def _committed(records: files.Records, folder: Path, marks: Mapping[str, str]) -> Iterator[Committed]:
    texts: list[dict[Any, str]] = records.runs.to_dict("records")
    for text, row in zip(texts, files.typed(records.runs, files.RUN_COLUMNS).to_dict("records"), strict=True):
        settings, mistakes, epochs = (
            part[(part["step"] == text["step"]) & (part["seed"] == text["seed"])]
            for part in (records.settings, records.mistakes, records.epochs)
        )
        params, tags = (
            dict(settings.loc[settings["kind"] == kind, ["name", "value"]].itertuples(index=False, name=None))
            for kind in ("param", "tag")
        )
        history = files.typed(epochs, files.EPOCH_COLUMNS).to_dict("records")
        own = tags.get("code_sha256", "").startswith(text["code_sha256"]) and all(map(files.TAGS.fullmatch, tags))
        fixed = {"epochs": text["epochs"], "holdout": "0", "folds": "0"}
        own &= fixed.items() <= {**fixed, **params}.items() and "device" in params
        _check(folder, row, params and own, history, len(mistakes))
        targets = stated_targets(row)
        figures = {name: row[name] for name in TESTED.once if name in row}
        if targets.accuracy is not None and history:
            figures["epochs_at_target"] = sum(epoch["test_accuracy"] >= targets.accuracy for epoch in history)
        counts = {name: row[name] for name in ("num_params", "epochs")}
        verdicts = judge(targets, accuracies=[row["final_test_accuracy"]], **counts)
        of_row = {name: text[name] for name in ("step", "code_sha256", "hardware", "torch", "git_commit")}
        of_row["git_dirty"] = text["git_dirty"].lower()
        tags = {
            **{name: value for name, value in {**of_row, **tags}.items() if value},  # with the whole code_sha256
            **target_tags(targets),
            **verdict_tags(verdicts),
            **{"model": NO_MODEL, DESCRIPTION: describe(EXPERIMENTS / f"{row['step']}.py", verdicts=verdicts)},
            # Neither the script nor the commit is of this moment.
            mlflow_tags.MLFLOW_SOURCE_NAME: f"experiments/{row['step']}.py",
            mlflow_tags.MLFLOW_SOURCE_TYPE: "LOCAL",
            mlflow_tags.MLFLOW_GIT_COMMIT: text["git_commit"],
            mlflow_tags.MLFLOW_GIT_BRANCH: "",
            **{"overrides": "", **marks},
        }
        start = pd.Timestamp(text["date"], tz="UTC").value // 10**6
        end = start + round(60_000 * float(text["minutes"] or 0))
        figures |= short_figures(figures)
        yield Committed(row, start, end, history, figures, {**params, "seed": text["seed"]}, tags, mistakes)


def _check(folder: Path, row: Mapping[Any, Any], settings: object, history: Sequence[Any], mistakes: int) -> None:
    step, last, best = row["step"], row["final_test_accuracy"], row["best_test_accuracy"]
    count, best_epoch, wrong = row["epochs"], row["best_epoch"], round(files.IMAGES * (1 - last / 100))
    curve, epochs = [epoch["test_accuracy"] for epoch in history], [epoch["epoch"] for epoch in history]
    highest = curve.index(max(curve)) + 1 if curve else best_epoch
    for file, fits, reason in (
        (step, best_epoch <= count, f"its best_epoch {best_epoch} is none of {count}"),
        (step, last > 1, f"its last accuracy, {last}, is in percent"),
        (step, last <= best, f"its last accuracy {last} is above its best {best}"),
        ("settings", settings, "it has no params, those of another run, or tags of other code or not of the lab"),
        ("epochs", epochs in ([], [*range(1, count + 1)]), f"it has other epochs than 1 to {count}"),
        ("epochs", not curve or (curve[-1], max(curve)) == (last, best), f"its last or best is not {last}, {best} %"),
        (step, best_epoch == highest, f"its best_epoch {best_epoch} is not {highest}, that of its best in epochs.csv"),
        ("mistakes", mistakes in (0, wrong), f"it got {wrong} images wrong, not {mistakes}"),
    ):
        if not fits:
            raise LabError(f"{folder / file}.csv: {step} seed {row['seed']}: {reason}")


def _restore(store: Store, runs: Sequence[Committed]) -> None:
    if len(runs) == 1:
        _run(store, runs[0], None)
        return
    first, past = runs[0].row, _past(store, min(run.start for run in runs), max(run.end for run in runs))
    step, targets, seeds = first["step"], stated_targets(first), [run.row["seed"] for run in runs]
    tags = {mlflow_tags.MLFLOW_GIT_COMMIT: "", **_shared([run.tags for run in runs]), "study": step, "seeds_reused": ""}
    tags |= {"seeds": " ".join(map(str, seeds)), "order": step_order(step)}
    with track(past, f"{step} {len(runs)} seeds", params=_shared([run.params for run in runs]), tags=tags) as tracked:
        ids = [_run(store, run, tracked.run_id) for run in runs]
        finished = list(map(FinishedRun, ids, seeds, [run.figures for run in runs]))
        log_verdict(tracked, judge_runs(targets, first["epochs"], tracked.run_id, finished), EXPERIMENTS / f"{step}.py")
        history = [{"run_id": run_id, **epoch} for run_id, run in zip(ids, runs, strict=True) for epoch in run.history]
        log_curves(tracked, pd.DataFrame(history), targets)


def _run(store: Store, run: Committed, parent_run_id: str | None) -> str:
    past, name = _past(store, run.start, run.end), f"{run.row['step']} seed {run.row['seed']}"
    with track(past, name, params=run.params, tags=run.tags, parent_run_id=parent_run_id) as tracked:
        points = {
            row["epoch"]: {name: row[name] for name in files.EPOCH_FIGURES if pd.notna(row[name])}
            for row in run.history
        }
        tracked.log_missing(points)
        tracked.log_once(run.figures)
        if len(run.mistakes):
            tracked.log_text(files.to_csv(run.mistakes[[*files.MISTAKE_COLUMNS][2:]]), MISTAKES)
    return tracked.run_id


def _past(store: Store, start: int, end: int) -> Store:
    """Return the store with a clock that says when a run began, and ever after when it ended."""
    return replace(store, clock=chain([start], repeat(end)).__next__)


def _shared(of_runs: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return the params or tags that all runs of a study have; but for those that it has of its own."""
    shared = sorted(set.intersection(*({*run.items()} for run in of_runs)))
    return {name: value for name, value in shared if name not in NOT_SHARED and not name.startswith("verdict_")}
