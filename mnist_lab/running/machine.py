"""How a run uses its machine: the threads of a CPU, and memory that is kept.

The number of threads is chosen at a run's start, whatever else the machine does, since it decides the rounding.
"""

import ctypes
import os
import platform

import psutil
import torch

# The parameters of mallopt(3). Its man page: setting either of them also ends glibc's own adjusting of both.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
THRESHOLD = 1 << 30  # bytes


def available_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count() or 1


def set_threads(wanted: int | None) -> int:
    """Let torch use `wanted` threads, or OMP_NUM_THREADS, or one per available core; return their number."""
    if wanted is not None or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(wanted or available_cores())
    return torch.get_num_threads()


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks of up to 1 GiB: the system gives them again page by page (docs/performance.md)."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, THRESHOLD)
        libc.mallopt(M_MMAP_THRESHOLD, THRESHOLD)
