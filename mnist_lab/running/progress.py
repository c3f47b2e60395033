"""Callbacks of a run, a study or a search, for the console or a worker process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # the console is imported before torch
    import torch
    from torch import Tensor

    from mnist_lab.tracking.store import FinishedRun
    from mnist_lab.training.loop import EpochMetrics
    from mnist_lab.verdicts.statistics import Aggregate
    from mnist_lab.verdicts.targets import Verdict


@dataclass(frozen=True)
class StudyResult:
    run_id: str
    runs: list[FinishedRun]  # of each seed, in the order that was asked for
    failed: dict[int, str]  # why the other seeds have none
    aggregates: dict[str, Aggregate]  # by figure, the last epoch's accuracy first; none where no seed has finished
    verdicts: list[Verdict]
    unit: str = "seed"  # or "fold": what there is a run for each of


class Trial(NamedTuple):
    number: int
    values: Mapping[str, object]  # by flat name
    accuracy: float  # in percent


@dataclass(frozen=True)
class SearchResult:
    """The state of a search: how many of its trials have ended in which way."""

    run_id: str
    name: str
    finished: int
    pruned: int
    failed: int
    too_large: int  # for the target, and not trained
    best: list[Trial]  # those that have finished, the best first, each set of values once

    @property
    def done(self) -> int:
        return self.finished + self.pruned + self.failed + self.too_large


class Pruned(Exception):
    """Raised by the listener of a trial's run to end it after the epoch."""


class Progress:
    """Does nothing; a listener overrides the methods that it needs."""

    def on_run(self, name: str, num_params: int, summary: str, num_images: int, done: int) -> None: ...  # epochs
    def on_batch(self, seen: int, loss_sum: Tensor, correct: Tensor) -> None: ...  # see `training.loop.OnBatch`
    def on_epoch(self, seed: int, metrics: EpochMetrics) -> None: ...
    def on_verdict(self, measured: Mapping[str, float], verdicts: Sequence[Verdict]) -> None: ...
    def on_study(self, name: str, seeds: Sequence[int], missing: Sequence[int], workers: int) -> None: ...
    def on_seed(self, seed: int, metrics: Mapping[str, float]) -> None: ...
    def on_failure(self, seed: int, reason: str) -> None: ...
    def on_study_verdict(self, result: StudyResult) -> None: ...
    def on_search(self, name: str, wanted: int, done: int, workers: int, device: torch.device) -> None: ...
    def on_trial(self, number: int, values: Mapping[str, object], outcome: str, stand: SearchResult) -> None: ...
    def on_time(self) -> None: ...  # now and then
