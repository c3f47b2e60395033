"""Walks a schedule through a whole run before any training: what can't work is refused, what does little is said."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from itertools import pairwise, zip_longest

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from mnist_lab.arguments import stable_text
from mnist_lab.experiment import Experiment, quoted
from mnist_lab.training.loop import build_optimizer, build_scheduler, scheduler_steps_per_epoch
from mnist_lab.training.states import plain

MAX_SCHEDULE_STEPS = 200_000  # that are walked: a second or two
MAX_LR = torch.finfo(torch.float32).max  # torch refuses to multiply a float32 parameter by more
NOTHING = 1e-3  # of a schedule's largest learning rate: trained with less, a network stands still
LONG = 100  # steps: few schedules are meant to take more epochs for half of their way

Values = list[dict[str, object]]  # what an optimizer holds, by parameter group


def check_schedule(experiment: Experiment, net: nn.Module, num_images: int) -> list[str]:
    """Step a scheduler of its own through the whole run: OneCycleLR, for one, fails only past its last step.

    Returns notices of what the schedule does in this run and is hardly meant to do.

    Raises:
        TypeError, ValueError: if it can't work.
    """
    optimizer = build_optimizer(experiment, net.parameters())
    scheduler = build_scheduler(experiment, optimizer, num_images)
    if scheduler is None:
        return []
    _check_kind(experiment, scheduler)
    _check_state(scheduler)
    if isinstance(scheduler, ReduceLROnPlateau):
        return []
    steps = _steps(experiment, num_images)
    rates = [_rates(optimizer)]  # building a schedule sets the rate of the first step
    with warnings.catch_warnings():  # of an optimizer that has not stepped yet
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        for _ in range(min(MAX_SCHEDULE_STEPS, steps)):
            scheduler.step()
            rates.append(_rates(optimizer))
        _check_state(scheduler)
        batches = math.ceil(num_images / experiment.batch_size)
        notices = [
            _notice_unit(experiment, scheduler, group, _largest(scheduler, rates), batches)
            for group in zip(*rates[:steps], strict=True)
        ]
    planned = getattr(scheduler, "total_steps", None)
    if isinstance(planned, int) and planned > steps:
        notices.append(
            f"scheduler: {type(scheduler).__name__} is made for {planned:,} steps and the run has {steps:,}, so it "
            "does not come to its end; leave out epochs, steps_per_epoch and total_steps, and they are filled in"
        )
    return [notice for notice in notices if notice][:1]


def _check_kind(experiment: Experiment, scheduler: object) -> None:
    if not isinstance(scheduler, LRScheduler):
        raise TypeError(f"gives a {type(scheduler).__name__}, not a torch.optim.lr_scheduler.LRScheduler")
    if getattr(scheduler, "mode", None) == "max":
        raise ValueError("mode='max' waits for a figure that rises, but it is given the training loss; use mode='min'")
    if isinstance(scheduler, ReduceLROnPlateau) and experiment.scheduler_interval == "batch":
        raise ValueError("ReduceLROnPlateau needs scheduler_interval='epoch': it follows the epoch's training loss")


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


def _steps(experiment: Experiment, num_images: int) -> int:
    return experiment.epochs * scheduler_steps_per_epoch(experiment, num_images)


def _rates(optimizer: Optimizer) -> list[float]:
    """Return each group's learning rate; raises ValueError if one is no float32 number."""
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    for rate in rates:
        if not abs(rate) <= MAX_LR:
            raise ValueError(f"the learning rate becomes {rate}, which is no float32 number")
    return rates


# ---- schedules in the wrong unit


def _largest(scheduler: LRScheduler, rates: list[list[float]]) -> float:
    """Return the largest learning rate that a schedule gives, or was given and does not reach in the run."""
    given = [group.get(name, 0) for group in scheduler.optimizer.param_groups for name in ("initial_lr", "max_lr")]
    return max(*map(max, rates), *map(float, given))


def _notice_unit(
    experiment: Experiment, scheduler: LRScheduler, rates: Sequence[float], largest: float, batches: int
) -> str:
    """Return a notice if one group's rates look like those of a schedule that was meant for the other interval.

    largest: learning rate of the schedule. batches: in an epoch.
    """
    name = type(scheduler).__name__
    if experiment.scheduler_interval == "batch":
        fault = _swings(rates, largest, experiment.epochs) or _rests(rates, largest, batches)
        if not fault:
            return ""
        what, steps = fault
        return (
            f"scheduler: {name} {what} {steps:,} batches, which are {steps / batches:.2g} epochs, as it steps after "
            f"each batch; with scheduler_interval='epoch' they would be {steps:,} epochs"
        )
    if (idle := sum(rate < NOTHING * largest for rate in rates)) * 3 >= len(rates):
        return (
            f"scheduler: {name} leaves {idle} of the run's {len(rates)} epochs a learning rate of at most "
            f"{max(rate for rate in rates if rate < NOTHING * largest):.2g}, and its largest is {largest:.2g}: it "
            f"steps once per epoch, {len(rates)} times in the run; is scheduler_interval='batch' meant?"
        )
    if max(rates) - min(rates) > 0.1 * largest:
        return ""
    steps = _half_way(scheduler, [*rates], len(rates) * batches)
    if steps < max(2 * len(rates), min(LONG, batches)):
        return ""
    return (
        f"scheduler: {name} has come half of its way after {steps:,} steps, which are {steps:,} epochs, as it steps "
        f"once per epoch, and the run has {len(rates)}; with scheduler_interval='batch' they would be "
        f"{steps / batches:.2g} epochs"
    )


def _swings(rates: Sequence[float], largest: float, epochs: int) -> tuple[str, int] | None:
    """Return the period, in steps, of a schedule that goes up and down more than once in an epoch."""
    changes = [after - before for before, after in pairwise(rates) if abs(after - before) > 1e-9 * largest]
    turns = sum(before * after < 0 for before, after in pairwise(changes))
    return ("goes up and down every", round(2 * len(rates) / turns)) if turns > 2 * epochs else None


def _rests(rates: Sequence[float], largest: float, batches: int) -> tuple[str, int] | None:
    """Return the steps after which a schedule changes no more, where these are very few."""
    steps = len(rates)
    while steps and abs(rates[steps - 1] - rates[-1]) <= NOTHING * largest:
        steps -= 1
    few = min(batches, len(rates) / 4) if rates[-1] < largest / 2 else batches / 10  # or is it a warm-up?
    return (f"comes to rest, at {rates[-1]:.2g}, after", steps) if 0 < steps < few else None


def _half_way(scheduler: LRScheduler, rates: list[float], steps: int) -> int:
    """Return after how many steps a rate has moved by half of what it moves in so many; 0 if that is not known."""
    try:
        for _ in range(len(rates), min(steps, MAX_SCHEDULE_STEPS)):
            scheduler.step()
            rates += _rates(scheduler.optimizer)[:1]
    except Exception:  # it ends with the run
        return 0
    moved = [abs(rate - rates[0]) for rate in rates]
    return next((step for step, way in enumerate(moved) if 2 * way >= max(moved) > 0), 0)


# ---- what has no effect


def without_effect(experiment: Experiment, net: nn.Module, num_images: int) -> dict[str, str]:
    """Return the hyperparameters of optimizer and scheduler that change nothing in this run, each with a sentence.

    Each number is changed a little, and the schedule walked with and without the change: what the optimizer holds
    before each step is compared. Of a tuple or list, each number is tried by itself: `milestones[1]`.
    """
    if experiment.scheduler is None or _steps(experiment, num_images) > MAX_SCHEDULE_STEPS:
        return {}
    found: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        declared = list(_held(experiment, net, num_images))
        if not declared[1:]:  # it follows the loss
            return {}
        for name, value in experiment.hyperparameters().items():
            part, _ = experiment.where(name)
            changes = _changes(name, value) if part in ("optimizer", "scheduler") else {}
            reasons: dict[str, str] = {}
            for label, changed in changes.items():
                try:
                    other, _ = experiment.override({name: changed})
                    reasons[label] = _no_effect(
                        experiment, declared, _held(other, net, num_images), part == "optimizer"
                    )
                except Exception:  # that value is not allowed, which is a difference
                    reasons[label] = ""
            if reasons and all(reasons.values()):
                found[name] = f"{name}: {quoted(value)} has no effect: {next(iter(reasons.values()))}"
            else:
                found |= {label: f"{label} has no effect: {reason}" for label, reason in reasons.items() if reason}
    return found


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


def _no_effect(experiment: Experiment, declared: list[Values], changed: Iterator[Values], of_optimizer: bool) -> str:
    """Return why a change makes no difference, or nothing if it makes one."""
    built = next(changed)
    keys = sorted({key for one, other in zip(declared[0], built, strict=True) for key in one if one[key] != other[key]})
    if of_optimizer and not keys:  # the optimizer keeps it elsewhere
        return ""
    if any(one != other for one, other in zip_longest(declared[1:], changed)):
        return ""
    if of_optimizer:
        return f"{stable_text(experiment.scheduler)} sets {' and '.join(keys)}"
    return f"the schedule of this run's {experiment.epochs} epochs is the same with another value"


def _held(experiment: Experiment, net: nn.Module, num_images: int) -> Iterator[Values]:
    """Yield what the optimizer holds when it is built, and then before each step of a scheduler that can be walked."""
    optimizer = build_optimizer(experiment, net.parameters())
    keys = [key for key in optimizer.param_groups[0] if key != "params"]  # a scheduler keeps others there

    def values() -> Values:
        held = [{key: group[key] for key in keys} for group in optimizer.param_groups]
        return [{key: v.tolist() if isinstance(v, Tensor) else v for key, v in group.items()} for group in held]

    yield values()
    scheduler = build_scheduler(experiment, optimizer, num_images)
    if scheduler is None or isinstance(scheduler, ReduceLROnPlateau):
        return
    yield values()
    for _ in range(_steps(experiment, num_images) - 1):
        scheduler.step()
        yield values()
