"""Whether a SQLite store can be read and written, and is where it was made. Standard library only."""

from __future__ import annotations

import errno
import importlib.metadata
import importlib.util
import os
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mnist_lab.errors import LabError
from mnist_lab.paths import ARTIFACTS, CHECKPOINTS, EXPERIMENT_NAME, LOCKS, artifacts_of, sqlite_file

BUSY_TIMEOUT = 4  # seconds that a lock on the database is waited for
ROOM = 4 * 2**20  # bytes that must be free before a run; one leaves about 1 MB, and the largest network's 5
# Where MLflow records paths of artifacts.
LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def check_readable(uri: str) -> None:
    """Refuse a SQLite store that is not there or not MLflow's, which MLflow itself would make into one."""
    file = sqlite_file(uri)
    if file is None:
        return
    try:
        if not file.exists():
            raise LabError(f"no runs yet: {file} does not exist; train first, e.g. `make step1`")
        if not file.is_file():
            raise LabError(f"tracking store {file} is not a file")
    except OSError as error:  # a folder on the way that this user may not enter
        raise LabError(f"tracking store {file} can't be read: {error.strerror}") from error
    with _connection(file, "ro", "read") as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not {"alembic_version", "experiments", "runs"} <= tables:
            raise LabError(f"tracking store {file} is not an MLflow database")
        versions = [version for (version,) in connection.execute("SELECT version_num FROM alembic_version")]
    if (known := known_schemas()) and not known.issuperset(versions):
        raise LabError(
            f"tracking store {file} was last used by a newer MLflow than {importlib.metadata.version('mlflow')}, which "
            "can't read it: install that one, or go back to the copy made before (docs/metrics.md)"
        )


def check_writable(uri: str) -> None:
    """Refuse a SQLite store that is not MLflow's, or that a run could not be written to; nothing is changed or left.

    The database and the folders of artifacts, checkpoints and locks are tried, with room for a run. Raises LabError.
    """
    file = sqlite_file(uri)
    if file is None:
        return
    folders = [file.parent, file.parent / CHECKPOINTS, file.parent / LOCKS]
    if _is_there(file):
        for path in (file, file.parent):  # before SQLite is asked, which would leave a log as read-only as the file
            if not os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
                said = f"{path} is read-only for you{_advice(OSError(errno.EACCES, ''))}"
                raise LabError(f"tracking store {file} can't be written: {said}")
        check_readable(uri)
        with _connection(file, "rw", "written") as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("CREATE TABLE probe (x)")  # a read-only file lets one begin, where it has a log
            connection.execute("ROLLBACK")
            artifacts = _folder_of(_recorded(connection))
    else:
        artifacts = file.parent / ARTIFACTS
    for folder in dict.fromkeys(_existing(folder) for folder in [*folders, artifacts] if folder):
        try:
            with tempfile.TemporaryFile(dir=folder, buffering=0) as probe:  # without a name, where Linux can
                if probe.write(os.urandom(ROOM)) < ROOM:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise LabError(
                f"tracking store {file} can't be used: {folder} can't be written: {error.strerror}{_advice(error)}"
            ) from error


def has_experiment(uri: str, tags: Mapping[str, str]) -> bool:
    """Say whether a SQLite store is there, is where it was made, and has the lab's experiment with these tags.

    Raises LabError if it can't be read or written.
    """
    file = sqlite_file(uri)
    if file is None or not _is_there(file):
        return False
    check_writable(uri)
    follow_move(uri)
    query = (
        "SELECT key, value FROM experiment_tags JOIN experiments USING (experiment_id) "
        "WHERE name = ? AND lifecycle_stage = 'active'"
    )
    with _connection(file, "ro", "read") as connection:
        return tags.items() <= dict(connection.execute(query, (EXPERIMENT_NAME,)).fetchall()).items()


def follow_move(uri: str) -> None:
    """Correct the paths of artifacts in a SQLite store that was moved or copied with its `artifacts/`.

    MLflow records absolute paths. Nothing changes on a server, in a folder that the lab would not have chosen, or where
    the database was moved without its artifacts. Raises LabError.
    """
    file = sqlite_file(uri)
    if file is None:
        return
    new = artifacts_of(file)
    with _connection(file, "ro", "read") as connection:
        old = _former_artifacts(connection, new)
    if old is None:
        return
    with _connection(file, "rw", "corrected, though it was moved and so its artifacts are not found") as connection:
        connection.execute("BEGIN IMMEDIATE")
        for table, column in LOCATIONS:
            connection.execute(
                f"UPDATE {table} SET {column} = :new || substr({column}, length(:old) + 1) "  # noqa: S608
                f"WHERE {column} = :old OR substr({column}, 1, length(:old) + 1) = :old || '/'",
                {"new": new, "old": old},
            )
        connection.execute("COMMIT")


def _former_artifacts(connection: sqlite3.Connection, new: str) -> str | None:
    """Return where the artifacts are said to be, if they are in the folder `new`."""
    old = _recorded(connection)
    if old == new or not old.startswith("file:") or not old.endswith(f"/{ARTIFACTS}"):
        return None
    query = "SELECT substr(artifact_uri, length(:old) + 2) FROM runs WHERE substr(artifact_uri, 1, length(:old)) = :old"
    runs = [run for (run,) in connection.execute(query, {"old": old})]
    here = _folder_of(new)
    return old if here and (not runs or any((here / run).exists() for run in runs)) else None


def known_schemas() -> set[str]:
    """Return the versions of its database that the installed MLflow knows, without importing it; that takes seconds."""
    spec = importlib.util.find_spec("mlflow")
    assert spec is not None
    assert spec.origin is not None
    files = (Path(spec.origin).parent / "store" / "db_migrations" / "versions").glob("*_*.py")
    return {file.name.partition("_")[0] for file in files}


def _recorded(connection: sqlite3.Connection) -> str:
    """Return the location that is recorded for the artifacts of new runs; empty where there is none."""
    query = "SELECT artifact_location FROM experiments WHERE name = ?"
    return next((location for (location,) in connection.execute(query, (EXPERIMENT_NAME,))), "")


def _folder_of(location: str) -> Path | None:
    """Return the folder that a location means, or None where it is no folder of this machine."""
    if location.startswith("file:"):
        return Path(unquote(urlsplit(location).path))
    return Path(location) if location.startswith("/") else None


def _existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.parents) if _is_there(path))


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # in a folder that this user may not enter
        return False


@contextmanager
def _connection(file: Path, mode: str, purpose: str) -> Iterator[sqlite3.Connection]:
    """Open an existing database in the mode "ro" or "rw", and turn what goes wrong with it into a sentence."""
    try:
        with closing(
            sqlite3.connect(f"{file.as_uri()}?mode={mode}", uri=True, timeout=BUSY_TIMEOUT, isolation_level=None)
        ) as connection:
            yield connection
    except sqlite3.Error as error:
        raise LabError(f"tracking store {file} can't be {purpose}: {error}{_advice(error)}") from error


def _advice(error: OSError | sqlite3.Error) -> str:
    """Say what to do about it, in the rest of a sentence."""
    code = getattr(error, "errno", None) or getattr(error, "sqlite_errorname", "").removeprefix("SQLITE_").split("_")[0]
    if code in ("BUSY", "LOCKED"):
        return "; another program has locked it: wait for that program or end it, then try again"
    if code in ("FULL", errno.ENOSPC, errno.EDQUOT):
        return "; a run needs a few megabytes there: make room, or name another store with --tracking-uri"
    if code in ("READONLY", "CANTOPEN", "PERM", errno.EACCES, errno.EPERM, errno.EROFS):
        return "; make it and its folder writable, copy the folder, or name another store with --tracking-uri"
    return ""
