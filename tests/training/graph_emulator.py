"""The semantics of a CUDA graph, on the CPU.

Recording notes each operation of torch with the tensors that it got and gave, and leaves memory and random numbers as
they were. A replay does these operations again on the same memory; what Python did in between is not repeated. Reading
a value while recording fails, as on a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mnist_lab.training import cudagraph, dropout

READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2")


def name_of(operation: Any) -> str:
    return str(operation._schema.name).removeprefix("aten::")


def tensors_in(values: object) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class NoReads(TorchDispatchMode):
    """Fails where a value is read."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if name_of(func) in READS:
            raise RuntimeError(f"{name_of(func)} reads a value, which is not permitted when stream is capturing")
        return func(*args, **(kwargs or {}))


class Recorder(NoReads):
    """Notes the operations, and the values of memory from outside before they change it."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[tuple[Tensor, bool]]]] = []
        self.made: set[int] = set()  # memory that was got while recording
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.alive: list[Tensor] = []  # else memory would be given away, and its number used again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tensors_in((args, kwargs))
        for tensor in given:
            if memory(tensor) not in self.made:
                whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())  # type: ignore[call-overload]
                self.before.setdefault(memory(tensor), (whole, whole.clone()))
        results = super().__torch_dispatch__(func, types, args, kwargs)
        shared = {memory(tensor) for tensor in given}
        outputs = [(tensor, memory(tensor) not in shared) for tensor in tensors_in(results)]
        self.made |= {memory(tensor) for tensor, is_new in outputs if is_new}
        self.alive += [*given, *(tensor for tensor, _ in outputs)]
        self.operations.append((func, args, kwargs or {}, outputs))
        return results

    @torch.no_grad()
    def roll_back(self) -> None:
        for tensor, value in self.before.values():
            tensor.copy_(value)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, outputs in self.operations:
            for (tensor, is_new), again in zip(outputs, tensors_in(func(*args, **kwargs)), strict=True):
                if is_new:
                    tensor.detach().copy_(again)


def record(device: torch.device, work: Callable[[], None]) -> Callable[[], None]:
    """Stand in for `cudagraph.record`."""
    state = torch.get_rng_state()
    recorder = Recorder()
    try:
        with recorder:
            work()
    finally:
        recorder.roll_back()
        torch.set_rng_state(state)
    return recorder.replay


@contextmanager
def reads_refused(device: torch.device) -> Iterator[None]:
    """Stand in for `cudagraph.reads_refused`."""
    with NoReads():
        yield


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU pass for a device with graphs; dropout is torch's own, as on a device."""
    monkeypatch.setattr(cudagraph, "can_record", lambda device: True)
    monkeypatch.setattr(cudagraph, "record", record)
    monkeypatch.setattr(cudagraph, "reads_refused", reads_refused)
    monkeypatch.setattr(dropout, "MAX_P", -1.0)
