"""The rehearsal tries what training does: the layout in memory, the steps, and evaluation."""

import re
import warnings
from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import partial, wraps
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, Optimizer
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from torchvision.transforms import v2

from helpers import TrackedRun
from mnist_lab import Targets
from mnist_lab.checking.rehearsal import rehearse
from mnist_lab.data import Mnist
from mnist_lab.errors import LabError
from mnist_lab.objectives import mixup
from mnist_lab.running.progress import Progress
from mnist_lab.training import dropout
from mnist_lab.training.loop import num_params
from networks import Linear, Small, train
from networks import declare as declare_linear

FLATTEN = partial(torch.flatten, start_dim=1)
AVERAGE = partial(AveragedModel, use_buffers=True)


class Convolutions(nn.Module):
    """Two convolutions, dropout between them, and the flatten that is given; takes any number of images."""

    def __init__(self, flatten: Callable[[Tensor], Tensor] = FLATTEN) -> None:
        super().__init__()
        self.flatten = flatten
        self.first = nn.Conv2d(1, 6, 5, stride=3)
        self.second = nn.Conv2d(6, 10, 3, stride=2)
        self.linear = nn.Linear(90, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.dropout(self.first(images).relu(), 0.1, training=self.training)
        return self.linear(self.flatten(self.second(hidden)))


class Changing(Convolutions):
    """Flattens by `view` in evaluation of as many images as are evaluated at once."""

    def forward(self, images: Tensor) -> Tensor:
        self.flatten = FLATTEN if self.training or len(images) != 250 else view
        return super().forward(images)


def view(images: Tensor) -> Tensor:
    return images.view(-1, 90)


declare = partial(declare_linear, net=Convolutions)


@pytest.mark.parametrize(
    "changes",
    [
        {"net": partial(Convolutions, flatten=view)},
        {"optimizer": partial(LBFGS, lr=0.1, max_iter=2)},
        {"net": Changing},
    ],
    ids=["view", "LBFGS", "view in evaluation"],
)
def test_what_fails_in_channels_last_only_trains_contiguous(changes: dict[str, Any], small_mnist: Mnist) -> None:
    memory_format = rehearse(declare(**changes), small_mnist).memory_format
    training, epochs = train(declare(**changes), small_mnist, memory_format=memory_format)

    assert memory_format == torch.contiguous_format
    assert all(parameter.is_contiguous() for parameter in training.net.parameters())
    assert epochs[1].train_loss < epochs[0].train_loss


def test_what_fails_in_both_layouts_is_refused_for_what_fails_in_the_contiguous_one(small_mnist: Mnist) -> None:
    too_few = partial(Convolutions, flatten=lambda images: images.view(-1, 45))
    with pytest.raises(LabError, match=r"^net: linear, Linear\(.* is given \(256, 45\)"):
        rehearse(declare(net=too_few), small_mnist)


@pytest.mark.parametrize(
    "minimised",
    [
        {},
        {"loss": nn.CrossEntropyLoss(label_smoothing=0.1)},
        {"loss": partial(F.cross_entropy, reduction="sum")},
        {"objective": partial(mixup, alpha=0.2)},
    ],
)
def test_softmax_before_a_loss_of_logits_is_said(minimised: dict[str, Any], small_mnist: Mnist) -> None:
    softmax = partial(Linear, change=partial(F.softmax, dim=1))
    [notice] = rehearse(declare(net=softmax, **minimised), small_mnist).notices
    assert notice.startswith("net: seems to end with softmax")
    assert rehearse(declare(**minimised), small_mnist).notices == []


# ---- parameters without a gradient


def test_a_late_layer_counts_a_copy_not(train_run: Callable[..., TrackedRun], caplog: pytest.LogCaptureFixture) -> None:
    class Late(Convolutions):
        """Trains a layer in some batches only, none of them in the rehearsal, a copy never; one freezes late."""

        late_is_used = False

        def __init__(self) -> None:
            super().__init__()
            self.late, self.copy = nn.Linear(10, 10), deepcopy(self.linear)

        def forward(self, images: Tensor) -> Tensor:
            self.copy.requires_grad_(False)
            self.first.requires_grad_(not Late.late_is_used)
            logits = super().forward(images)
            return self.late(logits) if Late.late_is_used else logits

    class UseLate(Progress):
        def on_run(self, *_: object) -> None:
            Late.late_is_used = True

    own, late = num_params(Convolutions()), declare(net=Late, epochs=1)
    run = train_run(late, "late")
    assert run.metrics["num_params"] == [(0, own)]
    assert caplog.messages[0].startswith(
        "no gradient reaches copy.bias, copy.weight, late.bias, late.weight: not trained, and not counted"
    )
    assert f"Trainable params: {own:,}" in (run.artifacts / "model_summary.txt").read_text()
    unused = num_params(Convolutions().first)  # it is frozen before the first batch
    assert train_run(late, "late", listener=UseLate()).metrics["num_params"] == [(0, own + 110 - unused)]


# ---- what trains but is not meant


class SameStart(Convolutions):
    def __init__(self) -> None:
        torch.manual_seed(1)
        super().__init__()


class Normed(Convolutions):
    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Sequential(self.second, nn.BatchNorm2d(10, momentum=0.5))


class OwnGenerator:
    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)

    def __call__(self, images: Tensor) -> Tensor:
        return images * torch.from_numpy(self.generator.uniform(0.5, 1, (len(images), 1, 1, 1))).float()


class Temperature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits / self.temperature, labels)


class CountingSGD(SGD):
    count = 0

    def step(self, closure: Any = None) -> Any:
        self.count += 1
        return super().step(closure)


class StepsItsOwn(Optimizer):
    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        super().__init__(parameters := list(parameters), {"lr": lr})
        self.own = [SGD(parameters, lr=lr)]

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        self.own[0].step()


def backward_too(net: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    loss = F.cross_entropy(logits := net(images), labels)
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    return loss, logits


def in_a_run_of_its_own(net: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    with mlflow.start_run():
        mlflow.log_param("images", len(images))
    logits = net(images)
    return F.cross_entropy(logits, labels), logits


def saturated(logits: Tensor) -> Tensor:
    return F.softmax(1e2 * logits, dim=1)


def of_sigmoid(numbers: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy(numbers, F.one_hot(labels, 10).float())


BY_BATCH, ONE_CYCLE = {"scheduler_interval": "batch"}, partial(OneCycleLR, max_lr=0.1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"net": SameStart}, "net: begins with the same weights whatever the seed"),
        ({"loss": Temperature()}, r"loss: has weights of its own, of shape \(\), which are not trained"),
        ({"optimizer": partial(CountingSGD, lr=0.01)}, "optimizer: changes count from batch to batch"),
        ({"scheduler": partial(ONE_CYCLE, total_steps=9_999), **BY_BATCH}, "scheduler: .* 9,999 steps, .* images 938"),
        ({"scheduler": partial(ONE_CYCLE, total_steps=99), **BY_BATCH}, "scheduler: .* all 60,000 images will fail"),
        ({"scheduler": partial(StepLR, step_size=20), **BY_BATCH}, "scheduler: StepLR stands still after 80 of 938"),
        ({"scheduler": partial(StepLR, step_size=9), **BY_BATCH}, "scheduler: .* half of its way after 9 batches"),
        ({"net": lambda unused=0.5: Convolutions()}, "net: never reads unused of its arguments"),
        ({"net": Small}, "net: after this run's 8 batches, .* are 43 % initial values"),
        ({"augmentation": OwnGenerator()}, "the run's seed does not decide what augmentation draws"),
        ({"augmentation": lambda images: images * 2 - 0.5}, r"augmentation gives pixels from -0\.50 to 1\.50"),
        ({"augmentation": partial(torch.clamp, min=0.6)}, "augmentation gives 100 % of the images a light corner"),
        ({"augmentation": lambda images: images.flip(0)}, "augmentation: an image depends on the others"),
        ({"augmentation": v2.MixUp(num_classes=10)}, "augmentation: torchvision's MixUp draws once for all images"),
        ({"augmentation": v2.RandomRotation(7)}, r"augmentation: .* image by image, some \d+ s of an epoch"),
        ({"optimizer": lambda p: SGD([*p][-2:], lr=0.01)}, r"optimizer: .* not given first\.weight, .*, which"),
        (
            {"average": partial(AveragedModel, avg_fn=lambda mean, new, _: 0.99 * mean + 0.01 * new), "batch_size": 5},
            r"average: after the first epoch it is still 37 % the first weights \(14 % after 200 batches\)",
        ),
        ({"net": Normed, "average": AveragedModel}, r"average: .*use_buffers=True"),
        ({"optimizer": partial(StepsItsOwn, lr=0.01), "scheduler": partial(StepLR, step_size=1)}, "optimizer: .* lr 0"),
        ({"objective": lambda net, x, y: (F.cross_entropy(net.eval()(x), y), net(x))}, "objective: leaves the network"),
        ({"loss": lambda y, t: F.cross_entropy(y, t) + 0 * torch.manual_seed(1).initial_seed()}, "training: the"),
        ({"objective": backward_too}, "objective: calls backward"),
        ({"loss": lambda y, t: 0 * F.cross_entropy(y, t)}, "optimizer: its first 3 steps have moved no weight"),
        ({"objective": in_a_run_of_its_own}, "mlflow: the script calls mlflow.start_run"),
        ({"targets": Targets(params=1_000)}, "targets.params: "),
        ({"net": partial(Linear, change=torch.sigmoid), "loss": of_sigmoid}, "net: seems to end with sigmoid"),
        ({"net": partial(Linear, change=partial(F.log_softmax, dim=0))}, "net: gives an image other logits beside"),
        ({"loss": lambda y, t: F.nll_loss(y, t)}, r".*log_softmax\(dim=1\)"),
        ({"net": partial(Linear, change=saturated)}, "net: seems to end with softmax"),
        ({"net": partial(Linear, change=partial(torch.cumsum, dim=0))}, "net: gives an image other logits beside"),
        ({"net": partial(Linear, change=lambda y: y + 1e-2 * y.mean(0))}, "net: gives an image other logits beside"),
    ],
)
def test_what_trains_but_is_not_meant_is_said(changes: dict[str, Any], said: str, small_mnist: Mnist) -> None:
    [notice] = rehearse(declare(**changes), small_mnist).notices
    assert re.match(said, notice)


# ---- what is unusual and meant so

FILTERS, SPARSE, FROZEN = torch.ones(6, 1, 5, 5), torch.eye(3).to_sparse(), nn.Linear(90, 10).requires_grad_(False)


class Fixed(Convolutions):
    """Has filters and a frozen layer that all networks share and none changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filters", FILTERS)
        self.sparse = nn.Parameter(SPARSE, requires_grad=False)
        self.frozen = deepcopy(FROZEN)

    def train(self, mode: bool = True) -> Any:  # returns nothing, as scripts write it
        super().train(mode)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.second(F.conv2d(images, self.filters, stride=3).relu() + self.first(images)).flatten(1)
        return self.linear(hidden) + self.frozen(hidden)


class Noisy(Convolutions):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images + torch.randn_like(images) * self.training)


class KeepsActivation(Convolutions):
    def forward(self, images: Tensor) -> Tensor:
        self.kept = super().forward(images)
        return self.kept


class Auxiliary(Convolutions):
    """Gives two outputs in training, as GoogLeNet does."""

    def forward(self, images: Tensor) -> Any:
        logits = super().forward(images)
        return (logits, logits) if self.training else logits


class GhostNorm(nn.BatchNorm1d):
    """Changes its statistics when it is switched to evaluation, as one that keeps those of each half of a batch."""

    def train(self, mode: bool = True) -> "GhostNorm":
        if self.training and not mode and self.running_mean is not None:
            self.running_mean = self.running_mean.view(2, 5).mean(0).repeat(2)
        return super().train(mode)


def ghost_normed() -> nn.Module:
    return Linear(change=GhostNorm(10, momentum=0.5))


def weight_normed() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has a newer weight_norm
        return Linear(change=nn.utils.weight_norm(nn.Linear(10, 10)))


def computed_anew() -> nn.Module:
    net = Linear(change=lambda y: (net.training and setattr(net, "twice", 2 * net.linear.weight)) or y)
    net.twice = 2 * net.linear.weight  # and anew in training
    return net


class SharpSGD(SGD):
    """SAM on SGD: wants a closure beside the gradients, and rounds where it brings the weights back."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        moves = [p.grad * (0.05 / (norm + 1e-12)) for p in parameters]
        for p, move in zip(parameters, moves, strict=True):
            p.add_(move)
        torch.enable_grad()(closure)()
        for p, move in zip(parameters, moves, strict=True):
            p.sub_(move)
        return super().step()


class ClippedAdam(Adam):
    """Evaluates the loss by itself, though its signature says that it need not."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = closure()
        nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 1.0)
        super().step()
        return loss


class Kept(list[float]):
    """A loss that is false as long as it is empty."""

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.append(0)
        return F.multi_margin_loss(logits, labels)


def of_both(net: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits, auxiliary = net(images)
    return F.cross_entropy(logits, labels) + F.cross_entropy(auxiliary, labels), logits


def adversarial(net: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    change = torch.zeros_like(images, requires_grad=True)
    (gradient,) = torch.autograd.grad(F.cross_entropy(net(images + change), labels), change)
    logits = net(images + 0.1 * gradient.sign() + change)
    return F.cross_entropy(logits, labels), logits


def by_transform(net: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    gradient = torch.func.grad(lambda given: F.cross_entropy(net(given), labels))(images)  # type: ignore[no-untyped-call]
    logits = net(images)
    return F.cross_entropy(logits, labels) + gradient.pow(2).sum(), logits


def by_numpy(images: Tensor) -> Tensor:
    factors = np.random.random((len(images), 1, 1, 1))  # noqa: NPY002  from the generator that is seeded
    return images * torch.from_numpy(factors.astype(np.float32))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"net": Noisy},
        {"net": Fixed, "objective": adversarial, "optimizer": partial(SGD, lr=1e-5)},
        {"net": lambda: (net := Convolutions()).register_buffer("kept", FILTERS) or net, "average": AveragedModel},
        {"net": KeepsActivation, "average": AVERAGE},
        {"net": Auxiliary, "objective": of_both},
        {"net": partial(Linear, change=nn.Dropout(0.1)), "objective": by_transform},
        {"net": wraps(Linear)(lambda: torch.compile(Linear(), backend="eager")), "loss": Kept()},
        {"augmentation": by_numpy},
        {
            "net": partial(Linear, change=nn.LogSoftmax(dim=1)),
            "loss": partial(F.nll_loss, reduction="sum"),
            "optimizer": partial(SGD, lr=5e-4),
        },
        {"net": ghost_normed},
        {"net": ghost_normed, "average": AVERAGE},
        {"net": weight_normed, "average": AVERAGE},
        {"net": computed_anew},
        *({"optimizer": partial(optimizer, lr=0.005)} for optimizer in (SharpSGD, ClippedAdam)),
    ],
)
def test_what_is_meant_is_let_through_without_a_word_and_trains(changes: dict[str, Any], small_mnist: Mnist) -> None:
    rehearsal = rehearse(declare(**changes), small_mnist)
    assert (rehearsal.notices, rehearsal.memory_format) == ([], torch.channels_last)
    _, (first, second) = train(declare(**changes), small_mnist, memory_format=torch.channels_last)
    assert second.train_loss < first.train_loss


class Recomputed(Convolutions):
    """Computes its activations again in the backward pass, as memory-saving networks do."""

    def forward(self, images: Tensor) -> Tensor:
        return checkpoint(super().forward, images.requires_grad_(), use_reentrant=False)


def test_what_is_computed_again_has_the_same_dropout(small_mnist: Mnist, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rehearse(declare(net=Recomputed), small_mnist).notices == []
    _, recomputed = train(declare(net=Recomputed), small_mnist)
    monkeypatch.setattr(dropout, "MAX_P", -1.0)  # torch's own dropout in either pass
    _, plain = train(declare(), small_mnist)
    assert [one.train_loss for one in recomputed] == pytest.approx([one.train_loss for one in plain], abs=1e-6)


def test_losses_of_half_precision_logits_are_not_rounded(small_mnist: Mnist) -> None:
    half = declare(net=partial(Linear, change=Tensor.half), batch_size=500)  # so the loss is that of one batch
    _, epochs = train(half, small_mnist)
    for epoch in epochs:
        assert epoch.eval_loss * 512 % 1 != 0
        assert epoch.train_loss * 512 % 1 != 0
