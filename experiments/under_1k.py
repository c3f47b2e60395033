"""Under 1,000 parameters: one pair of kernels, used four times.

Target: 98.7 % in the last epoch, with fewer than 1,000 parameters in fewer than 15 epochs.

Change: step 8's layers have 17 channels each. All but the first share a 1x1 kernel that mixes the channels, followed by
a depthwise 3x3 kernel, with a batch norm without parameters between the two. Each of their four uses has a batch norm
of its own, and the last layer has no bias: 935 parameters. The augmentation is weaker (5 degrees, 1 pixel, no scaling)
and the learning rate 0.5, as in under_2k.

Result: 98.87 +- 0.11 % in the last epoch (mean and sd of seeds 0 to 9, two cores of an AMD EPYC with AVX-512, torch
2.15) and 98.90 at best; training accuracy 98.56. The mean is shown to be above 98.7 (p = 0.0003).

Analysis: all targets are met. A whole 3x3 kernel, which has room for 9 channels, ended at 98.72 +- 0.11 with 990
parameters (ten seeds, AVX2). The width alone does not help: on held-out images, after six epochs, the pair is 0.25
points above the whole kernel, but without the batch norm between the kernels only 0.02 (two seeds each).
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
        mix = nn.Conv2d(17, 17, 1, bias=False)
        depthwise = nn.Conv2d(17, 17, 3, groups=17, bias=False)

        def block() -> nn.Sequential:
            between = nn.BatchNorm2d(17, affine=False)
            return nn.Sequential(mix, between, depthwise, nn.BatchNorm2d(17), nn.ReLU())

        self.layers = nn.Sequential(  # after each: output (channels, height, width), receptive field in pixels
            nn.Conv2d(1, 17, 3, bias=False),  # (17, 26, 26), 3
            nn.BatchNorm2d(17),
            nn.ReLU(),
            block(),  # (17, 24, 24), 5
            nn.MaxPool2d(2),  # (17, 12, 12), 6
            block(),  # (17, 10, 10), 10
            block(),  # (17, 8, 8), 14
            nn.MaxPool2d(2),  # (17, 4, 4), 16
            block(),  # (17, 2, 2), 24
            nn.AvgPool2d(2),  # (17, 1, 1), 28
            nn.Flatten(),
            nn.Linear(17, 10, bias=False),
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
    targets=Targets(accuracy=98.7, params=1_000, epochs=15),
)

if __name__ == "__main__":
    main(EXPERIMENT)
