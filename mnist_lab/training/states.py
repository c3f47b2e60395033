"""What a training changes besides parameters, as tensors and plain values that a checkpoint can keep."""

from __future__ import annotations

import copy
import dataclasses
import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mnist_lab.errors import LabError
from mnist_lab.experiment import Experiment

PARTS = ("loss", "objective", "augmentation")  # of an experiment, besides the network, that may count their batches
PLAIN = (bool, int, float, complex, str, type(None))
INTERNAL = frozenset(vars(nn.Module())) - {"training"}  # attributes that every module has


def plain(state: Any) -> Any:
    """Return a state with Python's numbers for numpy's, which a checkpoint is not read back with."""
    if isinstance(state, np.generic):
        return state.item()
    if type(state) is dict:
        return {name: plain(value) for name, value in state.items()}
    return type(state)(map(plain, state)) if type(state) in (list, tuple) else state


# ---- loss, objective and augmentation


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
    return [
        module_state(one) if isinstance(one, nn.Module) else plain(one.state_dict()) for one in _stateful(experiment)
    ]


def load_parts_state(experiment: Experiment, states: list[dict[str, Any]], device: torch.device) -> None:
    """Put back what `parts_state` returned."""
    for one, state in zip(_stateful(experiment), states, strict=False):
        if isinstance(one, nn.Module):
            load_module_state(one, state, device)
        else:
            one.load_state_dict(state)


def _stateful(experiment: Experiment) -> Iterator[Any]:
    for name in PARTS:
        for one in objects_in(getattr(experiment, name)):
            if hasattr(one, "state_dict") and hasattr(one, "load_state_dict"):
                yield one


# ---- modules


def module_state(module: nn.Module) -> dict[str, Any]:
    """Return a module's state_dict, the buffers that this leaves out, and numbers, texts and tensors in attributes."""
    state = module.state_dict()
    return {
        "net": state,
        "buffers": {name: buffer for name, buffer in module.named_buffers() if name not in state},
        "attributes": {name: _attributes(one) for name, one in module.named_modules()},
    }


@torch.no_grad()
def load_module_state(module: nn.Module, state: Mapping[str, Any], device: torch.device) -> None:
    """Put back what `module_state` returned."""
    module.load_state_dict(state["net"])
    for name, value in state["buffers"].items():
        owner, _, buffer = name.rpartition(".")
        _put(module.get_submodule(owner), buffer, value, device)
    for name, values in state["attributes"].items():
        for attribute, value in values.items():
            _put(module.get_submodule(name), attribute, value, device)


def _put(module: nn.Module, name: str, value: object, device: torch.device) -> None:
    """Set an attribute; a tensor of the same shape stays the one that it is, and an equal number keeps its type."""
    now = getattr(module, name, None)
    if isinstance(value, Tensor):
        if isinstance(now, Tensor) and (now.shape, now.dtype) == (value.shape, value.dtype):
            now.copy_(value)
        else:
            setattr(module, name, value.to(device))
    elif isinstance(now, Tensor) or now != value:
        setattr(module, name, value)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes that a checkpoint can be read back with, without activations: tensors with a graph."""
    own = {name: plain(value) for name, value in vars(module).items() if name not in INTERNAL}
    return {
        name: value.detach().clone() if isinstance(value, Tensor) else value
        for name, value in own.items()
        if type(value) in PLAIN or (isinstance(value, Tensor) and value.is_leaf and value.layout == torch.strided)
    }


# ---- optimizers


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimizer's state, and under "held" that of optimizers that it holds, as SAM does."""
    held = {name: optimizer_state(one) for name, one in held_optimizers(optimizer).items()}
    return {"state": plain(optimizer.state_dict()), "held": held}


def load_optimizer_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Put back what `optimizer_state` returned; groups that optimizers share stay shared, for schedules."""
    held = held_optimizers(optimizer)
    groups = list(map(id, optimizer.param_groups))
    linked = [one for one in held.values() if list(map(id, one.param_groups)) == groups]
    optimizer.load_state_dict(state["state"])
    for name, one in held.items():
        load_optimizer_state(one, state["held"][name])
    for one in linked:
        one.param_groups = optimizer.param_groups


def held_optimizers(optimizer: Optimizer) -> dict[str, Optimizer]:
    """Return the optimizers among an optimizer's attributes, in lists too, by name."""
    held: dict[str, Any] = {}
    for name, value in vars(optimizer).items():
        held |= {f"{name}[{index}]": one for index, one in enumerate(value)} if type(value) is list else {name: value}
    return {name: one for name, one in held.items() if isinstance(one, Optimizer) and one is not optimizer}
