"""What is printed: a run or a study as it goes, and its verdict."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from tabulate import tabulate

from mnist_lab.errors import counted, without_password
from mnist_lab.paths import own_store
from mnist_lab.running.progress import Progress
from mnist_lab.verdicts.measures import MEASURES, percent

if TYPE_CHECKING:  # imported when a run starts: MLflow alone takes seconds, and `--help` needs none of it
    import torch
    from torch import Tensor
    from tqdm import tqdm

    from mnist_lab.running.job import Job
    from mnist_lab.running.progress import SearchResult, StudyResult
    from mnist_lab.training.loop import EpochMetrics
    from mnist_lab.verdicts.targets import Verdict

REFRESH_SECONDS = 0.5  # reading the running figures waits for the device, so the bar does it this often only
LAGS = 0.1  # the share of first weights from which the accuracy of an average says little


def say_what_is_done() -> None:
    """Let the lab's loggers give their notices, and on a terminal say what is being done, where it takes a while."""
    logger = logging.getLogger("mnist_lab")
    logger.setLevel(logging.WARNING)  # else the root's counts, which importing mlflow.pytorch raises to ERROR
    if not sys.stderr.isatty():
        return
    if not logger.handlers:  # without one, Python shows warnings by itself
        logger.addHandler(logging.StreamHandler())
        logger.propagate = False
    logger.setLevel(logging.INFO)


class _Display(Progress):
    bar: tqdm[NoReturn] | None = None

    def start_bar(self, total: int, bar_format: str, **settings: Any) -> None:
        from tqdm import tqdm

        if sys.stdout.isatty():
            settings |= {"bar_format": bar_format, "file": sys.stdout}
            self.bar = tqdm(total=total, leave=False, dynamic_ncols=True, **settings)

    def show(self, line: str, stand: str) -> None:
        """Print a line, with where it all stands: in the bar, or behind it."""
        if self.bar is None:
            print(f"{line}  ({stand})", flush=True)
        else:
            self.bar.set_postfix_str(stand, refresh=False)
            self.bar.write(line, file=sys.stdout)

    def close(self) -> None:  # so that what is printed next starts on a line of its own
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def on_time(self) -> None:
        if self.bar is not None:
            self.bar.refresh()


class _TrainingDisplay(_Display):
    def __init__(self, job: Job) -> None:
        from mnist_lab.checking.schedule import FirstWeights

        self.job, self.epochs = job, job.experiment.epochs
        self.first_weights = FirstWeights(job.experiment)

    def epoch_line(self, metrics: EpochMetrics) -> str:
        raw = ""
        if metrics.raw_accuracy is not None:
            batches = metrics.epoch * math.ceil(metrics.train_images / self.job.experiment.batch_size)
            share = self.first_weights.share(batches)
            little = f"; the average says little yet: it is {share:.0%} the first weights" if share >= LAGS else ""
            raw = f" (raw weights {percent(metrics.raw_accuracy)} %{little})"
        return (
            f"epoch {metrics.epoch:>{len(str(self.epochs))}}/{self.epochs}  "
            f"train loss {metrics.train_loss:.4f}, accuracy {percent(metrics.train_accuracy)} %  "
            f"{metrics.evaluated_on} loss {metrics.eval_loss:.4f}, accuracy {percent(metrics.eval_accuracy)} %{raw}  "
            f"lr {metrics.lr:.3g}  {metrics.epoch_seconds:.1f} s"
        )


class Console(_TrainingDisplay):
    """Shows a run as it goes, a bar on a terminal and a line per epoch everywhere, and its verdict."""

    epoch = 1
    num_images = 0
    shown_at = 0.0

    def on_run(self, name: str, device: torch.device, num_params: int, summary: str, num_images: int) -> None:
        self.num_images = num_images
        if sys.stdout.isatty():
            print(summary)
        print(f"{name}: {num_params:,} parameters, {counted(num_images, 'training image')}, on {device.type}")

    def on_batch(self, seen: int, loss_sum: Tensor, correct: Tensor) -> None:
        if self.bar is None:
            form = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{remaining} left, {rate_fmt}{postfix}]"
            self.start_bar(self.num_images, form, desc=f"epoch {self.epoch}/{self.epochs}", unit=" images")
        now = time.monotonic()
        if self.bar is not None and now - self.shown_at >= REFRESH_SECONDS:
            self.shown_at = now
            loss, accuracy = loss_sum.item() / seen, 100 * correct.item() / seen
            self.bar.set_postfix_str(f"loss {loss:.4f}, accuracy {percent(accuracy)} %", refresh=False)
            self.bar.update(seen - self.bar.n)

    def on_epoch(self, seed: int, metrics: EpochMetrics) -> None:
        self.close()
        self.epoch = metrics.epoch + 1
        print(self.epoch_line(metrics), flush=True)

    def on_verdict(self, measured: Mapping[str, float], verdicts: Sequence[Verdict]) -> None:
        print_result(measured, verdicts, self.job)


class StudyConsole(_TrainingDisplay):
    """Shows a study as it goes: one bar for all seeds on a terminal, else a line per epoch; and a line per seed."""

    done = wanted = width = 0

    def on_study(self, name: str, seeds: Sequence[int], missing: Sequence[int], workers: int) -> None:
        self.wanted, self.done, self.width = len(seeds), len(seeds) - len(missing), len(str(max(seeds)))
        if reused := [seed for seed in seeds if seed not in missing]:
            print(f"{name}: finished already, and not trained again: {self._names(reused)}")
        if not missing:
            return
        print(f"{name}: training {self._names(missing)} ({workers} at a time, on {self.job.device.type})", flush=True)
        form = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} epochs [{elapsed}, {remaining} left{postfix}]"
        # The seeds' epochs end in bursts: only the mean speed, smoothing=0, says when all is done.
        self.start_bar(len(missing) * self.epochs, form, smoothing=0)

    def on_epoch(self, seed: int, metrics: EpochMetrics) -> None:
        if self.bar is not None:
            self.bar.update()
        else:
            print(f"{self._name(seed)}  {self.epoch_line(metrics)}", flush=True)

    def on_seed(self, seed: int, metrics: Mapping[str, float]) -> None:
        self.done += 1
        measures = self.job.protocol
        last, best = (MEASURES[name].text(metrics[name]) for name in (measures.judged, measures.best))
        judged = MEASURES[measures.judged].label.removeprefix("final ")
        best = f"best {measures.part} accuracy {best} in epoch {metrics['best_epoch']:.0f}"
        self._show(seed, f"done: {judged} {last} in the last epoch; {best}")

    def on_failure(self, seed: int, reason: str) -> None:
        self._show(seed, f"failed: {reason}")

    def on_study_verdict(self, result: StudyResult) -> None:
        self.close()
        print_study(result, self.job)

    def _show(self, seed: int, line: str) -> None:
        self.show(f"{self._name(seed)}  {line}", f"{self.done}/{self.wanted} {self.job.protocol.unit}s")

    def _names(self, seeds: Sequence[int]) -> str:
        return f"{self.job.protocol.unit}{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"

    def _name(self, seed: int) -> str:
        return f"{self.job.protocol.unit} {seed:>{self.width}}"


class SearchConsole(_Display):
    """Shows a search as it goes: a line per trial, with where the search stands, which a terminal has in a bar."""

    wanted = 0

    def on_search(self, name: str, wanted: int, done: int, workers: int, device: torch.device) -> None:
        self.wanted = wanted
        before = f", {done} of them done before" if done else ""
        print(f"{name}: {wanted} trials{before}, {workers} at a time, on {device.type}", flush=True)
        if done < wanted:
            form = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left{postfix}]"
            self.start_bar(wanted, form, smoothing=0, initial=done)

    def on_trial(self, number: int, values: Mapping[str, object], outcome: str, stand: SearchResult) -> None:
        parts = [f"{stand.done}/{self.wanted}"]
        parts += [f"{count} {word}" for count, word in ((stand.pruned, "pruned"), (stand.failed, "failed")) if count]
        parts += [f"best {percent(best.accuracy)} % in trial {best.number}" for best in stand.best[:1]]
        if self.bar is not None:
            self.bar.update()
        text = " ".join(f"{name}={value}" for name, value in values.items())
        self.show(f"trial {number:>{len(str(self.wanted))}}  {outcome}  {text}", ", ".join(parts))


def print_search(result: SearchResult, job: Job) -> None:
    from mnist_lab.running.search import best_table, paste_lines, too_good

    too_large = f", {result.too_large} too large for the target, and not trained" if result.too_large else ""
    ended = f"{result.finished} trained to the end, {result.pruned} pruned, {result.failed} failed"
    print(f"\n{counted(result.done, 'trial')}: {ended}{too_large}.")
    if result.best:
        print("\n" + best_table(result))
        print("\nThe best values, to write into the script:\n")
        print("\n".join(f"    {line}" for line in paste_lines(job, result.best[0].values)) + "\n")
        changed = {**job.overrides, **result.best[0].values}
        settings = [f"--set {name}={value}" for name, value in changed.items()]
        settings += [f"--limit {job.limit}"] if job.limit else []
        command = f"make {job.step} ARGS='--holdout {job.holdout} --seeds 1-10 {' '.join(settings)}'"
        print(
            f"The best of {result.finished + result.pruned} is too good by up to about "
            f"{too_good(result, job.holdout):.2f} points: "
            f"so much would chance alone lift it on {job.holdout:,} images if all were equally good. "
            f"What it reaches with other seeds: {command}"
        )
    print("The test images were not read.")
    print(f"MLflow run {result.run_id}; `{make('ui', job)}` shows it, with the runs of the trials below it.")


def print_result(measured: Mapping[str, float], verdicts: Sequence[Verdict], job: Job) -> None:
    print()
    if verdicts:
        print(verdict_table(verdicts) + "\n")
    names, reported = (*job.protocol.summary, *job.protocol.at_times), job.experiment.reported
    figures = {"measured": measured, **({"reported": reported} if reported.keys() & {*names} else {})}
    measures = {name: MEASURES[name] for name in names if name in measured}
    rows = [(one.label, *(one.text(values.get(name)) for values in figures.values())) for name, one in measures.items()]
    print(tabulate(rows, headers=("", *figures), disable_numparse=True))
    if job.holdout:
        print("\nThe accuracy that counts is the final test accuracy: the test images were read once, at the end.")
    else:
        print("\nThe accuracy that counts is the last epoch's. The best epoch was picked on the test images.")
    _print_overrides(job)


def print_run_id(run_id: str, job: Job) -> None:
    flags = ["--include-overrides"] if job.tags["overrides"] else []
    flags += ["--holdout", str(job.holdout)] if job.holdout else []
    compare = make("compare", job, *flags)
    print(f"MLflow run {run_id}; `{make('ui', job)}` shows it, `{compare}` sets it beside the others.", flush=True)


def make(target: str, job: Job, *flags: str) -> str:
    """Return the command that reads the store of this job; without a password that may be in its URI."""
    elsewhere = ["--tracking-uri", without_password(job.tracking_uri)] if job.tracking_uri != own_store() else []
    given = " ".join([*flags, *elsewhere])
    return f'make {target} ARGS="{given}"' if given else f"make {target}"


def print_study(result: StudyResult, job: Job) -> None:
    from mnist_lab.running.study import tables

    if result.runs:
        print("\n" + tables(result))
    if result.verdicts:
        print("\n" + verdict_table(result.verdicts))
    for verdict in result.verdicts:
        if verdict.name == "accuracy":
            print(f"\n{how_sure(verdict)}")
    if job.folds:
        print("\nEach fold was judged by a network that has not seen its images. The test images were not read.")
    _print_overrides(job)


def how_sure(verdict: Verdict) -> str:
    """Say how sure the verdict on the accuracy of several seeds is, and how many it takes where it is not shown."""
    from mnist_lab.verdicts.comparison import seeds_text

    if verdict.n == 1:
        return "One seed shows nothing about the mean: train more of them."
    side = "at least" if verdict.measured >= verdict.target else "below"
    text = f"That the mean is {side} {verdict.target:g} %: p = {verdict.p:.2g}"
    if verdict.word != "not shown":
        return f"{text}, from {verdict.n} seeds."
    if verdict.seeds_needed is None:
        return f"{text}, which does not show it; how many seeds would can't be said."
    needed = seeds_text(verdict.seeds_needed)
    return f"{text}, which does not show it; about {needed} seeds would, if the mean stays where it is."


def _print_overrides(job: Job) -> None:
    if overrides := job.tags["overrides"]:
        print(f"Overridden ({overrides}): tagged so, and not counted among the runs as declared.")


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    from mnist_lab.verdicts import targets

    return tabulate(targets.rows(verdicts), headers=targets.HEADERS, disable_numparse=True)
