"""`make ui`: the MLflow UI on loopback."""

from __future__ import annotations

from mnist_lab.errors import LabError
from mnist_lab.tracking import serving, view
from mnist_lab.tracking.sqlite import has_experiment

HOST = "127.0.0.1"
PORTS_TRIED = 20
APP = "mnist-lab"  # the entry point in pyproject.toml that names `front`
PATH = "/lab"  # its page


def free_port(first: int) -> int:
    """Return `first`, or the next port after it that nothing listens on; raises LabError if there is none."""
    serving.check_port(first)
    last = min(first + PORTS_TRIED - 1, 65535)
    for port in range(first, last + 1):
        if serving.is_free(HOST, port):
            return port
    raise LabError(f"port: {first} to {last} are all taken; name another with --port")


def make_ready(uri: str) -> None:
    """Give a SQLite store the lab's experiment and its view, where it lacks them; raises LabError if it can't be used.

    MLflow takes seconds to import, and its server, a process of its own, as many more: so it is not asked in vain.
    """
    if not has_experiment(uri, {view.TAG: view.state()}):
        from mnist_lab.tracking.store import open_store

        open_store(uri)


def serve(uri: str, port: int) -> None:
    """Serve the runs in the store `uri` until interrupted; print the address of the runs table when it is there.

    Raises LabError if the server ends by itself or is not there in time.
    """
    flags = ["--workers", "1", "--backend-store-uri", uri, "--app-name", APP]
    serving.serve(HOST, port, flags, {}, lambda: [f"The runs: http://{HOST}:{port}{PATH}"])
