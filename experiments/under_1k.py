"""Under 1,000 parameters: one convolution, used four times.

Target: 98.6 % in the last epoch, with fewer than 1,000 parameters in fewer than 15 epochs.

Change: step 8's layers have 8 channels each, and those behind the first share one 3x3 kernel. Each of its four uses
has a batch norm of its own. The augmentation is weaker (5 degrees, 1 pixel, no scaling) and the learning rate 0.3, as
in under_2k.

Result: not trained yet with the seeds that a figure needs.

Analysis: none yet.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mnist_lab import Experiment, Targets, main
from mnist_lab.augmentation import random_affine


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        shared = nn.Conv2d(8, 8, 3, bias=False)
        self.layers = nn.Sequential(  # after each: output (channels, height, width), receptive field in pixels
            nn.Conv2d(1, 8, 3, bias=False),  # (8, 26, 26), 3
            nn.BatchNorm2d(8),
            nn.ReLU(),
            shared,  # (8, 24, 24), 5
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),  # (8, 12, 12), 6
            shared,  # (8, 10, 10), 10
            nn.BatchNorm2d(8),
            nn.ReLU(),
            shared,  # (8, 8, 8), 14
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),  # (8, 4, 4), 16
            shared,  # (8, 2, 2), 24
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AvgPool2d(2),  # (8, 1, 1), 28
            nn.Flatten(),
            nn.Linear(8, 10),
        )

    def forward(self, images: Tensor) -> Tensor:  # (N, 1, 28, 28) -> (N, 10)
        return self.layers(images)


EXPERIMENT = Experiment(
    net=Net,
    epochs=14,
    batch_size=128,
    optimizer=partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    scheduler=partial(OneCycleLR, max_lr=0.3, pct_start=0.2, anneal_strategy="linear", cycle_momentum=False),
    scheduler_interval="batch",
    augmentation=partial(random_affine, degrees=5.0, shift=1.0, scale=0.0),
    average=partial(AveragedModel, multi_avg_fn=get_ema_multi_avg_fn(0.998), use_buffers=True),
    targets=Targets(accuracy=98.6, params=1_000, epochs=15),
)

if __name__ == "__main__":
    main(EXPERIMENT)
