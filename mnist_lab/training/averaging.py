"""How much of an average of weights is what was trained."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from mnist_lab.experiment import Experiment


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
