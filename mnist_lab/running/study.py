"""One experiment trained with several seeds: what is missing is trained, and all of it is judged together."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from tabulate import tabulate

from mnist_lab.errors import counted
from mnist_lab.experiment import Targets
from mnist_lab.running import identity
from mnist_lab.running.job import Job
from mnist_lab.running.progress import Progress, StudyResult
from mnist_lab.running.record import DESCRIPTION, describe, run_name_of, target_tags, verdict_tags
from mnist_lab.running.run import tried, with_teacher
from mnist_lab.running.workers import Failed, Outcome, SeedTask, Trainers
from mnist_lab.tracking.run import TrackedRun, track
from mnist_lab.tracking.sqlite import read_points
from mnist_lab.tracking.store import FinishedRun, Store, adopt, finished_runs, open_store
from mnist_lab.verdicts.comparison import mean_interval_text
from mnist_lab.verdicts.measures import MEASURES, TESTED, Protocol, percent, short_figures
from mnist_lab.verdicts.statistics import aggregate
from mnist_lab.verdicts.targets import judge

logger = logging.getLogger(__name__)

VERDICT = "verdict.md"  # the artifact with the study's description


def study(
    job: Job, seeds: Sequence[int], progress: Progress, trainers: Trainers, *, again: bool = False
) -> StudyResult:
    """Train and track the job with each of these seeds, and judge them together; raises LabError before any training.

    A seed with a finished run of the same declaration, code and kind of device is not trained again, unless `again`:
    its run becomes a child of this study. When a seed fails, the others are still trained.
    """
    logger.info("Opening the tracking store")
    store = open_store(job.tracking_uri)
    job = with_teacher(job, store)
    hardware, protocol = identity.hardware(job.device), job.protocol
    of_these = partial(finished_runs, seeds=seeds, hardware=hardware)
    runs = {} if again else of_these(store, job.params, job.tags, protocol.judged)
    reused, missing = [seed for seed in seeds if seed in runs], [seed for seed in seeds if seed not in runs]
    count = 0
    if missing:  # else there is nothing to refuse
        trainers.prepare(job, store)
        count = min(trainers.room(), len(missing))
        _, _, rehearsal = tried(job, store)
        rehearsal.notice(job.overrides)
    name = run_name_of(job, counted(len(seeds), job.protocol.unit))
    tags = {
        **{tag: text for tag, text in job.tags.items() if tag != "step"},
        **{"study": job.step, "seeds": " ".join(map(str, seeds)), "seeds_reused": " ".join(map(str, reused))},
        **job.commit_tags,
        **{"hardware": hardware, **target_tags(job.targets)},
    }
    failed: dict[int, str] = {}

    def on_end(task: SeedTask, outcome: Outcome) -> None:
        if isinstance(outcome, Failed):
            failed[task.number] = outcome.reason
            progress.on_failure(task.number, outcome.reason)
        elif outcome is not None:
            runs[task.number] = outcome
            progress.on_seed(task.number, outcome.metrics)

    with track(store, name, params=job.params, tags=tags) as tracked:
        for seed in reused:
            adopt(store, tracked.run_id, runs[seed].run_id)
        progress.on_study(name, seeds, missing, count, job.device)
        if missing:
            tasks = (SeedTask(job, seed, tracked.run_id, again) for seed in missing)
            trainers.train(store, tracked.run_id, tasks, progress, on_end)
        logger.info("Judging the seeds together")
        finished = [runs[seed] for seed in seeds if seed in runs]
        result = judge_runs(job.targets, job.experiment.epochs, tracked.run_id, finished, protocol)
        result = replace(result, reused=reused, failed=failed)
        log_verdict(tracked, result, job.script, job.tags["overrides"])
        progress.on_study_verdict(result)
        logger.info("Drawing the curves of all seeds")
        log_curves(tracked, _read_history(store, job, finished), job.targets)
        if failed:
            tracked.end_status = "FAILED"
    return result


def judge_runs(
    targets: Targets, epochs: int, run_id: str, runs: Sequence[FinishedRun], measured: Protocol = TESTED
) -> StudyResult:
    """Judge the finished runs, of so many epochs each, of the study with this id; `measured`: by which protocol."""
    aggregates, verdicts = {}, []
    if runs:
        figures = {name: [run.metrics[name] for run in runs] for name in measured.over_seeds}
        aggregates = {name: aggregate(values, targets.accuracy) for name, values in figures.items()}
        num_params = int(runs[0].metrics["num_params"])
        verdicts = judge(targets, accuracies=figures[measured.judged], num_params=num_params, epochs=epochs)
    return StudyResult(run_id, list(runs), [], {}, aggregates, verdicts, measured.unit)


def log_verdict(tracked: TrackedRun, result: StudyResult, script: Path, overrides: str = "") -> None:
    """Log what the seeds show together; verdicts, tables and the docstring are the study's description."""
    metrics: dict[str, float] = {}
    for name, figures in result.aggregates.items():  # first: MLflow's comparison of runs begins with them
        metrics |= {f"{name}_{key}": value for key, value in asdict(figures).items() if key != "n"}
    metrics["seeds"] = len(result.runs)
    if result.runs:
        judged, *_ = result.aggregates.values()
        metrics |= {"num_params": result.runs[0].metrics["num_params"], "sd": round(judged.sd, 3)}
        for verdict in [verdict for verdict in result.verdicts if verdict.name == "accuracy"]:
            metrics["p"] = verdict.p
        metrics |= short_figures({name: figures.mean for name, figures in result.aggregates.items()})
    text = "\n\n".join(tabulate(*table, tablefmt="github", disable_numparse=True) for table in tables(result))
    described = describe(script, overrides, result.verdicts, text)
    failed = {"seeds_failed": " ".join(map(str, result.failed))} if result.failed else {}
    tracked.log_once({name: value for name, value in metrics.items() if math.isfinite(value)})
    tracked.set_tags({**verdict_tags(result.verdicts), **failed, DESCRIPTION: described})
    tracked.log_text(described + "\n", VERDICT)


def log_curves(tracked: TrackedRun, history: Sequence[Mapping[str, object]], targets: Targets) -> None:
    """Log the mean over the runs of each figure that all of them have, epoch by epoch, and draw the curves.

    history: a record of each run and epoch.
    """
    import pandas as pd

    from mnist_lab.figures import plot_training  # pandas and matplotlib take a second

    if not history:
        return
    frame = pd.DataFrame.from_records(list(history))
    by_epoch = frame.groupby("epoch")
    means = by_epoch[[name for name in frame if name in MEASURES]].agg(fmean)
    of_all: dict[Any, dict[Any, float]] = means[by_epoch.size() == frame["run_id"].nunique()].to_dict("index")
    tracked.log_missing(
        {epoch: {name: mean for name, mean in row.items() if mean == mean} for epoch, row in of_all.items()}
    )
    tracked.log_figures({"training": plot_training(frame, targets.accuracy)})


def _read_history(store: Store, job: Job, runs: Sequence[FinishedRun]) -> list[dict[str, object]]:
    """Return a record of each epoch of these runs, with the losses and accuracies; raises LabError."""
    names, seeds = job.protocol.curves, {run.run_id: run.seed for run in runs}
    records: dict[tuple[str, int], dict[str, object]] = {}
    with store.failures("can't be read"):
        for run_id, name, epoch, value in read_points(store.uri, dict.fromkeys(seeds, job.experiment.epochs), names):
            new = {"run_id": run_id, "step": job.step, "seed": seeds[run_id], "epoch": epoch}
            record = records.setdefault((run_id, epoch), {**new, **dict.fromkeys(names, math.nan)})
            record[name] = math.nan if value is None else value
    return list(records.values())


def tables(result: StudyResult) -> list[tuple[list[tuple[str, ...]], tuple[str, ...]]]:
    """Return rows and headers of two tables as text: one row per figure over the seeds, and one per seed."""
    if not result.aggregates:
        return []
    over_seeds: list[tuple[str, ...]] = []
    for name, a in result.aggregates.items():
        sd = f"{a.sd:.3f}" if math.isfinite(a.sd) else "-"
        at_target = f"{round(a.share_at_target * a.n)} of {a.n}" if math.isfinite(a.share_at_target) else "-"
        interval = mean_interval_text(a.n, a.low, a.high)
        over_seeds.append(
            (_label(name), percent(a.mean), sd, interval, percent(a.minimum), percent(a.median), at_target)
        )
    headers = ("accuracy in percent", "mean", "sd", "95 % interval", "minimum", "median", "at target")
    per_seed: list[tuple[str, ...]] = [
        (str(run.seed), *(percent(run.metrics[name]) for name in result.aggregates), run.run_id) for run in result.runs
    ]
    return [(over_seeds, headers), (per_seed, (result.unit, *map(_label, result.aggregates), "run"))]


def _label(name: str) -> str:
    """Say "last epoch, test" for `final_test_accuracy`."""
    epoch, part, _ = name.replace("final", "last").split("_")
    return f"{epoch} epoch, {part}"
