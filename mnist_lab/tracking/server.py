"""`make ui` and `make server`: MLflow's own server as a child of this program, for a team on PostgreSQL.

Without the processes for jobs, which the lab has none of, it is ready in 4 s with 0.4 GB, instead of 8 s and 1.8 GB.
"""

import errno
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any

import psutil

from mnist_lab.errors import LabError, one_line, without_password
from mnist_lab.paths import ARTIFACTS, EXPERIMENT_NAME, is_there, tracking_uri
from mnist_lab.tracking.sqlite import check_writable, follow_move, known_schemas
from mnist_lab.tracking.view import VIEW

HOST = "127.0.0.1"
PORTS_TRIED = 20
# Beside the server, waits for the end of its input, which is that of this program, however it ends. Then ends the
# process group $0; by force where it is there a second later.
GUARD = 'cat; kill -s TERM -- "-$0"; sleep 1; kill -s KILL -- "-$0"'

APP, PATH = "mnist-lab", "/lab"  # the entry point in pyproject.toml that names `make_app`, and its page
DRIVER = "postgresql+psycopg"
ADMIN_VARIABLE, LEAST_PASSWORD = "MLFLOW_AUTH_ADMIN_PASSWORD", 12  # MLflow's own name and number of characters
# Whoever has a password may read and log; what may be deleted is MLflow's own rule. A worker takes a password that was
# right as right for a minute: checking one costs more than all else of a request.
AUTH_INI = """[mlflow]
admin_username = admin
default_permission = EDIT
auth_cache_ttl_seconds = 60
database_uri = {uri}
"""


def serve_ui(uri: str, port: int) -> None:
    """Serve the runs in a SQLite store, made if it is not there, on loopback until interrupted; raises LabError."""
    check_writable(uri)
    if is_there(uri):
        follow_move(uri)
    else:
        from mnist_lab.tracking.store import open_store  # which takes seconds to import

        open_store(uri)
    os.environ["MLFLOW_BACKEND_STORE_URI"] = uri
    os.environ.setdefault("MLFLOW_SERVER_ALLOWED_HOSTS", "localhost,localhost:*,127.0.0.1,127.0.0.1:*")
    _run_mlflow(HOST, port, ["--workers", "1", "--app-name", APP], [f"The runs: {_url(HOST, port)}{PATH}"])


def serve(host: str, port: int, folder: Path, workers: int, *, auth: bool, database: str) -> None:
    """Serve MLflow to a team until interrupted, with artifacts in a folder and all else in PostgreSQL; LabError."""
    if not is_free(host, port):
        raise LabError(f"port: {port} is taken; name another with --port")
    if auth and len(os.environ.get(ADMIN_VARIABLE, "")) < LEAST_PASSWORD:
        raise LabError(f"auth: set {ADMIN_VARIABLE} to the admin's password, of {LEAST_PASSWORD} characters or more")
    uri, experiment_id = _prepare(database)
    os.environ["MLFLOW_BACKEND_STORE_URI"] = uri  # others can read a command line
    if host not in (HOST, "localhost", "::1"):
        print(f"Other machines reach {host}:{port}: docs/server.md says what is protected.", file=sys.stderr)
        own = [one.address for ones in psutil.net_if_addrs().values() for one in ones if one.family == socket.AF_INET]
        names = [host, "localhost", socket.gethostname(), socket.getfqdn(), *own]
        allowed = ",".join(_url(name, port).removeprefix("http://") for name in names)
        os.environ.setdefault("MLFLOW_SERVER_ALLOWED_HOSTS", allowed)
    url = _url(socket.gethostname() if host in ("0.0.0.0", "::") else host, port)  # noqa: S104
    page = f"/#/experiments/{experiment_id}/runs?{VIEW}" if auth else PATH
    lines = [f"The runs: {url}{page}", f"export MLFLOW_TRACKING_URI={url}"]
    if auth:
        file = folder.absolute() / "auth.ini"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch(mode=0o600)
            file.write_text(AUTH_INI.format(uri=uri.replace("%", "%%")))  # as MLflow reads it
        except OSError as error:
            raise LabError(f"folder {file.parent}: {file.name} can't be written: {error.strerror}") from error
        os.environ["MLFLOW_AUTH_CONFIG_PATH"] = str(file)
        os.environ["MLFLOW_FLASK_SERVER_SECRET_KEY"] = secrets.token_hex(32)
        lines += ["export MLFLOW_TRACKING_USERNAME=admin", f'export MLFLOW_TRACKING_PASSWORD="${ADMIN_VARIABLE}"']
    flags = ["--workers", str(workers), "--app-name", "basic-auth" if auth else APP]
    flags += ["--serve-artifacts", "--artifacts-destination", str(folder.absolute() / ARTIFACTS)]
    _run_mlflow(host, port, flags, lines)


# ---- MLflow's server


def make_app() -> Any:
    """Return MLflow's own application with one page more, for `mlflow server --app-name mnist-lab`."""
    from mlflow.server import app as routes  # slow to import, and the command that starts the server looks in here too
    from mlflow.server.fastapi_app import app as served

    # What two runs write at the same moment, one of them writes again (`TrackedRun._log_inputs`).
    logging.getLogger("psycopg").setLevel(logging.ERROR)
    page = Path(__file__).with_name("lab.html").read_text().replace("EXPERIMENT", EXPERIMENT_NAME).replace("VIEW", VIEW)
    routes.add_url_rule(PATH, "lab", lambda: page)
    return served


def _run_mlflow(host: str, port: int, flags: Sequence[str], lines: Sequence[str]) -> None:
    """Run `mlflow server` until interrupted, and print these lines when it is there; LabError if it does not last."""
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # whoever reads the output may be gone, and the server must still end
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), *flags]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment["PYTHONWARNINGS"] = "ignore"  # of its own libraries, which no user of the lab can heed
    child = partial(subprocess.Popen, start_new_session=True, stdout=DEVNULL)
    with (
        child([*command, "--uvicorn-opts", "--log-level warning"], env=environment) as server,
        child(["sh", "-c", GUARD, str(server.pid)], stdin=PIPE, stderr=DEVNULL),
        suppress(KeyboardInterrupt),
    ):
        while True:
            with suppress(OSError), urllib.request.urlopen(f"{_url(host, port)}/health", timeout=1):  # noqa: S310
                break
            if server.poll() is not None:
                raise LabError(f"the MLflow server did not start (exit code {server.returncode}): see above")
            time.sleep(0.2)
        # In one piece: whoever reads the first line may be gone before there is another.
        print("\n".join([*lines, "Ready. Ctrl-C stops the server."]), flush=True)
        raise LabError(f"the MLflow server ended by itself with exit code {server.wait()}")


# ---- addresses


def free_port(first: int) -> int:
    """Return `first`, or the next port that nothing on loopback listens on, which is said; LabError if none is free."""
    for port in range(first, first + PORTS_TRIED):
        if is_free(HOST, port):
            if port != first:
                print(f"Port {first} is taken; using {port}.", file=sys.stderr)
            return port
    raise LabError(f"port: {first} to {port} are all taken; name another with --port")


def is_free(host: str, port: int) -> bool:
    """Say whether nothing listens there; raises LabError if a user's server can't have this port or address."""
    if not 1024 <= port <= 65535:
        raise LabError(f"port: {port} is not between 1024 and 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        socket.create_server(address, family=family).close()
    except (OSError, UnicodeError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            return False
        raise LabError(f"host: {host!r} is no address of this machine ({error})") from error
    return True


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


# ---- PostgreSQL


def _prepare(uri: str) -> tuple[str, str]:
    """Return a database's URI without its password, and the id of the lab's experiment, made if it is not there.

    The password goes into the environment: what is in a URI could be shown, and is kept in a file. The experiment is
    made here: with passwords, the first user would own it. Another program's database is left as it is; LabError.
    """
    import psycopg
    from alembic.util import CommandError
    from mlflow.exceptions import MlflowException  # which takes seconds to import
    from psycopg.errors import UndefinedTable
    from sqlalchemy import make_url
    from sqlalchemy.exc import SQLAlchemyError

    from mnist_lab.tracking.store import experiment_of

    scheme, _, rest = uri.partition("://")
    if scheme not in ("postgresql", "postgres", DRIVER):  # the second is what hosting providers give
        shown = f"{without_password(uri)!r} is no database of PostgreSQL" if rest else "no database is named"
        form = "--backend-store-uri postgresql://user:password@host:5432/database"
        raise LabError(f"backend store: {shown}; give {form} (docs/server.md)")
    try:
        tracking_uri(uri)  # refuses a password that a URI can't hold
        with psycopg.connect(f"postgresql://{rest}", connect_timeout=5) as other, suppress(UndefinedTable):
            versions = {version for (version,) in other.execute("SELECT version_num FROM alembic_version")}
            if versions - known_schemas():
                raise LabError("backend store: it is another program's, or of a newer MLflow, which is not read")
        url = make_url(f"{DRIVER}://{rest}")
        if url.password:
            os.environ["PGPASSWORD"] = str(url.password)
        bare = url._replace(password=None).render_as_string()
        return bare, str(experiment_of(bare, f"mlflow-artifacts:/{EXPERIMENT_NAME}").experiment_id)
    except (psycopg.Error, MlflowException, SQLAlchemyError, CommandError) as error:
        raise LabError(f"backend store: {without_password(uri)!r} can't be used: {one_line(error)}") from error
