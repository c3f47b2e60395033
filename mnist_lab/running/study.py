"""One experiment with several seeds: the missing ones are trained, and all are judged together."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from mnist_lab.errors import counted
from mnist_lab.experiment import Targets
from mnist_lab.measures import MEASURES, TESTED, Protocol, percent, short_figures
from mnist_lab.running import identity
from mnist_lab.running.job import Job
from mnist_lab.running.progress import Progress, StudyResult
from mnist_lab.running.run import DESCRIPTION, describe, run_name_of, target_tags, tried, verdict_tags, with_teacher
from mnist_lab.running.workers import Failed, SeedTask, Trainers
from mnist_lab.tracking.run import TrackedRun, track
from mnist_lab.tracking.sqlite import read_points
from mnist_lab.tracking.store import FinishedRun, Store, adopt, finished_runs, open_store
from mnist_lab.verdicts.comparison import mean_interval_text, step_order
from mnist_lab.verdicts.statistics import aggregate
from mnist_lab.verdicts.targets import judge

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)


def study(
    job: Job, seeds: Sequence[int], progress: Progress, trainers: Trainers, *, again: bool = False
) -> StudyResult:
    """Train and track the job with each of these seeds, and judge them together; raises LabError before any training.

    A seed with a finished run of the same declaration, code, number of parameters and kind of device is not trained
    again, unless `again`: its run becomes a child of this study. When a seed fails, the others are still trained.
    """
    logger.info("Opening the tracking store")
    store = open_store(job.tracking_uri)
    job = with_teacher(job, store)
    hardware, protocol = identity.hardware(job.device), job.protocol
    runs = {} if again else finished_runs(store, job.params, job.tags, protocol.judged, seeds=seeds, hardware=hardware)
    _, _, rehearsal = tried(job, store)
    runs = {seed: run for seed, run in runs.items() if run.metrics.get("num_params") in rehearsal.params}
    reused, missing = [seed for seed in seeds if seed in runs], [seed for seed in seeds if seed not in runs]
    if missing:
        trainers.prepare(job, store)
        rehearsal.notice(job.overrides)
    else:
        trainers = Trainers()  # there is nothing to refuse, and no cluster to look for
    name = run_name_of(job, counted(len(seeds), job.protocol.unit))
    tags = {
        **{tag: text for tag, text in job.tags.items() if tag != "step"},
        **{"study": job.step, "seeds": " ".join(map(str, seeds)), "seeds_reused": " ".join(map(str, reused))},
        **job.commit_tags,
        **{"order": step_order(job.step), "hardware": hardware, **target_tags(job.targets)},
    }
    failed: dict[int, str] = {}
    with track(store, name, params=job.params, tags=tags) as tracked:
        for seed in reused:
            adopt(store, tracked.run_id, runs[seed].run_id)
        progress.on_study(name, seeds, missing, min(trainers.room, len(missing)))
        tasks = (SeedTask(job, seed, tracked.run_id, again) for seed in missing)
        with closing(trainers.train(store, tracked.run_id, tasks, progress)) as ended:
            for task, outcome in ended:
                if isinstance(outcome, Failed):
                    failed[task.number] = outcome.reason
                    progress.on_failure(task.number, outcome.reason)
                elif outcome is not None:
                    runs[task.number] = outcome
                    progress.on_seed(task.number, outcome.metrics)
        logger.info("Judging the seeds together")
        finished = [runs[seed] for seed in seeds if seed in runs]
        result = judge_runs(job.targets, job.experiment.epochs, tracked.run_id, finished, protocol)
        result = replace(result, failed=failed)
        log_verdict(tracked, result, job.script, job.tags["overrides"])
        progress.on_study_verdict(result)
        logger.info("Drawing the curves of all seeds")
        log_curves(tracked, _read_history(store, job, finished), job.targets)
        tracked.end_status = "FAILED" if failed else "FINISHED"
    return result


def judge_runs(
    targets: Targets, epochs: int, run_id: str, runs: Sequence[FinishedRun], measured: Protocol = TESTED
) -> StudyResult:
    """Judge the finished runs, each of `epochs` epochs, of the study with this id; `measured`: by which protocol."""
    aggregates, verdicts = {}, []
    if runs:
        figures = {name: [run.metrics[name] for run in runs] for name in measured.over_seeds}
        aggregates = {name: aggregate(values, targets.accuracy) for name, values in figures.items()}
        num_params = int(max(run.metrics["num_params"] for run in runs))
        verdicts = judge(targets, accuracies=figures[measured.judged], num_params=num_params, epochs=epochs)
    return StudyResult(run_id, list(runs), {}, aggregates, verdicts, measured.unit)


def log_verdict(tracked: TrackedRun, result: StudyResult, script: Path, overrides: str = "") -> None:
    """Log what the seeds show together; verdicts, tables and the docstring are the study's description."""
    metrics: dict[str, float] = {}
    for name, figures in result.aggregates.items():  # first: MLflow's comparison of runs begins with them
        metrics |= {f"{name}_{key}": value for key, value in asdict(figures).items() if key != "n"}
    metrics["seeds"] = len(result.runs)
    if result.runs:
        judged, *_ = result.aggregates.values()
        metrics |= {"num_params": max(run.metrics["num_params"] for run in result.runs), "sd": round(judged.sd, 3)}
        for verdict in [verdict for verdict in result.verdicts if verdict.name == "accuracy"]:
            metrics["p"] = verdict.p
        metrics |= short_figures({name: figures.mean for name, figures in result.aggregates.items()})
    tracked.log_once({name: value for name, value in metrics.items() if math.isfinite(value)})
    described = describe(script, overrides, result.verdicts, tables(result, "github"))
    failed = {"seeds_failed": " ".join(map(str, result.failed))} if result.failed else {}
    tracked.set_tags({**verdict_tags(result.verdicts), **failed, DESCRIPTION: described})
    tracked.log_text(described + "\n", "verdict.md")


def log_curves(tracked: TrackedRun, history: pd.DataFrame, targets: Targets) -> None:
    """Log the means over the runs of the epochs that all have, and draw the curves; history: a row of each epoch."""
    from mnist_lab.figures import plot_training

    if history.empty:
        return
    by_epoch = history.groupby("epoch")
    means = by_epoch[[name for name in history if name in MEASURES]].agg(fmean)
    of_all: dict[Any, Any] = dict(means[by_epoch.size() == history["run_id"].nunique()].iterrows())
    tracked.log_missing({epoch: row.dropna().to_dict() for epoch, row in of_all.items()})
    tracked.log_figures({"training": plot_training(history, targets.accuracy)})


def _read_history(store: Store, job: Job, runs: Sequence[FinishedRun]) -> pd.DataFrame:
    """Return one row per run and epoch, with the losses and accuracies; raises LabError."""
    import pandas as pd  # it and matplotlib take a second

    names, seeds = job.protocol.curves, {run.run_id: run.seed for run in runs}
    with store.failures("can't be read"):
        rows = read_points(store.uri, dict.fromkeys(seeds, job.experiment.epochs), names)
    points = pd.DataFrame(rows, columns=["run_id", "metric", "epoch", "value"]).astype({"value": "float64"})
    wide = points.pivot_table(index=["run_id", "epoch"], columns="metric", values="value", aggfunc="last")
    history = wide.reindex(columns=names).reset_index()
    return history.assign(step=job.step, seed=history["run_id"].map(seeds))


def tables(result: StudyResult, style: str = "simple") -> str:
    """Return two tables in a style of tabulate: one row per figure over the seeds, and one per seed."""
    if not result.aggregates:
        return ""
    # "last epoch, test" for `final_test_accuracy`
    labels = ["{} epoch, {}".format(*name.replace("final", "last").split("_")) for name in result.aggregates]
    over_seeds, per_seed = [], []
    for label, a in zip(labels, result.aggregates.values(), strict=True):
        sd = f"{a.sd:.3f}" if math.isfinite(a.sd) else "-"
        at_target = f"{round(a.share_at_target * a.n)} of {a.n}" if math.isfinite(a.share_at_target) else "-"
        interval = mean_interval_text(a.n, a.low, a.high)
        over_seeds.append((label, percent(a.mean), sd, interval, percent(a.minimum), percent(a.median), at_target))
    for run in result.runs:
        per_seed.append((str(run.seed), *(percent(run.metrics[name]) for name in result.aggregates), run.run_id))
    headers = ("accuracy in percent", "mean", "sd", "95 % interval", "minimum", "median", "at target")
    both = (over_seeds, headers), (per_seed, (result.unit, *labels, "run"))
    return "\n\n".join(tabulate(rows, names, tablefmt=style, disable_numparse=True) for rows, names in both)
