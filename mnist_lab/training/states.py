"""What a training changes besides parameters, as tensors and plain values that can be kept and put back."""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.optim import Optimizer

PLAIN = (bool, int, float, complex, str, type(None))


def plain(state: Any) -> Any:
    """Return a state with Python's numbers for numpy's, which a checkpoint is not read back with."""
    if isinstance(state, np.generic):
        return state.item()
    if type(state) is dict:
        return {name: plain(value) for name, value in state.items()}
    return type(state)(map(plain, state)) if type(state) in (list, tuple) else state


def plain_attributes(holder: object) -> dict[str, Any]:
    """Return the numbers and texts that a module or other object keeps itself, such as a counter of batches."""
    return {name: value for name, value in vars(holder).items() if isinstance(value, PLAIN)}


def kept_attributes(holder: object) -> dict[str, Any]:
    """Return what an object keeps itself and a checkpoint can be read back with: numbers, texts, and tensors.

    Left out are activations: tensors with a graph, and those of an evaluation.
    """
    numbers = {name: value for name, value in plain(plain_attributes(holder)).items() if type(value) in PLAIN}
    tensors = {name: value for name, value in vars(holder).items() if type(value) is Tensor}
    return numbers | {
        name: value for name, value in tensors.items() if not (value.requires_grad or value.is_inference())
    }


def put_back(holder: object, kept: Mapping[str, Any], device: torch.device) -> None:
    """Set the attributes that `kept_attributes` returned; those that are equal already keep their types."""
    now = kept_attributes(holder)
    for name, value in kept.items():
        if isinstance(value, Tensor):
            vars(holder)[name] = value.to(device)
        elif name not in now or isinstance(now[name], Tensor) or now[name] != value:
            vars(holder)[name] = value


def holders(*declared: object) -> list[object]:
    """Return the objects in declared callables that may keep numbers: functions, objects that are called, modules.

    Looked through are the arguments of a partial, what a method belongs to, and the callables among an object's
    attributes, in lists and dicts too.
    """
    found: dict[int, object] = {}
    todo = list(reversed(declared))
    while todo:
        value = todo.pop()
        if id(value) in found or isinstance(value, type | types.ModuleType):
            continue
        inner: list[object] = []
        if isinstance(value, functools.partial):
            inner = [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, types.MethodType):
            inner = [value.__self__]
        elif isinstance(value, list | tuple):
            inner = list(value)
        elif isinstance(value, dict):
            inner = list(value.values())
        elif isinstance(value, nn.Module):
            if not isinstance(value, GraphModule):  # as a teacher is: it keeps nothing
                found[id(value)] = value
                inner = list(value.children())
        elif callable(value) and hasattr(value, "__dict__"):
            found[id(value)] = value
            inner = [item for item in vars(value).values() if callable(item) or isinstance(item, list | tuple | dict)]
        todo += reversed(inner)
    return list(found.values())


def outer_variables(function: types.FunctionType) -> dict[str, object]:
    """Return what a function has from outside and may set: variables of an outer function, and globals that it sets."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    found = {name: cell.cell_contents for name, cell in cells if cell != types.CellType()}
    stored = {one.argval for one in dis.get_instructions(function) if one.opname == "STORE_GLOBAL"}
    return found | {name: function.__globals__.get(name) for name in stored}


def network_state(net: nn.Module) -> dict[str, Any]:
    """Return what a network holds: its state_dict, the buffers that this leaves out, and its modules' attributes."""
    state = net.state_dict()
    return {
        "net": state,
        "buffers": {name: buffer for name, buffer in net.named_buffers() if name not in state},
        "attributes": {name: kept_attributes(module) for name, module in net.named_modules()},
    }


def load_network_state(net: nn.Module, state: Mapping[str, Any], device: torch.device) -> None:
    """Put back what `network_state` returned."""
    net.load_state_dict(state["net"])
    buffers = dict(net.named_buffers())
    for name, value in state.get("buffers", {}).items():  # checkpoints of earlier versions lack them
        buffers[name].data = value.to(device)
    for name, kept in state.get("attributes", {}).items():
        put_back(net.get_submodule(name), kept, device)


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimizer's state, and under "held" that of optimizers that it holds, as SAM does."""
    held = {name: optimizer_state(one) for name, one in held_optimizers(optimizer).items()}
    return {"state": plain(optimizer.state_dict()), "held": held}


def load_optimizer_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Put back what `optimizer_state` returned; groups that optimizers share stay shared, for schedules."""
    if "held" not in state:  # of an earlier version
        state = {"state": state, "held": {}}
    held = held_optimizers(optimizer)
    linked = [one for one in held.values() if one.param_groups is optimizer.param_groups]
    optimizer.load_state_dict(state["state"])
    for name, one in held.items():
        if name in state["held"]:
            load_optimizer_state(one, state["held"][name])
    for one in linked:
        one.param_groups = optimizer.param_groups


def held_optimizers(optimizer: Optimizer) -> dict[str, Optimizer]:
    """Return the optimizers among an optimizer's attributes, by name."""
    own = vars(optimizer).items()
    return {name: one for name, one in own if isinstance(one, Optimizer) and one is not optimizer}
