"""Who listens to a run, a study or a search: the console, a worker process, or nobody."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the console is imported before torch
    import torch
    from torch import Tensor

    from mnist_lab.running.record import RunResult
    from mnist_lab.running.search import Counts
    from mnist_lab.running.study import StudyResult
    from mnist_lab.training.loop import EpochMetrics


class Pruned(Exception):
    """Raised by who listens to a trial's run, to end it after the epoch: it is not worth more of them."""


class Progress:
    """Listens, and does nothing: a listener overrides what it wants to hear.

    on_run, on_study, on_search: it begins. on_batch: see `training.loop.OnBatch`.
    on_verdict, on_study_verdict: it is judged; what takes longer, its figures and the model, is written next.
    on_time: called now and then.
    """

    def on_run(self, name: str, device: torch.device, num_params: int, summary: str, num_images: int) -> None: ...
    def on_batch(self, seen: int, loss_sum: Tensor, correct: Tensor) -> None: ...
    def on_epoch(self, seed: int, metrics: EpochMetrics) -> None: ...
    def on_verdict(self, result: RunResult) -> None: ...

    def on_study(
        self, name: str, seeds: Sequence[int], missing: Sequence[int], workers: int, device: torch.device
    ) -> None: ...
    def on_seed(self, seed: int, metrics: Mapping[str, float]) -> None: ...
    def on_failure(self, seed: int, reason: str) -> None: ...
    def on_study_verdict(self, result: StudyResult) -> None: ...

    def on_search(self, name: str, wanted: int, done: int, workers: int, device: torch.device) -> None: ...
    def on_trial(self, number: int, values: Mapping[str, object], outcome: str, counts: Counts) -> None: ...

    def on_time(self) -> None: ...
