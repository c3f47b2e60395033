"""How many CPU threads a run uses: every core that nobody else is using.

Two threads on two free cores train a step about 1.4 times as fast as one. But torch's threads wait for each other by
spinning, so beside another busy process two are slower than one: docs/performance.md has the figures.
"""

from __future__ import annotations

import os
import time

import psutil
import torch

# The share of a core that may be busy otherwise before the lab leaves that core alone.
BUSY = 0.5


def available_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count() or 1


class Load:
    """Measures how many cores other processes use, on average between two looks."""

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.machine, self.own, self.at = self._now()

    def others(self) -> float:
        """Return the cores' worth of time that others have used since the last look, or since this was made."""
        machine, own, at = self._now()
        elapsed = at - self.at
        used = (machine - self.machine) - (own - self.own)
        self.machine, self.own, self.at = machine, own, at
        return max(0.0, used / elapsed) if elapsed > 0 else 0.0

    def _now(self) -> tuple[float, float, float]:
        total = psutil.cpu_times()
        idle = total.idle + getattr(total, "iowait", 0.0)
        mine = self.process.cpu_times()
        return sum(total) - idle - getattr(total, "guest", 0.0), mine.user + mine.system, time.monotonic()


def free_cores(others: float, cores: int) -> int:
    """Return how many of `cores` are left when other processes use `others` cores' worth of time; at least one."""
    return max(1, cores - int(others + 1 - BUSY))


class Threads:
    """Sets torch's number of threads at the start of a run, and takes fewer when other processes come to need a core.

    A number that the user set (`--threads` or OMP_NUM_THREADS) stays. It never goes up again during a run: each change
    changes the rounding of sums, and so the run's exact figures.
    """

    def __init__(self, wanted: int | None, load: Load) -> None:
        """Choose by the load since `load` was made, which should be some tenths of a second ago."""
        self.load = load
        self.fixed = wanted is not None or "OMP_NUM_THREADS" in os.environ
        if wanted is not None:
            torch.set_num_threads(wanted)
        elif not self.fixed:
            torch.set_num_threads(free_cores(load.others(), available_cores()))
        self.number = torch.get_num_threads()

    def adapt(self) -> bool:
        """Look at the load since the last look; return whether the number of threads was lowered."""
        if self.fixed or self.number == 1:
            return False
        number = free_cores(self.load.others(), available_cores())
        if number >= self.number:
            return False
        torch.set_num_threads(number)
        self.number = number
        return True
