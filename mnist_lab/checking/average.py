"""How much of an average of weights is still the weights that it began with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from mnist_lab.experiment import Experiment

MUCH = 1 / 3  # of an average: with more of the first weights in it, it says little of those that were trained
MAX_BATCHES = 5_000  # that are tried


class FirstWeights:
    """Tells what share of the declared average is still the weights that it began with, those after the first batch.

    Found by averaging one number, 1 at first and then 0, by the declared rule.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.shares = [1.0]  # by the number of batches
        self.number = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.number.weight)
        self.average: AveragedModel | None = None
        if experiment.average is not None:
            with suppress(Exception):  # a rule of one's own may ask for more of a network
                self.average = experiment.average(self.number)

    @torch.no_grad()
    def share(self, batches: int) -> float:
        """Return the share after so many batches; 0 where it is not known."""
        if self.average is None:
            return 0.0
        while len(self.shares) <= batches:
            self.average.update_parameters(self.number)
            nn.init.zeros_(self.number.weight)
            self.shares.append(next(self.average.parameters()).item())
        return self.shares[batches]


def notice_slow_average(experiment: Experiment, num_images: int) -> Iterator[str]:
    """Yield a notice if after an epoch the average still holds much of the first weights."""
    first, batches = FirstWeights(experiment), math.ceil(num_images / experiment.batch_size)
    if first.share(min(batches, MAX_BATCHES)) <= MUCH:
        return
    last = min(MAX_BATCHES, experiment.epochs * batches)
    yield (
        f"average: after {batches:,} batches it is still {100 * first.share(batches):.0f} % the first weights, and "
        f"after {last:,} {100 * first.share(last):.0f} %: as long as it holds much of them, its accuracy says little; "
        "see the raw weights', train for longer, or let it forget sooner"
    )
