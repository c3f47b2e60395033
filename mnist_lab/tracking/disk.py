"""Files that are replaced whole: a reader or a power cut finds the old one or the new one whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path


def replace_files(contents: Mapping[Path, str | bytes]) -> None:
    """Write these files; folders that are missing are made. Text is written as UTF-8 whatever the locale is.

    None is replaced before all are on the disk. A link to a file stays one. Raises OSError if they can't be written;
    then the old files are as they were.
    """
    new: dict[Path, Path] = {}
    try:
        for file, content in contents.items():
            target = file.resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            new[target] = target.with_name(f"{target.name}.{os.getpid()}.new")
            try:
                new[target].write_bytes(content.encode() if isinstance(content, str) else content)
                sync_to_disk(new[target])
            except OSError as error:
                error.filename = str(file)  # a full disk is said without it
                raise
            with suppress(FileNotFoundError):
                shutil.copymode(target, new[target])
        for target, written in new.items():
            written.replace(target)
        for folder in {target.parent for target in new}:
            sync_to_disk(folder)
    finally:
        for written in new.values():
            with suppress(OSError):
                written.unlink()


def sync_to_disk(path: Path) -> None:
    """Make what was written to a file, or renamed in a folder, last through a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
