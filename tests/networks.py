"""Networks and declarations that train in a moment, for the tests of training and of what is checked before it."""

import dataclasses
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, SequentialLR

from mnist_lab import Experiment
from mnist_lab.data import Mnist
from mnist_lab.running.checkpoint import Checkpoint
from mnist_lab.training.loop import EpochMetrics, Training, initial_network

CPU = torch.device("cpu")


class Linear(nn.Module):
    """The least that can be trained; its logits may be changed."""

    def __init__(self, outputs: int = 10, change: Callable[[Tensor], Any] | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(49, outputs)
        self.change = change

    def forward(self, images: Tensor) -> Any:
        logits = self.linear(F.avg_pool2d(images, 4).flatten(1))
        return logits if self.change is None else self.change(logits)


class Small(nn.Sequential):
    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__(
            nn.Conv2d(1, 4, 3, stride=2, bias=False),
            nn.BatchNorm2d(4),
            nn.Dropout(dropout),
            nn.ReLU(),
            nn.AvgPool2d(3),
            nn.Flatten(),
            nn.Linear(64, 10),
        )


class DrawsElsewhere:
    def __call__(self, images: Tensor) -> Tensor:
        return torch.stack([self.change(image) for image in images])

    def change(self, image: Tensor) -> Tensor:
        return image.roll(random.randint(-2, 2), dims=-1) * float(np.random.uniform(0.5, 1.0))  # noqa: NPY002


def warm_up_then_decay(optimizer: Optimizer) -> SequentialLR:
    warm_up = LambdaLR(optimizer, lambda step: np.float64((step + 1) / 3))  # numpy's numbers are no plain ones
    return SequentialLR(optimizer, [warm_up, ExponentialLR(optimizer, 0.5)], milestones=[2])


FIRST = EpochMetrics(1, 0.5, 90, 100, 0.4, 95, 100, 0.1, 1.5)


def example(run_id: str = "abc", **changes: object) -> Checkpoint:
    """Return the checkpoint of a run that was stopped after its first epoch."""
    fields = {
        **{"run_id": run_id, "script": "/somewhere/step9_idea.py", "seed": 3, "changes": {"lr": 0.1, "sizes": (1, 2)}},
        **{"limit": None, "holdout": None, "identity": {"lr": "0.1"}, "threads": 1, "epochs": [FIRST]},
        "training": {"epoch": 1, "net": {"weight": torch.ones(3)}},
    }
    return Checkpoint(**{**fields, **changes})  # type: ignore[arg-type]


def declare(**changes: Any) -> Experiment:
    optimizer = partial(SGD, lr=0.05, momentum=0.9)
    fields: dict[str, Any] = {"net": Linear, "epochs": 2, "batch_size": 128, "optimizer": optimizer}
    return Experiment(**(fields | changes))


def train(
    experiment: Experiment,
    mnist: Mnist,
    seed: int = 0,
    memory_format: torch.memory_format = torch.contiguous_format,
    **options: Any,
) -> tuple[Training, list[EpochMetrics]]:
    """Return a training from its first epoch to its last, and the epochs, but for their times."""
    net = initial_network(experiment, seed, mnist.train_images.device, memory_format)
    training = Training(net, experiment, mnist, seed=seed, **options)
    return training, [dataclasses.replace(epoch, epoch_seconds=0.0) for epoch in training.epochs()]
