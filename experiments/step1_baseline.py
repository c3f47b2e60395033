"""Step 1, baseline: a plain network with batch norm.

Target: a network that trains without trouble and comes near 99.4 %, as the base for the next steps. It is over the
budget of 10,000 parameters by design.

Change: none, this is the start. 3x3 convolutions with batch norm, a 1x1 transition after the pooling, and one 7x7
convolution as the head. The learning rate was reported only as "judged a bit high", the batch size not at all. 0.01 and
128 are this project's choice, and the same up to step 3.

Result: 99.20 +- 0.09 % in the last epoch (mean and sd of seeds 0 to 9, two cores of an AMD EPYC with AVX-512, torch
2.15) and 99.25 at best; training accuracy 99.74. The accuracy target is missed, p < 0.01. Reported were 99.29 at
best, and 99.75 in training.

Analysis: it over-fits, as reported: the training accuracy is half a point above the test accuracy and still rises, so
more epochs will not reach 99.4. The parameters are 970 over the budget.
"""

from functools import partial

import torch
from torch import Tensor, nn

from mnist_lab import Experiment, Targets, main


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(  # after each: output (channels, height, width), receptive field in pixels
            nn.Conv2d(1, 10, 3, bias=False),  # (10, 26, 26), 3
            nn.BatchNorm2d(10),
            nn.ReLU(),
            nn.Conv2d(10, 10, 3, bias=False),  # (10, 24, 24), 5
            nn.BatchNorm2d(10),
            nn.ReLU(),
            nn.Conv2d(10, 20, 3, bias=False),  # (20, 22, 22), 7
            nn.BatchNorm2d(20),
            nn.ReLU(),
            nn.MaxPool2d(2),  # (20, 11, 11), 8
            nn.Conv2d(20, 10, 1, bias=False),  # (10, 11, 11), 8
            nn.BatchNorm2d(10),
            nn.ReLU(),
            nn.Conv2d(10, 10, 3, bias=False),  # (10, 9, 9), 12
            nn.BatchNorm2d(10),
            nn.ReLU(),
            nn.Conv2d(10, 20, 3, bias=False),  # (20, 7, 7), 16
            nn.BatchNorm2d(20),
            nn.ReLU(),
            nn.Conv2d(20, 10, 1, bias=False),  # (10, 7, 7), 16
            nn.BatchNorm2d(10),
            nn.ReLU(),
            nn.Conv2d(10, 10, 7, bias=False),  # (10, 1, 1), 28
        )

    def forward(self, images: Tensor) -> Tensor:  # (N, 1, 28, 28) -> (N, 10)
        return self.layers(images).flatten(1)


EXPERIMENT = Experiment(
    net=Net,
    epochs=14,
    batch_size=128,
    optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    targets=Targets(accuracy=99.4, params=10_000, epochs=15),
    reported={"best_train_accuracy": 99.75, "best_test_accuracy": 99.29},
)

if __name__ == "__main__":
    main(EXPERIMENT)
