"""Step 4, augmentation + StepLR: harder training images and a learning rate that falls.

Target: 99.4 % in the last epochs, with fewer than 10,000 parameters in fewer than 15 epochs.

Change: two at once, as reported. Training images are rotated at random, and the learning rate starts at 0.1 and falls
by StepLR (0.01 without a schedule was tried first, and gave 99.39 at best). Every block has dropout, and the head gets
50 channels. The angle was not reported; up to 7 degrees is usual for this family of networks.
Compared with step3_gap: step 4 as a whole.
Compared with steplr_alone: augmentation.
Compared with augment_alone: StepLR and lr 0.1.

Result: 99.43 +- 0.07 % in the last epoch (mean and sd of seeds 0 to 9, two cores of an Intel Xeon with AVX-512, torch
2.15) and 99.45 at best; training accuracy 99.45. Seven of ten seeds end at 99.4 or above, between 99.33 and 99.54.
Reported were 99.46 at best (epoch 11), and 99.32 in training.

Analysis: it is 0.28 points better than step 3, with an interval of 0.21 to 0.35 (ten seeds of each, p < 0.0001).
Of its two changes the schedule is shown to help (0.24 points, augment_alone.py); augmentation is not (0.07, see
steplr_alone.py).
Its mean is so near the target that ten seeds do not show it met: the interval is 99.38 to 99.48, and about 50 seeds
would be needed. Ten seeds trained before, most of them on another processor, ended at 99.41. It is chance whether a
single run reaches the target. The curves are smooth once the learning rate falls, so the last epoch is nearly the best.
The training accuracy, measured on rotated images, is hardly above the test accuracy.
"""

from functools import partial

import torch
from optuna.distributions import FloatDistribution
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

from mnist_lab import Experiment, Targets, main
from mnist_lab.augmentation import random_rotation


class Net(nn.Module):
    def __init__(self, dropout: float = 0.007) -> None:
        super().__init__()
        self.layers = nn.Sequential(  # after each: output (channels, height, width), receptive field in pixels
            nn.Conv2d(1, 8, 3, bias=False),  # (8, 26, 26), 3
            nn.BatchNorm2d(8),
            nn.Dropout(dropout),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, bias=False),  # (8, 24, 24), 5
            nn.BatchNorm2d(8),
            nn.Dropout(dropout),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, bias=False),  # (8, 22, 22), 7
            nn.BatchNorm2d(8),
            nn.Dropout(dropout),
            nn.ReLU(),
            nn.MaxPool2d(2),  # (8, 11, 11), 8
            nn.Conv2d(8, 13, 3, bias=False),  # (13, 9, 9), 12
            nn.BatchNorm2d(13),
            nn.Dropout(dropout),
            nn.ReLU(),
            nn.Conv2d(13, 14, 3, bias=False),  # (14, 7, 7), 16
            nn.BatchNorm2d(14),
            nn.Dropout(dropout),
            nn.ReLU(),
            nn.Conv2d(14, 8, 1, bias=False),  # (8, 7, 7), 16
            nn.BatchNorm2d(8),
            nn.Dropout(dropout),
            nn.ReLU(),
            nn.Conv2d(8, 26, 3, bias=False),  # (26, 5, 5), 20
            nn.BatchNorm2d(26),
            nn.Dropout(dropout),
            nn.ReLU(),
            nn.Conv2d(26, 50, 1, bias=False),  # (50, 5, 5), 20
            nn.BatchNorm2d(50),
            nn.Dropout(dropout),
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
    optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    scheduler=partial(StepLR, step_size=2, gamma=0.6),
    augmentation=partial(random_rotation, degrees=7.0),
    targets=Targets(accuracy=99.4, params=10_000, epochs=15),
    reported={"best_train_accuracy": 99.32, "best_test_accuracy": 99.46, "best_epoch": 11},
)

SEARCH = {
    "lr": FloatDistribution(0.02, 0.5, log=True),
    "gamma": FloatDistribution(0.4, 0.9),
    "dropout": FloatDistribution(0.0, 0.1),
    "degrees": FloatDistribution(0.0, 15.0),
}

if __name__ == "__main__":
    main(EXPERIMENT, search=SEARCH)
