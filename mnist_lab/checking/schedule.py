"""Walks schedule and average through a run before any training: refuses what cannot work, says what does little."""

import warnings
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel

from mnist_lab.arguments import stable_text
from mnist_lab.errors import counted
from mnist_lab.experiment import Experiment, quoted
from mnist_lab.training.loop import batches_per_epoch, build_average, build_optimizer, build_scheduler
from mnist_lab.training.states import own_parts

MAX_SCHEDULE_STEPS = 200_000  # that are walked: a second or two
ROUNDING = 1e-9  # of a rate that ends at 0
MAX_LR = torch.finfo(torch.float32).max  # torch refuses to multiply a float32 parameter by more
NOTHING = 1e-3  # of a schedule's largest learning rate: trained with less, a network stands still
MUCH = 1 / 3  # of an average: with more of the first weights in it, it says little of those that were trained
LITTLE = 0.05  # of batch norm's statistics: with more of their first values, a network that learns well reads badly
MAX_BATCHES = 5_000  # of an average that are tried
LONG = 100  # steps: few schedules are meant to take more epochs for half of their way

Groups = list[dict[str, Any]]  # what an optimizer holds for each group of parameters: lr, momentum and the like


class Walk:
    """A schedule of its own that is stepped through the whole run: OneCycleLR fails only past its last step."""

    def __init__(self, experiment: Experiment, net: nn.Module, num_images: int) -> None:
        self.experiment, self.net, self.num_images = experiment, net, num_images
        self.by_batch = experiment.scheduler_interval == "batch"
        self.unit = ("batch", "batches") if self.by_batch else ("epoch",)
        self.batches = batches_per_epoch(experiment, num_images)
        self.run = experiment.epochs * (self.batches if self.by_batch else 1)  # steps
        self.optimizer = build_optimizer(experiment, net.parameters())
        self.names = [name for name in self.optimizer.param_groups[0] if name != "params"]  # a scheduler adds others
        self.built = self._groups()
        self.scheduler = build_scheduler(experiment, self.optimizer, num_images)
        self.groups: list[Groups] = []  # before each step, and after the last
        if self.scheduler is not None:
            self._check_kind()
            if not isinstance(self.scheduler, ReduceLROnPlateau):
                self.go_on(min(self.run, MAX_SCHEDULE_STEPS))
        for rate in (float(group["lr"]) for groups in [self.built, *self.groups[: self.run]] for group in groups):
            if not -ROUNDING <= rate <= MAX_LR:
                limits = f"below 0 a step makes the loss larger, and float32 ends at {MAX_LR:.2g}"
                raise ValueError(f"the learning rate becomes {rate:.3g}: {limits}")

    def go_on(self, steps: int) -> None:
        assert self.scheduler is not None
        with warnings.catch_warnings():  # of an optimizer that has not stepped yet
            warnings.simplefilter("ignore")
            while len(self.groups) <= steps:
                if self.groups:
                    self.scheduler.step()
                self.groups.append(self._groups())

    @property
    def rates(self) -> list[float]:
        return [float(groups[0]["lr"]) for groups in self.groups]

    def _groups(self) -> Groups:
        return [{name: group[name] for name in self.names if name in group} for group in self.optimizer.param_groups]

    def _check_kind(self) -> None:
        scheduler = self.scheduler
        if not isinstance(scheduler, LRScheduler):
            raise TypeError(f"gives a {type(scheduler).__name__}, not a torch.optim.lr_scheduler.LRScheduler")
        if getattr(scheduler, "mode", None) == "max":
            raise ValueError("mode='max' waits for a figure that rises; use mode='min': it is given the training loss")
        if isinstance(scheduler, ReduceLROnPlateau) and self.by_batch:
            raise ValueError("ReduceLROnPlateau needs scheduler_interval='epoch': it follows the epoch's training loss")
        groups = getattr(getattr(scheduler, "optimizer", None), "param_groups", [])
        steered = {id(parameter) for group in groups for parameter in group["params"]}
        if steered and steered.isdisjoint(map(id, self.net.parameters())):
            raise ValueError("steps another optimizer; build it with the one that it is called with")


# ---- schedules in the wrong unit


def notice_unit(walk: Walk) -> Iterator[str]:
    """Yield a notice if the schedule looks as if it was meant for the other interval."""
    if not walk.groups:
        return
    scheduler, run, rates = f"scheduler: {type(walk.scheduler).__name__}", walk.run, walk.rates
    largest = max(*rates, *(float(walk.optimizer.param_groups[0].get(limit, 0)) for limit in ("initial_lr", "max_lr")))
    idle = sum(rate < NOTHING * largest for rate in rates[:run])
    moving = [step for step, rate in enumerate(rates) if abs(rate - rates[-1]) > NOTHING * largest]
    planned = getattr(walk.scheduler, "total_steps", None)
    if not walk.by_batch and 3 * idle >= run:
        idly = f"in {idle} of {counted(run, 'epoch')} the rate is some {min(rates):.2g}, of at most {largest:.2g}"
        yield f"{scheduler} steps once per epoch; {idly}; is scheduler_interval='batch' meant?"
    elif isinstance(planned, int) and planned > run:
        yield f"{scheduler} has {planned:,} steps, a run on all images {run:,}; leave it out, and the lab fills it in"
    elif planned != run:  # else it comes to its end with the run
        steps = _half_way(walk, 0.1 * largest)
        half_way, in_batches = f"has come half of its way after {counted(steps, *walk.unit)}", steps / walk.batches
        few = max(walk.experiment.epochs, 14 * (walk.rates[steps] < rates[0]))  # --epochs may have cut a decay short
        if walk.by_batch and 0 < steps <= min(few, walk.batches // 2):
            meant = f"is scheduler_interval='epoch' meant, with which it would be {counted(steps, 'epoch')}?"
            yield f"{scheduler} {half_way} ({in_batches:.2g} epochs); {meant}"
        elif walk.by_batch and moving and rates[-1] < rates[0] and 10 * moving[-1] < run:
            still = f"stands still after {moving[-1] + 1:,} of {run:,} batches"
            yield f"{scheduler} {still}; is scheduler_interval='epoch' meant?"
        elif not walk.by_batch and steps > max(run, LONG):
            meant = f"is scheduler_interval='batch' meant, with which it would be {in_batches:.2g} epochs?"
            yield f"{scheduler} {half_way}; {meant}"


def _half_way(walk: Walk, little: float) -> int:
    """Return after how many steps a rate has gone half of its way, in the run or, where it goes little, in batches."""
    if max(walk.rates) - min(walk.rates) <= little:
        with suppress(Exception):  # a schedule may end with the run
            walk.go_on(min(walk.experiment.epochs * walk.batches, MAX_SCHEDULE_STEPS))
    rates = walk.rates
    moved = [abs(rate - rates[0]) for rate in rates]
    return next((step for step, way in enumerate(moved) if 2 * way >= max(moved) > 0), 0)


# ---- what has no effect


def without_effect(walk: Walk) -> dict[str, str]:
    """Return the numbers given to optimizer and scheduler that change nothing in this run, each with a sentence.

    Each is changed a little, and the schedule walked again: what the optimizer holds before each step is compared.
    """
    if not walk.groups or walk.run > MAX_SCHEDULE_STEPS:
        return {}
    experiment, run = walk.experiment, slice(walk.run)
    reasons = {
        "optimizer": f"{stable_text(experiment.scheduler)} sets it",
        "scheduler": f"in a run of {counted(walk.run, *walk.unit)}, another value gives the same learning rates",
    }
    found: dict[str, str] = {}
    for name, (part, _, value) in experiment.flat().items():
        if part not in reasons or not isinstance(value, int | float) or isinstance(value, bool):
            continue
        changed = value + 1 if isinstance(value, int) else 0.9 * value + 0.01 * (value == 0)
        with suppress(Exception):  # that value is not allowed, which is a difference
            other = Walk(experiment.override({name: changed})[0], walk.net, walk.num_images)
            kept_elsewhere = part == "optimizer" and other.built == walk.built
            if other.groups[run] == walk.groups[run] and not kept_elsewhere:
                found[name] = f"{name}: {quoted(value)} has no effect: {reasons[part]}"
    if not found and all(groups == walk.groups[0] for groups in walk.groups[run]):
        found["scheduler"] = f"scheduler: changes no learning rate in a run of {counted(walk.run, *walk.unit)}"
    return found


# ---- averages: of weights, and of what batch norm has seen


def notice_batch_norm(experiment: Experiment, net: nn.Module, num_images: int) -> Iterator[str]:
    """Yield a notice if the statistics that batch norm evaluates with are still partly their initial values."""
    batches = experiment.epochs * batches_per_epoch(experiment, num_images)
    norms = [module for module in net.modules() if getattr(module, "running_mean", None) is not None]
    momentum = min([1.0, *(module.momentum for module in norms if isinstance(module.momentum, float | int))])
    if (share := (1 - momentum) ** batches) > LITTLE:
        statistics = f"statistics (momentum {momentum:g}) that are {100 * share:.0f} % initial values"
        after = f"after this run's {counted(batches, 'batch', 'batches')}"
        yield f"net: {after}, batch norm evaluates with {statistics}, so its accuracy says little"


class FirstWeights:
    """Tells what share of an average is still the first batch's weights, by averaging 1, 0, 0, ... by the same rule."""

    def __init__(self, experiment: Experiment) -> None:
        self.shares = [1.0]  # by the number of batches
        self.number = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.number.weight)
        self.average: AveragedModel | None = None
        with suppress(Exception):  # a script's own rule may ask for more of a network
            self.average = build_average(own_parts(experiment), self.number)

    def share(self, batches: int) -> float:
        """Return the share after so many batches; 0 where it is not known."""
        if self.average is None:
            return 0.0
        while len(self.shares) <= batches:
            self.average.update_parameters(self.number)
            nn.init.zeros_(self.number.weight)
            self.shares.append(next(self.average.parameters()).item())
        return self.shares[batches]


def notice_slow_average(experiment: Experiment, num_images: int) -> Iterator[str]:
    first, batches = FirstWeights(experiment), batches_per_epoch(experiment, num_images)
    if (early := first.share(min(batches, MAX_BATCHES))) > MUCH:
        last = min(MAX_BATCHES, experiment.epochs * batches)
        still = f"after the first epoch it is still {100 * early:.0f} % the first weights"
        later = f"{100 * first.share(last):.0f} % after {counted(last, 'batch', 'batches')}"
        yield f"average: {still} ({later}); while that is a large share, its accuracy says little"
