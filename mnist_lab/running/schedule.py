"""Walks a schedule through a whole run before any training: what can't work is refused, what does nothing is found."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping
from itertools import zip_longest

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from mnist_lab.arguments import stable_text
from mnist_lab.errors import LabError
from mnist_lab.experiment import Experiment, quoted
from mnist_lab.training.generators import kept_generators
from mnist_lab.training.loop import build_optimizer, build_scheduler, scheduler_steps_per_epoch
from mnist_lab.training.states import plain

logger = logging.getLogger(__name__)

MAX_SCHEDULE_STEPS = 200_000  # that are walked: a second or two
MAX_LR = torch.finfo(torch.float32).max  # torch refuses to multiply a float32 parameter by more


def check_schedule(experiment: Experiment, net: nn.Module, num_images: int) -> list[str]:
    """Step a scheduler of its own through the whole run: OneCycleLR, for one, fails only past its last step.

    Returns a notice if the schedule is longer than the run.

    Raises:
        TypeError, ValueError: if it can't work.
    """
    optimizer = build_optimizer(experiment, net.parameters())
    scheduler = build_scheduler(experiment, optimizer, num_images)
    if scheduler is None:
        return []
    if not isinstance(scheduler, LRScheduler):
        raise TypeError(f"gives a {type(scheduler).__name__}, not a torch.optim.lr_scheduler.LRScheduler")
    _check_state(scheduler)
    if getattr(scheduler, "mode", None) == "max":
        raise ValueError("mode='max' waits for a figure that rises, but it is given the training loss; use mode='min'")
    if isinstance(scheduler, ReduceLROnPlateau):
        if experiment.scheduler_interval == "batch":
            raise ValueError("ReduceLROnPlateau needs scheduler_interval='epoch': it follows the epoch's training loss")
        return []
    _check_lr(optimizer)  # building a schedule sets the rate of the first step
    steps = _steps(experiment, num_images)
    with warnings.catch_warnings():  # of an optimizer that has not stepped yet
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        for _ in _walk(scheduler, min(MAX_SCHEDULE_STEPS, steps)):
            _check_lr(optimizer)
    _check_state(scheduler)
    planned = getattr(scheduler, "total_steps", None)
    if not isinstance(planned, int) or planned <= steps:
        return []
    return [
        f"scheduler: {type(scheduler).__name__} is made for {planned:,} steps and the run has {steps:,}, so it does "
        "not come to its end; leave out epochs, steps_per_epoch and total_steps, and they are filled in"
    ]


def _steps(experiment: Experiment, num_images: int) -> int:
    return experiment.epochs * scheduler_steps_per_epoch(experiment, num_images)


def _walk(scheduler: LRScheduler, steps: int) -> Iterator[None]:
    for _ in range(steps):
        scheduler.step()
        yield


def _check_lr(optimizer: Optimizer) -> None:
    for lr in (float(group["lr"]) for group in optimizer.param_groups):
        if not abs(lr) <= MAX_LR:
            raise ValueError(f"the learning rate becomes {lr}, which is no float32 number")


def _check_state(scheduler: LRScheduler) -> None:
    """Refuse a scheduler whose state a checkpoint can't keep: it is read back without running any code."""
    kept = io.BytesIO()
    try:
        torch.save(plain(scheduler.state_dict()), kept)
        kept.seek(0)
        torch.load(kept, weights_only=True)
    except Exception as error:
        raise ValueError(
            f"the state of {type(scheduler).__name__} holds more than numbers, texts and tensors, "
            "so a checkpoint can't keep it; give it a state_dict() of those"
        ) from error


def without_effect(experiment: Experiment, num_images: int) -> dict[str, str]:
    """Return the hyperparameters of optimizer and scheduler that change nothing in this run, each with a sentence.

    Each number is changed a little, and the schedule walked with and without the change: what the optimizer holds
    before each step is compared. Of a tuple or list, each number is tried by itself: `milestones[1]`.
    """
    if experiment.scheduler is None or _steps(experiment, num_images) > MAX_SCHEDULE_STEPS:
        return {}
    found: dict[str, str] = {}
    with kept_generators(torch.device("cpu")), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = experiment.net()
        for name, value in experiment.hyperparameters().items():
            part, _ = experiment.where(name)
            changes = _changes(name, value) if part in ("optimizer", "scheduler") else {}
            reasons = {
                label: _no_effect(experiment, {name: changed}, net, num_images, part == "optimizer")
                for label, changed in changes.items()
            }
            if reasons and all(reasons.values()):
                found[name] = f"{name}: {quoted(value)} has no effect: {next(iter(reasons.values()))}"
            else:
                found |= {label: f"{label} has no effect: {reason}" for label, reason in reasons.items() if reason}
    return found


def report_without_effect(experiment: Experiment, overrides: Mapping[str, object], num_images: int) -> None:
    """Say in a notice what has no effect in this run; refuse what was set for it.

    Raises:
        LabError: naming the hyperparameter, and what sets it in its place.
    """
    for name, sentence in without_effect(experiment, num_images).items():
        if name in overrides:
            raise LabError(sentence)
        logger.warning("%s", sentence)


def _changes(name: str, value: object) -> dict[str, object]:
    """Return values that differ in one number each, by the name of that number."""
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return {
            f"{name}[{index}]": type(value)((*value[:index], changed, *value[index + 1 :]))
            for index, one in enumerate(value)
            for changed in _changes(name, one).values()
        }
    if isinstance(value, bool):
        return {}
    if isinstance(value, int):
        return {name: value + 1}
    if isinstance(value, float) or (isinstance(value, Tensor) and value.is_floating_point()):
        return {name: value * 0.9 + 0.01 * (value == 0)}
    return {}


def _no_effect(
    experiment: Experiment, change: Mapping[str, object], net: nn.Module, num_images: int, of_optimizer: bool
) -> str:
    """Return why a change makes no difference, or nothing if it makes one."""
    try:
        changed, _ = experiment.override(change)
        before, after = _held_at_first(experiment, net), _held_at_first(changed, net)
        keys = sorted({key for one, other in zip(before, after, strict=True) for key in one if one[key] != other[key]})
        if of_optimizer and not keys:  # no schedule is needed for that: the optimizer keeps it elsewhere
            return ""
        walks = (_held_in_the_run(one, net, num_images) for one in (experiment, changed))
        if any(one != other for one, other in zip_longest(*walks)):
            return ""
    except Exception:  # that value is not allowed, which is a difference, or the schedule can't be foreseen
        return ""
    if of_optimizer:
        return f"{stable_text(experiment.scheduler)} sets {' and '.join(keys)}"
    return f"the schedule of this run's {experiment.epochs} epochs is the same with another value"


def _held_at_first(experiment: Experiment, net: nn.Module) -> list[dict[str, object]]:
    return _values(build_optimizer(experiment, net.parameters()), None)


def _held_in_the_run(experiment: Experiment, net: nn.Module, num_images: int) -> Iterator[list[dict[str, object]]]:
    """Yield what the optimizer holds before each step of the scheduler."""
    optimizer = build_optimizer(experiment, net.parameters())
    keys = set(optimizer.param_groups[0])
    scheduler = build_scheduler(experiment, optimizer, num_images)
    assert scheduler is not None
    if isinstance(scheduler, ReduceLROnPlateau):
        raise TypeError("it follows the loss, so there is nothing to walk")
    yield _values(optimizer, keys)
    for _ in _walk(scheduler, _steps(experiment, num_images) - 1):
        yield _values(optimizer, keys)


def _values(optimizer: Optimizer, keys: Collection[str] | None) -> list[dict[str, object]]:
    """Return the values in each group, those of `keys` only if given: a scheduler keeps values of its own there."""
    return [
        {
            key: value.tolist() if isinstance(value, Tensor) else value
            for key, value in group.items()
            if key != "params" and (keys is None or key in keys)
        }
        for group in optimizer.param_groups
    ]
