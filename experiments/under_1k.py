"""Under 1,000 parameters: one convolution, used four times.

Target: 98.6 % in the last epoch, with fewer than 1,000 parameters in fewer than 15 epochs.

Change: step 8's layers have 9 channels each, and those behind the first share one 3x3 kernel. Each of its four uses has
a batch norm of its own, and the last layer has no bias: 990 parameters. The augmentation is weaker (5 degrees, 1 pixel,
no scaling) and the learning rate 0.5, as in under_2k.

Result: 98.72 +- 0.11 % in the last epoch (mean and sd of seeds 0 to 9, two cores of an AMD EPYC without AVX-512, torch
2.15) and 98.77 at best; training accuracy 98.32. The mean is shown to be above 98.6 (p = 0.003).

Analysis: all targets are met. Width is what counts here: on held-out images 9 channels are 0.36 points above 8, after
six epochs of one seed. The network still gets 1.7 % of its augmented training images wrong: its size limits it.
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
        shared = nn.Conv2d(9, 9, 3, bias=False)
        self.layers = nn.Sequential(  # after each: output (channels, height, width), receptive field in pixels
            nn.Conv2d(1, 9, 3, bias=False),  # (9, 26, 26), 3
            nn.BatchNorm2d(9),
            nn.ReLU(),
            shared,  # (9, 24, 24), 5
            nn.BatchNorm2d(9),
            nn.ReLU(),
            nn.MaxPool2d(2),  # (9, 12, 12), 6
            shared,  # (9, 10, 10), 10
            nn.BatchNorm2d(9),
            nn.ReLU(),
            shared,  # (9, 8, 8), 14
            nn.BatchNorm2d(9),
            nn.ReLU(),
            nn.MaxPool2d(2),  # (9, 4, 4), 16
            shared,  # (9, 2, 2), 24
            nn.BatchNorm2d(9),
            nn.ReLU(),
            nn.AvgPool2d(2),  # (9, 1, 1), 28
            nn.Flatten(),
            nn.Linear(9, 10, bias=False),
        )

    def forward(self, images: Tensor) -> Tensor:  # (N, 1, 28, 28) -> (N, 10)
        return self.layers(images)


EXPERIMENT = Experiment(
    net=Net,
    epochs=14,
    batch_size=128,
    optimizer=partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    scheduler=partial(OneCycleLR, max_lr=0.5, pct_start=0.2, anneal_strategy="linear", cycle_momentum=False),
    scheduler_interval="batch",
    augmentation=partial(random_affine, degrees=5.0, shift=1.0, scale=0.0),
    average=partial(AveragedModel, multi_avg_fn=get_ema_multi_avg_fn(0.998), use_buffers=True),
    targets=Targets(accuracy=98.6, params=1_000, epochs=15),
)

if __name__ == "__main__":
    main(EXPERIMENT)
