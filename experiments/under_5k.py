"""Under 5,000 parameters: step 8's network, narrower.

Target: 99.42 % in the last epoch, with fewer than 5,000 parameters in fewer than 15 epochs.

Change: step 8's widths become 8-10-12-12-14: 4,942 parameters.

Result: 99.47 +- 0.05 % in the last epoch (mean and sd of seeds 0 to 29, two cores of an AMD EPYC without AVX-512, torch
2.15) and 99.50 at best; training accuracy 99.33. The 30 seeds end between 99.37 and 99.57.

Analysis: all targets are met: the mean is shown to be above 99.42 (p < 0.0001). With half of step 8's parameters it
ends 0.1 points below step 8. It gets 0.7 % of its augmented training images wrong, so its size limits it, not
over-fitting.
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
        self.layers = nn.Sequential(  # after each: output (channels, height, width), receptive field in pixels
            nn.Conv2d(1, 8, 3, bias=False),  # (8, 26, 26), 3
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 10, 3, bias=False),  # (10, 24, 24), 5
            nn.BatchNorm2d(10),
            nn.ReLU(),
            nn.MaxPool2d(2),  # (10, 12, 12), 6
            nn.Conv2d(10, 12, 3, bias=False),  # (12, 10, 10), 10
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 12, 3, bias=False),  # (12, 8, 8), 14
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.MaxPool2d(2),  # (12, 4, 4), 16
            nn.Conv2d(12, 14, 3, bias=False),  # (14, 2, 2), 24
            nn.BatchNorm2d(14),
            nn.ReLU(),
            nn.AvgPool2d(2),  # (14, 1, 1), 28
            nn.Flatten(),
            nn.Linear(14, 10),
        )

    def forward(self, images: Tensor) -> Tensor:  # (N, 1, 28, 28) -> (N, 10)
        return self.layers(images)


EXPERIMENT = Experiment(
    net=Net,
    epochs=14,
    batch_size=128,
    optimizer=partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    scheduler=partial(OneCycleLR, max_lr=0.2, pct_start=0.2, anneal_strategy="linear", cycle_momentum=False),
    scheduler_interval="batch",
    augmentation=partial(random_affine, degrees=10.0, shift=1.0, scale=0.1),
    average=partial(AveragedModel, multi_avg_fn=get_ema_multi_avg_fn(0.998), use_buffers=True),
    targets=Targets(accuracy=99.42, params=5_000, epochs=15),
)

if __name__ == "__main__":
    main(EXPERIMENT)
