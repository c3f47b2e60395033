"""What a training changes besides parameters, as tensors and plain values that can be kept and put back."""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.optim import Optimizer

PLAIN = (bool, int, float, complex, str, type(None))
INTERNAL = frozenset(vars(nn.Module())) - {"training"}  # what every module has


def plain(state: Any) -> Any:
    """Return a state with Python's numbers for numpy's, which a checkpoint is not read back with."""
    if isinstance(state, np.generic):
        return state.item()
    if type(state) is dict:
        return {name: plain(value) for name, value in state.items()}
    return type(state)(map(plain, state)) if type(state) in (list, tuple) else state


# ---- objects and functions that keep numbers


def holders(*declared: object) -> list[object]:
    """Return what may keep numbers in declared callables: objects, modules and functions.

    Looked through are the arguments of a partial, what a method belongs to, the functions that an object is called by,
    and the callables among its attributes, in lists and dicts too.
    """
    found: dict[int, object] = {}
    seen: dict[int, object] = {}  # a list may hold itself
    todo = list(reversed(declared))
    while todo:
        value = todo.pop()
        if id(value) in seen or isinstance(value, type | types.ModuleType | GraphModule):  # a teacher keeps nothing
            continue
        seen[id(value)] = value
        inner: list[object] = []
        if isinstance(value, functools.partial):
            inner = [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, list | tuple):
            inner = list(value)
        elif isinstance(value, dict):
            inner = list(value.values())
        elif isinstance(value, types.MethodType):
            inner = [value.__func__]
            if hasattr(value.__self__, "__dict__") and not isinstance(value.__self__, type | types.ModuleType):
                found[id(value.__self__)] = value.__self__
                inner += _callables(value.__self__)
        elif callable(value) and hasattr(value, "__dict__"):
            found[id(value)] = value
            inner = _callables(value)
        todo += reversed(inner)
    return list(found.values())


def _callables(holder: object) -> list[object]:
    """Return what an object is called by, unless that is torch's, and the callables that it holds."""
    held = [one for one in vars(holder).values() if callable(one) or isinstance(one, list | tuple | dict)]
    if isinstance(holder, types.FunctionType):
        return held
    called = [getattr(type(holder), name, None) for name in ("__call__", "forward")]
    own = [one for one in called if isinstance(one, types.FunctionType) and not one.__module__.startswith("torch")]
    if isinstance(holder, nn.Module):
        return [*own, *holder.children()]
    return [*own, *held]


def variables(holder: object) -> dict[str, Any]:
    """Return what a holder may set: attributes, a module's own parameters and buffers, a function's outer variables.

    Those of a function are the variables of functions around it, and the globals that it sets.
    """
    if isinstance(holder, nn.Module):
        return {**_attributes(holder), **holder._parameters, **holder._buffers}
    if not isinstance(holder, types.FunctionType):
        return dict(vars(holder))
    outer = {name: cell.cell_contents for name, cell in _cells(holder).items() if cell != types.CellType()}
    return {**vars(holder), **outer, **{name: holder.__globals__.get(name) for name in _stored_globals(holder)}}


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in INTERNAL}


def _cells(function: types.FunctionType) -> dict[str, types.CellType]:
    return dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))


def _stored_globals(function: types.FunctionType) -> set[str]:
    return {one.argval for one in dis.get_instructions(function) if one.opname == "STORE_GLOBAL"}


def set_variable(holder: object, name: str, value: object) -> None:
    """Set one of the holder's `variables`."""
    if isinstance(holder, nn.Module) and name in holder._parameters:
        holder._parameters[name] = value  # type: ignore[assignment]
    elif isinstance(holder, nn.Module) and name in holder._buffers:
        holder._buffers[name] = value  # type: ignore[assignment]
    elif isinstance(holder, types.FunctionType) and name in _cells(holder):
        _cells(holder)[name].cell_contents = value
    elif isinstance(holder, types.FunctionType) and name in _stored_globals(holder):
        holder.__globals__[name] = value
    else:
        vars(holder)[name] = value


@contextmanager
def left_as_they_are(*declared: object) -> Iterator[None]:
    """Give what `holders` finds, afterwards, the variables and tensors that it had before.

    What else is changed in place, such as a list or a generator of random numbers, stays changed.
    """
    before = [(holder, variables(holder)) for holder in holders(*declared)]
    tensors = [value for _, values in before for value in values.values() if isinstance(value, Tensor)]
    copies = [(tensor, tensor.detach().clone()) for tensor in tensors if not tensor.is_inference()]
    try:
        yield
    finally:
        for holder, values in before:
            for name in variables(holder).keys() - values.keys():
                vars(holder).pop(name, None)
            for name, value in values.items():
                set_variable(holder, name, value)
        for tensor, value in copies:
            tensor.data.copy_(value)


def kept(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those values that a checkpoint can be read back with: numbers, texts, and tensors, copied.

    Left out are activations: tensors with a graph, and those of an evaluation.
    """
    numbers = {name: value for name, value in plain(dict(values)).items() if type(value) in PLAIN}
    tensors = {
        name: value.detach().clone()
        for name, value in values.items()
        if isinstance(value, Tensor) and value.is_leaf and value.layout == torch.strided and not value.is_inference()
    }
    return {**numbers, **tensors}


@torch.no_grad()
def put_back(holder: object, values: Mapping[str, Any], device: torch.device) -> None:
    """Set the variables of which `kept` gave these values; a tensor of the same shape stays the one that it is."""
    now = variables(holder)
    numbers = kept({name: value for name, value in now.items() if not isinstance(value, Tensor)})
    for name, value in values.items():
        there = now.get(name)
        if not isinstance(value, Tensor):
            if name not in numbers or numbers[name] != value:  # one that is equal keeps its type
                set_variable(holder, name, value)
        elif isinstance(there, Tensor) and (there.shape, there.dtype) == (value.shape, value.dtype):
            there.copy_(value)
        else:
            set_variable(holder, name, value.to(device))


# ---- networks and optimizers


def network_state(net: nn.Module) -> dict[str, Any]:
    """Return what a network holds: its state_dict, the buffers that this leaves out, and its modules' attributes."""
    state = net.state_dict()
    return {
        "net": state,
        "buffers": {name: buffer for name, buffer in net.named_buffers() if name not in state},
        "attributes": {name: kept(_attributes(module)) for name, module in net.named_modules()},
    }


@torch.no_grad()
def load_network_state(net: nn.Module, state: Mapping[str, Any], device: torch.device) -> None:
    """Put back what `network_state` returned."""
    net.load_state_dict(state["net"])
    for name, value in state.get("buffers", {}).items():  # checkpoints of earlier versions lack them
        module, _, leaf = name.rpartition(".")
        put_back(net.get_submodule(module), {leaf: value}, device)
    for name, values in state.get("attributes", {}).items():
        put_back(net.get_submodule(name), values, device)


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimizer's state, and under "held" that of optimizers that it holds, as SAM does."""
    held = {name: optimizer_state(one) for name, one in held_optimizers(optimizer).items()}
    return {"state": plain(optimizer.state_dict()), "held": held}


def load_optimizer_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Put back what `optimizer_state` returned; groups that optimizers share stay shared, for schedules."""
    if "held" not in state:  # of an earlier version
        state = {"state": state, "held": {}}
    held = held_optimizers(optimizer)
    groups = list(map(id, optimizer.param_groups))
    linked = [one for one in held.values() if list(map(id, one.param_groups)) == groups]
    optimizer.load_state_dict(state["state"])
    for name, one in held.items():
        if name in state["held"]:
            load_optimizer_state(one, state["held"][name])
    for one in linked:
        one.param_groups = optimizer.param_groups


def held_optimizers(optimizer: Optimizer) -> dict[str, Optimizer]:
    """Return the optimizers among an optimizer's attributes, in lists too, by name."""
    held: dict[str, Any] = {}
    for name, value in vars(optimizer).items():
        held |= {f"{name}[{index}]": one for index, one in enumerate(value)} if type(value) is list else {name: value}
    return {name: one for name, one in held.items() if isinstance(one, Optimizer) and one is not optimizer}
