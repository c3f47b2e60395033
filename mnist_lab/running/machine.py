"""How a run uses its machine: the threads of a CPU, which decide the rounding, and memory that is kept."""

import ctypes
import gc
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch


def available_cores() -> int:  # that this process may run on
    return len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count() or 1


def set_threads(wanted: int | None) -> None:
    """Let torch use `wanted` threads, or OMP_NUM_THREADS, or one per available core."""
    if wanted is not None or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(wanted or available_cores())


@contextmanager
def without_collections() -> Iterator[None]:
    """Let Python look for no garbage: imports leave none, and a look through what they make takes long."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks of up to 1 GiB: the system gives them again page by page (docs/performance.md)."""
    if platform.libc_ver()[0] == "glibc":
        # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD: setting either also ends glibc's own adjusting of both (mallopt(3)).
        for parameter in (-1, -3):
            ctypes.CDLL(None).mallopt(parameter, 1 << 30)
