"""Memory that a training step frees is kept for the next step, where the C library is glibc.

glibc gives large freed blocks back to the system, and the system hands them out again page by page. Whether a step's
activations fall under this hangs on what happens to lie next to them, so epochs of one script took up to a fifth longer
in some processes than in others: docs/performance.md has the figures.
"""

from __future__ import annotations

import ctypes
import platform

# The parameters of mallopt(3). Its man page: setting either of them also ends glibc's own adjusting of both.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
THRESHOLD = 1 << 30  # bytes


def keep_freed_memory() -> None:
    """Let this process keep what it frees, in blocks of up to 1 GiB; do nothing where the C library isn't glibc."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, THRESHOLD)
        libc.mallopt(M_MMAP_THRESHOLD, THRESHOLD)
