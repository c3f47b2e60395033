"""The committed evidence as tracked runs: what docs/results keeps of each run, put into a store.

A restored run has the tags `restored`, the commit that the files are of, and `restored_sha256`, a digest of what they
say of all runs. By the digest a second call knows that nothing is to do.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from mlflow.utils.mlflow_tags import (
    MLFLOW_GIT_BRANCH,
    MLFLOW_GIT_COMMIT,
    MLFLOW_SOURCE_NAME,
    MLFLOW_SOURCE_TYPE,
)

from mnist_lab.errors import LabError
from mnist_lab.experiment import Targets
from mnist_lab.paths import PROJECT_ROOT
from mnist_lab.results.publish import (
    DATE,
    EPOCH_FIGURES,
    IMAGES,
    MISTAKE_COLUMNS,
    RUN_COLUMNS,
    Records,
    Row,
    cells,
    read_records,
    to_csv,
)
from mnist_lab.results.runs import MISTAKES, TARGETS, load_runs
from mnist_lab.running.record import DESCRIPTION, describe, verdict_tags
from mnist_lab.running.study import judge_runs, log_curves, log_verdict
from mnist_lab.tracking.connection import short_timeouts
from mnist_lab.tracking.run import TrackedRun, track
from mnist_lab.tracking.store import (
    RESTORED,
    FinishedRun,
    Store,
    alone,
    open_store,
    search,
    store_failures,
    uninterrupted,
)
from mnist_lab.verdicts.measures import short_figures
from mnist_lab.verdicts.targets import judge

DIGEST = "restored_sha256"
NO_MODEL = "none: this run was restored, and the files that it was restored from keep no network"
NOT_SHARED = {"seed", "step", "targets", "model", DESCRIPTION, DIGEST, MLFLOW_SOURCE_NAME, MLFLOW_SOURCE_TYPE}


@dataclass(frozen=True)
class Restored:
    """What a call has done to the store.

    runs, studies: how many it wrote. there: how many runs of the files were there already, restored or trained here.
    """

    runs: int
    studies: int
    there: int


@dataclass
class Past:
    """A clock that stands at a time, in milliseconds since 1970."""

    time: int

    def __call__(self) -> int:
        return self.time


@dataclass(frozen=True)
class Committed:
    """One run as the files have it.

    row: in <step>.csv. start, end: milliseconds since 1970. epochs, figures: what it logs of each epoch, and once.
    """

    row: Row
    step: str
    seed: int
    start: int
    end: int
    targets: Targets
    epochs: Mapping[int, Mapping[str, float]]
    figures: Mapping[str, float]
    params: Mapping[str, str]
    tags: Mapping[str, str]
    mistakes: Sequence[Row]
    digest: str


def _committed(records: Records, folder: Path) -> Committed:
    """Return the run that these rows are of; raises LabError if they don't fit together."""
    (row,) = records.runs
    step, last, count = row["step"], float(row["last"]), int(row["epochs"])
    start = int(datetime.strptime(row["date"], DATE).replace(tzinfo=UTC).timestamp() * 1000)
    stated = {name: float(row[f"target_{name}"]) for name in TARGETS if row[f"target_{name}"]}
    targets = Targets(**{name: value if name == "accuracy" else int(value) for name, value in stated.items()})  # type: ignore[arg-type]
    epochs = {
        int(of["epoch"]): {name: float(of[name]) for name in EPOCH_FIGURES if of.get(name)} for of in records.epochs
    }
    figures = {
        "num_params": float(row["num_params"]),
        "final_test_accuracy": last,
        "best_test_accuracy": float(row["best"]),
        "best_epoch": float(row["best_epoch"]),
    }
    if targets.accuracy is not None and epochs:
        figures["epochs_at_target"] = sum(of["test_accuracy"] >= targets.accuracy for of in epochs.values())
    verdicts = judge(targets, accuracies=[last], num_params=int(row["num_params"]), epochs=count)
    params, tags = (
        {line["name"]: line["value"] for line in records.settings if line["kind"] == kind} for kind in ("param", "tag")
    )
    tags = {
        **{name: row[name] for name in ("step", "code_sha256", "hardware", "torch", "git_commit")},
        "git_dirty": row["git_dirty"].lower(),
        **tags,  # with the whole code_sha256
        **{f"target_{name}": f"{value:.12g}" for name, value in stated.items()},
        **verdict_tags(verdicts),
        **{"model": NO_MODEL, DESCRIPTION: describe(script_of(step), verdicts=verdicts)},
    }
    wrong = IMAGES - round(IMAGES / 100 * last)
    for file, fits, reason in (
        (step, figures["best_epoch"] <= count, f"its best_epoch {row['best_epoch']} is none of {count}"),
        (step, last <= figures["best_test_accuracy"], f"its last accuracy {last} is above its best {row['best']}"),
        ("settings", bool(params), "it has no params"),
        ("epochs", [*epochs] in ([], [*range(1, count + 1)]), f"it has other epochs than 1 to {count}"),
        ("mistakes", len(records.mistakes) in (0, wrong), f"it got {wrong} images wrong, not {len(records.mistakes)}"),
    ):
        if not fits:
            raise LabError(f"{folder / file}.csv: {step} seed {row['seed']}: {reason}")
    return Committed(
        row=row,
        step=step,
        seed=int(row["seed"]),
        start=start,
        end=start + round(60_000 * float(row["minutes"] or 0)),
        targets=targets,
        epochs=epochs,
        figures=figures | short_figures(figures),
        params={**params, "seed": row["seed"]},
        tags={"overrides": "", **{name: value for name, value in tags.items() if value}},
        mistakes=records.mistakes,
        digest=digest([records.runs, records.epochs, records.settings, records.mistakes]),
    )


def digest(parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def script_of(step: str) -> Path:
    """Return where the script of a step is, or would be."""
    return PROJECT_ROOT / "experiments" / f"{step}.py"


def restore(
    folder: Path, *, commit: str, tracking_uri: str | None = None, progress: Callable[[str], None] = print
) -> Restored:
    """Put the runs that a folder of CSVs keeps into the store, under a study for each step with several seeds.

    A run that was trained into this store itself is not added again. Where the files say something else than they did
    before, or an earlier call was interrupted, all restored runs are written anew. All other runs are left alone.
    commit: which the files are of. progress: is told of each step before its runs are written.

    Raises:
        LabError: if the folder has no such files, they are not as the lab writes them, the store can't be written, or
            another call is at work on it.
    """
    committed = [_committed(records, folder) for records in read_records(folder).by_run()]
    if not committed:
        raise LabError(f"folder: {folder} has no CSVs of runs")
    store = open_store(tracking_uri)
    busy = f"another process is restoring runs into {store.name!r}; wait until it is through"
    with store_failures(store, "can't be written"), alone(store.uri, "restore", busy), short_timeouts():
        trained = _trained_here(store)
        steps: dict[str, list[Committed]] = {}
        for run in committed:
            if _text(run.row) not in trained:
                steps.setdefault(run.step, []).append(run)
        studies = sum(len(runs) > 1 for runs in steps.values())
        marks = {RESTORED: commit, DIGEST: digest([run.digest for runs in steps.values() for run in runs])}
        added = sum(map(len, steps.values()))
        if _is_there(store, marks[DIGEST], added + studies):
            added = studies = 0
        else:
            _remove_restored(store)
            for number, (step, runs) in enumerate(steps.items(), start=1):
                progress(f"{step}: {len(runs)} run{'' if len(runs) == 1 else 's'} ({number} of {len(steps)})")
                _restore(store, marks, runs)
    return Restored(added, studies, there=len(committed) - added)


# ---- the store


def _text(row: Row) -> str:
    return json.dumps({name: row.get(name, "") for name in RUN_COLUMNS}, sort_keys=True)


def _trained_here(store: Store) -> set[str]:
    """Return the rows, as text, that runs trained into this store have in the files."""
    runs = load_runs(store.uri).tested
    own = runs[(runs["status"] == "FINISHED") & (runs["overrides"] == "")]
    return {_text(row) for row in cells(own[own["restored"].isna()].to_dict("records"), RUN_COLUMNS)}


def _is_there(store: Store, of: str, count: int) -> bool:
    """Say whether so many runs of that digest were restored, and no others, each of them whole."""
    restored = search(store, f"tags.{DIGEST} LIKE '%'")
    whole = [run for run in restored if run.info.status == "FINISHED" and run.data.tags[DIGEST] == of]
    return len(whole) == len(restored) == count


def _remove_restored(store: Store) -> None:
    for run in search(store, f"tags.{DIGEST} LIKE '%'"):
        with uninterrupted():
            store.client.delete_run(run.info.run_id)


def _restore(store: Store, marks: Mapping[str, str], runs: Sequence[Committed]) -> None:
    """Write a step's runs, and the study over them if there are several."""
    if len(runs) == 1:
        _run(store, marks, runs[0], None)
        return
    clock = Past(min(run.start for run in runs))
    tags = {**_shared([run.tags for run in runs]), "study": runs[0].step, "seeds_reused": ""}
    tags = _marked({**tags, "seeds": " ".join(run.row["seed"] for run in runs)}, marks, runs[0].step)
    name, params = f"{runs[0].step} {len(runs)} seeds", _shared([run.params for run in runs])
    with track(replace(store, clock=clock), name, params=params, tags=tags) as tracked:
        ids = [_run(store, marks, run, tracked.run_id) for run in runs]
        clock.time = max(run.end for run in runs)
        _finish_study(tracked, runs, ids)


def _run(store: Store, marks: Mapping[str, str], run: Committed, parent_run_id: str | None) -> str:
    """Write a run; return its id."""
    clock = Past(run.start)
    past, tags = replace(store, clock=clock), _marked(run.tags, marks, run.step)
    with track(
        past, f"{run.step} seed {run.seed}", params=run.params, tags=tags, parent_run_id=parent_run_id
    ) as tracked:
        clock.time = run.end
        tracked.log_missing(run.epochs)
        tracked.log_once(run.figures)
        if run.mistakes:
            tracked.log_text(to_csv([*MISTAKE_COLUMNS][2:], run.mistakes), MISTAKES)
    return tracked.run_id


def _finish_study(tracked: TrackedRun, runs: Sequence[Committed], ids: Sequence[str]) -> None:
    finished = [FinishedRun(one, run.seed, run.figures) for one, run in zip(ids, runs, strict=True)]
    result = judge_runs(runs[0].targets, int(runs[0].row["epochs"]), tracked.run_id, finished)
    log_verdict(tracked, result, script_of(runs[0].step))
    unknown = dict.fromkeys(EPOCH_FIGURES, math.nan)
    history = [
        {"run_id": one, "step": run.step, "seed": run.seed, "epoch": epoch, **unknown, **of_epoch}
        for one, run in zip(ids, runs, strict=True)
        for epoch, of_epoch in run.epochs.items()
    ]
    log_curves(tracked, history, runs[0].targets)


def _shared(of_runs: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return the params or tags that all runs of a study have; but for those that it has of its own."""
    return {
        name: value
        for name, value in of_runs[0].items()
        if name not in NOT_SHARED and not name.startswith("verdict_") and all(of.get(name) == value for of in of_runs)
    }


def _marked(tags: Mapping[str, str], marks: Mapping[str, str], step: str) -> dict[str, str]:
    source = {MLFLOW_SOURCE_NAME: f"experiments/{step}.py", MLFLOW_SOURCE_TYPE: "LOCAL"}
    source |= {MLFLOW_GIT_COMMIT: tags.get("git_commit", ""), MLFLOW_GIT_BRANCH: ""}  # not those of this moment
    return {**tags, **source, **marks}
