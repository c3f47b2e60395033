"""What a training changes: one that is taken up again goes on with it, and another begins as declared."""

import io
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mnist_lab import Experiment
from mnist_lab.augmentation import random_rotation
from mnist_lab.checking.rehearsal import rehearse
from mnist_lab.data import Mnist
from mnist_lab.objectives import mixup
from mnist_lab.training.loop import Training, initial_network
from mnist_lab.training.states import own_parts, seed_generators
from networks import CPU, DrawsElsewhere, Linear, Small, declare, warm_up_then_decay

NOISE = torch.Generator().manual_seed(0)  # which no run seeds


class WarmsUp(Linear):
    batches = 0

    def forward(self, images: Tensor) -> Tensor:
        self.batches += self.training
        return super().forward(images) * min(1.0, self.batches / 20)


class Centred(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(10), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        if self.training:
            self.mean.lerp_(logits.detach().mean(0), 0.1)
        return logits - self.mean


class Grows(Linear):
    def forward(self, images: Tensor) -> Tensor:
        if self.training and not hasattr(self, "seen"):
            self.register_buffer("seen", torch.ones(1))
        return super().forward(images)


class Holds(Optimizer):
    """Steps by an optimizer that it holds, whose groups are its own, as SAM and Lookahead do."""

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})
        self.base = SGD(self.param_groups, lr=lr, momentum=0.9)
        self.param_groups = self.base.param_groups

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return self.base.step()


class LooksAhead(SGD):
    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        super().__init__(parameters := [*parameters], lr=lr)
        self.slow = [parameter.detach().clone() for parameter in parameters]

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        (group,) = self.param_groups
        group["steps"] = group.get("steps", 0) + 1
        super().step()
        for parameter, slow in zip(group["params"], self.slow, strict=True):
            if group["steps"] % 6 == 0:
                parameter.data = slow.lerp_(parameter.data, 0.5).clone()


class Noisy(Linear):
    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return logits + self.training * torch.rand(logits.shape, generator=NOISE)


class Counts:
    """Divides the loss by its batches' number, and keeps that as it will."""

    def __init__(self) -> None:
        self.batches = 0

    def __call__(self, net: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        self.batches += 1
        logits = net(images)
        return F.cross_entropy(logits, labels) / self.batches, logits


class Ramp(Counts):
    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches = state["batches"]


class Averages(Counts):
    def __call__(self, averaged: Any, current: Any, _: Any) -> None:  # type: ignore[override]
        self.batches += 1
        for one, now in zip(averaged, current, strict=True):
            one.lerp_(now, 0.9 - 0.5 / self.batches)


class KeptAverages(Averages, Ramp):
    pass


class Fades(Linear):
    def __init__(self, counter: Counts) -> None:
        super().__init__()
        self.counter = counter

    def forward(self, images: Tensor) -> Tensor:
        self.counter.batches += self.training
        return super().forward(images) / max(1, self.counter.batches)


class Freezes(Small):
    def forward(self, images: Tensor) -> Tensor:
        if self[1].num_batches_tracked == 2:  # once, in the first epoch
            self[-1].bias.requires_grad_(False)
        return super().forward(images)


def halves(parameters: Iterable[Tensor]) -> Optimizer:
    for parameter in (parameters := [*parameters]):
        parameter.register_hook(lambda gradient: gradient / 2)
    return SGD(parameters, lr=0.1)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(()))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, labels)
        self.mean.mul_(0.9).add_(0.1 * loss.detach())
        return loss / self.mean


def weighed(net: nn.Module, images: Tensor, labels: Tensor, *, by: Ramp) -> tuple[Tensor, Tensor]:
    return by(net, images, labels)


def start(experiment: Experiment, mnist: Mnist, seed: int = 3) -> Training:
    own = own_parts(experiment)
    return Training(initial_network(own, seed, CPU), own, mnist, seed=seed)


@pytest.mark.parametrize(
    "changes",
    [
        {"scheduler": partial(StepLR, step_size=2), "augmentation": partial(random_rotation, degrees=7.0)},
        {"augmentation": DrawsElsewhere()},
        {"scheduler": partial(OneCycleLR, max_lr=0.1), "scheduler_interval": "batch"},
        {"scheduler": partial(ReduceLROnPlateau, patience=0), "optimizer": partial(AdamW, lr=0.01)},
        {"scheduler": warm_up_then_decay},
        {"average": partial(AveragedModel, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=True)},
        {"average": AveragedModel, "objective": partial(mixup, alpha=0.3)},
        {"average": partial(AveragedModel, multi_avg_fn=KeptAverages())},
        {"net": Freezes},
        {"objective": Ramp()},
        {"objective": partial(weighed, by=Ramp())},
        {"loss": Normed()},
    ],
)
def test_a_training_that_is_taken_up_again_ends_as_if_never_stopped(changes: Any, small_mnist: Mnist) -> None:
    experiment = declare(**{"net": Small, "epochs": 3, **changes})
    rehearse(experiment, small_mnist)
    whole = start(experiment, small_mnist)
    epochs = list(whole.epochs())

    stopped = start(experiment, small_mnist)
    next(stopped.epochs())
    file = io.BytesIO()
    torch.save(stopped.state_dict(), file)
    file.seek(0)
    seed_generators(99)
    again = start(experiment, small_mnist, seed=12)  # all that counts comes from the state
    again.load_state_dict(torch.load(file, weights_only=True))
    rest = list(again.epochs())

    assert [replace(one, epoch_seconds=0.0) for one in rest] == [replace(one, epoch_seconds=0.0) for one in epochs[1:]]
    for name, value in whole.result.state_dict().items():
        assert torch.equal(value, again.result.state_dict()[name]), name


# ---- what is not kept


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": Counts()}, "objective: changes batches from"),
        ({"objective": partial(weighed, by=Counts())}, "objective: changes batches from"),
        ({"average": partial(AveragedModel, multi_avg_fn=Averages())}, "average: changes batches from"),
        ({"net": lambda: nn.Sequential(WarmsUp())}, "net: changes 0.batches from"),
        ({"net": Centred}, "net: changes mean from"),
        ({"net": Grows}, "resume: an interrupted run could not be resumed: "),
        ({"optimizer": partial(Holds, lr=0.05)}, "optimizer: changes base from"),
        ({"optimizer": partial(LooksAhead, lr=0.05)}, "optimizer: changes slow from"),
        ({"net": Noisy}, "resume: a resumed run would"),
    ],
)
def test_what_resume_begins_anew_is_named(changes: dict[str, Any], said: str, small_mnist: Mnist) -> None:
    (notice,) = rehearse(declare(**changes), small_mnist).notices
    assert notice.startswith(said)


class Slower(Counts):
    def __call__(self, *_: object) -> Any:
        self.batches += 1
        return 1 / self.batches


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": Counts()},
        {"objective": partial(weighed, by=Ramp())},
        {"average": partial(AveragedModel, multi_avg_fn=Averages())},
        {"net": partial(Fades, Counts())},
    ],
)
def test_each_run_begins_with_the_parts_as_declared(changes: dict[str, Any], small_mnist: Mnist) -> None:
    experiment = declare(**{"scheduler": partial(LambdaLR, lr_lambda=Slower()), **changes})
    untouched = [(epoch.train_loss, epoch.eval_loss) for epoch in start(experiment, small_mnist).epochs()]

    rehearse(experiment, small_mnist)

    again = [(epoch.train_loss, epoch.eval_loss) for epoch in start(experiment, small_mnist).epochs()]
    assert again == untouched


def test_what_an_optimizer_does_to_the_parameters_it_does_once(small_mnist: Mnist) -> None:
    once, plain = (declare(net=Linear, optimizer=optimizer) for optimizer in (halves, partial(SGD, lr=0.05)))
    losses = [[epoch.eval_loss for epoch in start(one, small_mnist).epochs()] for one in (once, plain)]
    assert losses[0] == pytest.approx(losses[1])
    assert rehearse(once, small_mnist).notices == []
