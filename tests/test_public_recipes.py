"""Some of the recipes of docs/public_recipes.md, as they stand: each has the parameters counted there, and trains."""

import dataclasses
import math
import re
from functools import partial
from itertools import pairwise

import pytest
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adadelta, Adam
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR, StepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision import transforms
from torchvision.transforms import v2

from helpers import ROOT, first
from mnist_lab import Experiment
from mnist_lab.checking.rehearsal import rehearse
from mnist_lab.data import Mnist
from mnist_lab.training.loop import num_params
from networks import train


class View(nn.Module):
    """Flatten by `view`, which after most convolutions works in a contiguous layout only."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features

    def forward(self, images: Tensor) -> Tensor:
        return images.view(-1, self.features)


def pytorch_examples() -> nn.Module:
    features = [nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25)]
    hidden = [nn.Flatten(), nn.Linear(64 * 12 * 12, 128), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*features, *hidden, nn.Linear(128, 10), nn.LogSoftmax(dim=1))


class SimpleCNN(nn.Module):
    """Scales its input to [-1, 1]; convolutions without pooling, and a classifier on the channels-last order."""

    def __init__(self, kernel: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.features = nn.Sequential()
        for before, after in pairwise((1, *channels)):
            self.features.append(nn.Conv2d(before, after, kernel, bias=False))
            self.features.extend([nn.BatchNorm2d(after), nn.ReLU()])
        size = 28 - len(channels) * (kernel - 1)
        self.classifier = nn.Linear(size * size * channels[-1], 10, bias=False)
        self.norm = nn.BatchNorm1d(10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.features((images - 0.5) * 2)
        return F.log_softmax(self.norm(self.classifier(hidden.permute(0, 2, 3, 1).flatten(1))), dim=1)


def depthwise_separable() -> nn.Module:
    def block(before: int, after: int) -> list[nn.Module]:
        depthwise = nn.Conv2d(before, before, 3, padding=1, groups=before, bias=False)
        return [depthwise, nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]

    stem = [nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(inplace=True)]
    first = [*block(12, 20), *block(20, 20), nn.MaxPool2d(2), nn.Dropout(0.05)]
    second = [*block(20, 28), *block(28, 28), nn.MaxPool2d(2), nn.Dropout(0.05)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Conv2d(32, 10, 1, bias=False), View(10), nn.LogSoftmax(dim=1)]
    return nn.Sequential(*stem, *first, *second, *block(28, 32), *head)


def smoothed(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return the divergence from labels that give 2 % to the nine other classes."""
    wanted = F.one_hot(labels, 10) * (0.98 - 0.02 / 9) + 0.02 / 9
    return F.kl_div(log_probabilities, wanted, reduction="batchmean")


def ema_with_warm_up(averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor) -> None:
    """Average by 0.999, and by less in the first batches."""
    decay = min(0.999, (1 + int(num_averaged)) / (10 + int(num_averaged)))
    for average, weights in zip(averaged, current, strict=True):
        average.lerp_(weights, 1 - decay)


M3 = (32, 48, 64, 80, 96, 112, 128, 144, 160, 176)

RECIPES = {
    "pytorch/examples": Experiment(
        net=pytorch_examples,
        epochs=14,
        batch_size=64,
        optimizer=partial(Adadelta, lr=1.0),
        scheduler=partial(StepLR, step_size=1, gamma=0.7),
        loss=F.nll_loss,
    ),
    "MnistSimpleCNN M3": Experiment(
        net=partial(SimpleCNN, kernel=3, channels=M3),
        epochs=150,
        batch_size=120,
        optimizer=partial(Adam, lr=0.001),
        scheduler=partial(ExponentialLR, gamma=0.98),
        loss=F.nll_loss,
        normalize=(0.0, 1.0),  # pixels in [0, 1]
        average=partial(AveragedModel, multi_avg_fn=ema_with_warm_up),
        augmentation=transforms.Compose(
            [transforms.RandomRotation(20), transforms.RandomAffine(0, translate=(0.2, 0.2))]
        ),
    ),
    "depthwise separable": Experiment(
        net=depthwise_separable,
        epochs=15,
        batch_size=128,
        optimizer=partial(SGD, lr=0.025, momentum=0.9, nesterov=True, weight_decay=5e-5),
        scheduler=partial(OneCycleLR, max_lr=0.025),
        scheduler_interval="batch",
        loss=smoothed,
        average=partial(AveragedModel, multi_avg_fn=get_ema_multi_avg_fn(0.995)),
        augmentation=v2.Compose([v2.RandomRotation((-7.0, 7.0), fill=1)]),
    ),
}


def counted_by_hand() -> dict[str, list[int]]:
    """Return the parameters of each recipe's layers, and in the end of all, as docs/public_recipes.md has them."""
    page = (ROOT / "docs" / "public_recipes.md").read_text()
    rows = re.findall(r"^\| (.+?) \| .* \| ([\d+]+)=([\d,]+) \|", page, flags=re.MULTILINE)
    return {name: [*map(int, layers.split("+")), int(total.replace(",", ""))] for name, layers, total in rows}


@pytest.mark.parametrize("name", RECIPES)
def test_a_public_recipe_has_the_parameters_counted_by_hand_and_trains(name: str, small_mnist: Mnist) -> None:
    recipe = RECIPES[name]
    recipe.check()
    few = first(small_mnist, 20, 10)
    short = dataclasses.replace(recipe, epochs=1, batch_size=8)

    rehearsal = rehearse(short, few)
    training, (epoch,) = train(short, few, memory_format=rehearsal.memory_format)

    *layers, total = counted_by_hand()[name]
    assert num_params(training.net) == total == sum(layers)
    assert not rehearsal.untrained
    assert math.isfinite(epoch.train_loss + epoch.eval_loss + (epoch.objective or 0))
