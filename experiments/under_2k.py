"""Under 2,000 parameters: one convolution, used four times.

Target: 99.2 % in the last epoch, with fewer than 2,000 parameters in fewer than 15 epochs.

Change: step 8's layers have 13 channels each, and all but the first share one 3x3 kernel. Each of its four uses has a
batch norm of its own: 1,908 parameters. The augmentation is weaker (5 degrees, 1 pixel, no scaling) and the learning
rate higher (0.5). In evaluation mode the network reads each image five times, as it is and shifted by one pixel to each
side, and gives the mean of the logits.

Result: 99.30 +- 0.07 % in the last epoch (mean and sd of seeds 0 to 9, two cores of an Intel Xeon with AVX-512, torch
2.15) and 99.33 at best; training accuracy 99.00.

Analysis: the target is met: the mean is shown to be above 99.2 (p = 0.001). The same weights with one view end at
99.19, so the views add 0.11 points (0.06 to 0.16). Before it had them, seeds 0 to 9 had ended at 99.19 +- 0.06 too, on
a processor without AVX-512. Eight other networks and recipes, a deeper and a residual network among them, were compared
with this one on held-out images, most with one seed (docs/frontier.md). None ended above it.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mnist_lab import Experiment, Targets, main
from mnist_lab.augmentation import random_affine

SHIFTS = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))  # pixels (down, to the right), cyclic


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        shared = nn.Conv2d(13, 13, 3, bias=False)
        self.layers = nn.Sequential(  # after each: output (channels, height, width), receptive field in pixels
            nn.Conv2d(1, 13, 3, bias=False),  # (13, 26, 26), 3
            nn.BatchNorm2d(13),
            nn.ReLU(),
            shared,  # (13, 24, 24), 5
            nn.BatchNorm2d(13),
            nn.ReLU(),
            nn.MaxPool2d(2),  # (13, 12, 12), 6
            shared,  # (13, 10, 10), 10
            nn.BatchNorm2d(13),
            nn.ReLU(),
            shared,  # (13, 8, 8), 14
            nn.BatchNorm2d(13),
            nn.ReLU(),
            nn.MaxPool2d(2),  # (13, 4, 4), 16
            shared,  # (13, 2, 2), 24
            nn.BatchNorm2d(13),
            nn.ReLU(),
            nn.AvgPool2d(2),  # (13, 1, 1), 28
            nn.Flatten(),
            nn.Linear(13, 10),
        )

    def forward(self, images: Tensor) -> Tensor:  # (N, 1, 28, 28) -> (N, 10)
        if self.training:
            return self.layers(images)
        return torch.stack([self.layers(images.roll(shift, dims=(2, 3))) for shift in SHIFTS]).mean(dim=0)


EXPERIMENT = Experiment(
    net=Net,
    epochs=14,
    batch_size=128,
    optimizer=partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    scheduler=partial(OneCycleLR, max_lr=0.5, pct_start=0.2, anneal_strategy="linear", cycle_momentum=False),
    scheduler_interval="batch",
    augmentation=partial(random_affine, degrees=5.0, shift=1.0, scale=0.0),
    average=partial(AveragedModel, multi_avg_fn=get_ema_multi_avg_fn(0.998), use_buffers=True),
    targets=Targets(accuracy=99.2, params=2_000, epochs=15),
)

if __name__ == "__main__":
    main(EXPERIMENT)
