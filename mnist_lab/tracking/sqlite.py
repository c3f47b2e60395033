"""A store's database: whether it can be read and written, and is where it was made; the points of many runs at once.

Light to import: who waits for `make ui` does not wait for MLflow.
"""

import errno
import importlib.metadata
import os
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import product
from pathlib import Path

from mnist_lab.errors import LabError
from mnist_lab.paths import ARTIFACTS, CHECKPOINTS, EXPERIMENT_NAME, LOCKS, artifacts_of, sqlite_file

ROOM = 4 * 2**20  # bytes that must be free before a run; one leaves about 1 MB, and the largest network's 5
# Where MLflow records paths of artifacts.
LOCATIONS = (
    *(("experiments", "artifact_location"), ("runs", "artifact_uri"), ("logged_models", "artifact_location")),
    *(("model_versions", "source"), ("model_versions", "storage_location")),
)
# The limits of a tracking server's route for the histories of several runs, which its own UI uses.
RUNS_PER_REQUEST, POINTS_PER_REQUEST = 100, 25_000

Point = tuple[str, str, int, float | None]  # run id, metric, epoch, value; None stands for NaN


def check_readable(uri: str) -> None:
    """Refuse a SQLite store that is not there or not MLflow's, which MLflow itself would make into one."""
    if (file := sqlite_file(uri)) is None:
        return
    with _connection(file, "ro", "read") as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not {"alembic_version", "experiments", "runs"} <= tables:
            raise LabError(f"tracking store {file} is not an MLflow database")
        versions = [version for (version,) in connection.execute("SELECT version_num FROM alembic_version")]
    if not known_schemas().issuperset(versions):
        newer = f"a newer MLflow than {importlib.metadata.version('mlflow')}, which can't read it"
        advice = "install that one, or go back to the copy made before (docs/metrics.md)"
        raise LabError(f"tracking store {file} was last used by {newer}: {advice}")


def check_writable(uri: str) -> None:
    """Refuse a SQLite store that is not MLflow's, or that a run could not be written to; nothing is changed or left."""
    if (file := sqlite_file(uri)) is None:
        return
    tried = file
    try:
        is_there = file.exists()
        for folder in (file.parent, *(file.parent / name for name in (ARTIFACTS, CHECKPOINTS, LOCKS))):
            tried = next(path for path in (folder, *folder.parents) if path.exists())
            with tempfile.TemporaryFile(dir=tried) as probe:  # without a name, where Linux can
                probe.write(os.urandom(ROOM))
        tried = file  # before SQLite is asked, which would leave a log as read-only as the file
        # Not by opening it: to close it would free the locks that SQLite has on it for this process.
        if is_there and not os.access(file, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        reason = f"{tried} can't be written: {error.strerror}{_advice(error)}"
        raise LabError(f"tracking store {file} can't be used: {reason}") from error
    if is_there:
        check_readable(uri)
        with _connection(file, "rw", "written") as connection:
            connection.executescript("BEGIN IMMEDIATE; CREATE TABLE probe (x); ROLLBACK")


def follow_move(uri: str) -> None:
    """Correct the absolute paths that MLflow records in a SQLite store that was moved or copied; raises LabError."""
    if (file := sqlite_file(uri)) is None:
        return
    new = artifacts_of(file)
    with _connection(file, "ro", "read") as connection:
        query = "SELECT artifact_location FROM experiments WHERE name = ?"
        old = next((location for (location,) in connection.execute(query, (EXPERIMENT_NAME,))), "")
        if old == new or not old.startswith("file:") or not old.endswith(f"/{ARTIFACTS}"):
            return  # the user has chosen another folder
        uris = [uri for (uri,) in connection.execute("SELECT artifact_uri FROM runs") if uri.startswith(old)]
    if uris and not any((file.resolve().parent / ARTIFACTS / uri[len(old) + 1 :]).exists() for uri in uris):
        return  # the artifacts were not moved
    with _connection(file, "rw", "corrected, though it was moved and so its artifacts are not found") as connection:
        connection.execute("BEGIN IMMEDIATE")
        for table, column in LOCATIONS:
            connection.execute(
                f"UPDATE {table} SET {column} = :new || substr({column}, length(:old) + 1) "  # noqa: S608
                f"WHERE substr({column} || '/', 1, length(:old) + 1) = :old || '/'",
                {"new": new, "old": old},
            )
        connection.execute("COMMIT")


def known_schemas() -> set[str]:
    """Return the versions of its database that the installed MLflow knows, without importing it; that takes seconds."""
    package = importlib.metadata.distribution("mlflow").locate_file("mlflow")
    files = Path(str(package), "store", "db_migrations", "versions").glob("*_*.py")
    return {file.name.partition("_")[0] for file in files}


@contextmanager
def _connection(file: Path, mode: str, purpose: str) -> Iterator[sqlite3.Connection]:
    """Open an existing database in the mode "ro" or "rw", and turn what goes wrong with it into a sentence."""
    uri = f"{file.as_uri()}?mode={mode}"
    try:
        if not file.exists():
            raise LabError(f"no runs yet: {file} does not exist; train first, e.g. `make step1`")
        if not file.is_file():
            raise LabError(f"tracking store {file} is not a file")
        with closing(sqlite3.connect(uri, timeout=4, isolation_level=None, uri=True)) as connection:
            yield connection
    except (OSError, sqlite3.Error) as error:  # the first of a folder on the way that this user may not enter
        raise LabError(f"tracking store {file} can't be {purpose}: {error}{_advice(error)}") from error


def _advice(error: OSError | sqlite3.Error) -> str:
    code = getattr(error, "errno", None) or getattr(error, "sqlite_errorname", "").removeprefix("SQLITE_").split("_")[0]
    if code in ("BUSY", "LOCKED"):
        return "; another program has locked it: wait for that program or end it, then try again"
    if code in ("FULL", errno.ENOSPC, errno.EDQUOT):
        return "; a run needs a few megabytes there: make room, or name another store with --tracking-uri"
    if code in ("READONLY", "CANTOPEN", "PERM", errno.EACCES, errno.EPERM, errno.EROFS):
        return "; make it and its folder writable, copy the folder, or name another store with --tracking-uri"
    return ""


# ---- points: MLflow's client asks for one run and one metric at a time


def read_points(uri: str, epochs: Mapping[str, int], metrics: Sequence[str]) -> list[Point]:
    """Return every point of these metrics, in the order of logging; MlflowException, SQLAlchemyError or OSError.

    epochs: the runs' numbers of epochs by run id; they bound what a server is asked for at a time.
    """
    if not uri.startswith(("http://", "https://")):
        from mlflow.store.tracking.dbmodels.models import SqlMetric as Logged  # slow to import
        from sqlalchemy import NullPool, case, create_engine, select

        value = case((Logged.is_nan, None), else_=Logged.value)
        columns = select(Logged.run_uuid, Logged.key, Logged.step, value).order_by(Logged.timestamp)
        query = columns.where(Logged.run_uuid.in_(epochs), Logged.key.in_(metrics))
        with create_engine(uri, poolclass=NullPool).connect() as connection:
            return [tuple(row) for row in connection.execute(query)]

    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    route = "/ajax-api/2.0/mlflow/metrics/get-history-bulk"
    found: list[Point] = []
    run_ids, most = list(epochs), max(epochs.values(), default=1)
    at_a_time = max(1, min(RUNS_PER_REQUEST, POINTS_PER_REQUEST // (2 * most)))
    for first, metric in product(range(0, len(run_ids), at_a_time), metrics):
        params = {"run_id": run_ids[first : first + at_a_time], "metric_key": metric}
        response = http_request(get_default_host_creds(uri), route, "GET", params=params)  # type: ignore[no-untyped-call]
        response.raise_for_status()
        points = response.json()["metrics"]
        found += [(one["run_id"], one["key"], int(one["step"]), float(one["value"])) for one in points]
    return found
