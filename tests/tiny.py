"""Trains in a moment, with all that a training draws and keeps: dropout, batch norm, rotation, StepLR."""

from functools import partial

import torch
from torch import nn

from mnist_lab import Experiment, Targets, main
from mnist_lab.augmentation import random_rotation


class Net(nn.Sequential):
    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__(
            nn.Conv2d(1, 4, 3, stride=2),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Conv2d(4, 8, 3, stride=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 10),
        )


EXPERIMENT = Experiment(
    net=Net,
    epochs=2,
    batch_size=64,
    optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.8),
    augmentation=partial(random_rotation, degrees=7.0),
    targets=Targets(accuracy=50.0, params=10_000, epochs=5),
)

if __name__ == "__main__":
    main(EXPERIMENT)
