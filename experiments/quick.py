"""Quick: the least time on a CPU to a mean of 99.4 %.

Target: 99.4 % in the last epoch, in a small part of step 4's training time.

Change: against step 8, the first convolution is 5x5 with a stride of 2, the pool comes right after the second, and the
widths are multiples of 16, which are faster than others: 16-16, pool, 64-64 channels, 49,754 parameters. Two epochs.
In evaluation mode the network reads each image three times, as it is and shifted by one pixel up and down, and gives
the mean of the logits. The recipe comes from `--search`: 71 trials of two epochs on held-out images. The weights are
not averaged.

Result: 99.44 +- 0.02 % in the last epoch (mean and sd of seeds 0 to 9, two cores of an Intel Xeon with AVX-512, torch
2.15); training accuracy 98.98. A training with two such cores to itself takes 9 s, step 4's 328.

Analysis: the target is met: the mean is shown to be above 99.4 (p = 0.0002), and no seed ends below it. Two epochs with
one view end at 99.40 +- 0.05, three at 99.45 +- 0.04 (ten seeds each). The three took 1.4 times as long as this
(docs/frontier.md).
"""

from functools import partial

import torch
import torch.nn.functional as F
from optuna.distributions import FloatDistribution, IntDistribution
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from mnist_lab import Experiment, Targets, main
from mnist_lab.augmentation import random_affine

SHIFTS = ((0, 0), (1, 0), (-1, 0))  # pixels (down, to the right), cyclic


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(  # after each: output (channels, height, width), receptive field in pixels
            nn.Conv2d(1, 16, 5, stride=2, bias=False),  # (16, 12, 12), 5
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, bias=False),  # (16, 10, 10), 9
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),  # (16, 5, 5), 11
            nn.Conv2d(16, 64, 3, bias=False),  # (64, 3, 3), 19
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, bias=False),  # (64, 1, 1), 27
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64, 10),
        )

    def forward(self, images: Tensor) -> Tensor:  # (N, 1, 28, 28) -> (N, 10)
        if self.training:
            return self.layers(images)
        return torch.stack([self.layers(images.roll(shift, dims=(2, 3))) for shift in SHIFTS]).mean(dim=0)


EXPERIMENT = Experiment(
    net=Net,
    epochs=2,
    batch_size=160,
    optimizer=partial(torch.optim.SGD, momentum=0.9, nesterov=True, weight_decay=0.00025),
    scheduler=partial(OneCycleLR, max_lr=0.43, pct_start=0.16, anneal_strategy="linear", cycle_momentum=False),
    scheduler_interval="batch",
    loss=partial(F.cross_entropy, label_smoothing=0.03),
    augmentation=partial(random_affine, degrees=1.3, shift=1.3, scale=0.036),
    targets=Targets(accuracy=99.4),
)

SEARCH = {
    "max_lr": FloatDistribution(0.05, 0.6, log=True),
    "pct_start": FloatDistribution(0.1, 0.4),
    "label_smoothing": FloatDistribution(0.0, 0.2),
    "degrees": FloatDistribution(0.0, 10.0),
    "shift": FloatDistribution(0.0, 2.0),
    "scale": FloatDistribution(0.0, 0.1),
    "batch_size": IntDistribution(64, 256, step=32),
    "weight_decay": FloatDistribution(0.0, 0.001),
}

if __name__ == "__main__":
    main(EXPERIMENT, search=SEARCH)
