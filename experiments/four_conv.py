"""Four convolutions: a large network without batch norm or dropout.

Target: none was stated but a good result. It shows what 54 to 86 times the parameters of steps 1 to 4 give.

Change: not one of the steps. Four 3x3 convolutions and two linear layers, with biases. Of the training images one in
ten is cropped to its centre and scaled up again, then all are rotated by up to 15 degrees.

Result: 99.25 +- 0.07 % in the last epoch and 99.28 at best (mean and sd of seeds 0 to 2, two cores of an AMD EPYC with
AVX-512, torch 2.15); training accuracy 99.28, test loss 0.0220. Reported were 99.24 in the last epoch, 99.25 at best,
99.12 in training, and a test loss of 0.0204.

Analysis: the reported test accuracy is reproduced, as far as three runs can tell: they end between 99.17 and 99.30.
With 75 times the parameters of step 4 the network is no better than step 4: it has neither batch norm nor dropout, and
a small learning rate for its batch size.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

from mnist_lab import Experiment, main
from mnist_lab.augmentation import random_center_crop, random_rotation


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.conv3 = nn.Conv2d(64, 128, 3)
        self.conv4 = nn.Conv2d(128, 256, 3)
        self.linear1 = nn.Linear(256 * 4 * 4, 50)
        self.linear2 = nn.Linear(50, 10)

    def forward(self, x: Tensor) -> Tensor:  # (N, 1, 28, 28) -> (N, 10); comments: output, receptive field in pixels
        x = F.relu(self.conv1(x))  # (32, 26, 26), 3
        x = F.relu(F.max_pool2d(self.conv2(x), 2))  # (64, 12, 12), 6
        x = F.relu(self.conv3(x))  # (128, 10, 10), 10
        x = F.relu(F.max_pool2d(self.conv4(x), 2))  # (256, 4, 4), 16
        x = F.relu(self.linear1(x.flatten(1)))  # (50,), 28
        return F.log_softmax(self.linear2(x), dim=1)


def crop_and_rotate(images: Tensor, size: int = 22, p: float = 0.1, degrees: float = 15.0) -> Tensor:
    return random_rotation(random_center_crop(images, size, p), degrees)


EXPERIMENT = Experiment(
    net=Net,
    epochs=20,
    batch_size=512,
    optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    scheduler=partial(StepLR, step_size=15, gamma=0.1),
    augmentation=crop_and_rotate,
    reported={
        "final_train_accuracy": 99.12,
        "final_test_accuracy": 99.24,
        "best_test_accuracy": 99.25,
        "final_test_loss": 0.0204,
    },
)

if __name__ == "__main__":
    main(EXPERIMENT)
