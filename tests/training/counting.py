"""Objectives that count their batches: in an attribute, in a variable of an outer function, and in a global."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

BATCHES = 0
Objective = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]


def weighed(net: nn.Module, images: Tensor, labels: Tensor, batches: int) -> tuple[Tensor, Tensor]:
    logits = net(images)
    return F.cross_entropy(logits, labels) * min(1.0, batches / 20), logits


class Ramp:
    def __init__(self) -> None:
        self.batches = 0

    def __call__(self, net: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        self.batches += 1
        return weighed(net, images, labels, self.batches)


def ramp() -> Objective:
    batches = 0

    def objective(net: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal batches
        batches += 1
        return weighed(net, images, labels, batches)

    return objective


def globally(net: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    global BATCHES
    BATCHES += 1
    return weighed(net, images, labels, BATCHES)
