"""Where a run comes from: commit, uncommitted changes, versions and hardware."""

from __future__ import annotations

import importlib.metadata
import logging
import multiprocessing
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import torch

DIFF = (  # one that `git apply` takes, however the user's git shows diffs
    *("diff", "--no-ext-diff", "--no-color", "--no-renames", "--no-textconv"),
    *("--submodule=short", "--src-prefix=a/", "--dst-prefix=b/"),
)
PACKAGES = ("torch", "torchvision", "mlflow", "numpy", "pandas", "matplotlib")
MAX_DIFF = 1_000_000  # characters; what is beyond is named
MAX_NAMED = 20  # files that are left out
# Names of files that hold keys and passwords: their text must not get into a store, which others may read.
SECRET_FILES = (
    *(".env", ".env.*", "*.env", ".envrc", ".netrc", "_netrc", ".pgpass", ".pypirc", ".npmrc", ".htpasswd"),
    *("*.pem", "*.key", "*.p12", "*.pfx", "*.ppk", "*.jks", "*.keystore", "*.kdbx", "*.gpg", "*.asc"),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "kaggle.json", "*.token", "token", "token.*", "*[_-]token*"),
    *("*credential*", "*secret*", "*password*", "*passwd*", "*api[_-]key*", "*apikey*"),
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Commit:
    """The state of the repository that holds a script.

    sha: the commit, "none" outside a repository or before the first commit, or "unknown" where git refuses to say.
    dirty: whether any file differs from that commit, new files included; None where git refuses to say.
    diff: lines that name what is left out, then `git diff` against the commit, with the script's new files.
    """

    sha: str
    dirty: bool | None
    diff: str

    @property
    def tags(self) -> dict[str, str]:
        """The commit as tags of a run."""
        return {"git_commit": self.sha, "git_dirty": "unknown" if self.dirty is None else str(self.dirty).lower()}


def commit(script: Path, imported: Iterable[Path] = (), written: Iterable[Path] = ()) -> Commit:
    """Return the state of the repository that `script` lies in.

    The diff has changed files and, of new ones, those beside the script and those `imported`. Files that may hold keys
    or passwords are left out.
    written: files and folders that the lab itself writes or fetches, such as a tracking store. They are no changes.
    """
    folder = script.resolve().parent
    try:
        root = Path(_git(folder, "rev-parse", "--show-toplevel").removesuffix("\n"))
    except _Refusal as refusal:
        if not any((parent / ".git").exists() for parent in (folder, *folder.parents)):
            return Commit("none", dirty=False, diff="")
        _say_once(f"commit and changes of {folder} are recorded as unknown: {refusal}")
        return Commit("unknown", dirty=None, diff="")
    try:
        sha = _git(folder, "rev-parse", "--verify", "HEAD").strip()
    except _Refusal:  # before the first commit
        sha = "none"
    own = [path for path in map(Path.resolve, written) if path.is_relative_to(root) and not folder.is_relative_to(path)]
    others = ["--", ":/", *(f":(top,exclude,literal){path.relative_to(root)}" for path in own)]
    try:
        status = ("status", "--porcelain", "-z", "--no-renames", "--untracked-files=all")  # -z: names as they are
        changes = _git(root, *status, *others)
        if not changes:
            return Commit(sha, dirty=False, diff="")
        against = ("HEAD",) if sha != "none" else ("--cached",)
        changed = _git(root, "diff", "--name-only", "--no-renames", "-z", *against, *others).split("\0")
        left_out = {name: "may hold keys or passwords" for name in changed if _is_secret(name)}
        secret = [f":(top,exclude,literal){name}" for name in left_out]
        diff = _git(root, *DIFF, *against, *others, *secret)
        diffs = [part for part in re.split(r"^(?=diff --git )", diff, flags=re.MULTILINE) if part]
        sources = {file.resolve() for file in imported}
        for name in (entry[3:] for entry in changes.split("\0") if entry.startswith("?? ")):
            file = root / name
            if _is_secret(name):
                left_out[name] = "may hold keys or passwords"
            elif file.parent != folder and file.resolve() not in sources:
                left_out[name] = "new, and not beside the script"
            elif file.is_symlink() or not file.is_file():
                left_out[name] = "no file"
            elif file.stat().st_size > MAX_DIFF:
                left_out[name] = "too large"
            else:
                diffs.append(_git(root, *DIFF, "--no-index", "--", os.devnull, name))
    except _Refusal as refusal:
        _say_once(f"git does not say what has changed in {root}: {refusal}")
        return Commit(sha, dirty=None, diff="")
    return Commit(sha, dirty=True, diff=_limited(diffs, left_out))


def _is_secret(name: str) -> bool:
    return any(fnmatch(part.lower(), pattern) for part in Path(name).parts for pattern in SECRET_FILES)


def _limited(diffs: list[str], left_out: Mapping[str, str]) -> str:
    """Put the diffs of files together, up to MAX_DIFF characters, after lines that name the files that are left out."""
    kept, reasons = "", dict(left_out)
    for diff in diffs:
        if len(kept) + len(diff) <= MAX_DIFF:
            kept += diff
        else:
            reasons[diff.partition("\n")[0].removeprefix("diff --git ")] = "too large"
    words = [f"Left out ({why}): {name!r}\n" for name, why in list(reasons.items())[:MAX_NAMED]]
    if len(reasons) > MAX_NAMED:
        words.append(f"Left out: {len(reasons) - MAX_NAMED:,} more files\n")
    return "".join([*words, kept])


def environment(device: torch.device) -> dict[str, str]:
    """Return versions and hardware as text by name."""
    return {
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in PACKAGES},
        "cuda": torch.version.cuda if device.type == "cuda" and torch.version.cuda else "none",
        "os": platform.platform(),
        "hardware": hardware(device),
        "threads": str(torch.get_num_threads()),
        "tf32": str(torch.backends.cudnn.allow_tf32) if device.type == "cuda" else "none",
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


class _Refusal(Exception):
    """Why git gives no answer."""


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
    except OSError as error:  # no git on this machine
        raise _Refusal(f"git can't be started: {error.strerror}") from error
    # `git diff --no-index` exits with 1 where the files differ, which is the case it is asked for.
    if done.returncode not in (0, 1):
        raise _Refusal(next(iter(done.stderr.splitlines()), f"git ended with code {done.returncode}"))
    return done.stdout


@cache
def _say_once(sentence: str) -> None:
    if multiprocessing.parent_process() is None:  # else the study that began this process has said it
        logger.warning(sentence)
