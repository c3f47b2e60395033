"""The committed evidence as tracked runs: what docs/results keeps of each run, put into a store.

A restored run has the tags `restored`, the commit that the files are of, and `restored_sha256`, a digest of the files.
By the digest a second call knows that nothing is to do.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import chain, compress, groupby, repeat
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from mlflow.utils import mlflow_tags

from mnist_lab.errors import LabError
from mnist_lab.experiment import Targets
from mnist_lab.paths import PROJECT_ROOT
from mnist_lab.results import records as files
from mnist_lab.results.compare import stated_targets
from mnist_lab.results.runs import MISTAKES, load_runs
from mnist_lab.running.record import DESCRIPTION, describe, target_tags, verdict_tags
from mnist_lab.running.study import judge_runs, log_curves, log_verdict
from mnist_lab.tracking.connection import short_timeouts
from mnist_lab.tracking.run import track
from mnist_lab.tracking.store import RESTORED, FinishedRun, Store, alone, open_store, search, uninterrupted
from mnist_lab.verdicts.measures import TESTED, short_figures
from mnist_lab.verdicts.targets import judge

DIGEST = "restored_sha256"
NO_MODEL = "none: this run was restored, and the files that it was restored from keep no network"
NOT_SHARED = {"seed", "step", "targets", "model", DESCRIPTION}


class Restored(NamedTuple):
    """How many runs, and studies over them, a call has written; and how many of its runs were there already."""

    runs: int
    studies: int
    there: int


@dataclass(frozen=True)
class Committed:
    """One run as the files have it; times in milliseconds since 1970."""

    step: str
    seed: int
    epochs: int
    start: int
    end: int
    targets: Targets
    history: Sequence[Mapping[Any, Any]]  # a record of each epoch
    figures: Mapping[str, float]  # logged once
    params: Mapping[str, str]
    tags: Mapping[str, str]
    mistakes: pd.DataFrame


def restore(
    folder: Path, *, commit: str, tracking_uri: str | None = None, progress: Callable[[str], None] = print
) -> Restored:
    """Put the runs that a folder of CSVs keeps into the store, under a study for each step with several seeds.

    A run that was trained into this store itself is not added again. Where the files say something else than they did
    before, or an earlier call was interrupted, all restored runs are written anew. All other runs are left alone.
    commit: which the files are of. progress: is told of each step before its runs are written.
    """
    records = files.read_records(folder)
    if records.runs.empty:
        raise LabError(f"folder: {folder} has no CSVs of runs")
    content = b"".join(file.read_bytes() for file in sorted(folder.glob("*.csv")))
    marks = {RESTORED: commit, DIGEST: hashlib.sha256(content).hexdigest()}
    committed = [*_committed(records, folder, marks)]
    store = open_store(tracking_uri)
    busy = f"another process is restoring runs into {store.name!r}; wait until it is through"
    with store.failures("can't be written"), alone(store.uri, "restore", busy), short_timeouts():
        own = load_runs(store.uri).tested
        own = own[(own["status"] == "FINISHED") & (own["overrides"] == "") & own["restored"].isna()]
        missing = compress(
            committed, ~files.among(records.runs, files.cells(own, files.RUN_COLUMNS), *files.RUN_COLUMNS)
        )
        steps = {step: [*runs] for step, runs in groupby(missing, key=lambda run: run.step)}
        studies, added = sum(len(runs) > 1 for runs in steps.values()), sum(map(len, steps.values()))
        restored = search(store, f"tags.{DIGEST} LIKE '%'")
        whole = [run for run in restored if run.info.status == "FINISHED" and run.data.tags[DIGEST] == marks[DIGEST]]
        if len(whole) == len(restored) == added + studies:
            return Restored(0, 0, there=len(committed))
        for run in restored:
            with uninterrupted():
                store.client.delete_run(run.info.run_id)
        for number, (step, runs) in enumerate(steps.items(), start=1):
            progress(f"{step}: {len(runs)} run{'' if len(runs) == 1 else 's'} ({number} of {len(steps)})")
            _restore(store, runs)
    return Restored(added, studies, there=len(committed) - added)


def script_of(step: str) -> Path:
    return PROJECT_ROOT / "experiments" / f"{step}.py"


# ---- from files


def _committed(records: files.Records, folder: Path, marks: Mapping[str, str]) -> Iterator[Committed]:
    every_epoch = files.typed(records.epochs, files.EPOCH_COLUMNS)
    texts: list[dict[Any, str]] = records.runs.to_dict("records")
    for text, row in zip(texts, files.typed(records.runs, files.RUN_COLUMNS).to_dict("records"), strict=True):
        settings, mistakes = _of_run(records.settings, text), _of_run(records.mistakes, text)
        params, tags = (
            dict(settings.loc[settings["kind"] == kind, ["name", "value"]].itertuples(index=False, name=None))
            for kind in ("param", "tag")
        )
        history = _of_run(every_epoch, row).to_dict("records")
        _check(folder, row, params, history, len(mistakes))
        targets = stated_targets(row)
        figures = {name: row[name] for name in TESTED.once if name in row}
        if targets.accuracy is not None and history:
            figures["epochs_at_target"] = sum(epoch["test_accuracy"] >= targets.accuracy for epoch in history)
        accuracies = [row["final_test_accuracy"]]
        verdicts = judge(targets, accuracies=accuracies, num_params=row["num_params"], epochs=row["epochs"])
        tags = {
            **{name: text[name] for name in ("step", "code_sha256", "hardware", "torch", "git_commit")},
            "git_dirty": text["git_dirty"].lower(),
            **tags,  # with the whole code_sha256
            **target_tags(targets),
            **verdict_tags(verdicts),
            **{"model": NO_MODEL, DESCRIPTION: describe(script_of(row["step"]), verdicts=verdicts)},
        }
        named = {  # neither the script nor the commit is of this moment
            mlflow_tags.MLFLOW_SOURCE_NAME: f"experiments/{row['step']}.py",
            mlflow_tags.MLFLOW_SOURCE_TYPE: "LOCAL",
            mlflow_tags.MLFLOW_GIT_COMMIT: text["git_commit"],
            mlflow_tags.MLFLOW_GIT_BRANCH: "",
            **{"overrides": "", **marks},
        }
        start = int(datetime.strptime(text["date"], files.DATE).replace(tzinfo=UTC).timestamp() * 1000)
        yield Committed(
            **{name: row[name] for name in ("step", "seed", "epochs")},
            start=start,
            end=start + round(60_000 * float(text["minutes"] or 0)),
            targets=targets,
            history=history,
            figures=figures | short_figures(figures),
            params={**params, "seed": text["seed"]},
            tags={name: value for name, value in tags.items() if value} | named,
            mistakes=mistakes,
        )


def _of_run(rows: pd.DataFrame, run: Mapping[Any, Any]) -> pd.DataFrame:
    of_run: pd.DataFrame = rows[(rows["step"] == run["step"]) & (rows["seed"] == run["seed"])]
    return of_run


def _check(
    folder: Path, row: Mapping[Any, Any], params: object, history: Sequence[Mapping[Any, Any]], mistakes: int
) -> None:
    step, last, best = row["step"], row["final_test_accuracy"], row["best_test_accuracy"]
    count, best_epoch, wrong = row["epochs"], row["best_epoch"], round(files.IMAGES * (1 - last / 100))
    curve, epochs = [epoch["test_accuracy"] for epoch in history], [epoch["epoch"] for epoch in history]
    for file, fits, reason in (
        (step, best_epoch <= count, f"its best_epoch {best_epoch} is none of {count}"),
        (step, last > 1, f"its last accuracy, {last}, is in percent"),
        (step, last <= best, f"its last accuracy {last} is above its best {best}"),
        ("settings", params, "it has no params"),
        ("epochs", epochs in ([], [*range(1, count + 1)]), f"it has other epochs than 1 to {count}"),
        ("epochs", not curve or (curve[-1], max(curve)) == (last, best), f"its last or best is not {last}, {best} %"),
        ("mistakes", mistakes in (0, wrong), f"it got {wrong} images wrong, not {mistakes}"),
    ):
        if not fits:
            raise LabError(f"{folder / file}.csv: {step} seed {row['seed']}: {reason}")


# ---- the store


def _restore(store: Store, runs: Sequence[Committed]) -> None:
    if len(runs) == 1:
        _run(store, runs[0], None)
        return
    step, past = runs[0].step, _past(store, min(run.start for run in runs), max(run.end for run in runs))
    tags = {mlflow_tags.MLFLOW_GIT_COMMIT: "", **_shared([run.tags for run in runs]), "study": step, "seeds_reused": ""}
    tags["seeds"] = " ".join(str(run.seed) for run in runs)
    params = _shared([run.params for run in runs])
    with track(past, f"{step} {len(runs)} seeds", params=params, tags=tags) as tracked:
        ids = [_run(store, run, tracked.run_id) for run in runs]
        finished = [FinishedRun(one, run.seed, run.figures) for one, run in zip(ids, runs, strict=True)]
        log_verdict(tracked, judge_runs(runs[0].targets, runs[0].epochs, tracked.run_id, finished), script_of(step))
        history = [{"run_id": run_id, **epoch} for run_id, run in zip(ids, runs, strict=True) for epoch in run.history]
        log_curves(tracked, history, runs[0].targets)


def _run(store: Store, run: Committed, parent_run_id: str | None) -> str:
    past, name = _past(store, run.start, run.end), f"{run.step} seed {run.seed}"
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
    return {
        name: value
        for name, value in of_runs[0].items()
        if name not in NOT_SHARED and not name.startswith("verdict_") and all(run.get(name) == value for run in of_runs)
    }
