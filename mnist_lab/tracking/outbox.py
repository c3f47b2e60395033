"""What a tracking server did not take: kept on disk, record by record, until it is back. Nothing here knows MLflow."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mnist_lab.errors import LabError, without_password
from mnist_lab.paths import OUTBOX, own_folder
from mnist_lab.tracking.disk import replace_files, sync_to_disk

RECORD = "record.json"
TARGET = "target.json"


@dataclass(frozen=True)
class Record:
    """One thing to write into a run: what kind it is, its content as JSON can hold it, and a file or folder with it."""

    kind: str
    content: Mapping[str, Any]
    path: Path | None = None


class Outbox:
    """The records of one run that wait for its tracking server, in the order in which they were written.

    Each is a folder that is renamed into place when it is whole, so a crash leaves whole records only. A lock keeps two
    processes from sending the same run's; the system frees it when its process ends.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = FileLock(folder.with_suffix(".lock"), timeout=0)

    @classmethod
    def of_run(cls, uri: str, run_id: str) -> Outbox:
        """Return the outbox of a run; nothing is made on disk before the first record."""
        return cls(own_folder(uri) / OUTBOX / run_id)

    @property
    def run_id(self) -> str:
        return self.folder.name

    def target(self, uri: str) -> str:
        """Return the URI, without its password, of the records' store; raises LabError unless it is `uri`."""
        kept = _read(self.folder / TARGET)
        target = without_password(str(kept.get("uri")))
        if target.rstrip("/") != without_password(uri).rstrip("/"):
            raise LabError(f"they are for another store, {target!r}: name that with --tracking-uri if they are yours")
        if kept.get("run_id") != self.run_id:
            raise LabError(f"{self.folder / TARGET} names another run than the folder, {kept.get('run_id')!r}")
        return target

    def lock(self) -> bool:
        """Take the outbox for this process; False where another has it."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout:
            return False
        return True

    def unlock(self) -> None:
        """Let go of the outbox, and take away what is not needed any more."""
        if not self._lock.is_locked:
            return
        if not self.waiting():
            shutil.rmtree(self.folder, ignore_errors=True)
            Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()

    def add(self, uri: str, record: Record) -> None:
        """Keep a record, with a copy of its file or folder, so that it outlasts a power cut; raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / TARGET).exists():
            target = {"uri": without_password(uri), "run_id": self.run_id}
            replace_files({self.folder / TARGET: json.dumps(target)})
            sync_to_disk(self.folder.parent)
        last = max((int(entry.name) for entry in self.waiting()), default=0)
        entry = self.folder / f"{last + 1:06}"
        new = entry.with_suffix(".new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        if record.path is not None:
            copy = shutil.copytree if record.path.is_dir() else shutil.copy
            copy(record.path, new / record.path.name)
        name = None if record.path is None else record.path.name
        content = {"kind": record.kind, "content": dict(record.content), "path": name}
        (new / RECORD).write_text(json.dumps(content), encoding="utf-8")
        for path in [*new.rglob("*"), new]:
            sync_to_disk(path)
        new.rename(entry)
        sync_to_disk(self.folder)

    def waiting(self) -> list[Path]:
        """Return the entries of the records that wait, the oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(entry for entry in self.folder.iterdir() if entry.name.isdecimal())

    def read(self, entry: Path) -> Record:
        """Return the record of an entry; raises LabError if it is damaged, or has a file from outside the entry."""
        kept = _read(entry / RECORD)
        kind, content, name = (kept.get(key) for key in ("kind", "content", "path"))
        if not (isinstance(kind, str) and isinstance(content, dict)):
            raise LabError(f"record {entry} is damaged: it has no kind and content")
        if name is None:
            return Record(kind, content)
        if not isinstance(name, str) or name in ("", ".", "..", RECORD) or Path(name).name != name or "\0" in name:
            raise LabError(f"record {entry} names a file that is not its own, {name!r}")
        path = entry / name
        if foreign := [part for part in (entry, path, *path.rglob("*")) if not _is_own(part)]:
            raise LabError(f"record {entry} holds what is no file or folder of its own: {foreign[0]}")
        return Record(kind, content, path)

    def remove(self, entry: Path) -> None:
        """Forget a record that has been sent."""
        gone = entry.with_suffix(".sent")
        entry.rename(gone)  # first, so that no half of it is ever sent again
        shutil.rmtree(gone, ignore_errors=True)


def all_outboxes(uri: str) -> list[Outbox]:
    """Return the outboxes with something in them, of whatever server."""
    folder = own_folder(uri) / OUTBOX
    return [Outbox(path.parent) for path in sorted(folder.glob(f"*/{TARGET}"))]


def _is_own(path: Path) -> bool:
    """Say whether a path is a file or a folder, and no link to one, nor a pipe, at which a reader would wait."""
    return not path.is_symlink() and (path.is_file() or path.is_dir())


def _read(file: Path) -> dict[str, Any]:
    try:
        if not _is_own(file):
            raise ValueError("it is no file")
        kept = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LabError(f"{file} can't be read: {error}") from error
    if not isinstance(kept, dict):
        raise LabError(f"{file} can't be read: it does not hold names and values")
    return kept
