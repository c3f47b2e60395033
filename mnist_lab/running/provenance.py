"""Where a run comes from: commit, uncommitted changes, versions and hardware."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

DIFF = ("diff", "--no-ext-diff", "--no-color")  # one that `git apply` takes, however the user's git shows diffs
PACKAGES = ("torch", "torchvision", "mlflow", "numpy", "pandas", "matplotlib")


@dataclass(frozen=True)
class Commit:
    """The state of the repository that holds a script.

    sha: the commit, or "none" outside a repository or before the first commit.
    dirty: whether any file differs from that commit, new files included.
    diff: `git diff` against it, new files included; empty if not dirty.
    """

    sha: str
    dirty: bool
    diff: str


def commit(script: Path) -> Commit:
    """Return the state of the repository that `script` lies in."""
    sha = _git(script.parent, "rev-parse", "--verify", "HEAD").strip() or "none"
    changes = _git(script.parent, "status", "--porcelain", "-z", "--untracked-files=all")  # -z: names as they are
    if not changes:
        return Commit(sha, dirty=False, diff="")
    diff = _git(script.parent, *DIFF, "HEAD") if sha != "none" else ""
    tree = _git(script.parent, "rev-parse", "--show-toplevel").strip()
    for new in (entry[3:] for entry in changes.split("\0") if entry.startswith("?? ")):
        diff += _git(Path(tree), *DIFF, "--no-index", "--", os.devnull, new)
    return Commit(sha, dirty=True, diff=diff)


def environment(device: torch.device) -> dict[str, str]:
    """Return versions and hardware as text by name."""
    return {
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in PACKAGES},
        "cuda": torch.version.cuda if device.type == "cuda" and torch.version.cuda else "none",
        "os": platform.platform(),
        "hardware": hardware(device),
        "threads": str(torch.get_num_threads()),
    }


def hardware(device: torch.device) -> str:
    """Return the name of the device that trains, e.g. "NVIDIA H100" or "AMD EPYC 9R14, 2 cores, AVX512".

    A CPU's name comes with the vector instructions that torch uses: with others, sums are rounded in another order.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, errors="replace")
    except FileNotFoundError:  # no git on this machine
        return ""
    # `git diff --no-index` exits with 1 where the files differ, which is the case it is asked for.
    return done.stdout if done.returncode in (0, 1) else ""
