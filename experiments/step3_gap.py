"""Step 3, GAP: global average pooling instead of a large kernel in the head.

Target: 99.4 % within the budget, without the 2,500 parameters that step 2 spends in its head.

Change: a head of global average pooling and a 1x1 convolution. Pooling costs capacity, so layers were added before it,
and dropout falls to 0.007: with 0.1 the training accuracy was reported to stay at 98.8 to 99.0. Learning rate and batch
size are those of step 1.
Compared with gap_alone: more layers, less dropout.

Result: 99.16 +- 0.08 % in the last epoch (mean and sd of seeds 0 to 9, two cores of an AMD EPYC with AVX-512, torch
2.15) and 99.25 at best; training accuracy 99.36. The accuracy target is missed, p < 0.01. Reported were 99.37 at
best (epoch 14), and 99.40 in training.

Analysis: with almost no dropout the training accuracy is as reported. The reported gain over step 2 is not shown:
ten seeds end 0.03 points lower. GAP alone (gap_alone.py) costs 0.22 points, and the added layers, with less dropout,
bring back 0.19. Two of the 140 epochs of ten runs reached 99.39, above the reported best: at the constant learning rate
the test accuracy moves by about 0.1 from epoch to epoch, and a best epoch picked on the test images is 0.10 points
above the last on average.
"""

from functools import partial

import torch
from torch import Tensor, nn

from mnist_lab import Experiment, Targets, main


class Net(nn.Module):
    def __init__(self, dropout: float = 0.007) -> None:
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
            nn.Conv2d(16, 16, 3, bias=False),  # (16, 7, 7), 16
            nn.BatchNorm2d(16),
            nn.Dropout(dropout),
            nn.ReLU(),
            nn.Conv2d(16, 8, 1, bias=False),  # (8, 7, 7), 16
            nn.BatchNorm2d(8),
            nn.Dropout(dropout),
            nn.ReLU(),
            nn.Conv2d(8, 32, 3, bias=False),  # (32, 5, 5), 20
            nn.BatchNorm2d(32),
            nn.Dropout(dropout),
            nn.ReLU(),
            nn.Conv2d(32, 16, 1, bias=False),  # (16, 5, 5), 20
            nn.BatchNorm2d(16),
            nn.Dropout(dropout),
            nn.ReLU(),
            nn.AvgPool2d(5),  # (16, 1, 1), 28
            nn.Conv2d(16, 10, 1, bias=False),  # (10, 1, 1), 28
        )

    def forward(self, images: Tensor) -> Tensor:  # (N, 1, 28, 28) -> (N, 10)
        return self.layers(images).flatten(1)


EXPERIMENT = Experiment(
    net=Net,
    epochs=14,
    batch_size=128,
    optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    targets=Targets(accuracy=99.4, params=10_000, epochs=15),
    reported={"best_train_accuracy": 99.40, "best_test_accuracy": 99.37, "best_epoch": 14},
)

if __name__ == "__main__":
    main(EXPERIMENT)
