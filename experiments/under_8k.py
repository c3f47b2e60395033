"""Under 8,000 parameters: step 8's network, narrower.

Target: 99.46 % in the last epoch, with fewer than 8,000 parameters in fewer than 15 epochs.

Change: step 8's widths become 9-12-16-18-13: 7,755 parameters.

Result: 99.55 +- 0.03 % in the last epoch (mean and sd of seeds 0 to 9, two cores of an AMD EPYC without AVX-512, torch
2.15) and 99.57 at best; training accuracy 99.48. The mean is shown to be above 99.46 (p < 0.0001), and above 99.50
(p = 0.0003).

Analysis: all targets are met. With a fifth fewer parameters than step 8, ten seeds show no loss: 99.55 against 99.56.
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
            nn.Conv2d(1, 9, 3, bias=False),  # (9, 26, 26), 3
            nn.BatchNorm2d(9),
            nn.ReLU(),
            nn.Conv2d(9, 12, 3, bias=False),  # (12, 24, 24), 5
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.MaxPool2d(2),  # (12, 12, 12), 6
            nn.Conv2d(12, 16, 3, bias=False),  # (16, 10, 10), 10
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 18, 3, bias=False),  # (18, 8, 8), 14
            nn.BatchNorm2d(18),
            nn.ReLU(),
            nn.MaxPool2d(2),  # (18, 4, 4), 16
            nn.Conv2d(18, 13, 3, bias=False),  # (13, 2, 2), 24
            nn.BatchNorm2d(13),
            nn.ReLU(),
            nn.AvgPool2d(2),  # (13, 1, 1), 28
            nn.Flatten(),
            nn.Linear(13, 10),
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
    targets=Targets(accuracy=99.46, params=8_000, epochs=15),
)

if __name__ == "__main__":
    main(EXPERIMENT)
