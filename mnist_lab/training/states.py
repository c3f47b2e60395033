"""A run's state besides its network: the random generators, and the state of loss, objective and augmentation.

Each run has copies of these parts, and keeps their `state_dict`.
"""

import copy
import dataclasses
import functools
import random
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from mnist_lab.errors import LabError
from mnist_lab.experiment import Experiment

PARTS = ("loss", "objective", "augmentation", "average")  # besides the network, what may count its batches


def plain(state: Any) -> Any:
    """Return a state with Python's numbers for numpy's, which a checkpoint is not read back with."""
    if isinstance(state, np.generic):
        return state.item()
    if type(state) is dict:
        return {name: plain(value) for name, value in state.items()}
    return type(state)(map(plain, state)) if type(state) in (list, tuple) else state


def own_parts(experiment: Experiment) -> Experiment:
    """Return the experiment with copies of its declared parts, for one run to change."""
    memo: dict[int, Any] = {}  # what two parts share, their copies share too
    copies = {}
    for name in ("net", "optimizer", "scheduler", *PARTS):
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
    for one, state in zip(_stateful(experiment), states, strict=False):
        one.load_state_dict(state)


def _stateful(experiment: Experiment) -> list[Any]:
    objects = [one for name in PARTS for one in objects_in(getattr(experiment, name))]
    return [one for one in objects if hasattr(one, "state_dict") and hasattr(one, "load_state_dict")]


# ---- random numbers: Python's, numpy's and torch's generators, which a run draws from unless its script makes its own


def seed_generators(seed: int) -> None:
    """Seed Python's `random`, numpy's global generator, and torch's on every device; seed: from 0 to 2**32 - 1."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  the global one is what others draw from
    torch.manual_seed(seed)


def drawn_unseeded() -> bool:
    """Say whether numbers were drawn from torch's generator before anything seeded it."""
    seed = torch.initial_seed()  # torch begins with 64 random bits; a smaller number is taken for somebody's own
    return seed >= 2**32 and not torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(seed).get_state())


def generator_states(device: torch.device) -> dict[str, Any]:
    """Return the generators' states as tensors and plain values; of torch's, the CPU's and the device's."""
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (str(name), torch.tensor(keys.tolist(), device="cpu"), *rest),  # type: ignore[union-attr]
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "mps": torch.mps.get_rng_state() if device.type == "mps" else None,
    }


def set_generator_states(states: Mapping[str, Any], device: torch.device) -> None:
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["cpu"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"], device)
    if states["mps"] is not None:
        torch.mps.set_rng_state(states["mps"])


@contextmanager
def kept_generators(device: torch.device) -> Iterator[None]:
    """Leave the generators as they were, whatever is drawn within this context."""
    states = generator_states(device)
    try:
        yield
    finally:
        set_generator_states(states, device)
