"""`make ui`: the MLflow UI on loopback, in its light form (ready in 4 s with 0.4 GB, instead of 8 s and 1.8 GB)."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

from mnist_lab.errors import LabError
from mnist_lab.tracking.sqlite import UI_VIEW

HOST = "127.0.0.1"
PORTS_TRIED = 20
START_TIMEOUT = 60  # seconds
STOP_TIMEOUT = 5
MARK = "Mnist-Lab"  # a header of the server's answers: another server may have taken the port in the meantime


def check_port(port: int) -> None:
    """Refuse a port that a user's server can't have; raises LabError."""
    if not 1024 <= port <= 65535:
        raise LabError(f"port: {port} is not between 1024 and 65535")


def free_port(first: int) -> int:
    """Return `first`, or the next port after it that nothing listens on; raises LabError if there is none."""
    check_port(first)
    last = min(first + PORTS_TRIED - 1, 65535)
    for port in range(first, last + 1):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port just left is free, as for the server
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise LabError(f"port: {first} to {last} are all taken; name another with --port")


def serve(uri: str, experiment_id: str, port: int) -> None:
    """Serve the runs in the store `uri` until interrupted; print the address of the runs table when it is there.

    Raises LabError if the server ends by itself or is not there after START_TIMEOUT seconds.
    """
    address = f"http://{HOST}:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", HOST, "--port", str(port)]
    mark = f"pid {os.getpid()}"
    command += ["--backend-store-uri", uri, "--uvicorn-opts", f"--log-level warning --header '{MARK}:{mark}'"]
    environment = {
        **os.environ,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PYTHONWARNINGS": "ignore",  # of its own libraries, which no user of the lab can heed
    }
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # whoever reads the output may be gone, and the server must still end
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        _wait_until_ready(server, address, mark)
        view = f"workflowType=machine_learning&viewStateShareKey={UI_VIEW}"  # else the page is made for language models
        print(f"The runs: {address}/#/experiments/{experiment_id}/runs?{view}", flush=True)
        print("Ctrl-C stops the server.", flush=True)
        server.wait()
        raise LabError(f"the MLflow server ended by itself with exit code {server.returncode}")
    except KeyboardInterrupt:
        print(file=sys.stderr)
    finally:
        _stop(server)


def _stop(server: subprocess.Popen[bytes]) -> None:
    """End the server with its workers: a request that never ends must not hold them."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(STOP_TIMEOUT)
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


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
