"""CUDA graphs: what is done with a batch, up to its gradients, is recorded once and then launched as a whole.

A small network's training step is some 150 kernels of a few microseconds each, and launching them one by one from
Python takes longer than running them. https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
Optimizer and schedule stay outside, so that one graph serves whatever they do with learning rate or weight decay.
A graph repeats kernels on fixed memory. What Python does meanwhile (draws numbers, counts, looks at values, puts
another tensor in a buffer's place) would be frozen, so each graph is first tried against batches launched one by one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mnist_lab.arguments import stable_text
from mnist_lab.errors import LabError, script_line, text_of
from mnist_lab.training.generators import generator_states, set_generator_states
from mnist_lab.training.states import PLAIN, set_variable, variables

logger = logging.getLogger(__name__)

TRIED = 3  # batches, both ways
NOISE = 4  # times what two eager trainings differ by, that a graph may differ from one; nothing where these are equal


@dataclass
class Graph:
    """Recorded work on one shape of batch. gradients: those of the parameters, on the memory that it writes to."""

    replay: Callable[[], None]
    batch: Tensor
    gradients: list[Tensor | None]


class Captured:
    """Calls `work(batch)`; on a CUDA device it launches a graph of it, one per shape of batch, where that is the same.

    work: sets the gradients of the optimizer's parameters, and adds to `sums` in place. Where it can't be recorded,
        or a graph of it computes something else, it is called as it is, and `refused` and a notice say why.
    nets: the networks in it, whose buffers and plain attributes it may change.
    holders: other objects in it, such as an objective that counts, whose plain attributes it may change.
    buffers: those that belong to no network.
    """

    def __init__(
        self,
        work: Callable[[Tensor], None],
        nets: Sequence[nn.Module],
        holders: Sequence[object],
        optimizer: Optimizer,
        buffers: Sequence[Tensor],
        sums: Sequence[Tensor],
        device: torch.device,
    ) -> None:
        self.work, self.nets, self.holders, self.optimizer, self.device = work, nets, holders, optimizer, device
        self.buffers, self.sums = buffers, sums
        self.refused = ""
        self.graphs: dict[Hashable, Graph] = {}

    def __call__(self, batch: Tensor) -> None:
        graph = None
        if not self.refused and can_record(self.device):
            # A schedule may add parameters to the optimizer, or let some be trained later.
            key = batch.shape, tuple((id(parameter), parameter.requires_grad) for parameter in self.parameters)
            graph = self.graphs.get(key) or self._prepare(batch, key)
        if graph is None:
            self._work(batch)
        else:
            self._launch(graph, batch)

    @property
    def parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _work(self, batch: Tensor) -> None:
        self.optimizer.zero_grad()
        self.work(batch)

    @property
    def tags(self) -> dict[str, str]:
        """What a run on a device with graphs says of them; nothing for other devices."""
        if not can_record(self.device):
            return {}
        return {"cuda_graph": f"refused: {self.refused}" if self.refused else "used"}

    def _launch(self, graph: Graph, batch: Tensor) -> None:
        graph.batch.copy_(batch)
        graph.replay()
        for parameter, gradient in zip(self.parameters, graph.gradients, strict=True):
            parameter.grad = gradient

    def _prepare(self, batch: Tensor, key: Hashable) -> Graph | None:
        """Record a graph for such batches, and keep it if it does what the work does; nothing else changes."""
        before = self._state()
        try:
            with reads_refused(self.device):
                self._work(batch)
            self._restore(before)
            graph = self._record(batch)
            self._restore(before)
            refused = self._difference(graph, batch, before)
        except Exception as error:  # a network, loss or augmentation that looks at values, each in its own words
            refused = text_of(error)[:200] + script_line(error)
        try:
            self._restore(before)
        except RuntimeError as error:  # torch's generator, after a recording that failed
            raise LabError(
                f"device: {self.device} can't go on after a recording that failed ({refused}); train on the CPU, or "
                "take that out"
            ) from error
        if refused:
            self.refused, self.graphs = refused, {}
            logger.warning("no CUDA graph, so slower: %s", refused)
            return None
        self.graphs[key] = graph
        return graph

    def _record(self, batch: Tensor) -> Graph:
        static = batch.clone()
        self.optimizer.zero_grad()
        replay = record(self.device, lambda: self.work(static))
        return Graph(replay, static, [parameter.grad for parameter in self.parameters])

    def _difference(self, graph: Graph, batch: Tensor, before: _State) -> str:
        """Say in what the graph's batches differ from those launched one by one; nothing where they are the same."""

        sums = [(total, total.clone()) for total in self.sums]

        def tried(call: Callable[[], None]) -> tuple[list[Tensor], _State]:
            self._restore(before)
            seen: list[Tensor] = []
            for _ in range(TRIED):
                call()
                seen += [parameter.grad.clone() for parameter in self.parameters if parameter.grad is not None]
                for total, value in sums:
                    seen.append(total.clone())
                    total.copy_(value)
            return [*seen, *self._buffers()], self._state()

        own, after = tried(lambda: self._work(batch))
        changed = [key for key, value in after.attributes.items() if value != before.attributes.get(key)]
        if changed:
            index, name = changed[0]
            holder = after.holders[index]
            of_network = any(holder is module for net in self.nets for module in net.modules())
            whose = "the network" if of_network else getattr(holder, "__qualname__", type(holder).__qualname__)
            return f"{whose} changes {name!r}, which a graph would repeat for all batches"
        if after.numbers != before.numbers:
            return "numbers are drawn on the CPU, which a graph would repeat for all batches"
        graphs, _ = tried(lambda: self._launch(graph, batch))
        distance = _distance(own, graphs)
        if distance > 0 and distance > NOISE * _distance(own, tried(lambda: self._work(batch))[0]):
            return "it computes something else than the same batches launched one by one"
        return ""

    # ---- what a batch may change

    def _buffers(self) -> list[Tensor]:
        return [buffer.clone() for buffer in (*self.buffers, *(one for net in self.nets for one in net.buffers()))]

    def _state(self) -> _State:
        modules = [module for net in self.nets for module in net.modules()]
        modules += [holder for holder in self.holders if isinstance(holder, nn.Module)]
        slots = {
            (module, name): tensor
            for module in modules
            for name, tensor in {**module._parameters, **module._buffers}.items()
            if tensor is not None
        }
        holders = [*modules, *self.holders]
        tensors = [*slots.values(), *self.parameters, *self.buffers, *self.sums]
        attributes = {
            (index, name): value
            for index, holder in enumerate(holders)
            for name, value in variables(holder).items()
            if isinstance(value, PLAIN)
        }
        states = generator_states(self.device)
        on_host = {name: states[name] for name in ("python", "numpy", "cpu") if name != self.device.type}
        copies = [(tensor, tensor.detach().clone()) for tensor in tensors]
        return _State(modules, holders, slots, copies, states, attributes, stable_text(on_host))

    @torch.no_grad()
    def _restore(self, state: _State) -> None:
        for (module, name), tensor in state.slots.items():
            (module._parameters if name in module._parameters else module._buffers)[name] = tensor  # type: ignore[assignment]
        for tensor, value in state.tensors:
            tensor.copy_(value)
        for (index, name), value in state.attributes.items():
            set_variable(state.holders[index], name, value)
        set_generator_states(state.generators, self.device)


@dataclass
class _State:
    """What a batch may change.

    slots: which tensor is a parameter or buffer, by module and name.
    tensors: each with a copy of its values.
    holders: these modules and what else keeps numbers.
    attributes: numbers and texts of the holders, by the holder's place and their name.
    numbers: what is different once a number was drawn on the CPU.
    """

    modules: list[nn.Module]
    holders: list[object]
    slots: dict[tuple[nn.Module, str], Tensor]
    tensors: list[tuple[Tensor, Tensor]]
    generators: dict[str, Any]
    attributes: dict[tuple[int, str], Any]
    numbers: str


def _distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Return the largest relative distance of two lists of tensors; infinite where they are not of one kind."""
    if [tensor.shape for tensor in first] != [tensor.shape for tensor in second]:
        return float("inf")
    pairs = [(a.double(), b.double()) for a, b in zip(first, second, strict=True) if not torch.equal(a, b)]
    distances = [((a - b).norm() / a.norm()).item() for a, b in pairs]
    return max((distance if distance == distance else float("inf") for distance in distances), default=0.0)


# ---- the device


def can_record(device: torch.device) -> bool:
    """Say whether the device has graphs."""
    return device.type == "cuda"


def record(device: torch.device, work: Callable[[], None]) -> Callable[[], None]:
    """Record work on the device, of which nothing is done yet, and return what does it."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        work()
    return graph.replay


@contextmanager
def reads_refused(device: torch.device) -> Iterator[None]:
    """Let what reads a value off the device fail, on a stream of its own, as recording asks for."""
    stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)  # type: ignore[no-untyped-call]
    before = torch.cuda.get_sync_debug_mode()
    stream.wait_stream(current)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
        current.wait_stream(stream)
