"""The committed evidence as tracked runs: what docs/results keeps of each run, put into a store.

A restored run has the tags `restored`, the commit that the files are of, and `restored_sha256`, a digest of what they
say of it. By the digest a second call knows what is there, and completes what an interrupted one left half written.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout
from mlflow.entities import Metric, Param, Run
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_SOURCE_NAME, MLFLOW_SOURCE_TYPE

from mnist_lab.errors import LabError
from mnist_lab.experiment import Targets
from mnist_lab.paths import LOCKS, PROJECT_ROOT, own_folder
from mnist_lab.results.predictions import MISTAKES
from mnist_lab.results.records import (
    EPOCH_FORMATS,
    MISTAKE_COLUMNS,
    RUN_COLUMNS,
    Row,
    cells,
    read_records,
    run_of,
    to_csv,
)
from mnist_lab.results.runs import load_runs
from mnist_lab.running.record import DESCRIPTION, describe, verdict_tags
from mnist_lab.running.study import VERDICT, description, draw, judge_runs, mean_epochs, summary
from mnist_lab.tracking.connection import short_timeouts
from mnist_lab.tracking.store import (
    RESTORED,
    FinishedRun,
    Store,
    adopt,
    open_store,
    search,
    store_failures,
    uninterrupted,
)
from mnist_lab.verdicts.measures import short_figures
from mnist_lab.verdicts.targets import judge

DIGEST = "restored_sha256"
NO_MODEL = "none: this run was restored, and the files that it was restored from keep no network"
METRICS_PER_CALL = 900  # MLflow takes 1,000 things at once


@dataclass(frozen=True)
class Restored:
    """What a call has done to the store.

    runs, studies: how many it added or completed. there: how many runs were there already, restored or trained here.
    removed: how many restored runs and studies it took away, as the files say something else by now.
    without_mistakes: how many runs of the files have no record of which images they got wrong.
    """

    runs: int
    studies: int
    there: int
    removed: int
    without_mistakes: int


@dataclass(frozen=True)
class Committed:
    """One run as it is to stand in a store, or a study over several.

    start, end: milliseconds since 1970. mistakes: as CSV, empty where they are not known. over: the runs of a study.
    """

    step: str
    name: str
    start: int
    end: int
    params: Mapping[str, str]
    tags: Mapping[str, str]
    targets: Targets
    seed: int = 0
    metrics: Sequence[Metric] = ()
    mistakes: str = ""
    over: Sequence[Committed] = ()
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        points = [(metric.key, metric.value, metric.timestamp, metric.step) for metric in self.metrics]
        parts = [{**self.params}, {**self.tags}, points, self.mistakes, [one.digest for one in self.over]]
        said = json.dumps([self.name, self.start, self.end, *parts], sort_keys=True)
        object.__setattr__(self, "digest", hashlib.sha256(said.encode()).hexdigest())


def restore(
    folder: Path, *, commit: str, tracking_uri: str | None = None, progress: Callable[[str], None] = print
) -> Restored:
    """Put the runs that a folder of CSVs keeps into the store, under a study for each step with several seeds.

    A run that was trained into this store itself is not added again. Restored runs of which the files say something
    else by now are replaced. All other runs are left alone.
    commit: which the files are of. progress: is told of each step before its runs are written.

    Raises:
        LabError: if the folder has no such files, they are not as the lab writes them, the store can't be written, or
            another call is at work on it.
    """
    committed = _read(folder)
    store = open_store(tracking_uri)
    with store_failures(store, "can't be written"), _alone(store), short_timeouts():
        trained = _trained_here(store)
        steps: dict[str, list[Committed]] = {}
        for row, run in committed:
            if _text(row) not in trained:
                steps.setdefault(run.step, []).append(run)
        studies = {step: _study(step, runs) for step, runs in steps.items() if len(runs) > 1}
        wanted = [*studies.values(), *(run for runs in steps.values() for run in runs)]
        there, removed = _sort_out(store, wanted)
        missing = [run for run in wanted if not _is_whole(there, run)]
        for step, runs in steps.items():
            if count := sum(run in missing for run in runs):
                progress(f"{step}: {count} run{'s' if count > 1 else ''}")
            _restore(store, commit, runs, studies.get(step), there)
    added = sum(not run.over for run in missing)
    return Restored(
        runs=added,
        studies=len(missing) - added,
        there=len(committed) - added,
        removed=removed,
        without_mistakes=sum(not run.mistakes for _, run in committed),
    )


# ---- what the files say


def _read(folder: Path) -> list[tuple[Row, Committed]]:
    """Return each row of the runs in the folder, with the run that it and the rows of the other files make."""
    try:
        records = read_records(folder)
    except OSError as error:
        raise LabError(f"the results can't be restored: {error.strerror}: {error.filename}") from error
    except UnicodeDecodeError as error:
        raise LabError(f"the results can't be restored: a file in {folder} is not UTF-8") from error
    if not records.runs:
        raise LabError(f"folder: {folder} has no CSVs of runs")
    of_run: dict[tuple[str, str], list[list[Row]]] = {run_of(row): [[], [], []] for row in records.runs}
    for number, rows in enumerate((records.epochs, records.settings, records.mistakes)):
        for row in rows:
            if run_of(row) in of_run:
                of_run[run_of(row)][number].append(row)
    read = []
    for row in records.runs:
        try:
            read.append((row, _run(row, *of_run[run_of(row)])))
        except (KeyError, ValueError) as error:
            where = f"{row['step']} seed {row['seed']} in {folder}"
            raise LabError(f"the results can't be restored: {where} is not as the lab writes it: {error}") from error
    return read


def _run(row: Row, epochs: Sequence[Row], settings: Sequence[Row], mistakes: Sequence[Row]) -> Committed:
    """Return the run that these rows are of. Raises KeyError or ValueError if a figure is missing or no number."""
    step, seed = row["step"], int(row["seed"])
    params, tags = (
        {line["name"]: line["value"] for line in settings if line["kind"] == kind} for kind in ("param", "tag")
    )
    if not params:
        raise ValueError("settings.csv has no params of it")
    start = int(datetime.strptime(row["date"], "%Y-%m-%d %H:%M").replace(tzinfo=UTC).timestamp() * 1000)
    end = start + round(60_000 * float(row["minutes"] or 0))
    stated = {name: float(row[f"target_{name}"]) for name in ("accuracy", "params", "epochs") if row[f"target_{name}"]}
    targets = Targets(**{name: value if name == "accuracy" else int(value) for name, value in stated.items()})  # type: ignore[arg-type]
    num_params, count = int(row["num_params"]), int(row["epochs"])
    once = {
        "num_params": num_params,
        "final_test_accuracy": float(row["last"]),
        "best_test_accuracy": float(row["best"]),
        "best_epoch": int(row["best_epoch"]),
    }
    if targets.accuracy is not None and len(epochs) == count:
        once["epochs_at_target"] = sum(float(epoch["test_accuracy"]) >= targets.accuracy for epoch in epochs)
    once |= short_figures(once)
    metrics = [Metric(name, float(value), end, 0) for name, value in once.items()]
    for epoch in epochs:
        number = int(epoch["epoch"])
        time = start + (end - start) * number // count
        known = {name: float(epoch[name]) for name in EPOCH_FORMATS if epoch.get(name)}
        metrics += [Metric(name, value, time, number) for name, value in known.items()]
    verdicts = judge(targets, accuracies=[float(row["last"])], num_params=num_params, epochs=count)
    recorded = {name: row[name] for name in ("hardware", "torch", "git_commit") if row[name]}
    if row["git_dirty"]:
        recorded["git_dirty"] = row["git_dirty"].lower()
    return Committed(
        step=step,
        name=f"{step} seed {seed}",
        start=start,
        end=end,
        params={**params, "seed": str(seed)},
        tags={
            "step": step,
            "overrides": "",
            **({"code_sha256": row["code_sha256"]} if row["code_sha256"] else {}),
            **tags,
            **recorded,
            **{f"target_{name}": f"{value:.12g}" for name, value in vars(targets).items() if value is not None},
            **verdict_tags(verdicts),
            "model": NO_MODEL,
            DESCRIPTION: describe(script_of(step), verdicts=verdicts),
        },
        targets=targets,
        seed=seed,
        metrics=metrics,
        mistakes=to_csv([*MISTAKE_COLUMNS][2:], mistakes) if mistakes else "",
    )


def _study(step: str, runs: Sequence[Committed]) -> Committed:
    """Return the study over the runs of a step; its params and tags are those that all of them share."""
    first = runs[0]
    own = {
        "seed",
        "step",
        "targets",
        "model",
        DESCRIPTION,
        *(name for name in first.tags if name.startswith("verdict_")),
    }

    def shared(kind: str) -> dict[str, str]:
        of_runs = [getattr(run, kind) for run in runs]
        return {n: v for n, v in of_runs[0].items() if n not in own and all(of.get(n) == v for of in of_runs)}

    seeds = " ".join(str(run.seed) for run in runs)
    return Committed(
        step=step,
        name=f"{step} {len(runs)} seeds",
        start=min(run.start for run in runs),
        end=max(run.end for run in runs),
        params=shared("params"),
        tags={**shared("tags"), "study": step, "seeds": seeds, "seeds_reused": ""},
        targets=first.targets,
        over=runs,
    )


def script_of(step: str) -> Path:
    """Return where the script of a step is, or would be."""
    return PROJECT_ROOT / "experiments" / f"{step}.py"


def _history(runs: Sequence[Committed]) -> list[dict[str, object]]:
    """Return a record of each epoch of these runs; what the files don't say is NaN."""
    records: list[dict[str, object]] = []
    for run in runs:
        epochs: dict[int, dict[str, object]] = {}
        for metric in run.metrics:
            if metric.key in EPOCH_FORMATS:
                empty = dict.fromkeys(EPOCH_FORMATS, math.nan)
                identity = {"run_id": run.digest, "step": run.step, "seed": run.seed, "epoch": metric.step}
                epochs.setdefault(metric.step, {**empty, **identity})[metric.key] = metric.value
        records += epochs.values()
    return records


# ---- the store


@contextmanager
def _alone(store: Store) -> Iterator[None]:
    """Keep other calls from the store meanwhile."""
    file = own_folder(store.uri) / LOCKS / "restore.lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(file, timeout=0):
            yield
    except Timeout:
        raise LabError(f"another process is restoring runs into {store.name!r}; wait until it is through") from None


def _text(row: Row) -> str:
    return json.dumps({name: row.get(name, "") for name in RUN_COLUMNS}, sort_keys=True)


def _trained_here(store: Store) -> set[str]:
    """Return the rows, as text, that runs trained into this store have in the files."""
    runs = load_runs(store.uri).runs
    own = runs[(runs["status"] == "FINISHED") & (runs["holdout"] == 0) & (runs["overrides"] == "")]
    return {_text(row) for row in cells(own[own["restored"].isna()].to_dict("records"), RUN_COLUMNS)}


def _is_whole(there: Mapping[str, Run], run: Committed) -> bool:
    return run.digest in there and there[run.digest].info.status == "FINISHED"


def _sort_out(store: Store, wanted: Iterable[Committed]) -> tuple[dict[str, Run], int]:
    """Return what is there of the wanted runs, by their digests, and remove what else was restored; how many."""
    digests = {run.digest for run in wanted}
    there: dict[str, Run] = {}
    surplus = []
    for run in sorted(search(store, f"tags.{DIGEST} LIKE '%'"), key=lambda run: run.info.status != "FINISHED"):
        digest = run.data.tags[DIGEST]
        if digest in digests and digest not in there:
            there[digest] = run
        else:
            surplus.append(run.info.run_id)
    for run_id in surplus:
        with uninterrupted():
            store.client.delete_run(run_id)
    return there, len(surplus)


def _restore(
    store: Store, commit: str, runs: Sequence[Committed], study: Committed | None, there: Mapping[str, Run]
) -> None:
    """Write what is missing of a step's runs, and of the study over them."""
    parent = None if study is None else _open(store, commit, study, there)
    ids = []
    for run in runs:
        ids.append(_open(store, commit, run, there, parent))
        if not _is_whole(there, run):
            _fill(store, ids[-1], run)
    if study is None or parent is None:
        return
    studies = {one.info.run_id for one in search(store, "tags.study LIKE '%'")}
    for found in (there[run.digest] for run in runs if run.digest in there):
        if found.data.tags.get(MLFLOW_PARENT_RUN_ID) not in studies:  # what held it is not there any more
            adopt(store, parent, found.info.run_id)
    if not _is_whole(there, study):
        _fill(store, parent, study, ids)


def _open(store: Store, commit: str, run: Committed, there: Mapping[str, Run], parent_run_id: str | None = None) -> str:
    """Return the run's id, of the one that is there or of a new one, which stands as RUNNING until it is filled."""
    if run.digest in there:
        return str(there[run.digest].info.run_id)
    tags = {
        **run.tags,
        RESTORED: commit,
        DIGEST: run.digest,
        MLFLOW_SOURCE_NAME: f"experiments/{run.step}.py",
        MLFLOW_SOURCE_TYPE: "LOCAL",
        **({} if parent_run_id is None else {MLFLOW_PARENT_RUN_ID: parent_run_id}),
    }
    with uninterrupted():
        new = store.client.create_run(store.experiment_id, start_time=run.start, tags=tags, run_name=run.name)
    return str(new.info.run_id)


def _fill(store: Store, run_id: str, run: Committed, ids: Sequence[str] = ()) -> None:
    """Write all that a run has, and close it. What an interrupted call wrote is not written twice.

    ids: of the runs that a study is over.
    """
    client, metrics = store.client, list(run.metrics)
    with uninterrupted():
        if run.over:
            finished = [
                FinishedRun(one_id, one.seed, {metric.key: metric.value for metric in one.metrics})
                for one_id, one in zip(ids, run.over, strict=True)
            ]
            result = judge_runs(run.targets, int(run.params["epochs"]), run_id, finished)
            figures, tags = summary(result)
            metrics = [Metric(name, value, run.end, 0) for name, value in figures.items()]
            described = description(result, script_of(run.step))
            for name, text in {**tags, DESCRIPTION: described}.items():
                client.set_tag(run_id, name, text)
            client.log_text(run_id, described + "\n", VERDICT)
            history = _history(run.over)
            for epoch, means in mean_epochs(history).items():
                metrics += [Metric(name, value, run.end, epoch) for name, value in means.items()]
            for name, figure in draw(history, run.targets).items():
                client.log_figure(run_id, figure, f"figures/{name}.png")
        client.log_batch(run_id, params=[Param(name, value) for name, value in run.params.items()])
        for first in range(0, len(metrics), METRICS_PER_CALL):
            client.log_batch(run_id, metrics=metrics[first : first + METRICS_PER_CALL])
        if run.mistakes:
            client.log_text(run_id, run.mistakes, MISTAKES)
        client.set_terminated(run_id, "FINISHED", run.end)
