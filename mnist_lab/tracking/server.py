"""`make ui` and `make server`: MLflow's own server as a child of this program, for a team on PostgreSQL.

Without the processes for jobs, which the lab has none of, it is ready in 4 s with 0.4 GB, instead of 8 s and 1.8 GB.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from mnist_lab.errors import LabError, one_line, text_of, without_password
from mnist_lab.paths import ARTIFACTS, EXPERIMENT_NAME, sqlite_file, tracking_uri
from mnist_lab.tracking.sqlite import check_writable, follow_move, known_schemas
from mnist_lab.tracking.view import VIEW

if TYPE_CHECKING:
    from fastapi import FastAPI

HOST = "127.0.0.1"
LOOPBACK, EVERYWHERE = (HOST, "localhost", "::1"), ("0.0.0.0", "::")  # noqa: S104 - what a user may ask for
PORTS_TRIED = 20
START_TIMEOUT = 120  # seconds; the server takes 4 on a quiet machine, a database longer after a crash
SERVER_STOP_TIMEOUT, DATABASE_STOP_TIMEOUT = 5, 30
# Waits for the end of its input, then ends the process group $1 by the signal $0; by force if it is there $2 s later.
GUARD = '''
    cat; kill -s "$0" -- "-$1"
    for second in $(seq "$2"); do sleep 1; kill -s 0 -- "-$1" || exit; done
    kill -s KILL -- "-$1"'''

APP, PATH = "mnist-lab", "/lab"  # the entry point in pyproject.toml that names `make_app`, and its page
ADMIN_VARIABLE = "MLFLOW_AUTH_ADMIN_PASSWORD"  # MLflow's own
# Whoever has a password may read and log; what may be deleted is MLflow's own rule. A worker takes a password that was
# right as right for a minute: checking one costs more than all else of a request.
AUTH_INI = """[mlflow]
admin_username = admin
default_permission = EDIT
auth_cache_ttl_seconds = 60
database_uri = {uri}
"""

DRIVER = "postgresql+psycopg"
DEBIAN = Path("/usr/lib/postgresql")  # where Debian keeps the server's programs: not on the path
# As whom the database runs where root runs this program: PostgreSQL refuses root.
ACCOUNT: dict[str, Any] = {"user": "postgres", "group": "postgres", "extra_groups": []}
CONNECTIONS = 200  # at most; a worker of MLflow keeps up to 15 for each of runs, models and users


def serve_ui(uri: str, port: int) -> None:
    """Serve the runs in a SQLite store on loopback until interrupted; print the address of the runs table.

    A store that is not there is made. Raises LabError.
    """
    check_writable(uri)
    database = sqlite_file(uri)
    if database is not None and database.exists():
        follow_move(uri)
    else:
        from mnist_lab.tracking.store import open_store  # which takes seconds to import

        open_store(uri)
    os.environ["MLFLOW_BACKEND_STORE_URI"] = uri
    flags = ["--workers", "1", "--app-name", APP]
    with contextlib.suppress(KeyboardInterrupt), mlflow_server(HOST, port, *flags) as server:
        _report_and_wait([f"The runs: {_url(HOST, port)}{PATH}"], {"the MLflow server": server})


def serve(host: str, port: int, folder: Path, workers: int, *, auth: bool, backend_store_uri: str | None) -> None:
    """Serve MLflow to a team until interrupted; print what to set when the server is there.

    folder: where the artifacts are, and what else the server keeps of its own.
    backend_store_uri: of a database of PostgreSQL; without one, the server has its own in `folder`.

    Raises LabError if the database or the server does not start, or ends by itself.
    """
    if not is_free(host, port):
        raise LabError(f"port: {port} is taken; name another with --port")
    folder = folder.absolute()
    exports = _admin_exports(folder) if auth else []
    if host not in LOOPBACK:
        print(
            f"Other machines reach {host}:{port}: docs/server.md says what is protected.", file=sys.stderr, flush=True
        )
        os.environ.setdefault("MLFLOW_SERVER_ALLOWED_HOSTS", _allowed_hosts(host, port))
    with named_database(backend_store_uri) if backend_store_uri else own_database(folder / "postgres") as database:
        uri, process = database
        experiment_id = _experiment(uri)
        os.environ["MLFLOW_BACKEND_STORE_URI"] = uri  # others can read a command line, passwords included
        if auth:
            _write_auth_settings(folder / "auth.ini", uri)
        flags = ["--workers", str(workers), "--serve-artifacts", "--artifacts-destination", str(folder / ARTIFACTS)]
        flags += ["--app-name", "basic-auth" if auth else APP]
        with contextlib.suppress(KeyboardInterrupt), mlflow_server(host, port, *flags) as server:
            url = _url(socket.gethostname() if host in EVERYWHERE else host, port)
            page = f"/#/experiments/{experiment_id}/runs?{VIEW}" if auth else PATH
            lines = [f"The runs: {url}{page}", f"export MLFLOW_TRACKING_URI={url}", *exports]
            _report_and_wait(lines, {"the MLflow server": server, "PostgreSQL": process})


# ---- MLflow's server


def make_app() -> FastAPI:
    """Return MLflow's own application with one page more, for `mlflow server --app-name mnist-lab`."""
    from mlflow.server import app as routes  # slow to import, and the command that starts the server looks in here too
    from mlflow.server.fastapi_app import app as served

    # What two runs write at the same moment, one of them writes again (`TrackedRun._log_input`).
    logging.getLogger("psycopg").setLevel(logging.ERROR)
    page = Path(__file__).with_name("lab.html").read_text().replace("EXPERIMENT", EXPERIMENT_NAME).replace("VIEW", VIEW)
    routes.add_url_rule(PATH, "lab", lambda: page)
    app: FastAPI = served
    return app


@contextlib.contextmanager
def mlflow_server(host: str, port: int, *flags: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run `mlflow server`, give it when it is there, and end it; raises LabError."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), *flags]
    command += ["--uvicorn-opts", "--log-level warning"]
    environment = {
        **os.environ,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PYTHONWARNINGS": "ignore",  # of its own libraries, which no user of the lab can heed
    }

    def problem() -> str:
        try:
            with urllib.request.urlopen(f"{_url(host, port)}/health", timeout=1):  # noqa: S310 - http
                return ""
        except OSError as error:
            return text_of(error)

    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # whoever reads the output may be gone, and the server must still end
    with child(command, signal.SIGTERM, SERVER_STOP_TIMEOUT, env=environment, stdout=subprocess.DEVNULL) as server:
        _wait_until_ready("the MLflow server", server, problem, lambda: "its messages are above")
        yield server


def _report_and_wait(lines: Sequence[str], needed: dict[str, subprocess.Popen[bytes] | None]) -> None:
    """Print what the user is to know, and wait until interrupted; raises LabError if a process ends by itself."""
    # In one piece: whoever reads the first line may be gone before there is another.
    print("\n".join([*lines, "Ready. Ctrl-C stops the server."]), flush=True)
    while True:
        for name, process in needed.items():
            if process is not None and process.poll() is not None:
                raise LabError(f"{name} ended by itself with exit code {process.returncode}")
        time.sleep(0.2)


def _wait_until_ready(
    name: str, process: subprocess.Popen[bytes], problem: Callable[[], str], messages: Callable[[], str]
) -> None:
    """Wait until there is no problem any more; raises LabError, with the messages of a process that ends."""
    deadline = time.monotonic() + START_TIMEOUT
    while cause := problem():
        if process.poll() is not None:
            raise LabError(f"{name} did not start (exit code {process.returncode}): {messages()}")
        if time.monotonic() > deadline:
            raise LabError(f"{name} was not ready after {START_TIMEOUT} seconds: {cause}")
        time.sleep(0.2)


@contextlib.contextmanager
def child(
    command: Sequence[str], end: signal.Signals, timeout: int, **options: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program and end it, by a signal and by force after `timeout` seconds; also where this program is killed.

    A shell beside it does that: the pipe that it reads from ends with this program, however that ends.
    """
    process = subprocess.Popen(command, start_new_session=True, **options)
    guard = subprocess.Popen(
        ["sh", "-c", GUARD, end.name.removeprefix("SIG"), str(process.pid), str(timeout)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert guard.stdin is not None
    try:
        yield process
    finally:
        guard.stdin.close()
        process.wait()
        for group in (process.pid, guard.pid):  # what is left of them
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)
        guard.wait()


# ---- addresses


def check_port(port: int) -> None:
    """Refuse a port that a user's server can't have; raises LabError."""
    if not 1024 <= port <= 65535:
        raise LabError(f"port: {port} is not between 1024 and 65535")


def free_port(first: int) -> int:
    """Return `first`, or the next port after it that nothing on loopback listens on; raises LabError if none is."""
    check_port(first)
    last = min(first + PORTS_TRIED - 1, 65535)
    for port in range(first, last + 1):
        if is_free(HOST, port):
            return port
    raise LabError(f"port: {first} to {last} are all taken; name another with --port")


def is_free(host: str, port: int) -> bool:
    """Say whether nothing listens there; raises LabError if `host` is no address of this machine."""
    check_port(port)
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port just left is free, as for the server
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            return False
        raise LabError(f"host: {host!r} is no address of this machine ({error})") from error
    return True


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _allowed_hosts(host: str, port: int) -> str:
    """Return by which names other machines may call the server; to others it gives no answer."""
    own = [one.address for ones in psutil.net_if_addrs().values() for one in ones if one.family == socket.AF_INET]
    names = [host, "localhost", socket.gethostname(), socket.getfqdn(), *own]
    return ",".join(_url(name, port).removeprefix("http://") for name in names)


# ---- passwords


def _admin_exports(folder: Path) -> list[str]:
    """Give MLflow the admin's password, for its first start; return what the admin sets, without showing it."""
    shown = f"${ADMIN_VARIABLE}"
    if ADMIN_VARIABLE not in os.environ:
        file = folder / "admin_password"
        if not file.exists():
            _write_secret(file, f"{secrets.token_urlsafe(18)}\n")
        os.environ[ADMIN_VARIABLE] = file.read_text().strip()
        shown = f"$(cat {shlex.quote(str(file))})"
    return ["export MLFLOW_TRACKING_USERNAME=admin", f'export MLFLOW_TRACKING_PASSWORD="{shown}"']


def _write_auth_settings(file: Path, uri: str) -> None:
    """Let MLflow ask for passwords; the users are in the same database."""
    _write_secret(file, AUTH_INI.format(uri=uri.replace("%", "%%")))  # as MLflow reads it
    os.environ["MLFLOW_AUTH_CONFIG_PATH"] = str(file)
    os.environ["MLFLOW_FLASK_SERVER_SECRET_KEY"] = secrets.token_hex(32)


def _write_secret(file: Path, text: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        file.write_text(text)
    except OSError as error:
        raise LabError(f"folder {file.parent}: {file.name} can't be written: {error.strerror}") from error


# ---- PostgreSQL


@contextlib.contextmanager
def named_database(uri: str) -> Iterator[tuple[str, None]]:
    """Give the URI of a database that answers, without its password; raises LabError.

    The password goes into the environment: what is in a URI could be shown, and is kept in a file.
    """
    from sqlalchemy import make_url  # slow to import

    scheme, _, rest = uri.partition("://")
    name = f"backend store {without_password(uri) if rest else '...'!r}"
    if scheme not in ("postgresql", "postgres", DRIVER):  # the second is what hosting providers give
        raise LabError(f"{name} is no database of PostgreSQL: give postgresql://user:password@host:5432/database")
    if cause := _problem(tracking_uri(f"{DRIVER}://{rest}")):
        raise LabError(f"{name} can't be used: {cause}")
    url = make_url(f"{DRIVER}://{rest}")
    if url.password:
        os.environ["PGPASSWORD"] = str(url.password)
    yield url._replace(password=None).render_as_string(), None


@contextlib.contextmanager
def own_database(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run PostgreSQL on a folder, which is made on first use; its log is a file beside it. Raises LabError.

    It listens on no port, but on a socket in a folder that only this user can enter, so it asks for no password.
    """
    programs, log = find_programs(), folder.with_name(f"{folder.name}.log")
    account = ACCOUNT if os.geteuid() == 0 else {}
    with contextlib.ExitStack() as stack:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            sockets = stack.enter_context(tempfile.TemporaryDirectory(prefix="mnist-lab-", ignore_cleanup_errors=True))
            _give(sockets, account)
            if not folder.exists():
                _create(folder, programs, account)
            messages = stack.enter_context(log.open("ab"))
        except (OSError, LookupError) as error:
            raise LabError(f"folder {folder} can't be used: {getattr(error, 'strerror', None) or error}") from error
        begin = messages.tell()
        command = [str(programs / "postgres"), "-D", str(folder), "-k", sockets, "-c", "listen_addresses="]
        command += ["-c", "unix_socket_permissions=0700", "-c", f"max_connections={CONNECTIONS}"]
        options: dict[str, Any] = {"cwd": sockets, "stdout": messages, "stderr": messages, **account}
        # To PostgreSQL that signal says: end all sessions, write, stop.
        process = stack.enter_context(child(command, signal.SIGINT, DATABASE_STOP_TIMEOUT, **options))
        uri = f"{DRIVER}://mnist_lab@/postgres?host={sockets}"
        _wait_until_ready("PostgreSQL", process, lambda: _problem(uri), lambda: _last_lines(log.read_bytes()[begin:]))
        yield uri, process


def _create(folder: Path, programs: Path, account: dict[str, Any]) -> None:
    """Make the folder under another name first: a process that is killed half-way leaves nothing that counts."""
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(mode=0o700)
    try:
        _give(new, account)
        command = [str(programs / "initdb"), f"--pgdata={new}", "--username=mnist_lab", "--encoding=UTF8"]
        command += ["--no-locale", "--auth-local=trust", "--auth-host=reject"]
        done = subprocess.run(command, cwd="/", stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, **account)
        if done.returncode:
            whom = f" as the user {account['user']!r}" if account else ""
            raise LabError(f"folder {folder}: PostgreSQL can't make a database there{whom}: {_last_lines(done.stderr)}")
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _give(folder: str | Path, account: dict[str, Any]) -> None:
    if account:
        shutil.chown(folder, account["user"], account["group"])


def _last_lines(messages: bytes) -> str:
    return " ".join(messages.decode(errors="replace").split("\n")[-4:]).strip()


def find_programs() -> Path:
    """Return the folder of PostgreSQL's programs: on the path, or the newest where Debian keeps them."""
    newest_first = sorted(DEBIAN.glob("*/bin"), key=lambda path: float(path.parent.name), reverse=True)
    places = [os.environ.get("PATH", ""), *newest_first]
    program = shutil.which("postgres", path=os.pathsep.join(map(str, places)))
    if program is None:
        raise LabError(
            "PostgreSQL is not installed: install it (on Debian and Ubuntu: apt-get install postgresql), or name a "
            "database with --backend-store-uri postgresql://user:password@host:5432/database"
        )
    return Path(program).resolve().parent


def _problem(uri: str) -> str:
    """Say why a database can't be used; nothing if it can. Another program's is left as it is."""
    import psycopg

    try:
        with psycopg.connect(uri.replace(DRIVER, "postgresql", 1), connect_timeout=5) as connection:
            versions = {version for (version,) in connection.execute("SELECT version_num FROM alembic_version")}
    except psycopg.errors.UndefinedTable:  # nothing of MLflow's is there yet
        return ""
    except psycopg.Error as error:
        return one_line(error)
    unknown = versions - known_schemas()
    return "it is another program's, or was last used by a newer MLflow, which this one can't read" if unknown else ""


def _experiment(uri: str) -> str:
    """Return the id of the lab's experiment, made if it is not there, whose artifacts go by way of the server.

    It is made here and not by the first user: with passwords, that one would own it.
    """
    from alembic.util import CommandError
    from mlflow.exceptions import MlflowException  # which takes seconds to import
    from sqlalchemy.exc import SQLAlchemyError

    from mnist_lab.tracking.store import experiment_of

    try:
        return str(experiment_of(uri, f"mlflow-artifacts:/{EXPERIMENT_NAME}").experiment_id)
    except (MlflowException, SQLAlchemyError, CommandError) as error:  # the last where it is another program's
        raise LabError(f"the database can't be used: {one_line(error).partition(' [SQL:')[0]}") from error
