"""The arguments that a script declares, as text that is the same in each process."""

from __future__ import annotations

import enum
import functools
import hashlib
import inspect
import logging
import re
import types
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,}")
LAMBDA = "<lambda>"
DIGEST_LENGTH = 12
MAX_TEXT = 6_000  # characters, the most that MLflow keeps of a param
MAX_BITS = 10_000  # of a whole number; Python writes none of many more digits
MAX_BEGINNING = 1_000  # of a longer text
INTERNAL = frozenset(vars(nn.Module()))  # what every module has: its mode, parameters, hooks


def stable_text(value: object) -> str:
    """Return an argument as text that says what it is, and is the same in each process.

    A function or class is its name; an object that would show its address is its class's name and what it holds; a
    tensor or array is its shape, its type and a digest of its values. A digest replaces the end of a long text.
    """
    text = value if type(value) is str else _text(value, ())
    if len(text) <= MAX_TEXT:
        return text
    return f"{text[:MAX_BEGINNING]}... sha256={_sha256(text.encode('utf-8', 'surrogatepass'))}"


def _text(value: object, outer: tuple[int, ...]) -> str:
    """Return the text of a value inside others, whose ids are `outer`."""
    if id(value) in outer:
        return "..."
    text = functools.partial(_text, outer=(*outer, id(value)))
    if isinstance(value, enum.Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        return hex(value)
    if isinstance(value, np.generic):
        return repr(value.item())
    if isinstance(value, Tensor):
        return _digest(value.detach().resolve_conj().to_dense(), "Tensor") if not value.is_meta else _plain(value)
    if isinstance(value, np.ndarray):
        return text(value.tolist()) if value.dtype.hasobject else _digest(value, "ndarray")
    if isinstance(value, functools.partial):
        return _call(text(value.func), [*map(text, value.args), *_pairs(value.keywords, text)])
    if isinstance(value, types.ModuleType):
        return value.__name__
    if isinstance(value, logging.Logger):  # which holds all others
        return f"Logger({value.name!r})"
    if callable(value) and isinstance(getattr(value, "__qualname__", None), str):
        return _callable(value, text)
    if isinstance(value, nn.Module) and type(value).__repr__ is nn.Module.__repr__:
        return _module(value, text)
    return _container(value, text) or _object(value, text)


def _callable(value: Any, text: Callable[[object], str]) -> str:
    """Return the name of a function, class or method, with what a local function has from outside."""
    owner = getattr(value, "__self__", None)
    if isinstance(owner, types.ModuleType | type) or owner is None:
        name = value.__name__ if isinstance(value, types.BuiltinFunctionType) else value.__qualname__
        return _call(name, _pairs(held(value, text), text)) if held(value, text) else str(name)
    return f"{text(owner)}.{value.__name__}"


def _module(value: nn.Module, text: Callable[[object], str]) -> str:
    """Return a module's class, its own settings and its children, but not its weights: they are drawn anew."""
    name, settings = type(value).__qualname__, _plain(value.extra_repr())
    if type(value).extra_repr is nn.Module.extra_repr or ADDRESS.search(settings):
        return _call(name, _pairs(held(value, text), text))
    return _call(name, [*([settings] if settings else []), *_pairs(dict(value.named_children()), text)])


def _container(value: object, text: Callable[[object], str]) -> str:
    """Return a container with its elements in order, a set's sorted; nothing for what is no container."""
    name = type(value).__qualname__
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return _call(name, _pairs(dict(zip(value._fields, value, strict=True)), text))
    if type(value) is tuple:
        return f"({', '.join(map(text, value))}{',' if len(value) == 1 else ''})"
    if type(value) is list:
        return f"[{', '.join(map(text, value))}]"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(text, value)))}}}" if value else f"{name}()"
    if isinstance(value, Mapping):
        shown = f"{{{', '.join(f'{text(key)}: {text(item)}' for key, item in value.items())}}}"
        return shown if type(value) is dict else f"{name}({shown})"
    return ""


def _object(value: object, text: Callable[[object], str]) -> str:
    """Return an object's own text, or where that has an address or hides functions, its class and what it holds."""
    if type(value) is str:
        return repr(value)
    name, shown = type(value).__qualname__, _plain(value)
    dataclass = hasattr(type(value), "__dataclass_fields__")
    if not (dataclass or ADDRESS.search(shown) or str(id(value)) in shown or _has_functions(value)):
        return shown
    holds = _pairs(_own(value), text)
    if not holds and isinstance(value, Collection):
        holds = list(map(text, value))
    return _call(name, holds)


def _plain(value: object) -> str:
    try:
        return " ".join(str(value).split())
    except Exception:  # the script's own __repr__ fails
        return type(value).__qualname__


def _digest(value: Tensor | np.ndarray[Any, Any], name: str) -> str:
    dtype = str(value.dtype).removeprefix("torch.")
    if value.ndim == 0:
        return f"{name}({value.item()!r}, dtype={dtype})"
    data = value.cpu().contiguous().flatten().view(torch.uint8).numpy() if isinstance(value, Tensor) else value
    return f"{name}(shape={tuple(value.shape)}, dtype={dtype}, sha256={_sha256(data.tobytes())})"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:DIGEST_LENGTH]


def _call(name: str, arguments: list[str]) -> str:
    return f"{name}({', '.join(arguments)})"


def _pairs(arguments: Mapping[str, object], text: Callable[[object], str]) -> list[str]:
    return [f"{name}={text(argument)}" for name, argument in arguments.items()]


def _state(value: object) -> dict[str, object]:
    """Return an object's attributes, those in slots too."""
    try:
        state = object.__getstate__(value)
    except TypeError:  # an object made in C
        return {}
    parts = state if isinstance(state, tuple) else (state,)
    return {name: item for part in parts if isinstance(part, dict) for name, item in part.items()}


def _own(value: object) -> dict[str, object]:
    """Return an object's attributes without what every module has, and a module's children and buffers."""
    own = {name: item for name, item in _state(value).items() if name not in INTERNAL}
    if isinstance(value, nn.Module):
        own |= {name: item for name, item in {**value._modules, **value._buffers}.items() if item is not None}
    return own


def _has_functions(value: object, outer: tuple[int, ...] = ()) -> bool:
    """Say whether there are functions among what a value holds, or among what that holds in turn."""
    if isinstance(value, types.FunctionType | types.MethodType | functools.partial):
        return True
    if id(value) in outer or isinstance(value, type | types.ModuleType | logging.Logger | Tensor | np.ndarray):
        return False
    items: Iterable[object] = value if isinstance(value, list | tuple | set | frozenset) else _own(value).values()
    items = value.values() if isinstance(value, Mapping) else items
    return any(_has_functions(item, (*outer, id(value))) for item in items)


def held(value: object, text: Callable[[object], str] = stable_text) -> dict[str, object]:
    """Return what a callable holds by name: a local function's outer variables and defaults, an object's attributes.

    Attributes that begin with an underscore are left out, and those that are as the class's defaults have them.
    text: what makes text of these to compare.
    """
    while isinstance(value, functools.partial):
        value = value.func
    if isinstance(value, types.FunctionType):
        inner = inspect.unwrap(value)
        cells = zip(inner.__code__.co_freevars, inner.__closure__ or (), strict=True)
        outer = {name: cell.cell_contents for name, cell in cells if not _is_empty(cell)}
        if "<locals>" not in inner.__qualname__:
            return outer
        defaults = {p.name: p.default for p in inspect.signature(inner).parameters.values() if p.default is not p.empty}
        return {**outer, **defaults}
    if isinstance(value, types.MethodType) and not isinstance(value.__self__, type):
        return held(value.__self__, text)
    if isinstance(value, type) or isinstance(getattr(value, "__qualname__", None), str):
        return {}
    try:
        parameters = inspect.signature(type(value)).parameters
    except (TypeError, ValueError):
        parameters = {}  # type: ignore[assignment]
    usual = {name: text(p.default) for name, p in parameters.items()}
    own = {name: item for name, item in _own(value).items() if not name.startswith("_")}
    return {name: item for name, item in own.items() if name not in usual or text(item) != usual[name]}


def _is_empty(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False
