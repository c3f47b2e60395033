"""What a script declares: a network, how it is trained, what it should reach, and what was reported elsewhere."""

from __future__ import annotations

import ast
import dataclasses
import functools
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Annotated, Any, Literal, NamedTuple

import torch.nn.functional as F
from pydantic import Field, InstanceOf, TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from mnist_lab.arguments import LAMBDA, defaults, held, parameters_of, stable_text
from mnist_lab.commandline import finite_number, whole_number
from mnist_lab.errors import LabError, did_you_mean, unknown_argument
from mnist_lab.measures import TESTED

# The declared parts that take arguments. Only for PARTS_WITH_DEFAULTS do default values count as declared:
# their signatures are the script's or the lab's own, while a torch optimiser has a dozen defaults that nobody chose.
PARTS = ("optimizer", "scheduler", "loss", "net", "augmentation", "objective", "average")
PARTS_WITH_DEFAULTS = ("net", "augmentation", "objective")
NAMES_OF_PARTS = ("optimizer", "scheduler", "scheduler_interval", "loss", "augmentation", "objective", "average")
LISTED_WHERE_DECLARED = ("loss", "objective", "average")  # so runs of before they could be declared are still the same
# Logged beside the hyperparameters: an argument so named is qualified by its part.
RUN_PARAMS = ("seed", "device", "holdout", "folds")
MNIST_PIXELS = (0.1307, 0.3081)  # mean and standard deviation of the training pixels, scaled to [0, 1]
MAX_COUNT = 1_000_000_000  # of epochs or images in a batch: torch counts no further than 64 bits go
NAME_IT = "name the function (def ...), so that runs can say what they used"


class Declared(NamedTuple):
    part: str | None  # None: a field of its own
    argument: str
    value: object


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What the experiment should reach; None where nothing was stated."""

    accuracy: float | None = None  # test accuracy of the last epoch in percent, at least this
    params: int | None = None  # trainable parameters, fewer than this
    epochs: int | None = None  # epochs trained, fewer than this


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One network and the way it is trained, in torch's own words.

    net: the network's class; called without arguments, or with those given by `partial`. It maps normalised images
        (N, 1, 28, 28) to logits or log-probabilities (N, 10).
    epochs, batch_size: all training images are seen in each epoch; the last batch may be smaller.
    optimizer: called with the network's parameters, e.g. `partial(torch.optim.SGD, lr=0.01, momentum=0.9)`.
    scheduler: called with the optimizer, e.g. `partial(StepLR, step_size=2, gamma=0.6)`. Its arguments `epochs` and
        `steps_per_epoch` (OneCycleLR), if not given and without a default other than None, are the run's own.
    scheduler_interval: whether the scheduler steps after each "epoch" or each "batch".
    augmentation: maps a batch of training images, float in [0, 1] of shape (N, 1, 28, 28), to another such batch, with
        a draw for each image. A transform of torchvision's is applied image by image. One that needs the labels, such
        as torchvision's MixUp, or a function with an argument named `labels`, maps images and labels (N,) to images and
        labels: (N,) again, or probabilities (N, 10).
    loss: maps logits (N, 10) and labels, as the augmentation gives them, to a scalar that training minimises; the
        cross-entropy if not given. The reported losses are the cross-entropy whatever is minimised.
    objective: in place of `loss`, for what needs the network or the images: maps the network, normalised images
        (N, 1, 28, 28) and labels to the scalar that training minimises and the batch's logits (N, 10). If its argument
        `teacher` is text, it names a trained network, which the objective gets: `runs:/<id>/model`,
        `models:/<name>/<version>`, or a script, for its newest finished run. See mnist_lab.objectives.
    average: maps the network to an average of its weights, e.g.
        `partial(AveragedModel, multi_avg_fn=get_ema_multi_avg_fn(0.998), use_buffers=True)`. It is updated after each
        batch, and is evaluated, judged and logged in place of the network.
    normalize: mean and standard deviation; the network's input is (images - mean) / deviation.
    targets: what the verdict judges.
    reported: figures of an earlier write-up, keyed by what a run measures; shown beside the measured ones.
    """

    net: Callable[..., nn.Module]
    epochs: int
    batch_size: int
    optimizer: Callable[..., Optimizer]
    scheduler: Callable[..., LRScheduler] | None = None
    scheduler_interval: Literal["epoch", "batch"] = "epoch"
    augmentation: Callable[..., Any] | None = None
    loss: Callable[[Tensor, Tensor], Tensor] | None = None
    objective: Callable[..., tuple[Tensor, Tensor]] | None = None
    average: Callable[[nn.Module], AveragedModel] | None = None
    normalize: tuple[float, float] = MNIST_PIXELS
    targets: Targets = Targets()
    reported: Mapping[str, float] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse values that are plainly wrong, by a LabError. What only torch can judge is rehearsed."""
        for name, (allowed, words) in ALLOWED.items():
            value = attrgetter(name)(self)
            try:
                TypeAdapter(allowed).validate_python(value, strict=True)
            except ValidationError:
                raise LabError(f"{name}: {quoted(value)} is not {words}") from None
        for part in PARTS:
            value = getattr(self, part)
            if value is not None or part in ("net", "optimizer"):
                _check_part(part, value)
        if self.loss is not None and self.objective is not None:
            raise LabError(f"objective: {_name(self.objective)} returns the loss; leave out loss={_name(self.loss)}")

    def hyperparameters(self) -> dict[str, object]:
        """Return every declared hyperparameter, flat: `batch_size epochs optimizer lr momentum scheduler ...`.

        A name that two parts use is qualified in the second: `momentum` of the optimizer, `scheduler.momentum`.
        So is a name that has another meaning among a run's params: `net.seed`. What a part holds without `partial` is
        included: the attributes of a transform, the outer variables of a local function.
        """
        usual = ("normalize", MNIST_PIXELS)
        return {name: one.value for name, one in self.flat().items() if (name, one.value) != usual}

    def flat(self) -> dict[str, Declared]:
        """Return the hyperparameters with the part and the argument that each name stands for."""
        flat = {name: Declared(None, name, getattr(self, name)) for name in ("batch_size", "epochs", "normalize")}
        for part in PARTS:
            value = getattr(self, part)
            if part == "loss" and self.objective is None:
                value = F.cross_entropy if value is None else value
            if value is None and part in LISTED_WHERE_DECLARED:
                continue
            if part != "net":
                flat[part] = Declared(None, part, "none" if value is None else _name(value))
            for argument, given in (held(value) | _arguments(part, value)).items():
                taken = argument in flat or argument in NAMES_OF_PARTS or argument in RUN_PARAMS
                flat[f"{part}.{argument}" if taken else argument] = Declared(part, argument, given)
            if part == "scheduler" and value is not None:
                flat["scheduler_interval"] = Declared(None, "scheduler_interval", self.scheduler_interval)
        return flat

    def override(self, changes: Mapping[str, object]) -> tuple[Experiment, dict[str, object]]:
        """Return a copy with hyperparameters replaced, and those changes that differ from the declaration.

        changes: by flat name as in `hyperparameters()`. Text (from the command line) is read as a Python literal.
        Raises LabError if nothing of that name is declared, or the value is of another type than the declared one.
        """
        flat = self.flat()
        fields: dict[str, Any] = {}
        different: dict[str, object] = {}
        for name, given in changes.items():
            _check_settable(name, flat)
            part, argument, declared = flat[name]
            value = _like(name, given, declared)
            if stable_text(value) == stable_text(declared):
                continue
            different[name] = value
            if part is None:
                fields[argument] = value
                continue
            declared_part = getattr(self, part)
            if argument not in _arguments(part, declared_part):
                raise LabError(f"{name}: {_name(declared_part)} was made with it; copy the script and declare it there")
            fields[part] = functools.partial(fields.get(part, declared_part), **{argument: value})
        return dataclasses.replace(self, **fields), different


def _name(part: Callable[..., object]) -> str:
    function = part.func if isinstance(part, functools.partial) else part
    return getattr(function, "__name__", type(part).__name__)


def _arguments(part: str, value: Any) -> dict[str, object]:
    given = value.keywords if isinstance(value, functools.partial) else {}
    return {**defaults(value), **given} if part in PARTS_WITH_DEFAULTS else given


def quoted(value: object) -> str:
    """Return the value as a sentence shows it: its repr on one line, the beginning of a long one."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # an int of thousands of digits has none either
        text = f"a {type(value).__name__}"
    return text if len(text) <= 1_000 else f"{text[:1_000]}..."


def _check_settable(name: str, declared: Collection[str]) -> None:
    if name in NAMES_OF_PARTS:
        raise LabError(f"{name}: can't be set from the command line; copy the script and declare it there")
    if name not in declared:
        settable = [key for key in declared if key not in NAMES_OF_PARTS]
        shown = name if name.isprintable() and len(name) < 100 else quoted(name)
        hint = f" (--{name} is a flag)" if name in RUN_PARAMS else did_you_mean(name, settable)
        raise LabError(f"{shown}: not declared{hint}; declared are {', '.join(settable)}")


def _like(name: str, given: object, declared: object) -> object:
    value = _read(given, type(declared)) if isinstance(given, str) and not isinstance(declared, str) else given
    if isinstance(declared, float):
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
            return float(value)
    elif declared is None or type(value) is type(declared):
        return value
    kind = type(declared).__name__
    wanted = {"int": "a whole number", "float": "a finite number", "bool": "True or False"}.get(kind, f"a {kind}")
    raise LabError(f"{name}: {quoted(given)} is not {wanted} (the declared value is {quoted(declared)})")


def _read(text: str, kind: type) -> object:
    """Return the value that a text from the command line stands for, or the text itself."""
    readers: dict[type, Callable[[str], object]] = {int: whole_number, float: finite_number}
    read: Callable[[str], object] = readers.get(kind, ast.literal_eval)
    try:
        return read(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text


def _check_part(part: str, value: Any) -> None:
    name = _name(value)
    if part == "net" and isinstance(value, nn.Module):
        raise LabError(f"net: give the class, {name}, not {name}(): each run builds a network of its own")
    if isinstance(value, Optimizer | LRScheduler | AveragedModel):
        raise LabError(f"{part}: {type(value).__name__} is built already; give its class, or a partial of it")
    if not callable(value):
        raise LabError(f"{part}: {quoted(value)} can't be called; give a class or function, or a partial of one")
    function = value.func if isinstance(value, functools.partial) else value
    if part in ("augmentation", "loss", "objective") and isinstance(function, type):
        raise LabError(f"{part}: {name} is a class; give an object of it, {name}(...)")
    if part != "net" and name == LAMBDA:
        raise LabError(f"{part}: is a lambda; {NAME_IT}")
    for argument, given in (held(value) | _arguments(part, value)).items():
        if not isinstance(given, str) and LAMBDA in stable_text(given):
            raise LabError(f"{part}: {argument} has a lambda in it; {NAME_IT}")
    if isinstance(value, functools.partial):
        _check_partial(part, value)


def _check_partial(part: str, value: functools.partial[Any]) -> None:
    name, parameters = _name(value), parameters_of(value.func)
    if value.args:
        raise LabError(f"{part}: give the arguments of partial({name}, ...) by keyword")
    takes_any = not parameters or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for argument, given in value.keywords.items():
        if argument not in parameters and not takes_any:
            raise LabError(f"{part}: {unknown_argument(name, [*parameters][1:], argument, quoted(given))}")
        usual = parameters[argument].default if argument in parameters else None
        if isinstance(given, str) and not isinstance(usual, str) and isinstance(_read(given.strip(), float), float):
            raise LabError(f"{part}: {argument}={given!r} is text; write {argument}={given.strip()}")


Number = Annotated[float, Field(allow_inf_nan=False)]
Normalizing = tuple[Annotated[float, Field(ge=-1, le=1)], Annotated[float, Field(gt=0, allow_inf_nan=False)]]
Percent = Annotated[float, Field(gt=1, le=100)]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
FIGURES = f"a dict of numbers, by names among {', '.join(TESTED.summary)}"
A_COUNT = f"an int of at least 1 and at most {MAX_COUNT:,}"

# What is allowed in each field that is no part, and in words. In the order in which they are checked.
ALLOWED: dict[str, tuple[Any, str]] = {
    "epochs": (Count, A_COUNT),
    "batch_size": (Count, A_COUNT),
    "normalize": (Normalizing, "a pair (mean, standard deviation) of pixels in [0, 1], the latter above 0"),
    "scheduler_interval": (Literal["epoch", "batch"], "'epoch' or 'batch'"),
    "targets": (InstanceOf[Targets], "a Targets(accuracy=..., params=..., epochs=...)"),
    "targets.accuracy": (Percent | None, "a percentage above 1 and up to 100, such as 99.4"),
    "targets.params": (Count | None, A_COUNT),
    "targets.epochs": (Count | None, A_COUNT),
    "reported": (Mapping[Literal[TESTED.summary], Number], FIGURES),  # type: ignore[name-defined]
}
