"""Some of the recipes of docs/public_recipes.md, as they stand: each has the parameters counted there, and trains."""

import dataclasses
import math
import re
from functools import partial

import pytest
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adadelta
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import v2

from helpers import ROOT, first
from mnist_lab import Experiment
from mnist_lab.checking.rehearsal import rehearse
from mnist_lab.data import Mnist
from mnist_lab.training.loop import num_params
from networks import train


def pytorch_examples() -> nn.Module:
    features = [nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25)]
    hidden = [nn.Flatten(), nn.Linear(64 * 12 * 12, 128), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*features, *hidden, nn.Linear(128, 10), nn.LogSoftmax(dim=1))


def depthwise_separable() -> nn.Module:
    def block(before: int, after: int) -> list[nn.Module]:
        depthwise = nn.Conv2d(before, before, 3, padding=1, groups=before, bias=False)
        return [depthwise, nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]

    stem = [nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(inplace=True)]
    first = [*block(12, 20), *block(20, 20), nn.MaxPool2d(2), nn.Dropout(0.05)]
    second = [*block(20, 28), *block(28, 28), nn.MaxPool2d(2), nn.Dropout(0.05)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Conv2d(32, 10, 1, bias=False), nn.Flatten(), nn.LogSoftmax(dim=1)]
    return nn.Sequential(*stem, *first, *second, *block(28, 32), *head)


def smoothed(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return the divergence from labels that give 2 % to the nine other classes."""
    wanted = F.one_hot(labels, 10) * (0.98 - 0.02 / 9) + 0.02 / 9
    return F.kl_div(log_probabilities, wanted, reduction="batchmean")


RECIPES = {
    "pytorch/examples": Experiment(
        net=pytorch_examples,
        epochs=14,
        batch_size=64,
        optimizer=partial(Adadelta, lr=1.0),
        scheduler=partial(StepLR, step_size=1, gamma=0.7),
        loss=F.nll_loss,
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
