"""The arguments that a script declares, as text that is the same in each process."""

import functools
import hashlib
import inspect
import re
import types
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from reprlib import recursive_repr
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,}")
LAMBDA = "<lambda>"
MAX_TEXT = 6_000  # characters, the most that MLflow keeps of a param
INTERNAL = frozenset(vars(nn.Module()))  # what every module has: its mode, parameters, hooks


def stable_text(value: object) -> str:
    """Return an argument as text that is the same in each process.

    A function or class becomes its name; an object whose text would have its address, its class's name and attributes;
    a tensor or array, its shape, type and a digest of its values. A digest replaces the end of a long text.
    """
    text = value if type(value) is str else _text(value)
    if len(text) <= MAX_TEXT:
        return text
    return f"{text[:1_000]}... sha256={_sha256(text.encode('utf-8', 'surrogatepass'))}"


def held(value: Any) -> dict[str, object]:
    """Return what a callable holds by name: a local function's outer variables and defaults, an object's attributes.

    Left out are attributes that begin with an underscore, and those whose text is that of the class's defaults.
    """
    if isinstance(value, functools.partial | types.MethodType):
        return held(value.func if isinstance(value, functools.partial) else value.__self__)
    value = inspect.unwrap(value) if isinstance(value, types.FunctionType) else value
    if isinstance(value, types.FunctionType):
        outer = dict(inspect.getclosurevars(value).nonlocals)
        return outer | defaults(value) if "<locals>" in value.__qualname__ else outer
    if isinstance(getattr(value, "__qualname__", None), str):
        return {}
    usual = {name: _text(default) for name, default in defaults(type(value)).items()}
    own = {name: item for name, item in attributes(value).items() if not name.startswith("_")}
    return {name: item for name, item in own.items() if _text(item) != usual.get(name)}


@recursive_repr("...")  # where a value is in itself
def _text(value: Any) -> str:
    if isinstance(value, np.generic):
        return repr(value.item())
    if isinstance(value, Tensor | np.ndarray):
        return _digest(value)
    if isinstance(value, functools.partial):
        return _call(_text(value.func), value.keywords, map(_text, value.args))
    if isinstance(value, types.ModuleType):
        return value.__name__
    if callable(value) and isinstance(getattr(value, "__qualname__", None), str):
        return _callable(value)
    return _container(value) or _object(value)


def _callable(value: Any) -> str:
    """Return the name of a function, class or method, with what a local function has from outside."""
    owner = getattr(value, "__self__", None)
    if owner is not None and not isinstance(owner, types.ModuleType | type):
        return f"{_text(owner)}.{value.__name__}"
    name = value.__name__ if isinstance(value, types.BuiltinFunctionType) else value.__qualname__
    holds = held(value)
    return _call(name, holds) if holds else str(name)


def _container(value: Any) -> str:
    """Return a container with its elements in order, a set's sorted; nothing for what is no container."""
    name = type(value).__qualname__
    if type(value) is tuple:
        return f"({', '.join(map(_text, value))}{',' if len(value) == 1 else ''})"
    if type(value) is list:
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(_text, value)))}}}" if value else f"{name}()"
    if isinstance(value, Mapping):
        shown = f"{{{', '.join(f'{_text(key)}: {_text(item)}' for key, item in value.items())}}}"
        return shown if type(value) is dict else f"{name}({shown})"
    return ""


def _object(value: Any) -> str:
    """Return an object's own text, or where that has an address, its class and what it holds."""
    if type(value) is str:
        return repr(value)
    name = shown = type(value).__qualname__
    with suppress(Exception):  # a script's own __repr__ may fail, and an int of thousands of digits has none
        shown = " ".join(str(value).split())
    if isinstance(value, nn.Module) and type(value).__repr__ is nn.Module.__repr__:
        settings = " ".join(value.extra_repr().split())
        if settings and not ADDRESS.search(settings):
            return _call(name, dict(value.named_children()), [settings])
        return _call(name, held(value))
    if not (hasattr(value, "__dataclass_fields__") or ADDRESS.search(shown)):
        return shown
    holds = attributes(value)
    return _call(name, holds, map(_text, value) if isinstance(value, Collection) and not holds else ())


def _call(name: str, named: Mapping[str, object], first: Iterable[str] = ()) -> str:
    return f"{name}({', '.join([*first, *(f'{argument}={_text(item)}' for argument, item in named.items())])})"


def _digest(value: Tensor | np.ndarray[Any, Any]) -> str:
    kind, shape, dtype = type(value).__name__, tuple(value.shape), str(value.dtype).removeprefix("torch.")
    if isinstance(value, Tensor):
        value = value.detach().cpu().to_dense().contiguous().flatten().view(torch.uint8).numpy()
    return f"{kind}(shape={shape}, dtype={dtype}, sha256={_sha256(value.tobytes())})"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def defaults(function: Callable[..., object]) -> dict[str, object]:
    parameters = parameters_of(function).values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}


def parameters_of(function: Callable[..., object]) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a function or class by name; none of a callable written in C without a signature."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


def attributes(value: object) -> dict[str, object]:
    """Return an object's attributes, those in slots too; of a module, its own, its children and its buffers."""
    try:
        state = object.__getstate__(value)
    except TypeError:  # an object made in C
        return {}
    parts = [part for part in (state if isinstance(state, tuple) else (state,)) if isinstance(part, dict)]
    found = {name: item for part in parts for name, item in part.items() if name not in INTERNAL}
    if isinstance(value, nn.Module):
        found |= {name: item for name, item in {**value._modules, **value._buffers}.items() if item is not None}
    return found
