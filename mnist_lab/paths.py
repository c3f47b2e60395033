"""Where things are: the project, the tracking store, and the lab's own folders beside it."""

import os
import re
from pathlib import Path

from mnist_lab.errors import LabError

PROJECT_ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = PROJECT_ROOT / "experiments"
PUBLISHED = PROJECT_ROOT / "docs" / "results"  # the committed figures
SQLITE = "sqlite:///"
EXPERIMENT_NAME = "mnist"  # the one MLflow experiment that holds all runs
# Folders beside a SQLite database; all but the first are in the project's `mlruns` where a server has the runs.
ARTIFACTS, CHECKPOINTS, LOCKS = "artifacts", "checkpoints", "locks"
SEARCHES = "searches.db"  # Optuna's database, in the same place
OWN_FOLDER = "MNIST_LAB_MLRUNS"  # names that folder for a server's runs, e.g. one that several machines share
# What stands before the last @ of a URI: a user name and a password, as RFC 3986 has them written.
USER_INFO = re.compile(r"[\w.~!$&()*+,;=:%-]*", re.ASCII)


def tracking_uri(given: str | None = None) -> str:
    """Return the URI given, else MLFLOW_TRACKING_URI, else the project's own `mlruns/mlflow.db`.

    A SQLite path comes back absolute. LabError if a SQLite URI names no file, or one that MLflow would read as another;
    if a user name or password holds characters that a URI can't.
    """
    uri = given or os.environ.get("MLFLOW_TRACKING_URI") or own_store()
    if file := sqlite_file(uri):
        if {"%", "?"} & {*str(file)}:
            raise LabError(f"tracking store {str(file)!r}: % and ? have another meaning in a URI; choose another path")
        return f"{SQLITE}{file}"
    # It is not shown, as it may be a database's words with a password.
    if uri.startswith(("sqlite:", "file:")) or ("://" not in uri and uri != "databricks"):
        raise LabError(f"tracking store: the URI is none; give {SQLITE}<path>/mlflow.db or http://<host>:<port>")
    scheme, _, rest = uri.partition("://")
    if not USER_INFO.fullmatch(rest.rpartition("@")[0]):
        others = "other characters than letters, digits and _.~!$&()*+,;=- in its user name and password"
        raise LabError(f"tracking store {scheme}://...: write {others} as %XX, e.g. %40 for @")
    return uri


def own_store() -> str:
    return f"{SQLITE}{PROJECT_ROOT / 'mlruns' / 'mlflow.db'}"


def sqlite_file(uri: str) -> Path | None:
    """Return the absolute path of a SQLite store's database, or None for a store of another kind."""
    path = uri.removeprefix(SQLITE)
    return Path(path).absolute() if path and path != uri else None


def is_there(uri: str) -> bool:
    """Say whether a store is there, as far as this machine's files tell: MLflow would make one."""
    file = sqlite_file(uri)
    return file is None or file.exists()


def own_folder(uri: str) -> Path:
    """Return the lab's own folder for a store: the database's, else MNIST_LAB_MLRUNS, else the project's `mlruns`."""
    database = sqlite_file(uri)
    return database.parent if database else Path(os.environ.get(OWN_FOLDER) or PROJECT_ROOT / "mlruns").absolute()


def artifacts_of(database: Path) -> str:
    """Return the location of the artifacts that belong to a SQLite database: a folder beside it."""
    return (database.resolve().parent / ARTIFACTS).as_uri()


def own_files(uri: str) -> list[Path]:
    """Return the files and folders, there or not, that MLflow and the lab write for a store."""
    folders = [own_folder(uri) / name for name in (ARTIFACTS, CHECKPOINTS, LOCKS)]
    databases = [database for database in (sqlite_file(uri), own_folder(uri) / SEARCHES) if database]
    endings = ("", "-wal", "-shm", "-journal", ".lock", ".new")
    return folders + [database.with_name(database.name + ending) for database in databases for ending in endings]


def script_named(name: str) -> str:
    """Return the name of the script that "step4" is short for, where there is one such script; else the name itself."""
    scripts = list(EXPERIMENTS.glob(f"{name}_*.py")) if re.fullmatch(r"step\d+", name) else []
    return scripts[0].stem if len(scripts) == 1 else name
