"""MLflow's own server in its light form, run as a child until this program is interrupted.

Without the processes for jobs, which the lab has none of, it is ready in 4 s with 0.4 GB, instead of 8 s and 1.8 GB.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence

from mnist_lab.errors import LabError

START_TIMEOUT = 120  # seconds; 4 on a quiet machine
STOP_TIMEOUT = 5
MARK = "Mnist-Lab"  # a header of the server's answers: another server may have taken the port in the meantime


def check_port(port: int) -> None:
    """Refuse a port that a user's server can't have; raises LabError."""
    if not 1024 <= port <= 65535:
        raise LabError(f"port: {port} is not between 1024 and 65535")


def is_free(host: str, port: int) -> bool:
    """Say whether nothing listens there; raises LabError if `host` is no address of this machine."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port just left is free, as for the server
            probe.bind(address)
    except (socket.gaierror, UnicodeError) as error:
        raise LabError(f"host: {host!r} is no address ({error})") from error
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            return False
        raise LabError(f"host: {host!r} is no address of this machine ({error.strerror})") from error
    return True


def url(host: str, port: int) -> str:
    """Return the address of a server on this machine that listens on `host`."""
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        if address.is_unspecified:
            host = "127.0.0.1" if address.version == 4 else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    host: str,
    port: int,
    flags: Sequence[str],
    environment: Mapping[str, str],
    when_ready: Callable[[], Sequence[str]],
    needed: Mapping[str, subprocess.Popen[bytes]] | None = None,
) -> None:
    """Run `mlflow server` with these flags and variables until interrupted; print lines when it is there.

    when_ready: gives the lines.
    needed: other processes, by name, without which the server is of no use.

    Raises LabError if the server or a process that it needs ends by itself, or if it is not there after START_TIMEOUT
    seconds.
    """
    mark = f"pid {os.getpid()}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), *flags]
    command += ["--uvicorn-opts", f"--log-level warning --header '{MARK}:{mark}'"]
    environment = {
        **os.environ,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PYTHONWARNINGS": "ignore",  # of its own libraries, which no user of the lab can heed
        **environment,
    }
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # whoever reads the output may be gone, and the server must still end
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    watched = {"the MLflow server": server, **(needed or {})}
    try:
        _wait_until_ready(server, url(host, port), mark)
        # In one piece: whoever reads the first line may be gone before there is another.
        print("\n".join([*when_ready(), "Ready. Ctrl-C stops the server."]), flush=True)
        while all(process.poll() is None for process in watched.values()):
            time.sleep(0.2)
        name, ended = next((name, one) for name, one in watched.items() if one.returncode is not None)
        raise LabError(f"{name} ended by itself with exit code {ended.returncode}")
    except KeyboardInterrupt:
        print(file=sys.stderr)
    finally:
        with signals_held_back():
            stop(server, signal.SIGTERM, STOP_TIMEOUT)


@contextlib.contextmanager
def signals_held_back() -> Iterator[None]:
    """Ignore the signals that end a program: what is being ended has a time limit of its own."""
    handlers = {
        number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def stop(leader: subprocess.Popen[bytes], number: signal.Signals, timeout: float) -> None:
    """End a process by a signal, and all of its group if it takes longer: no request may hold them for ever."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            leader.wait(timeout)
        os.killpg(leader.pid, signal.SIGKILL)
    leader.wait()


def _wait_until_ready(server: subprocess.Popen[bytes], address: str, mark: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise LabError(f"the MLflow server did not start: exit code {server.returncode}, its messages are above")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=1) as answer:  # noqa: S310
            if answer.headers.get(MARK) == mark:
                return
        time.sleep(0.2)
    raise LabError(f"the MLflow server was not ready after {START_TIMEOUT} seconds")
