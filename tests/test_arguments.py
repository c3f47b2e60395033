"""Arguments as text, the same in each process, and numbers read from text."""

import enum
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2

from mnist_lab.arguments import MAX_TEXT, held, stable_text
from mnist_lab.commandline import finite_number, whole_number


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
    (1e-08, "1e-08"),
    ("relu", "relu"),
    ((1,), "(1,)"),
    ({"b", "a"}, "{'a', 'b'}"),
    (np.float64(0.1), "0.1"),
    (torch.device("cpu"), "cpu"),
    (F.relu, "relu"),
    (nn.Sequential(nn.LeakyReLU(0.2)), "Sequential(0=LeakyReLU(negative_slope=0.2))"),
    (Rotation(9.0), "Rotation(degrees=9.0, relu=ReLU())"),
    (partial(F.leaky_relu, negative_slope=0.2), "leaky_relu(negative_slope=0.2)"),
    ({"act": [F.relu, nn.ReLU]}, "{'act': [relu, ReLU]}"),
    (warm_up(5), "warm_up.<locals>.factor(epochs=5)"),
    (Schedule(3), "Schedule(warm_up=3)"),
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
    assert held(nn.CrossEntropyLoss(label_smoothing=0.1)) == {"label_smoothing": 0.1}
    assert held(v2.RandomRotation(30)) == {"degrees": [-30.0, 30.0]}
    assert held(warm_up(5)) == {"epochs": 5}
    assert held(Schedule(3).at) == {"warm_up": 3}
    assert held(partial(warm_up, epochs=5)) == {}
    assert held(F.cross_entropy) == held(nn.ReLU) == held(None) == {}


def test_a_number_is_read_and_nothing_else() -> None:
    assert [whole_number(text) for text in ("3", "+3", "-3", "003")] == [3, 3, -3, 3]
    assert [finite_number(text) for text in ("3", "-.5", "5e-2", "2.")] == [3, -0.5, 0.05, 2]
    wrong = ["", "٣", "1_0", " 3", "3\n", "0x10", "two", "nan", "1e999", "."]
    for read, text in [*itertools.product((whole_number, finite_number), wrong), (whole_number, "3.0")]:
        with pytest.raises(ValueError, match="is not a"):
            read(text)
