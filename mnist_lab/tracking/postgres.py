"""PostgreSQL for `make server`: one that a URI names, or one of the project's own that ends with the server."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from mnist_lab.errors import LabError, without_password
from mnist_lab.paths import tracking_uri
from mnist_lab.tracking import serving
from mnist_lab.tracking.sqlite import known_schemas

DRIVER = "postgresql+psycopg"
SCHEMES = ("postgresql", "postgres", DRIVER)  # the second is what hosting providers give
DEBIAN = "usr/lib/postgresql/*/bin"  # where Debian keeps the server's programs: not on the path
ACCOUNT = "postgres"  # the machine's user who runs the database where root runs this program; PostgreSQL refuses root
ROLE = "mnist_lab"  # the user within the database
SCHEMA_TABLE = "alembic_version"  # where MLflow keeps the version of its tables
CONNECTIONS = 200  # at most; a worker of MLflow keeps up to 15 for each of runs, models and users
CONNECT_TIMEOUT = 5  # seconds
START_TIMEOUT = 60  # of a database, which after a crash first reads its log
STOP_TIMEOUT = 30


@dataclass(frozen=True)
class Database:
    """A database that answers: its URI, as MLflow needs it, and PostgreSQL's process if it is the project's own."""

    uri: str
    process: subprocess.Popen[bytes] | None = None


def named(uri: str) -> Database:
    """Return the database that a URI names, if it answers, and is empty or MLflow's; raises LabError."""
    uri = tracking_uri(uri)
    scheme = uri.partition(":")[0]
    try:
        url = sqlalchemy.make_url(uri)
        if scheme not in SCHEMES:
            raise ArgumentError
    except (ArgumentError, ValueError) as error:
        said = without_password(uri) if "://" in uri else f"{scheme}:..."
        raise LabError(
            f"backend store {said!r} is no database of PostgreSQL: give postgresql://user:password@host:5432/database"
        ) from error
    uri = url.set(drivername=DRIVER).render_as_string(hide_password=False)
    if said := problem(uri):
        raise LabError(f"backend store {without_password(uri)!r} can't be used: {said}")
    return Database(uri)


@contextlib.contextmanager
def own(folder: Path) -> Iterator[Database]:
    """Run PostgreSQL on a folder, which is made on first use; its log is a file beside it.

    It listens on no port, but on a socket in a folder that only this user can enter, so it asks for no password.

    Raises:
        LabError: if PostgreSQL is not installed, or does not start there.
    """
    folder = folder.absolute()
    binaries, as_whom = programs(folder), account()
    with tempfile.TemporaryDirectory(prefix="mnist-lab-", ignore_cleanup_errors=True) as sockets:
        if as_whom:
            shutil.chown(sockets, as_whom["user"], as_whom["group"])
        if not folder.exists():
            _create(folder, binaries, sockets, as_whom)
        log = folder.with_name(f"{folder.name}.log")
        begin = log.stat().st_size if log.exists() else 0
        command = [str(binaries / "postgres"), "-D", str(folder), "-k", sockets, "-c", "listen_addresses="]
        command += ["-c", "unix_socket_permissions=0700", "-c", f"max_connections={CONNECTIONS}"]
        with log.open("ab") as messages:
            process = subprocess.Popen(
                command, cwd=sockets, stdout=messages, stderr=messages, text=False, start_new_session=True, **as_whom
            )
        try:
            url = sqlalchemy.URL.create(DRIVER, ROLE, database="postgres", query={"host": sockets})
            database = Database(url.render_as_string(), process)
            _wait_until_ready(database, folder, log, begin)
            yield database
        finally:
            with serving.signals_held_back():
                serving.stop(process, signal.SIGINT, STOP_TIMEOUT)  # to PostgreSQL: end all sessions, write, stop


def _create(folder: Path, binaries: Path, cwd: str, as_whom: Mapping[str, Any]) -> None:
    """Make the folder under another name first: a process that is killed half-way leaves nothing that counts."""
    new = folder.with_name(f"{folder.name}.new")
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700, parents=True)
        if as_whom:
            shutil.chown(new, as_whom["user"], as_whom["group"])
        command = [str(binaries / "initdb"), "-D", str(new), "--username", ROLE, "--encoding", "UTF8", "--no-locale"]
        command += ["--auth-local", "trust", "--auth-host", "reject"]
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, errors="replace", **as_whom)
        if done.returncode:
            said = " ".join(line for line in done.stderr.splitlines() if "error" in line or "hint" in line.lower())
            advice = (
                f"; the user {ACCOUNT!r}, as whom PostgreSQL runs here, must be able to enter it" if as_whom else ""
            )
            raise LabError(f"folder {folder}: PostgreSQL can't make a database there: {said}{advice}")
        new.rename(folder)
    except OSError as error:
        raise LabError(f"folder {folder} can't be made: {error.strerror}") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def programs(folder: Path) -> Path:
    """Return the folder of PostgreSQL's programs that fit a database: of its own version, or the newest for a new one.

    Raises:
        LabError: if they are not installed, or the folder is no database.
    """
    on_path = shutil.which("postgres")
    found = [Path(on_path).resolve().parent] if on_path else []
    found += [path for path in Path("/").glob(DEBIAN) if (path / "postgres").exists()]
    versions = {path: _version(path / "postgres") for path in found}
    if not versions:
        raise LabError(
            "PostgreSQL is not installed: install it (on Debian and Ubuntu: apt-get install postgresql), or name a "
            "database with --backend-store-uri postgresql://user:password@host:5432/database"
        )
    newest = max(versions, key=lambda path: versions[path])
    if not folder.exists():
        return newest
    try:
        wanted = int((folder / "PG_VERSION").read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise LabError(f"folder {folder} is no database of PostgreSQL, or of a version before 10") from error
    except OSError as error:
        raise LabError(f"folder {folder} can't be read: {error.strerror}") from error
    fitting = [path for path, version in versions.items() if version == wanted]
    if not fitting:
        raise LabError(
            f"folder {folder} is a database of PostgreSQL {wanted}, and {versions[newest]} is installed here: install "
            f"that version (on Debian and Ubuntu: apt-get install postgresql-{wanted}), or upgrade it by pg_upgrade"
        )
    return fitting[0]


def _version(program: Path) -> int:
    said = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"\) (\d+)", said)  # "postgres (PostgreSQL) 15.18 (Debian 15.18-0)"
    return int(found[1]) if found else 0


def account() -> dict[str, Any]:
    """Return, for `subprocess`, as whom PostgreSQL is to run: nothing where that is this user; raises LabError."""
    if os.geteuid() != 0:
        return {}
    try:
        group = pwd.getpwnam(ACCOUNT).pw_gid
    except KeyError:
        raise LabError(
            f"PostgreSQL does not run as root, and this machine has no user {ACCOUNT!r}: start the server as another "
            "user, or name a database with --backend-store-uri"
        ) from None
    return {"user": ACCOUNT, "group": group, "extra_groups": []}


def _wait_until_ready(database: Database, folder: Path, log: Path, begin: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    assert database.process is not None
    while unready := problem(database.uri):
        if database.process.poll() is not None:
            said = log.read_bytes()[begin:].decode(errors="replace")
            reasons = re.findall(r"(?:FATAL|DETAIL|HINT): +(.*)", said)
            raise LabError(f"PostgreSQL did not start on {folder}: {' '.join(reasons) or f'see {log}'}")
        if time.monotonic() > deadline:
            raise LabError(f"PostgreSQL was not ready on {folder} after {START_TIMEOUT} seconds: {unready}")
        time.sleep(0.1)


def problem(uri: str) -> str:
    """Say why a database can't be used; nothing if it can."""
    engine = sqlalchemy.create_engine(uri, connect_args={"connect_timeout": CONNECT_TIMEOUT})
    try:
        with engine.connect() as connection:
            if not sqlalchemy.inspect(connection).has_table(SCHEMA_TABLE):
                return ""
            versions = set(connection.scalars(sqlalchemy.text(f"SELECT version_num FROM {SCHEMA_TABLE}")))  # noqa: S608
    except SQLAlchemyError as error:
        return without_password(" ".join(str(getattr(error, "orig", None) or error).split()))
    finally:
        engine.dispose()
    if known_schemas().issuperset(versions):
        return ""
    return "it is another program's, or was last used by a newer MLflow, which this one can't read"
