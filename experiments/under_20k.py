"""Under 20k: a wider network, with batch norm after the activation.

Target: 99.4 % with fewer than 20,000 parameters in fewer than 20 epochs, using batch norm, dropout and global average
pooling.

Change: not one of the steps. Six convolutions; the first five are followed by ReLU, then batch norm, and (but for the
fifth) dropout of 0.1. Average pooling in the middle, adaptive average pooling before the 1x1 convolution.

Result: 99.35 +- 0.08 % in the last epoch (mean and sd of seeds 0 to 9, two cores of an AMD EPYC with AVX-512, torch
2.15) and 99.42 at best; training accuracy 99.38, test loss 0.020. Reported were 99.43 in the last epoch, 99.45 at best
(epoch 15), and a test loss of 0.0172.

Analysis: the target is shown neither met nor missed: three seeds of ten end at 99.40 or above, and about thirty seeds
would be needed. Two of ten end as high as reported, at 99.43 and 99.46, so the reported run was a lucky one. The best
epochs are between 13 and 19 (reported: 15), and 0.075 points above the last on average: the learning rate never falls,
and the best epoch was picked.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist_lab import Experiment, Targets, main


class Net(nn.Module):
    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.layers = nn.Sequential(  # after each: output (channels, height, width), receptive field in pixels
            nn.Conv2d(1, 16, 3, bias=False),  # (16, 26, 26), 3
            nn.ReLU(),
            nn.BatchNorm2d(16),
            nn.Dropout(dropout),
            nn.Conv2d(16, 16, 3, bias=False),  # (16, 24, 24), 5
            nn.ReLU(),
            nn.BatchNorm2d(16),
            nn.Dropout(dropout),
            nn.Conv2d(16, 16, 3, bias=False),  # (16, 22, 22), 7
            nn.ReLU(),
            nn.BatchNorm2d(16),
            nn.Dropout(dropout),
            nn.AvgPool2d(2),  # (16, 11, 11), 8
            nn.Conv2d(16, 32, 3, bias=False),  # (32, 9, 9), 12
            nn.ReLU(),
            nn.BatchNorm2d(32),
            nn.Dropout(dropout),
            nn.Conv2d(32, 16, 3, bias=False),  # (16, 7, 7), 16
            nn.ReLU(),
            nn.BatchNorm2d(16),
            nn.AdaptiveAvgPool2d(1),  # (16, 1, 1), 28
            nn.Conv2d(16, 10, 1, bias=False),  # (10, 1, 1), 28
        )

    def forward(self, images: Tensor) -> Tensor:  # (N, 1, 28, 28) -> (N, 10)
        return F.log_softmax(self.layers(images).flatten(1), dim=1)


EXPERIMENT = Experiment(
    net=Net,
    epochs=19,
    batch_size=128,
    optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    targets=Targets(accuracy=99.4, params=20_000, epochs=20),
    reported={"best_test_accuracy": 99.45, "best_epoch": 15, "final_test_accuracy": 99.43, "final_test_loss": 0.0172},
)

if __name__ == "__main__":
    main(EXPERIMENT)
