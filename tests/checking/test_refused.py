"""What can't work, by the field that the refusal names and a word of what it says; each is refused by the rehearsal."""

import copy
import re
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torchvision import transforms
from torchvision.transforms import v2

from mnist_lab.augmentation import random_rotation
from mnist_lab.checking.rehearsal import rehearse
from mnist_lab.data import Mnist
from mnist_lab.errors import LabError
from mnist_lab.objectives import mixup
from networks import Linear, declare


def changed(change: Any) -> Any:
    return partial(Linear, change=change)


class OnlyEvaluated(Linear):
    def forward(self, images: Tensor) -> Any:
        logits = self.linear(F.avg_pool2d(images, 4).flatten(1))
        return logits if self.training or self.change is None else self.change(logits)


class LearnsItsNoise(Linear):
    """Draws in evaluation too, but the noise has no effect before the first update."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + self.scale * torch.randn(len(images), 10)


def raises(*_: object) -> Any:
    raise KeyError("no such\nlayer")


class KeepsAPath(Linear):
    def get_extra_state(self) -> object:
        return Path("layers")

    def set_extra_state(self, state: object) -> None: ...


class Listed(Linear):
    """Keeps a layer where torch does not look for it."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = [nn.Linear(10, 10)]

    def forward(self, images: Tensor) -> Tensor:
        return self.kept[0](super().forward(images).relu())


class Late(Linear):
    """Builds a layer where it is used first."""

    def forward(self, images: Tensor) -> Tensor:
        if not hasattr(self, "late"):
            self.late = nn.Linear(10, 10)
        return self.late(super().forward(images).relu())


def in_place(logits: Tensor) -> Tensor:
    logits = logits.exp()
    logits += 1  # exp's gradient needs what it gave
    return logits


def computed_once() -> Linear:
    net = Linear()
    net.twice = 2 * net.linear.weight
    return net


SHARED = nn.Linear(784, 10)
STATISTICS = nn.BatchNorm2d(1, affine=False)
flat = partial(nn.Sequential, nn.Flatten())
linear = partial(nn.Linear, 784)

NETS: dict[str, tuple[Any, str]] = {
    "three input channels": (lambda: nn.Sequential(nn.Conv2d(3, 10, 28)), r"^net: 0, .*\(128, 1, 28, 28\)"),
    "not flattened": (lambda: nn.Sequential(nn.Linear(784, 10)), r"^net: 0, Linear.*784.* is given \(128, 1, 28, 28\)"),
    "five outputs": (changed(lambda y: y[:, :5]), r"\(128, 5\)"),
    "nothing": (changed(lambda y: None), r"None \(is a return missing\?\)"),
    "computed once": (computed_once, "computes twice from its weights"),
    "bfloat16": (changed(lambda y: y.bfloat16()), "bfloat16"),
    "NaN": (changed(lambda y: y * torch.nan), "finite"),
    "wrong in evaluation": (partial(OnlyEvaluated, change=lambda y: y[:, :9]), r"\(\d+, 9\)"),
    "fewer rows than test images": (partial(OnlyEvaluated, change=lambda y: y[:200]), r"250 images.*\(200, 10\)"),
    "squeezed, so one image has no rows": (changed(torch.squeeze), r"1 image: .*\(10,\)"),
    "last batch of one image": (lambda: flat(linear(10), nn.BatchNorm1d(10)), "^net: 2, .*more than 1 value"),
    "no backward pass": (changed(in_place), "inplace operation"),
    "raises": (changed(raises), r"no such.*\(test_refused\.py, line \d+\)"),
    "sys.exit": (changed(lambda y: sys.exit()), r"sys\.exit\(None\)"),
    "no parameters": (partial(nn.Upsample, size=28), "no parameters"),
    "lazy": (lambda: flat(nn.LazyLinear(10)), "uninitialized"),
    "half precision of weights only": (lambda: Linear().half(), "dtype"),
    "larger than memory": (lambda: nn.Linear(10**6, 10**6), "memory"),
    "dropout in evaluation": (changed(lambda y: F.dropout(y, 0.1)), r"training=self\.training"),
    "shared layers": (lambda: flat(SHARED), r"1\.weight, 1\.bias"),
    "shared statistics": (lambda: nn.Sequential(STATISTICS, nn.Flatten(), nn.Linear(784, 10)), r"0\.running_mean"),
    "noise that is learned": (LearnsItsNoise, "other logits"),
    "state of another kind": (KeepsAPath, r"state_dict\(\)"),
    "a layer built late": (Late, "late.weight, late.bias after its __init__"),
    "layers in a list": (Listed, r"\(10, 10\)|\(10\)"),
}


class WithoutRate(Optimizer):
    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return None


def remembers_code(optimizer: Optimizer) -> StepLR:
    scheduler = StepLR(optimizer, 1)
    scheduler.code = raises  # type: ignore[attr-defined]
    return scheduler


class OneImage:
    """As wrappers of other libraries' transforms are: it takes one image (C, H, W)."""

    def __call__(self, image: Tensor) -> Tensor:
        channels, height, width = image.shape
        return image.reshape(channels, height, width)


class FirstAxes(OneImage):
    """Gives of a batch another shape, and raises nothing."""

    def __call__(self, image: Tensor) -> Tensor:
        return image.unsqueeze(0)[0, :1]


def logs(function: str, *given: Any, **named: Any) -> Any:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        getattr(mlflow, function)(*given, **named)
        return F.cross_entropy(logits, labels)

    return loss


IMAGE_BY_IMAGE = r"\(128, 1, 28, 28\).*image_by_image"


by_batch = {"scheduler_interval": "batch"}
PARTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "steps that are too large": ("optimizer", {"optimizer": partial(SGD, lr=1e38)}, "not finite"),
    "an optimizer without a rate": ("optimizer", {"optimizer": WithoutRate}, "without lr"),
    "of another network": ("optimizer", {"optimizer": lambda _: SGD(Linear().parameters(), lr=0.1)}, "none of"),
    "no scheduler": ("scheduler", {"scheduler": lambda optimizer: optimizer}, "SGD"),
    "too short": ("scheduler", {"scheduler": partial(OneCycleLR, max_lr=0.1, total_steps=7), **by_batch}, "7"),
    "plateau by batch": ("scheduler", {"scheduler": ReduceLROnPlateau, **by_batch}, "scheduler_interval='epoch'"),
    "plateau that rises": ("scheduler", {"scheduler": partial(ReduceLROnPlateau, mode="max")}, "mode='min'"),
    "by nothing": ("scheduler", {"scheduler": partial(StepLR, step_size=0)}, r"in StepLR\(step_size=0"),
    "below zero": ("scheduler", {"scheduler": partial(LambdaLR, lr_lambda=lambda epoch: 0.5 - epoch)}, "below 0"),
    "beyond float32": ("scheduler", {"optimizer": partial(SGD, lr=1e40)}, "float32"),
    "state with code": ("scheduler", {"scheduler": remembers_code}, "not code, a function"),
    "another's": ("scheduler", {"scheduler": lambda _: StepLR(SGD(Linear().parameters()), 1)}, "another optimizer"),
    "another shape": ("augmentation", {"augmentation": v2.Resize(14)}, r"\(128, 1, 14, 14\)"),
    "fewer images": ("augmentation", {"augmentation": lambda x: x[1:]}, r"\(127, 1, 28, 28\)"),
    "NaN pixels": ("augmentation", {"augmentation": lambda x: x * torch.nan}, "finite"),
    "refused degrees": ("augmentation", {"augmentation": partial(random_rotation, degrees=-7.0)}, "degrees=-7.0"),
    "ToTensor": ("augmentation", {"augmentation": transforms.Compose([transforms.ToTensor()])}, "leave out ToT"),
    "few labels": ("augmentation", {"augmentation": lambda images, labels: (images, labels[1:])}, r"\(127,\)"),
    "one draw a batch": (
        "augmentation",
        {"augmentation": lambda x: v2.RandomRotation(10)(x) + 0.02 * torch.rand_like(x)},
        "image_by_image",
    ),
    "for one image": ("augmentation", {"augmentation": OneImage()}, IMAGE_BY_IMAGE),
    "for one image, silent": ("augmentation", {"augmentation": FirstAxes()}, IMAGE_BY_IMAGE),
    "a loss per image": ("loss", {"loss": partial(F.cross_entropy, reduction="none")}, r"\(128,\)"),
    "labels that spread": ("loss", {"loss": lambda y, t: (y - t).square().mean(), "batch_size": 10}, "must match"),
    "an infinite loss": ("loss", {"loss": lambda y, labels: y.sum() * torch.inf}, "inf"),
    "a loss without a gradient": ("loss", {"loss": lambda y, t: (y.argmax(1) != t).float().mean()}, "gradient"),
    "logits without a gradient": ("loss", {"net": changed(lambda y: y.detach())}, "gradient"),
    "no copy": ("loss", {"loss": partial(F.cross_entropy, weight=(one for one in ()))}, "can't be copied"),
    "a loss that raises": ("loss", {"loss": raises}, r"logits \(128, 10\) and labels \(128,\): .*no such"),
    "no logits": ("objective", {"objective": lambda net, x, t: F.cross_entropy(net(x), t)}, "logits"),
    "other rows": ("objective", {"objective": lambda net, x, t: (net(x).sum(), net(x)[1:])}, r"\(127, 10\)"),
    "swapped": ("objective", {"objective": lambda net, x, t: (net(x), net(x).sum())}, "single number"),
    "of nothing": (
        "objective",
        {"objective": lambda net, x, t: (torch.ones((), requires_grad=True) * 2, net(x).detach())},
        "gradient",
    ),
    "in an objective": ("net", {"net": changed(raises), "objective": lambda net, x, t: (net(x).sum(), 0)}, "no such"),
    "alpha": ("objective", {"objective": partial(mixup, alpha=0.0)}, "alpha=0.0"),
    "shares": ("augmentation", {"augmentation": lambda x, labels: (x, 9 * F.one_hot(labels, 10).float())}, "sum to 1"),
    "a tag of the lab's": ("mlflow", {"loss": logs("set_tag", "step", 3)}, "step"),
    "the end of the lab's run": ("mlflow", {"loss": logs("end_run")}, "end_run"),
    "no average": ("average", {"average": copy.deepcopy}, "Linear"),
}
REFUSED = {name: ("net", {"net": net}, said) for name, (net, said) in NETS.items()} | PARTS


@pytest.mark.parametrize(("field", "changes", "said"), REFUSED.values(), ids=REFUSED)
def test_what_can_not_work_is_refused(field: str, changes: dict[str, Any], said: str, small_mnist: Mnist) -> None:
    size = {"batch_size": 499} if "more than 1 value" in said else {}
    with pytest.raises(LabError) as refusal:
        rehearse(declare(**(size | changes)), small_mnist)

    sentence = str(refusal.value)
    assert refusal.value.field == field, sentence
    assert re.search(said, sentence), sentence
    assert sentence.isprintable()
