"""Declarations: how arguments read as text, what is refused, hyperparameters, and how they are overridden."""

import enum
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial, wraps

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, StepLR
from torchvision.transforms import RandomRotation

import networks
from mnist_lab import Targets
from mnist_lab.arguments import MAX_TEXT, held, stable_text
from mnist_lab.augmentation import random_rotation
from mnist_lab.commandline import finite_number, whole_number
from mnist_lab.errors import LabError
from mnist_lab.experiment import quoted


class Net(nn.Sequential):
    def __init__(self, dropout: float = 0.1, width: int = 4, bias: bool = False, name: str = "plain") -> None:
        super().__init__(nn.Flatten(), nn.Dropout(dropout), nn.Linear(784, 10))


def crop_and_rotate(images: Tensor, size: int = 22, p: float = 0.1, degrees: float = 15.0) -> Tensor:
    return images


declare = partial(
    networks.declare,
    net=Net,
    epochs=14,
    optimizer=partial(SGD, lr=0.1, momentum=0.9),
    scheduler=partial(StepLR, step_size=2, gamma=0.6),
    augmentation=partial(random_rotation, degrees=7.0),
)


# ---- fields and check()


def named_factor(epoch: int) -> float:
    return 1.0


def factor_of(change: Callable[[int], float]) -> Callable[[int], float]:
    def factor(epoch: int) -> float:
        return change(epoch)

    return factor


class Transform:
    def __init__(self, change: object) -> None:
        self.change = change

    def __call__(self, images: Tensor) -> Tensor:
        return images


class NetOf(Net):
    def __init__(self, act: object = F.relu, mean: Tensor | None = None) -> None:
        super().__init__()


ALLOWED: list[dict[str, object]] = [
    {},
    {"scheduler": None, "augmentation": None},
    {"optimizer": Adam, "loss": nn.NLLLoss(), "net": lambda: Net(), "scheduler_interval": "batch"},
    {"targets": Targets(accuracy=100, params=1, epochs=1), "reported": {"best_epoch": 11, "final_test_loss": 0.0204}},
    {"scheduler": partial(LambdaLR, lr_lambda=[named_factor]), "net": partial(NetOf, act=F.gelu)},
    {"scheduler": partial(LambdaLR, lr_lambda=factor_of(named_factor)), "augmentation": Transform("<lambda>")},
    {"net": partial(Net, name="7")},
]


@pytest.mark.parametrize("changes", ALLOWED)
def test_what_scripts_declare_passes(changes: dict[str, object]) -> None:
    declare(**changes).check()


COUNTS = [0, 1.0, True, "14", 10**10]
# What is refused, by the field that the sentence names, and what else stands in it.
REFUSED: list[tuple[str, object, str]] = [
    *((field, value, repr(value)) for field in ("epochs", "batch_size") for value in [*COUNTS, None]),
    *((f"targets.{limit}", value, repr(value)) for limit in ("params", "epochs") for value in COUNTS),
    *(("targets.accuracy", value, repr(value)) for value in (0, 100.1, float("nan"), "99.4")),
    ("targets.accuracy", 0.994, "99.4"),
    *(("targets", value, repr(value)) for value in (None, 99.4)),
    *(("scheduler_interval", value, repr(value)) for value in ("step", None)),
    *(("normalize", value, repr(value)) for value in (0.5, (33.3, 78.6), (0.5, 0), ("0.1", 0.3), [0.1, 0.3])),
    *(("reported", value, repr(value)) for value in (None, 99.46, ["best_test_accuracy"])),
    ("reported", {"best_accuracy": 99.46}, "best_test_accuracy"),
    *(("reported", {"best_test_accuracy": value}, repr(value)) for value in ("99.46", float("nan"))),
    *(("net", value, repr(value)) for value in (None, "Net")),
    ("net", Net(), "class"),
    *(("optimizer", value, quoted(value)) for value in (None, 0.1)),
    ("optimizer", SGD([nn.Parameter(torch.zeros(1))], lr=0.1), "optimizer: SGD is built already"),
    *(("scheduler", "StepLR", "'StepLR'"), ("augmentation", 7, "7"), ("loss", "cross_entropy", "'cross_entropy'")),
    ("loss", nn.CrossEntropyLoss, "CrossEntropyLoss(...)"),
    ("augmentation", partial(RandomRotation, degrees=7), "RandomRotation(...)"),
    *(("net", partial(Net, 0.2), "Net"), ("optimizer", partial(SGD, [], lr=0.1), "SGD")),
    ("scheduler", partial(LambdaLR, lr_lambda=[named_factor, lambda epoch: 1.0]), "lr_lambda"),
    ("scheduler", partial(LambdaLR, lr_lambda=factor_of(lambda epoch: 1.0)), "lr_lambda"),
    ("optimizer", lambda parameters: SGD(parameters, lr=0.1), "lambda"),
    ("net", partial(NetOf, act={"first": partial(lambda x, y: x, y=1)}), "act"),
    ("optimizer", partial(SGD, lr="0.1"), "lr=0.1"),
    ("scheduler", partial(StepLR, step_size=2, gamma="6e-1"), "gamma=6e-1"),
    ("optimizer", partial(SGD, lr=0.1, momentun=0.9), "'momentum'"),
    ("optimizer", partial(SGD, learning_rate=0.01), "learning_rate=0.01"),
    ("net", partial(Net, widht=8), "'width'"),
]


@pytest.mark.parametrize(
    ("field", "value", "named"), REFUSED, ids=[f"{field}-{named}"[:40] for field, _, named in REFUSED]
)
def test_a_declaration_that_cannot_be_right_is_refused_by_its_field(field: str, value: object, named: str) -> None:
    part, _, limit = field.partition(".")
    with pytest.raises(LabError) as refusal:
        declare(**{part: Targets(**{limit: value}) if limit else value}).check()  # type: ignore[arg-type]

    assert refusal.value.field == field
    assert named in str(refusal.value)
    assert "\n" not in str(refusal.value)


# ---- hyperparameters()


def test_hyperparameters_are_flat_and_in_torchs_words() -> None:
    assert declare().hyperparameters() == {
        **{"batch_size": 128, "epochs": 14, "optimizer": "SGD", "lr": 0.1, "momentum": 0.9, "loss": "cross_entropy"},
        **{"scheduler": "StepLR", "step_size": 2, "gamma": 0.6, "scheduler_interval": "epoch", "dropout": 0.1},
        **{"width": 4, "bias": False, "name": "plain", "augmentation": "random_rotation", "degrees": 7.0},
    }


def test_what_a_part_holds_and_its_own_defaults_are_declared() -> None:
    for changes, declared in [
        ({"augmentation": crop_and_rotate}, {"size": 22, "p": 0.1, "degrees": 15.0}),
        ({"augmentation": RandomRotation(30)}, {"augmentation": "RandomRotation", "degrees": [-30.0, 30.0]}),
        ({"loss": nn.CrossEntropyLoss(label_smoothing=0.1)}, {"loss": "CrossEntropyLoss", "label_smoothing": 0.1}),
    ]:
        assert declared.items() <= declare(**changes).hyperparameters().items()


class NetWithMomentum(Net):
    def __init__(self, momentum: float = 0.5, epochs: int = 3, augmentation: bool = True, seed: int = 7) -> None:
        super().__init__()
        self.momentum = momentum


def test_a_name_that_two_parts_or_the_run_use_is_qualified_in_the_second() -> None:
    flat = declare(net=NetWithMomentum, scheduler=partial(OneCycleLR, max_lr=0.2, epochs=5)).hyperparameters()

    assert (flat["momentum"], flat["net.momentum"]) == (0.9, 0.5)
    assert (flat["epochs"], flat["scheduler.epochs"], flat["net.epochs"]) == (14, 5, 3)
    assert (flat["augmentation"], flat["net.augmentation"], flat["net.seed"]) == ("random_rotation", True, 7)
    assert "seed" not in flat


# ---- override()


def test_a_value_is_read_in_the_declared_values_type_and_one_equal_to_it_is_no_override() -> None:
    for name, given, value in [
        *(("epochs", 2, 2), ("epochs", "2", 2), ("lr", "5e-2", 0.05), ("lr", 1, 1.0), ("dropout", "0", 0.0)),
        *(("bias", "True", True), ("name", "7", "7"), ("degrees", "-1.5", -1.5)),
    ]:
        changed, overrides = declare().override({name: given})
        assert overrides == {name: value}
        assert type(overrides[name]) is type(value)
        assert changed.hyperparameters() == declare().hyperparameters() | {name: value}

    changed, overrides = declare().override({"lr": "0.10", "epochs": "14", "dropout": 0.1, "name": "plain"})
    assert (overrides, changed.hyperparameters()) == ({}, declare().hyperparameters())


def test_overrides_reach_what_is_built() -> None:
    changed, overrides = declare().override({"lr": "0.05", "momentum": 0, "dropout": 0.5, "gamma": 0.1, "degrees": 0})

    net = changed.net()
    optimizer = changed.optimizer(net.parameters())
    scheduler = changed.scheduler(optimizer)
    assert net[1].p == 0.5
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (0.05, 0.0)
    assert (scheduler.step_size, scheduler.gamma) == (2, 0.1)
    images = torch.rand(4, 1, 28, 28)
    torch.testing.assert_close(changed.augmentation(images), images, rtol=0, atol=1e-5)
    assert list(overrides) == ["lr", "momentum", "dropout", "gamma", "degrees"]


def test_a_qualified_name_changes_its_own_part_only() -> None:
    changed, overrides = declare(net=NetWithMomentum).override({"net.momentum": "0.7", "epochs": 2, "net.epochs": 4})
    assert overrides == {"net.momentum": 0.7, "epochs": 2, "net.epochs": 4}
    assert (changed.net().momentum, changed.optimizer.keywords["momentum"]) == (0.7, 0.9)
    assert (changed.epochs, changed.hyperparameters()["net.epochs"]) == (2, 4)


def refusal_of(name: str, given: object, **changes: object) -> str:
    with pytest.raises(LabError) as refusal:
        declare(**changes).override({name: given})
    assert refusal.value.field == name
    return str(refusal.value)


def test_what_cannot_be_overridden_is_refused_by_its_name() -> None:
    for name, values in {
        "epochs": ["2.5", 2.0, True, "two", "٣", "1_0"],
        "lr": ["fast", "nan", "1e999", "True", "{[]: 1}", "٣"],
        "bias": ["1", "yes"],
        "name": [7],
    }.items():
        for given in values:
            sentence = refusal_of(name, given)
            assert quoted(given) in sentence
            assert quoted(declare().hyperparameters()[name]) in sentence
    for part in ("optimizer", "loss"):
        refusal_of(part, "Adam")
    refusal_of("degrees", "[0, 1]", augmentation=RandomRotation(30))
    for name, meant in [("droput", "did you mean 'dropout'?"), ("learning_rate", ""), ("optimizer.lr", "")]:
        sentence = refusal_of(name, 1)
        assert "batch_size, epochs, normalize, lr, momentum, step_size, gamma, dropout" in sentence
        assert meant in sentence
    assert "did you mean 'step_size'?" in refusal_of("scheduler.step_size", 1)


# ---- arguments as text


class Schedule:
    def __init__(self, warm_up: int = 2) -> None:
        self.warm_up = warm_up

    def at(self, epoch: int) -> float:
        return min(1.0, epoch / self.warm_up)


class Rotation(nn.Module):
    def __init__(self, degrees: float = 7.0) -> None:
        super().__init__()
        self.degrees = degrees
        self.relu = nn.ReLU()


@dataclass
class Settings:
    activation: Callable[..., object] = F.relu
    layers: list[type] = field(default_factory=lambda: [nn.ReLU])


class Mode(enum.Enum):
    FAST = 1


def warm_up(epochs: int) -> Callable[[int], float]:
    def factor(epoch: int) -> float:
        return min(1.0, epoch / epochs)

    return factor


IN_ITSELF: list[object] = [1]
IN_ITSELF.append(IN_ITSELF)
TEXTS = [
    *((1e-08, "1e-08"), ("relu", "relu"), ((1,), "(1,)"), ({"b", "a"}, "{'a', 'b'}"), (np.float64(0.1), "0.1")),
    *((torch.device("cpu"), "cpu"), (F.relu, "relu")),
    (nn.Sequential(nn.LeakyReLU(0.2)), "Sequential(0=LeakyReLU(negative_slope=0.2))"),
    (Rotation(9.0), "Rotation(degrees=9.0, relu=ReLU())"),
    (partial(F.leaky_relu, negative_slope=0.2), "leaky_relu(negative_slope=0.2)"),
    ({"act": [F.relu, nn.ReLU]}, "{'act': [relu, ReLU]}"),
    (warm_up(5), "warm_up.<locals>.factor(epochs=5)"),
    (10**5000, "int"),
    (Schedule(3).at, "Schedule(warm_up=3).at"),
    (Settings(), "Settings(activation=relu, layers=[ReLU])"),
    (Mode.FAST, "Mode.FAST"),
    (IN_ITSELF, "[1, ...]"),
    (object(), "object()"),
]


@pytest.mark.parametrize(("value", "text"), TEXTS, ids=[text for _, text in TEXTS])
def test_the_text_says_what_an_argument_is(value: object, text: str) -> None:
    assert stable_text(value) == text


class ShowsItsNumber:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __repr__(self) -> str:
        return f"Scale number {id(self)} <{id(self):#x}>"


MADE: dict[str, Callable[[int], object]] = {
    "a tensor": lambda number: torch.full((3,), number),
    "an array": lambda number: np.full(3, number),
    "a buffer": lambda number: nn.CrossEntropyLoss(weight=torch.full((10,), float(number))),
    "a long list": lambda number: [*range(9000), number],
    "a number of its own": ShowsItsNumber,
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_a_text_is_that_of_what_an_argument_holds_and_no_other(make: Callable[[int], object]) -> None:
    first, same, other = (stable_text(make(number)) for number in (1, 1, 2))

    assert first == same != other
    assert len(first) <= MAX_TEXT


def test_what_a_part_holds_is_what_its_class_does_not_give_by_default() -> None:
    assert held(nn.CrossEntropyLoss()) == {}

    assert held(warm_up(5)) == {"epochs": 5}
    assert held(Schedule(3).at) == {"warm_up": 3}
    assert held(partial(warm_up, epochs=5)) == held(wraps(nn.ReLU)(lambda: 0)) == {}
    assert held(F.cross_entropy) == held(nn.ReLU) == held(None) == {}


def test_a_number_is_read_and_nothing_else() -> None:
    assert [whole_number(text) for text in ("3", "+3", "-3", "003")] == [3, 3, -3, 3]
    assert [finite_number(text) for text in ("3", "-.5", "5e-2", "2.")] == [3, -0.5, 0.05, 2]
    wrong = ["", "٣", "1_0", " 3", "3\n", "0x10", "two", "nan", "1e999", "."]
    for read, text in [*itertools.product((whole_number, finite_number), wrong), (whole_number, "3.0")]:
        with pytest.raises(ValueError, match="is not a"):
            read(text)
