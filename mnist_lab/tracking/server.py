"""`make server`: MLflow's tracking server for a team, on PostgreSQL, with the artifacts by way of the server."""

from __future__ import annotations

import base64
import configparser
import contextlib
import ipaddress
import os
import secrets
import shlex
import socket
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from mnist_lab.errors import LabError, text_of, without_password
from mnist_lab.paths import ARTIFACTS, EXPERIMENT_NAME
from mnist_lab.tracking import postgres, serving, ui, view

PASSWORD_VARIABLE = "MLFLOW_AUTH_ADMIN_PASSWORD"  # noqa: S105 - the name of a variable, MLflow's own
PASSWORD_FILE = "admin_password"  # noqa: S105 - the name of a file
PASSWORD_LENGTH = 12  # characters that MLflow asks for
# Everyone who has a password may read and log; what may be deleted is MLflow's own rule.
PERMISSION = "EDIT"
# Seconds for which a worker takes a password as right that was: checking one costs more than all else of a request.
PASSWORD_CACHE = 60
FAMILIES = (socket.AF_INET, socket.AF_INET6)


@dataclass(frozen=True)
class Settings:
    """What the server is asked to be.

    backend_store_uri: of a database of PostgreSQL; without one, the server has its own in `folder`.
    folder: where the artifacts are, and what else it keeps of its own.
    """

    folder: Path
    host: str = "127.0.0.1"
    port: int = 5000
    workers: int = 2
    auth: bool = False
    backend_store_uri: str | None = None

    def check(self) -> None:
        """Refuse what can be refused before anything starts; raises LabError."""
        serving.check_port(self.port)
        if not serving.is_free(self.host, self.port):
            raise LabError(f"port: {self.port} is taken; name another with --port")
        password = os.environ.get(PASSWORD_VARIABLE)
        if self.auth and password is not None and len(password) < PASSWORD_LENGTH:
            raise LabError(f"{PASSWORD_VARIABLE} has {len(password)} characters; give {PASSWORD_LENGTH} or more")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(self.host).is_loopback
        return self.host == "localhost"

    @property
    def everywhere(self) -> bool:
        """Whether the server listens on all addresses of this machine."""
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(self.host).is_unspecified
        return False

    @property
    def address(self) -> str:
        """What users give as their tracking URI."""
        return serving.url(socket.gethostname() if self.everywhere else self.host, self.port)

    def notices(self) -> list[str]:
        """Return what a user should know who lets other machines in."""
        if self.is_loopback:
            return []
        where = f"{self.host}:{self.port}"
        if self.auth:
            return [f"Passwords and figures cross the network to {where} unencrypted: see docs/server.md."]
        return [f"No password is asked for: whoever reaches {where} can read, change and delete the runs (see --auth)."]


def serve(settings: Settings) -> None:
    """Serve until interrupted; print what to set when the server is there. Ends all that it started.

    Raises LabError if the database or the server does not start, or ends by itself.
    """
    settings.check()
    for notice in settings.notices():
        print(notice, file=sys.stderr, flush=True)
    given, folder = settings.backend_store_uri, settings.folder
    with contextlib.nullcontext(postgres.named(given)) if given else postgres.own(folder / "postgres") as database:
        experiment_id = _experiment(database.uri)
        flags = ["--workers", str(settings.workers), "--serve-artifacts"]
        flags += ["--artifacts-destination", str((folder / ARTIFACTS).absolute())]
        environment = {"MLFLOW_BACKEND_STORE_URI": database.uri}  # others can read a command line, passwords included
        if "MLFLOW_SERVER_ALLOWED_HOSTS" not in os.environ and not settings.is_loopback:
            environment["MLFLOW_SERVER_ALLOWED_HOSTS"] = ",".join(_names(settings))
        with _passwords(settings, database.uri) as (admin, more):
            serving.serve(
                settings.host,
                settings.port,
                [*flags, "--app-name", "basic-auth" if admin else ui.APP],
                {**environment, **more},
                lambda: _lines(settings, experiment_id, admin),
                {"PostgreSQL": database.process} if database.process else {},
            )


def _experiment(uri: str) -> str:
    """Return the id of the lab's experiment, made if it is not there, whose artifacts go by way of the server.

    It is made here and not by the first user: with passwords, that one would own it.
    """
    from mlflow.exceptions import MlflowException  # which takes seconds to import
    from sqlalchemy.exc import SQLAlchemyError

    from mnist_lab.tracking.store import experiment_of

    name = without_password(uri)
    try:
        experiment = experiment_of(uri, f"mlflow-artifacts:/{EXPERIMENT_NAME}")
    except (MlflowException, SQLAlchemyError) as error:
        said = without_password(text_of(error))
        raise LabError(f"backend store {name!r} can't be used: {said}") from error
    location = experiment.artifact_location
    if location.startswith("file:") or ":" not in location:
        raise LabError(
            f"backend store {name!r}: its experiment {EXPERIMENT_NAME!r} keeps the artifacts in a folder of one "
            f"machine, {location}; name another database"
        )
    return str(experiment.experiment_id)


@dataclass(frozen=True)
class _Admin:
    """The one user that the server makes: a name, a password, and how a shell gets the password without showing it."""

    name: str
    password: str
    in_shell: str
    new_file: Path | None = None


@contextlib.contextmanager
def _passwords(settings: Settings, uri: str) -> Iterator[tuple[_Admin | None, dict[str, str]]]:
    """Give the admin and the variables by which MLflow asks for passwords: neither is in any command line.

    The users are in the same database. Its URI goes to MLflow in a file that is there while the server runs.
    """
    if not settings.auth:
        yield None, {}
        return
    admin = _admin(settings.folder)
    config = configparser.ConfigParser(interpolation=None)
    config["mlflow"] = {
        "default_permission": PERMISSION,
        "database_uri": uri.replace("%", "%%"),  # as MLflow reads it
        "auth_cache_ttl_seconds": str(PASSWORD_CACHE),
    }
    with tempfile.TemporaryDirectory(prefix="mnist-lab-") as folder:  # which no other user can enter
        file = Path(folder) / "auth.ini"
        with file.open("w") as content:
            config.write(content)
        yield (
            admin,
            {
                "MLFLOW_AUTH_CONFIG_PATH": str(file),
                "MLFLOW_AUTH_ADMIN_USERNAME": admin.name,
                PASSWORD_VARIABLE: admin.password,
                "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
            },
        )


def _admin(folder: Path) -> _Admin:
    name = os.environ.get("MLFLOW_AUTH_ADMIN_USERNAME") or "admin"
    if password := os.environ.get(PASSWORD_VARIABLE):
        return _Admin(name, password, f"${PASSWORD_VARIABLE}")
    file = (folder / PASSWORD_FILE).absolute()
    in_shell = f"$(cat {shlex.quote(str(file))})"
    try:
        if file.exists():
            return _Admin(name, file.read_text().strip(), in_shell)
        folder.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        password = secrets.token_urlsafe(18)
        file.write_text(f"{password}\n")
    except OSError as error:
        raise LabError(f"the admin's password can't be kept in {file}: {error.strerror}") from error
    return _Admin(name, password, in_shell, new_file=file)


def _is_known(settings: Settings, admin: _Admin) -> bool:
    """Say whether the admin's password is the one that the server knows; it is set once, with the first start."""
    user = base64.b64encode(f"{admin.name}:{admin.password}".encode()).decode()
    version = f"{serving.url(settings.host, settings.port)}/version"
    asked = urllib.request.Request(version, headers={"Authorization": f"Basic {user}"})  # noqa: S310 - http
    try:
        with urllib.request.urlopen(asked, timeout=serving.START_TIMEOUT):  # noqa: S310 - this program's own server
            return True
    except urllib.error.HTTPError as error:
        if error.code != 401:
            raise
        return False


def _lines(settings: Settings, experiment_id: str, admin: _Admin | None) -> list[str]:
    """Return what the user is told when the server is there."""
    runs = f"/#/experiments/{experiment_id}/runs?{view.VIEW}" if admin else ui.PATH
    lines = [f"The runs: {settings.address}{runs}", f"export MLFLOW_TRACKING_URI={settings.address}"]
    if admin is not None:
        password = f'"{admin.in_shell}"'
        if not _is_known(settings, admin):
            if admin.new_file is not None:
                admin.new_file.unlink()
            password = "...  # the one that was set when this database was first served, or later in MLflow"  # noqa: S105
        lines += [f"export MLFLOW_TRACKING_USERNAME={admin.name}", f"export MLFLOW_TRACKING_PASSWORD={password}"]
    return lines


def _names(settings: Settings) -> list[str]:
    """Return the names by which other machines may call the server; to others it gives no answer."""
    names = ["localhost", "127.0.0.1", settings.host]
    if settings.everywhere:
        addresses = [one.address for ones in psutil.net_if_addrs().values() for one in ones if one.family in FAMILIES]
        names = ["localhost", socket.gethostname(), socket.getfqdn(), *addresses]
    return [f"[{name}]:{settings.port}" if ":" in name else f"{name}:{settings.port}" for name in dict.fromkeys(names)]
