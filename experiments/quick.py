"""Quick: the least time on a CPU to a mean of 99.4 %.

Target: 99.4 % in the last epoch, in a fifth of the time that step 4 trains.

Change: against step 8, the first convolution is 5x5 with a stride of 2, so what follows has a quarter of the pixels,
and is wide: 16-24-32-64 channels, 30,122 parameters. Three epochs, with smoothed labels and weaker augmentation
(5 degrees, 1 pixel, no scaling). The weights are not averaged: that takes time and was not seen to help.

Result: 99.47 +- 0.04 % in the last epoch (mean and sd of seeds 0 to 9, two cores of an AMD EPYC without AVX-512,
torch 2.15); training accuracy 99.29. A training with those two cores to itself takes 29 s, step 4's 368.

Analysis: the targets are met: the mean is shown to be above 99.4 (p = 0.0002). On held-out images, three
epochs of this network end 0.1 points above four of one with a quarter of its parameters, in not much more time, and
smoothed labels bring 0.1 more (one or two seeds each: docs/frontier.md).
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from mnist_lab import Experiment, Targets, main
from mnist_lab.augmentation import random_affine


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(  # after each: output (channels, height, width), receptive field in pixels
            nn.Conv2d(1, 16, 5, stride=2, bias=False),  # (16, 12, 12), 5
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 24, 3, bias=False),  # (24, 10, 10), 9
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.Conv2d(24, 32, 3, bias=False),  # (32, 8, 8), 13
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),  # (32, 4, 4), 15
            nn.Conv2d(32, 64, 3, bias=False),  # (64, 2, 2), 23
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.AvgPool2d(2),  # (64, 1, 1), 27
            nn.Flatten(),
            nn.Linear(64, 10),
        )

    def forward(self, images: Tensor) -> Tensor:  # (N, 1, 28, 28) -> (N, 10)
        return self.layers(images)


EXPERIMENT = Experiment(
    net=Net,
    epochs=3,
    batch_size=128,
    optimizer=partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    scheduler=partial(OneCycleLR, max_lr=0.2, pct_start=0.2, anneal_strategy="linear", cycle_momentum=False),
    scheduler_interval="batch",
    loss=partial(F.cross_entropy, label_smoothing=0.1),
    augmentation=partial(random_affine, degrees=5.0, shift=1.0, scale=0.0),
    targets=Targets(accuracy=99.4),
)

if __name__ == "__main__":
    main(EXPERIMENT)
