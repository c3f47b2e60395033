"""CUDA graphs: a batch's work is recorded once and then launched as a whole.

A small network's training step is some 150 kernels of a few microseconds each, and launching them one by one from
Python takes longer than running them. https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from mnist_lab.arguments import stable_text
from mnist_lab.training.generators import generator_states

logger = logging.getLogger(__name__)

WARM_UP_BATCHES = 3  # torch's advice: libraries choose their algorithms and optimizers make their state before


class Captured:
    """Calls `work(batch)`; on a CUDA device from its fourth call on as a CUDA graph, recorded once per shape and key.

    work: all that is done with one batch, in place, on tensors that outlive the calls. It must not read a value off
        the device. Work that can't be captured is called as it is from then on, and a notice says why.
    """

    def __init__(self, work: Callable[[Tensor], None]) -> None:
        self.work = work
        self.key: Hashable = None
        self.calls = 0
        self.refused = False
        self.graphs: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def __call__(self, batch: Tensor, key: Hashable) -> None:
        """Do the work for `batch`. A graph holds only as long as `key` is the same: the learning rate is part of it."""
        if batch.device.type != "cuda" or self.refused:
            self.work(batch)
            return
        if key != self.key:
            self.key, self.graphs = key, {}
        self.calls += 1
        if self.calls <= WARM_UP_BATCHES:
            self._warm_up(batch)
            return
        if batch.shape not in self.graphs:
            self._capture(batch)
        if self.refused:
            self.work(batch)
            return
        graph, static_batch = self.graphs[batch.shape]
        static_batch.copy_(batch)
        graph.replay()

    def _warm_up(self, batch: Tensor) -> None:
        """Do the work on a stream of its own, as capture asks for."""
        stream = torch.cuda.Stream(batch.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(batch.device))
        with torch.cuda.stream(stream):
            self.work(batch)
        torch.cuda.current_stream(batch.device).wait_stream(stream)

    def _capture(self, batch: Tensor) -> None:
        static_batch = batch.clone()
        graph, drawn = torch.cuda.CUDAGraph(), _drawn_on_the_cpu()
        try:
            with torch.cuda.graph(graph):  # records, and runs nothing
                self.work(static_batch)
            if _drawn_on_the_cpu() != drawn:
                raise ValueError("numbers are drawn on the CPU, and a graph would use the same ones for every batch")
        except Exception as error:  # a network, loss or optimizer that looks at values, each in its own words
            self.refused, self.graphs = True, {}
            logger.warning("no CUDA graph, so slower: %s", " ".join(str(error).split())[:200])
            torch.cuda.synchronize(batch.device)
            return
        self.graphs[batch.shape] = graph, static_batch


def _drawn_on_the_cpu() -> str:
    """Return a text that changes with each number that Python's, numpy's or torch's generator on the CPU gives."""
    return stable_text(generator_states(torch.device("cpu")))
