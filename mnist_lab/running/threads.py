"""How many CPU threads a run uses: chosen at its start, whatever else the machine does, since it decides the rounding.

Two threads on two free cores train a step about 1.4 times as fast as one. But torch's threads wait for each other by
spinning, so beside another busy process two are slower than one: docs/performance.md has the figures.
"""

from __future__ import annotations

import os

import psutil
import torch

BUSY = 0.5  # the share of a core that, used by others, slows down a thread of torch there


def available_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count() or 1


def set_threads(wanted: int | None) -> int:
    """Let torch use `wanted` threads, or OMP_NUM_THREADS, or one per available core; return their number."""
    if wanted is not None or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(wanted or available_cores())
    return torch.get_num_threads()


class Load:
    """Measures how many cores' worth of time other processes have used since this was made."""

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.others()

    def others(self) -> float:
        in_use = psutil.cpu_percent() * (psutil.cpu_count() or 1)
        return max(0.0, in_use - self.process.cpu_percent()) / 100


def crowded(threads: int, others: float) -> bool:
    """Say whether `threads` threads would wait for other processes, which use `others` cores' worth of time."""
    return threads > 1 and threads + others > (os.cpu_count() or 1) + BUSY
