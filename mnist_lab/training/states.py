"""What the declared parts change while they train: each run has copies of them, and keeps their `state_dict`."""

from __future__ import annotations

import copy
import dataclasses
import functools
import types
from collections.abc import Iterator
from typing import Any

import numpy as np

from mnist_lab.errors import LabError
from mnist_lab.experiment import Experiment

PARTS = ("loss", "objective", "augmentation")  # of an experiment, besides the network, that may count their batches


def plain(state: Any) -> Any:
    """Return a state with Python's numbers for numpy's, which a checkpoint is not read back with."""
    if isinstance(state, np.generic):
        return state.item()
    if type(state) is dict:
        return {name: plain(value) for name, value in state.items()}
    return type(state)(map(plain, state)) if type(state) in (list, tuple) else state


def own_parts(experiment: Experiment) -> Experiment:
    """Return the experiment with copies of its loss, objective and augmentation, for one run to change.

    Raises:
        LabError: if one of them can't be copied.
    """
    memo: dict[int, Any] = {}  # what two parts share, their copies share too
    copies = {}
    for name in PARTS:
        try:
            copies[name] = copy.deepcopy(getattr(experiment, name), memo)
        except Exception as error:
            raise LabError(f"{name}: each run works on a copy of it, and it can't be copied: {error}") from error
    return dataclasses.replace(experiment, **copies)


def objects_in(part: object) -> Iterator[object]:
    """Yield the objects in a declared callable: itself, a partial's arguments, and what a method belongs to."""
    if isinstance(part, functools.partial):
        for one in (part.func, *part.args, *part.keywords.values()):
            yield from objects_in(one)
    elif isinstance(part, types.MethodType):
        yield from objects_in(part.__self__)
    elif hasattr(part, "__dict__") and not isinstance(part, type | types.FunctionType | types.ModuleType):
        yield part


def parts_state(experiment: Experiment) -> list[dict[str, Any]]:
    """Return the states of the objects that follow torch's protocol: `state_dict` and `load_state_dict`."""
    return [plain(one.state_dict()) for one in _stateful(experiment)]


def load_parts_state(experiment: Experiment, states: list[dict[str, Any]]) -> None:
    """Put back what `parts_state` returned."""
    for one, state in zip(_stateful(experiment), states, strict=False):
        one.load_state_dict(state)


def _stateful(experiment: Experiment) -> Iterator[Any]:
    for name in PARTS:
        for one in objects_in(getattr(experiment, name)):
            if hasattr(one, "state_dict") and hasattr(one, "load_state_dict"):
                yield one
