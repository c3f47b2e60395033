"""Finds out how long an average of the weights still holds the first ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import nn

from mnist_lab.experiment import Experiment
from mnist_lab.training.loop import build_average

MUCH = 1 / 3  # of an average: with more of the first weights in it, it says little of those that were trained
MAX_BATCHES = 5_000  # that are tried


def notice_slow_average(experiment: Experiment, net: nn.Module, num_images: int) -> Iterator[str]:
    """Yield a notice if after an epoch, or after all, the average still holds much of the first weights.

    It is updated for so many batches with weights that are 1 in the first one and 0 from then on: what it holds is the
    share of the first ones.
    """
    batches = math.ceil(num_images / experiment.batch_size)
    shares = list(_shares(experiment, net, min(MAX_BATCHES, batches * experiment.epochs)))
    if len(shares) <= batches and shares[-1] <= MUCH:
        return
    tried = min(len(shares), batches)
    held = f"average: after {tried:,} batches it is still {100 * shares[tried - 1]:.0f} % the first weights"
    if shares[-1] <= MUCH:
        epoch = math.ceil(len(shares) / batches)
        yield f"{held}, so its accuracy says little before epoch {epoch}: until then, see the raw weights'"
    else:
        share = f"{100 * shares[-1]:.0f} % after {len(shares):,}"
        yield f"{held}, and {share}, so its accuracy says little: train for longer, or let it forget sooner"


@torch.no_grad()
def _shares(experiment: Experiment, net: nn.Module, batches: int) -> Iterator[float]:
    """Yield the share of the first weights after each batch, until it is small."""
    probe = deepcopy(net)
    for parameter in probe.parameters():
        parameter.fill_(1)
    average = build_average(experiment, probe)
    assert average is not None
    held = next(parameter for parameter in average.module.parameters() if parameter.numel())
    for _ in range(batches):
        average.update_parameters(probe)
        for parameter in probe.parameters():
            parameter.fill_(0)
        share = held.flatten()[0].item()
        yield share
        if share <= MUCH:
            return
