"""What is printed: a run or a study as it goes, and its verdict."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from mnist_lab.checking.schedule import FirstWeights
from mnist_lab.errors import counted, without_password
from mnist_lab.measures import MEASURES, percent
from mnist_lab.paths import own_store
from mnist_lab.running.job import Job
from mnist_lab.running.progress import Progress, SearchResult, StudyResult
from mnist_lab.training.loop import EpochMetrics
from mnist_lab.verdicts.comparison import table_text
from mnist_lab.verdicts.targets import Verdict, how_sure, verdict_table


class _Display(Progress):
    bar: tqdm[NoReturn] | None = None

    def __init__(self, job: Job) -> None:
        self.job, self.epochs = job, job.experiment.epochs
        self.first_weights = FirstWeights(job.experiment)

    def start_bar(self, total: int, **settings: Any) -> None:
        if sys.stdout.isatty():
            form = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{unit} [{elapsed}, {remaining} left{postfix}]"
            settings = {"bar_format": form, "smoothing": 0, **settings}  # runs end in bursts: the mean speed counts
            self.bar = tqdm(total=total, file=sys.stdout, leave=False, dynamic_ncols=True, **settings)

    def show(self, line: str, stand: str) -> None:
        """Print a line, and the state of the study or search: in the bar, or after the line."""
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

    def epoch_line(self, metrics: EpochMetrics) -> str:
        raw = ""
        if metrics.raw_accuracy is not None:
            batches = metrics.epoch * math.ceil(metrics.train_images / self.job.experiment.batch_size)
            share = self.first_weights.share(batches)
            little = f"; the average says little yet: it is {share:.0%} the first weights" if share >= 0.1 else ""
            raw = f" (raw weights {percent(metrics.raw_accuracy)} %{little})"
        return (
            f"epoch {metrics.epoch:>{len(str(self.epochs))}}/{self.epochs}  "
            f"train loss {metrics.train_loss:.4f}, accuracy {percent(metrics.train_accuracy)} %  "
            f"{metrics.evaluated_on} loss {metrics.eval_loss:.4f}, accuracy {percent(metrics.eval_accuracy)} %{raw}  "
            f"lr {metrics.lr:.3g}  {metrics.epoch_seconds:.1f} s"
        )

    def print_overrides(self) -> None:
        if overrides := self.job.tags["overrides"]:
            print(f"Overridden ({overrides}): tagged so, and not counted among the runs as declared.")


class Console(_Display):
    """Shows a run as it goes, a bar on a terminal and a line per epoch everywhere, and its verdict."""

    def on_run(self, name: str, num_params: int, summary: str, num_images: int, done: int) -> None:
        self.num_images, self.epoch = num_images, done + 1
        if sys.stdout.isatty():
            print(summary)
        where = f"on {self.job.device.type}" + (f", going on after epoch {done}" if done else "")
        print(f"{name}: {num_params:,} parameters, {counted(num_images, 'training image')}, {where}")

    def on_batch(self, seen: int, loss_sum: Tensor, correct: Tensor) -> None:
        if self.bar is None:
            form = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{remaining} left, {rate_fmt}{postfix}]"
            settings = {"desc": f"epoch {self.epoch}/{self.epochs}", "unit": " images", "mininterval": 0.5}
            self.start_bar(self.num_images, bar_format=form, **settings)
        # Reading the running figures waits for the device, so that is done when the bar was drawn anew, not oftener.
        if self.bar is not None and self.bar.update(seen - self.bar.n):
            loss, accuracy = loss_sum.item() / seen, 100 * correct.item() / seen
            self.bar.set_postfix_str(f"loss {loss:.4f}, accuracy {percent(accuracy)} %")

    def on_epoch(self, seed: int, metrics: EpochMetrics) -> None:
        self.close()
        self.epoch = metrics.epoch + 1
        print(self.epoch_line(metrics), flush=True)

    def on_verdict(self, measured: Mapping[str, float], verdicts: Sequence[Verdict]) -> None:
        print()
        if verdicts:
            print(verdict_table(verdicts) + "\n")
        protocol, reported = self.job.protocol, self.job.experiment.reported
        names = [name for name in (*protocol.summary, *protocol.at_times) if name in measured]
        columns = {
            "": [MEASURES[name].label for name in names],
            "measured": [MEASURES[name].text(measured[name]) for name in names],
            "reported": [MEASURES[name].text(reported.get(name)) for name in names],
        }
        print(table_text(columns))
        if self.job.holdout:
            print("\nThe accuracy that counts is the final test accuracy: the test images were read once, at the end.")
        else:
            print("\nThe accuracy that counts is the last epoch's. The best epoch was picked on the test images.")
        self.print_overrides()


class StudyConsole(_Display):
    """Shows a study as it goes: one bar for all seeds on a terminal, else a line per epoch; and a line per seed."""

    def on_study(self, name: str, seeds: Sequence[int], missing: Sequence[int], workers: int) -> None:
        self.wanted, self.done, self.width = len(seeds), len(seeds) - len(missing), len(str(max(seeds)))
        if reused := [seed for seed in seeds if seed not in missing]:
            print(f"{name}: finished already, and not trained again: {self._names(reused)}")
        if missing:
            where = f"{workers} at a time, on {self.job.device.type}"
            print(f"{name}: training {self._names(missing)} ({where})", flush=True)
            self.start_bar(len(missing) * self.epochs, unit=" epochs")

    def on_epoch(self, seed: int, metrics: EpochMetrics) -> None:
        if self.bar is not None:
            self.bar.update()
        else:
            print(f"{self._name(seed)}  {self.epoch_line(metrics)}", flush=True)

    def on_seed(self, seed: int, metrics: Mapping[str, float]) -> None:
        self.done += 1
        of = [self.job.protocol.judged, self.job.protocol.best]
        last, best = (f"{MEASURES[name].label} {MEASURES[name].text(metrics[name])}" for name in of)
        last = f"{last.removeprefix('final ')} in the last epoch"
        self._show(seed, f"done: {last}; {best} in epoch {metrics['best_epoch']:.0f}")

    def on_failure(self, seed: int, reason: str) -> None:
        self._show(seed, f"failed: {reason}")

    def on_study_verdict(self, result: StudyResult) -> None:
        from mnist_lab.running.study import tables

        self.close()
        if result.runs:
            print("\n" + tables(result))
        if result.verdicts:
            print("\n" + verdict_table(result.verdicts))
        for verdict in result.verdicts:
            if verdict.name == "accuracy":
                print(f"\n{how_sure(verdict)}")
        if self.job.folds:
            print("\nEach fold was judged by a network that has not seen its images. The test images were not read.")
        self.print_overrides()

    def _show(self, seed: int, line: str) -> None:
        self.show(f"{self._name(seed)}  {line}", f"{self.done}/{self.wanted} {self.job.protocol.unit}s")

    def _names(self, seeds: Sequence[int]) -> str:
        return f"{self.job.protocol.unit}{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"

    def _name(self, seed: int) -> str:
        return f"{self.job.protocol.unit} {seed:>{self.width}}"


class SearchConsole(_Display):
    """Shows a search as it goes: a line per trial, and the state of the search, on a terminal in a bar."""

    def on_search(self, name: str, wanted: int, done: int, workers: int, device: torch.device) -> None:
        self.wanted = wanted
        before = f", {done} of them done before" if done else ""
        print(f"{name}: {wanted} trials{before}, {workers} at a time, on {device.type}", flush=True)
        if done < wanted:
            self.start_bar(wanted, unit="", initial=done)

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
        print(f"\n{best_table(result)}\n\nThe best values, to write into the script:\n")
        print("\n".join(f"    {line}" for line in paste_lines(job, result.best[0].values)) + "\n")
        changed = {**job.overrides, **result.best[0].values}
        settings = "".join(f" --set {name}={value}" for name, value in changed.items())
        settings += f" --limit {job.limit}" if job.limit else ""
        command = f"make {job.step} ARGS='--holdout {job.holdout} --seeds 1-10{settings}'"
        print(
            f"The best of {result.finished + result.pruned} is too high by up to about "
            f"{too_good(result, job.holdout):.2f} points: chance alone would lift it so much on {job.holdout:,} images "
            f"if all were equally good. To train its values with other seeds: {command}"
        )
    print("The test images were not read.")
    print_run_id(result.run_id, job, "with the runs of the trials below it")


def print_run_id(run_id: str, job: Job, more: str = "") -> None:
    if not more:
        overrides = "--include-overrides" if job.tags["overrides"] else ""
        compare = _make("compare", job, overrides, f"--holdout {job.holdout}" if job.holdout else "")
        more = f"`{compare}` sets it beside the others"
    print(f"MLflow run {run_id}; `{_make('ui', job)}` shows it, {more}.", flush=True)


def _make(target: str, job: Job, *flags: str) -> str:
    """Return the command that reads the store of this job; without a password that may be in its URI."""
    store = "" if job.tracking_uri == own_store() else f"--tracking-uri {without_password(job.tracking_uri)}"
    given = " ".join(filter(None, (*flags, store)))
    return f'make {target} ARGS="{given}"' if given else f"make {target}"
