"""CUDA graphs, on request: what is done with a batch, up to its gradients, is recorded once and launched as a whole.

Launching a small network's 150 kernels one by one from Python takes longer than running them.
https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
Optimizer and schedule stay outside, so one graph serves whatever they do with learning rate or weight decay.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mnist_lab.errors import LabError, script_line, text_of

TRIED = 3  # batches, both ways
TOLERANCE, TINY = 1e-3, 1e-6  # relative and absolute: a GPU may add up in any order
Work = Callable[[Tensor], tuple[Tensor, ...]]


class Captured:
    """Does `work` on a batch by launching a graph of it; the work sets the gradients of the network's parameters.

    A graph serves one shape of batch, as long as the same parameters are trained. What Python does meanwhile (draws
    numbers, counts, looks at values) would be frozen in it, so it is first compared with batches launched one by one.

    training: whose `state_dict` holds all that the work may change.
    """

    def __init__(self, work: Work, net: nn.Module, training: Any) -> None:
        self.work, self.parameters, self.training = work, list(net.parameters()), training
        self.graphs: dict[Hashable, Work] = {}

    def __call__(self, batch: Tensor) -> tuple[Tensor, ...]:
        """Return what the work returns; raises LabError where a graph of it can't be had, or does something else."""
        key = batch.shape, tuple(parameter.requires_grad for parameter in self.parameters)
        if key not in self.graphs:
            self.graphs[key] = self._compared(batch)
        return self.graphs[key](batch)

    def _compared(self, batch: Tensor) -> Work:
        before = copy.deepcopy(self.training.state_dict())
        try:
            eager = self._tried(self.work, batch, before)
            graph = self._recorded(batch)
            graphed = self._tried(graph, batch, before)
        except Exception as error:  # a network, loss or augmentation that looks at values, each in its own words
            raise LabError(f"cuda-graph: a batch can't be recorded: {text_of(error)}{script_line(error)}") from error
        if len(eager) != len(graphed) or not all(map(_alike, eager, graphed)):
            raise LabError(
                "cuda-graph: a graph would repeat for all batches what is drawn or counted in Python, or put in a "
                "buffer's place, in one batch; train without --cuda-graph"
            )
        return graph

    def _recorded(self, batch: Tensor) -> Work:
        static = batch.clone()
        replay, outputs = record(batch.device, lambda: self.work(static))
        gradients = [parameter.grad for parameter in self.parameters]  # on the memory that the graph writes to

        def launch(batch: Tensor) -> tuple[Tensor, ...]:
            static.copy_(batch)
            replay()
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
            return tuple(output.clone() for output in outputs)

        return launch

    def _tried(self, work: Work, batch: Tensor, before: Mapping[str, Any]) -> list[Any]:
        """Return what a few batches give, and what they leave behind; afterwards all is as it was before."""
        self.training.load_state_dict(before)
        given: list[Any] = []
        for _ in range(TRIED):
            given += work(batch)
            given += [parameter.grad.clone() for parameter in self.parameters if parameter.grad is not None]
        left = copy.deepcopy(self.training.state_dict())
        left["generators"]["cuda"] = None  # what was drawn from it shows in the gradients
        self.training.load_state_dict(before)
        return given + tree_leaves(left)


def _alike(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return bool(one == other)
    if one.shape != other.shape or not one.is_floating_point():
        return torch.equal(one, other)
    return bool((one.double() - other.double()).norm() <= TOLERANCE * one.double().norm() + TINY)


def record(
    device: torch.device, work: Callable[[], tuple[Tensor, ...]]
) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """Record work on the device; return what launches it, and the memory that its outputs are written to."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.device(device):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()  # libraries choose their kernels
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            outputs = work()
    return graph.replay, outputs
