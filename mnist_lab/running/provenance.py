"""Where a run comes from: commit, uncommitted changes, versions and hardware."""

from __future__ import annotations

import importlib.metadata
import logging
import multiprocessing
import os
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import torch
from git import Git, GitCommandError, GitError, InvalidGitRepositoryError, Repo

DIFF = (  # one that `git apply` takes, however the user's git shows diffs
    *("--no-ext-diff", "--no-color", "--no-renames", "--no-textconv"),
    *("--submodule=short", "--src-prefix=a/", "--dst-prefix=b/"),
)
PACKAGES = ("torch", "torchvision", "mlflow", "numpy", "pandas", "matplotlib")
MAX_DIFF = 1_000_000  # characters; what is beyond is named
MAX_NAMED = 20  # files that are left out
EMPTY_TREE = "4b825dc642cb6eb9a060e54bf8d69288fbee4904"  # what git compares with before the first commit
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


def commit(script: Path, written: Iterable[Path] = ()) -> Commit:
    """Return the state of the repository that `script` lies in.

    The diff has changed files and, of new ones, those beside the script. Files that may hold keys or passwords are left
    out.
    written: files and folders that the lab itself writes or fetches, such as a tracking store. They are no changes.
    """
    folder = script.resolve().parent
    try:
        return _state(Repo(folder, search_parent_directories=True), folder, written)
    except InvalidGitRepositoryError:
        return Commit("none", dirty=False, diff="")
    except GitError as error:
        reason = next(iter(re.findall("fatal: .*", str(error))), f"git can't be used: {error}")
        _warn_once(f"commit and changes of {folder} are recorded as unknown: {reason}")
        return Commit("unknown", dirty=None, diff="")


def _state(repository: Repo, folder: Path, written: Iterable[Path]) -> Commit:
    git, root = repository.git, Path(str(repository.working_dir))
    own = [path for path in map(Path.resolve, written) if path.is_relative_to(root) and not folder.is_relative_to(path)]
    others = [":/", *(f":(top,exclude,literal){path.relative_to(root)}" for path in own)]
    new = _names(git.ls_files("-z", "--others", "--exclude-standard", "--", *others))  # fails where git refuses
    try:
        sha = against = git.rev_parse("--verify", "HEAD")
    except GitCommandError:  # before the first commit
        sha, against = "none", EMPTY_TREE
    changed = _names(git.diff("-z", "--name-only", "--no-renames", against, "--", *others))
    left_out = {name: "may hold keys or passwords" for name in (*changed, *new) if _is_secret(name)}
    secret = [f":(top,exclude,literal){name}" for name in changed if name in left_out]
    diffs = _diff(git, against, "--", *others, *secret)
    for name in [name for name in new if name not in left_out]:
        file = root / name
        if file.parent != folder or file.is_symlink() or not file.is_file():
            left_out[name] = "new, and not beside the script"
        elif file.stat().st_size > MAX_DIFF:
            left_out[name] = "too large"
        else:
            diffs += _diff(git, "--no-index", "--", os.devnull, name, with_exceptions=False)  # it exits with 1
    return Commit(sha, dirty=bool(changed or new), diff=_limited(diffs, left_out))


def _names(listed: str) -> list[str]:
    return [name for name in listed.split("\0") if name]


def _diff(git: Git, *arguments: str, with_exceptions: bool = True) -> list[str]:
    """Return the diff of each file."""
    whole = git.diff(
        *DIFF, *arguments, stdout_as_string=False, strip_newline_in_stdout=False, with_exceptions=with_exceptions
    ).decode("utf-8", "replace")
    return [part for part in re.split(r"^(?=diff --git )", whole, flags=re.MULTILINE) if part]


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


@cache
def _warn_once(sentence: str) -> None:
    if multiprocessing.parent_process() is None:  # else the study that began this process has said it
        logger.warning(sentence)
