"""`make ui`: the MLflow UI on loopback."""

from __future__ import annotations

from mnist_lab.errors import LabError
from mnist_lab.tracking import serving
from mnist_lab.tracking.sqlite import UI_VIEW

HOST = "127.0.0.1"
PORTS_TRIED = 20


def free_port(first: int) -> int:
    """Return `first`, or the next port after it that nothing listens on; raises LabError if there is none."""
    serving.check_port(first)
    last = min(first + PORTS_TRIED - 1, 65535)
    for port in range(first, last + 1):
        if serving.is_free(HOST, port):
            return port
    raise LabError(f"port: {first} to {last} are all taken; name another with --port")


def serve(uri: str, experiment_id: str, port: int) -> None:
    """Serve the runs in the store `uri` until interrupted; print the address of the runs table when it is there.

    Raises LabError if the server ends by itself or is not there in time.
    """
    view = f"workflowType=machine_learning&viewStateShareKey={UI_VIEW}"  # else the page is made for language models
    runs = f"The runs: http://{HOST}:{port}/#/experiments/{experiment_id}/runs?{view}"
    serving.serve(HOST, port, ["--workers", "1", "--backend-store-uri", uri], {}, lambda: [runs])
