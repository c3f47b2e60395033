"""The arguments that a script declares, as text that is the same in each process."""

import functools
import hashlib
import inspect
import re
import types
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,}")
LAMBDA = "<lambda>"
DIGEST_LENGTH = 12
MAX_TEXT = 6_000  # characters, the most that MLflow keeps of a param
MAX_BEGINNING = 1_000  # of a longer text
INTERNAL = frozenset(vars(nn.Module()))  # what every module has: its mode, parameters, hooks

Text = Callable[[object], str]


def stable_text(value: object) -> str:
    """Return an argument as text that says what it is, and is the same in each process.

    A function or class is its name; an object that would show its address is its class's name and what it holds; a
    tensor or array is its shape, its type and a digest of its values. A digest replaces the end of a long text.
    """
    text = value if type(value) is str else _text(value, ())
    if len(text) <= MAX_TEXT:
        return text
    return f"{text[:MAX_BEGINNING]}... sha256={_sha256(text.encode('utf-8', 'surrogatepass'))}"


def held(value: object, text: Text = stable_text) -> dict[str, object]:
    """Return what a callable holds by name: a local function's outer variables and defaults, an object's attributes.

    Left out are attributes that begin with an underscore, and those whose text is that of the class's defaults.
    """
    if isinstance(value, functools.partial):
        return held(value.func, text)
    if isinstance(value, types.FunctionType):
        inner = inspect.unwrap(value)
        if not isinstance(inner, types.FunctionType):  # a class or an object, by functools.wraps
            return held(inner, text)
        outer = dict(inspect.getclosurevars(inner).nonlocals)
        return outer | defaults(inner) if "<locals>" in inner.__qualname__ else outer
    if isinstance(value, types.MethodType) and not isinstance(value.__self__, type):
        return held(value.__self__, text)
    if isinstance(getattr(value, "__qualname__", None), str):
        return {}
    usual = {name: text(default) for name, default in defaults(type(value)).items()}
    own = {name: item for name, item in attributes(value).items() if not name.startswith("_")}
    return {name: item for name, item in own.items() if name not in usual or text(item) != usual[name]}


def _text(value: Any, outer: tuple[int, ...]) -> str:
    """Return the text of a value inside others, whose ids are `outer`: one in itself ends there."""
    if id(value) in outer:
        return "..."
    text = functools.partial(_text, outer=(*outer, id(value)))
    if isinstance(value, np.generic):
        return repr(value.item())
    if isinstance(value, Tensor | np.ndarray):
        return _digest(value)
    if isinstance(value, functools.partial):
        return _call(text(value.func), [*map(text, value.args), *_pairs(value.keywords, text)])
    if isinstance(value, types.ModuleType):
        return value.__name__
    if callable(value) and isinstance(getattr(value, "__qualname__", None), str):
        return _callable(value, text)
    return _container(value, text) or _object(value, text)


def _callable(value: Any, text: Text) -> str:
    """Return the name of a function, class or method, with what a local function has from outside."""
    owner = getattr(value, "__self__", None)
    if owner is not None and not isinstance(owner, types.ModuleType | type):
        return f"{text(owner)}.{value.__name__}"
    name = value.__name__ if isinstance(value, types.BuiltinFunctionType) else value.__qualname__
    holds = _pairs(held(value, text), text)
    return _call(name, holds) if holds else str(name)


def _container(value: Any, text: Text) -> str:
    """Return a container with its elements in order, a set's sorted; nothing for what is no container."""
    name = type(value).__qualname__
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


def _object(value: Any, text: Text) -> str:
    """Return an object's own text, or where that has an address, its class and what it holds."""
    if type(value) is str:
        return repr(value)
    name, shown = type(value).__qualname__, _plain(value)
    if isinstance(value, nn.Module) and type(value).__repr__ is nn.Module.__repr__:
        settings = _plain(value.extra_repr())
        if settings and not ADDRESS.search(settings):
            return _call(name, [settings, *_pairs(dict(value.named_children()), text)])
        return _call(name, _pairs(held(value, text), text))
    if not (hasattr(value, "__dataclass_fields__") or ADDRESS.search(shown)):
        return shown
    holds = _pairs(attributes(value), text)
    return _call(name, list(map(text, value)) if isinstance(value, Collection) and not holds else holds)


def _plain(value: object) -> str:
    try:
        return " ".join(str(value).split())
    except Exception:  # the script's own __repr__ fails
        return type(value).__qualname__


def _digest(value: Tensor | np.ndarray[Any, Any]) -> str:
    shape, dtype = tuple(value.shape), str(value.dtype).removeprefix("torch.")
    if isinstance(value, Tensor):
        data = value.detach().cpu().to_dense().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    else:
        data = value.tobytes()
    return f"{type(value).__name__}(shape={shape}, dtype={dtype}, sha256={_sha256(data)})"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:DIGEST_LENGTH]


def _call(name: str, arguments: list[str]) -> str:
    return f"{name}({', '.join(arguments)})"


def _pairs(arguments: Mapping[str, object], text: Text) -> list[str]:
    return [f"{name}={text(argument)}" for name, argument in arguments.items()]


def defaults(function: Callable[..., object]) -> dict[str, object]:
    """Return the default values of a function's or class's arguments by name."""
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
