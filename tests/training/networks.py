"""Networks and declarations that train in a moment, for the tests of this folder."""

import dataclasses
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from mnist_lab import Experiment
from mnist_lab.data import Mnist
from mnist_lab.training.loop import EpochMetrics, Training, initial_network

CPU = torch.device("cpu")


class Linear(nn.Module):
    """The least that can be trained."""

    def __init__(self, outputs: int = 10) -> None:
        super().__init__()
        self.linear = nn.Linear(49, outputs)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(F.avg_pool2d(images, 4).flatten(1))


class Small(nn.Module):
    """A step's network in small: convolution, batch norm and dropout."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, bias=False),
            nn.BatchNorm2d(4),
            nn.Dropout(dropout),
            nn.ReLU(),
            nn.AvgPool2d(3),
            nn.Flatten(),
            nn.Linear(64, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def declare(**changes: Any) -> Experiment:
    fields: dict[str, Any] = {
        "net": Linear,
        "epochs": 2,
        "batch_size": 128,
        "optimizer": partial(SGD, lr=0.05, momentum=0.9),
    }
    return Experiment(**(fields | changes))


def train(experiment: Experiment, mnist: Mnist, seed: int = 0, **options: Any) -> tuple[Training, list[EpochMetrics]]:
    """Return a training from its first epoch to its last, and the epochs, but for their times."""
    net = initial_network(experiment, seed, mnist.train_images.device, torch.contiguous_format)
    training = Training(net, experiment, mnist, seed=seed, **options)
    return training, [dataclasses.replace(epoch, epoch_seconds=0.0) for epoch in training.epochs()]


def first(mnist: Mnist, number: int) -> Mnist:
    """Return the data with so many training images only."""
    return dataclasses.replace(
        mnist, train_images=mnist.train_images[:number], train_labels=mnist.train_labels[:number]
    )
