"""Where the runs are kept: the tracking URI, and whether a SQLite file is there to be read. Standard library only."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from mnist_lab.errors import LabError

EXPERIMENT_NAME = "mnist"  # the one MLflow experiment that holds all runs
UI_VIEW = "lab"  # the name of the columns that the MLflow UI shows
PROJECT_ROOT = Path(__file__).resolve().parents[1]
SQLITE = "sqlite:///"


def tracking_uri(given: str | None = None) -> str:
    """Return the URI given, else MLFLOW_TRACKING_URI, else the project's own `mlruns/mlflow.db`.

    A SQLite path comes back absolute, so that it means the same file whatever the current folder is later.

    Raises:
        LabError: if a SQLite URI names no file, or one that MLflow would read as another.
    """
    uri = given or os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}{PROJECT_ROOT / 'mlruns' / 'mlflow.db'}"
    file = sqlite_file(uri)
    if file is None:
        if uri.startswith("sqlite:"):
            raise LabError(f"tracking store {uri!r} names no file; give {SQLITE}<path>/mlflow.db")
        return uri
    if "%" in str(file) or "?" in str(file):
        raise LabError(
            f"tracking store {str(file)!r}: % and ? have a meaning of their own in a URI; choose another path"
        )
    return f"{SQLITE}{file}"


def sqlite_file(uri: str) -> Path | None:
    """Return the absolute path of a SQLite store's database, or None for a store of another kind."""
    path = uri.removeprefix(SQLITE)
    return Path(path).absolute() if path and path != uri else None


def own_folder(uri: str) -> Path:
    """Return where the lab keeps what is its own of a store: beside the database, or in this project's `mlruns`."""
    database = sqlite_file(uri)
    return database.parent if database else PROJECT_ROOT / "mlruns"


def check_readable(uri: str) -> None:
    """Refuse a SQLite store that is not there or not MLflow's; MLflow itself would make one of it.

    Raises:
        LabError: with what to do.
    """
    file = sqlite_file(uri)
    if file is None:
        return
    if not file.exists():
        raise LabError(f"no runs yet: {file} does not exist; train first, e.g. `make step1`")
    if not file.is_file():
        raise LabError(f"tracking store {file} is not a file")
    try:
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.Error as error:
        raise LabError(f"tracking store {file} can't be read: {error}") from error
    if not {"alembic_version", "experiments", "runs"} <= tables:
        raise LabError(f"tracking store {file} is not an MLflow database")
