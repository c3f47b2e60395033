"""Step 5, one cycle: the learning rate rises and falls once over the whole training.

Target: 99.4 % in the last epoch, with fewer than 10,000 parameters in fewer than 15 epochs.

Change: the schedule. The learning rate rises linearly to 0.2 over the first fifth of all batches and falls to nearly
0 over the rest; it changes after each batch. Two more changes: Nesterov momentum, and no dropout, as step 4's 0.7 % is
very little. A schedule that ends near 0 acts like an average of the weights.
Compared with step4_augment_steplr: one cycle by batch, Nesterov, no dropout.

Result: 99.48 +- 0.04 % in the last epoch (mean and sd of seeds 0 to 9, two cores of an AMD EPYC without AVX-512, torch
2.15) and 99.49 at best; training accuracy 99.65. Each of the ten seeds ends at 99.41 or above.

Analysis: all targets are met, for the first time: the mean is shown to be above 99.4 (p = 0.0002). With three changes
at once it is 0.05 points above step 4 (-0.01 to +0.10, p = 0.09), which is not shown to be a difference.
Cross-validated on the 60,000 training images (six folds) it is +0.09 (0.03 to 0.15), which is not shown either: p is
0.01, and 0.062 once adjusted for the seven comparisons that are made so.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from mnist_lab import Experiment, Targets, main
from mnist_lab.augmentation import random_rotation


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(  # after each: output (channels, height, width), receptive field in pixels
            nn.Conv2d(1, 8, 3, bias=False),  # (8, 26, 26), 3
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, bias=False),  # (8, 24, 24), 5
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, bias=False),  # (8, 22, 22), 7
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),  # (8, 11, 11), 8
            nn.Conv2d(8, 13, 3, bias=False),  # (13, 9, 9), 12
            nn.BatchNorm2d(13),
            nn.ReLU(),
            nn.Conv2d(13, 14, 3, bias=False),  # (14, 7, 7), 16
            nn.BatchNorm2d(14),
            nn.ReLU(),
            nn.Conv2d(14, 8, 1, bias=False),  # (8, 7, 7), 16
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 26, 3, bias=False),  # (26, 5, 5), 20
            nn.BatchNorm2d(26),
            nn.ReLU(),
            nn.Conv2d(26, 50, 1, bias=False),  # (50, 5, 5), 20
            nn.BatchNorm2d(50),
            nn.ReLU(),
            nn.AvgPool2d(5),  # (50, 1, 1), 28
            nn.Conv2d(50, 10, 1, bias=False),  # (10, 1, 1), 28
        )

    def forward(self, images: Tensor) -> Tensor:  # (N, 1, 28, 28) -> (N, 10)
        return self.layers(images).flatten(1)


EXPERIMENT = Experiment(
    net=Net,
    epochs=14,
    batch_size=128,
    optimizer=partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    scheduler=partial(OneCycleLR, max_lr=0.2, pct_start=0.2, anneal_strategy="linear", cycle_momentum=False),
    scheduler_interval="batch",
    augmentation=partial(random_rotation, degrees=7.0),
    targets=Targets(accuracy=99.4, params=10_000, epochs=15),
)

if __name__ == "__main__":
    main(EXPERIMENT)
