"""What a schedule overrides, what changes nothing in a run, and schedules in the wrong unit."""

from functools import partial
from typing import Any

import pytest
from torch import nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    StepLR,
)

from mnist_lab.checking.schedule import Walk, notice_batch_norm, notice_unit, without_effect
from networks import Linear, declare, warm_up_then_decay


def walk(scheduler: Any, epochs: int = 14, interval: str = "epoch", images: int = 1_000) -> Walk:
    return Walk(declare(scheduler=scheduler, epochs=epochs, scheduler_interval=interval), Linear(), images)


NO_EFFECT = {
    "one cycle": (walk(partial(OneCycleLR, max_lr=0.01)), ["lr", "momentum"]),
    "one cycle by batch": (walk(partial(OneCycleLR, max_lr=1.0), 2, "batch"), ["lr", "momentum"]),
    "step beyond the run": (walk(partial(StepLR, step_size=14, gamma=0.6)), ["step_size", "gamma"]),
    "steps beyond the run": (walk(partial(MultiStepLR, milestones=[30, 60])), ["scheduler"]),
    "step in the run": (walk(partial(StepLR, step_size=13, gamma=0.6)), []),
    "step by batch": (walk(partial(StepLR, step_size=14), 2, "batch"), []),
    "in sequence": (walk(warm_up_then_decay), []),
    "plateau": (walk(partial(ReduceLROnPlateau, patience=3)), []),
    "none": (walk(None), []),
}


@pytest.mark.parametrize(("schedule", "names"), NO_EFFECT.values(), ids=NO_EFFECT)
def test_what_has_no_effect_is_found(schedule: Walk, names: list[str]) -> None:
    found = without_effect(schedule)

    assert list(found) == names
    assert all(sentence.startswith(name) for name, sentence in found.items())


# ---- schedules in the wrong unit


def in_batches(step: int) -> float:
    return min(1.0, (step + 1) / 500)


# By batch or epoch, the epochs of 469 batches, and the two numbers of steps and epochs that the notice gives.
WRONG = {
    "cosine in epochs": ("batch", 10, partial(CosineAnnealingLR, T_max=11), ("6 batches", "6 epochs")),
    "cosine in batches": ("epoch", 10, partial(CosineAnnealingLR, T_max=4690), ("2,34", "5 epochs")),
    "steps in epochs": ("batch", 14, partial(StepLR, step_size=6), ("6 batches", "6 epochs")),
    "steps in batches": ("epoch", 14, partial(StepLR, step_size=2814), ("2,814 epochs", "6 epochs")),
    "warm-up in epochs": ("batch", 14, partial(LinearLR, total_iters=5), ("3 batches", "3 epochs")),
    "warm-up in batches": ("epoch", 14, partial(LambdaLR, lr_lambda=in_batches), ("250 epochs", "0.53 epochs")),
    "one cycle in 1": ("epoch", 1, partial(OneCycleLR, max_lr=0.1), ("4e-07", "'batch'")),
    "one cycle in 3": ("epoch", 3, partial(OneCycleLR, max_lr=0.1), ("4e-07", "'batch'")),
}


@pytest.mark.parametrize(("interval", "epochs", "scheduler", "figures"), WRONG.values(), ids=WRONG)
def test_a_wrong_unit_is_named_in_both(interval: str, epochs: int, scheduler: Any, figures: tuple[str, ...]) -> None:
    (notice,) = notice_unit(walk(scheduler, epochs, interval, images=60_000))
    assert all(figure in notice for figure in figures)


RIGHT = {
    "cosine by batch": ("batch", 10, partial(CosineAnnealingLR, T_max=4690)),
    "one cycle": ("batch", 1, partial(OneCycleLR, max_lr=0.1)),
    "a quick look": ("epoch", 1, partial(StepLR, step_size=15)),
    "steps by batch": ("batch", 14, partial(StepLR, step_size=938)),
    "warm-up by batch": ("batch", 14, partial(LambdaLR, lr_lambda=in_batches)),
    "cycles by batch": ("batch", 14, partial(CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=2000)),
    "slow decay": ("epoch", 150, partial(ExponentialLR, gamma=0.98)),
}


@pytest.mark.parametrize(("interval", "epochs", "scheduler"), RIGHT.values(), ids=RIGHT)
def test_nothing_is_said_of_a_schedule_in_its_unit(interval: str, epochs: int, scheduler: Any) -> None:
    assert list(notice_unit(walk(scheduler, epochs, interval, images=60_000))) == []


def test_batch_norm_that_keeps_much_of_its_first_values_is_said() -> None:
    experiment = declare(epochs=1, batch_size=10)
    said = {rate: [*notice_batch_norm(experiment, nn.BatchNorm2d(1, momentum=rate), 100)] for rate in (0.1, 0)}
    assert all(text in said[rate][0] for rate, text in ((0.1, "10 batches"), (0.1, "35 %"), (0, "100 %")))  # 0.9 ** 10
    assert not [*notice_batch_norm(experiment, nn.BatchNorm2d(1, momentum=0.1), 300)]  # 4 %
