"""Step 2, dropout: less over-fitting with fewer parameters.

Target: under 10,000 parameters, and a smaller gap between training and test accuracy than step 1 has.

Change: dropout of 0.1, element-wise, between batch norm and ReLU. The network is narrower, and its head is a 5x5
convolution. Learning rate and batch size are those of step 1.
Compared with step1_baseline: dropout, narrower layers.

Result: 99.18 +- 0.07 % in the last epoch (mean and sd of seeds 0 to 9, two cores of an AMD EPYC with AVX-512, torch
2.15) and 99.25 at best; training accuracy 99.00. The accuracy target is missed, p < 0.01. Reported were 99.28 at
best, and 99.02 in training.

Analysis: dropout removes the over-fit: the training accuracy is now below the test accuracy. With 63 % of step 1's
parameters no difference in test accuracy is shown: 0.02 points lower, with an interval of -0.12 to +0.08. The 5x5
convolution in the head takes 2,500 of the 6,864 parameters and should go.
"""

from functools import partial

import torch
from torch import Tensor, nn

from mnist_lab import Experiment, Targets, main


class Net(nn.Module):
    def __init__(self, dropout: float = 0.1) -> None:
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
            nn.Dropout(dropout),
            nn.ReLU(),
            nn.MaxPool2d(2),  # (8, 11, 11), 8
            nn.Conv2d(8, 16, 3, bias=False),  # (16, 9, 9), 12
            nn.BatchNorm2d(16),
            nn.Dropout(dropout),
            nn.ReLU(),
            nn.Conv2d(16, 8, 3, bias=False),  # (8, 7, 7), 16
            nn.BatchNorm2d(8),
            nn.Dropout(dropout),
            nn.ReLU(),
            nn.Conv2d(8, 10, 3, bias=False),  # (10, 5, 5), 20
            nn.BatchNorm2d(10),
            nn.Dropout(dropout),
            nn.ReLU(),
            nn.Conv2d(10, 10, 5, bias=False),  # (10, 1, 1), 28
        )

    def forward(self, images: Tensor) -> Tensor:  # (N, 1, 28, 28) -> (N, 10)
        return self.layers(images).flatten(1)


EXPERIMENT = Experiment(
    net=Net,
    epochs=14,
    batch_size=128,
    optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    targets=Targets(accuracy=99.4, params=10_000, epochs=15),
    reported={"best_train_accuracy": 99.02, "best_test_accuracy": 99.28},
)

if __name__ == "__main__":
    main(EXPERIMENT)
