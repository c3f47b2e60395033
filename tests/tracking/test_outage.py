"""Tracking servers: tables of their runs; and runs whose server is away, which wait, or end and can go on."""

import http.client
import math
import os
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import mlflow
import numpy as np
import pandas as pd
import pytest
import requests
import torch
from mlflow.entities import LoggedModel
from mlflow.utils import rest_utils
from urllib3 import HTTPSConnectionPool
from urllib3.exceptions import MaxRetryError, SSLError

import tiny
from forkserver import PATIENCE
from helpers import TINY, Server, TrackedRun, read_runs, within
from mnist_lab import results
from mnist_lab.errors import LabError
from mnist_lab.measures import TESTED
from mnist_lab.running import checkpoint
from mnist_lab.running import run as runner
from mnist_lab.running.job import Job
from mnist_lab.running.progress import Progress
from mnist_lab.tracking import run as tracking
from mnist_lab.tracking import sqlite
from mnist_lab.tracking.connection import environment_variables, why_refused
from mnist_lab.tracking.store import open_store
from mnist_lab.training.loop import EpochMetrics
from run_writer import T0, write_run

EPOCHS = 4


@pytest.fixture
def server(one_server: Server) -> Server:
    if one_server.process is None:  # killed by the test before
        one_server.start()
    return one_server


@pytest.fixture(autouse=True)
def _own_checkpoints(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("mnist_lab.paths.PROJECT_ROOT", tmp_path / "project")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")


class AfterEpochOne(Progress):
    def __init__(self, deed: Callable[[], None]) -> None:
        self.deed = deed

    def on_epoch(self, seed: int, metrics: EpochMetrics) -> None:
        if metrics.epoch == 1:
            self.deed()


def job_of(uri: str) -> Job:
    changes: dict[str, object] = {"epochs": EPOCHS}
    experiment = tiny.EXPERIMENT.override(changes)[0]
    return Job(script=TINY, experiment=experiment, overrides=changes, threads=1, tracking_uri=uri, limit=256)


def train(uri: str, listener: Progress | None = None) -> str:
    return runner.run(job_of(uri), 5, listener or Progress()).run_id


def left_by(run: TrackedRun, server: Server) -> dict[str, Any]:
    """Return what a run left, but for what no two runs share."""
    client, folder = mlflow.MlflowClient(server.uri), server.artifacts(run)
    in_mlflow = client.get_run(run.run_id)
    (model,) = client.search_logged_models([in_mlflow.info.experiment_id], f"source_run_id = '{run.run_id}'")
    with environment_variables({"MLFLOW_TRACKING_URI": server.uri}), np.load(folder / "predictions.npz") as arrays:
        net, logits = mlflow.pytorch.load_model(f"runs:/{run.run_id}/{run.tags['step']}"), arrays["logits"].tolist()
    own = {"process", "mlflow.user", "mlflow.source.name"}
    return {
        "run": (run.name, run.status, run.params),
        "tags": {name: tag for name, tag in run.tags.items() if name not in own},
        "metrics": run.metrics | {"epoch_seconds": [step for step, _ in run.metrics["epoch_seconds"]]},
        "files": sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()),
        "logits": logits,
        "inputs": sorted(map(str, in_mlflow.inputs.dataset_inputs)),
        "model": (model.status, sorted((metric.key, metric.step, metric.value) for metric in model.metrics)),
        "net": net(torch.linspace(0, 1, 3 * 784).reshape(3, 1, 28, 28)).tolist(),
    }


def check_same(run: TrackedRun, whole: TrackedRun, server: Server) -> None:
    """Check that a run is as one that nothing disturbed: each point once, and every artifact."""
    left = left_by(run, server)
    assert left == left_by(whole, server)
    assert (run.status, left["model"][0], left["metrics"]["epoch_seconds"]) == ("FINISHED", "READY", [1, 2, 3, 4])
    assert {"predictions.npz", "model_summary.txt", "figures/training.png", "source/tiny.py"} <= {*left["files"]}


def by_id(server: Server, run_id: str) -> TrackedRun:
    return next(run for run in read_runs(server.database) if run.run_id == run_id)


@pytest.fixture(scope="module")
def whole(one_server: Server) -> TrackedRun:
    return by_id(one_server, train(one_server.uri))


def resume(uri: str) -> str:
    found = checkpoint.find(uri)
    return runner.run(job_of(uri), found.seed, Progress(), resume=found).run_id


def test_a_server_gives_the_same_tables_in_few_requests(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    file, store = f"sqlite:///{server.database}", open_store(server.uri)
    for seed in range(8):
        write_run(store, "step4", seed, [99.0, 99.5], start_time=T0 + seed, status="FINISHED" if seed < 6 else "FAILED")
    asked = []
    http_request = rest_utils.http_request
    record = lambda *given, **more: asked.append(more) or http_request(*given, **more)  # noqa: E731
    monkeypatch.setattr(rest_utils, "http_request", record)
    monkeypatch.setattr(sqlite, "RUNS_PER_REQUEST", 3)

    table, history = (
        [read("step4", status=status, tracking_uri=uri) for uri in (server.uri, file)]
        for read, status in ((partial(results.run_table, columns="all"), "FINISHED"), (results.epoch_history, None))
    )

    pd.testing.assert_frame_equal(*table)
    pd.testing.assert_frame_equal(*(one.sort_values(["run_id", "epoch"], ignore_index=True) for one in history))
    assert history[0]["run_id"].nunique() == 8
    histories = [more for more in asked if "metric_key" in more.get("params", {})]
    assert len(histories) == math.ceil(8 / 3) * len(TESTED.each_epoch)


@pytest.mark.parametrize(
    ("fault", "seconds"),
    [
        ("killed", 2),  # and those that its start takes
        pytest.param("killed", 20, marks=pytest.mark.long),
        pytest.param("frozen", 8, marks=pytest.mark.long),
    ],
)
def test_a_server_that_is_away_or_hangs_for_a_while_is_waited_for(
    fault: str, seconds: int, whole: TrackedRun, server: Server, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5" if fault == "frozen" else "30")

    def go_away() -> None:
        if fault == "frozen":
            os.killpg(server.process.pid, signal.SIGSTOP)
            threading.Timer(seconds, os.killpg, (server.process.pid, signal.SIGCONT)).start()
        else:
            server.kill()
            threading.Timer(seconds, server.start).start()

    run_id = train(server.uri, AfterEpochOne(go_away))

    assert "the run waits for it" in caplog.text
    check_same(by_id(server, run_id), whole, server)


@pytest.mark.usefixtures("impatient")
def test_a_run_whose_server_stays_away_ends(whole: TrackedRun, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    find = tracking.TrackedRun._logged_model

    def make_and_die(*given: Any) -> LoggedModel:
        find(*given)
        server.kill()
        return find(*given)

    with monkeypatch.context() as patch:
        patch.setattr(tracking.TrackedRun, "_logged_model", make_and_die)  # the worst moment: a model is half there
        sentence = r"^tracking store .* failed during the run: .*`--resume \w+` goes on"
        with pytest.raises(LabError, match=sentence) as end:
            train(server.uri)

    server.start()
    run_id = resume(server.uri)

    assert f"--resume {run_id}`" in str(end.value)
    check_same(by_id(server, run_id), whole, server)


def test_ctrl_c_ends_the_wait_for_a_server(whole: TrackedRun, server: Server) -> None:
    def go_away() -> None:
        server.kill()
        threading.Timer(3, os.kill, (os.getpid(), signal.SIGINT)).start()

    with within(60), pytest.raises(KeyboardInterrupt):
        train(server.uri, AfterEpochOne(go_away))

    server.start()
    check_same(by_id(server, resume(server.uri)), whole, server)


class Proxy(BaseHTTPRequestHandler):
    """Hands each request on to the real server, once a run has begun with a fault of its own."""

    port: ClassVar[int]
    begun: ClassVar[bool]
    lost: ClassVar[set[str]]
    answer: ClassVar[tuple[int, bytes] | None]  # in place of the server's; else the first of each kind is lost

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.begun and self.answer is not None:
            return self.reply(self.answer[0], {}, self.answer[1])
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        path = urlsplit(self.path).path
        kind = f"{self.command} {path.rpartition('/artifacts/')[0] or path}"
        Proxy.begun |= self.path.endswith("log-batch") and b'"metrics"' in body
        if self.begun and self.answer is None and self.command != "DELETE" and kind not in self.lost:
            self.lost.add(kind)
            return None
        return self.reply(answer.status, dict(answer.getheaders()), content)

    def reply(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def log_message(self, *_: object) -> None: ...


@contextmanager
def serve(port: int = 0, *, begun: bool = False, answer: tuple[int, bytes] | None = None) -> Iterator[str]:
    """Give the address, without http://, of a proxy of the server at that port."""
    Proxy.port, Proxy.begun, Proxy.lost, Proxy.answer = port, begun, set(), answer
    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{proxy.server_port}"
        proxy.shutdown()


def test_what_is_asked_again_because_the_answer_was_lost_is_there_once(whole: TrackedRun, server: Server) -> None:
    with serve(server.port) as proxy:
        run_id = train(f"http://{proxy}")

    lost = {kind.rpartition("/mlflow")[2] for kind in Proxy.lost}
    assert lost >= {"/runs/log-batch", "/runs/outputs", "/runs/update", "/logged-models"}
    assert {kind.partition(" ")[0] for kind in Proxy.lost} >= {"GET", "POST", "PUT", "PATCH"}
    check_same(by_id(server, run_id), whole, server)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        ((401, b"You are not authenticated."), r"the server refuses you \(HTTP 401\): give MLFLOW_TRACKING_USERNAME"),
        (
            (500, b'{"error_code": "INTERNAL_ERROR", "message": "password authentication failed"}'),
            r"the server fails \(HTTP 500\): password authentication failed",
        ),
    ],
)
def test_a_server_that_refuses_in_mid_run_is_said_so(answer: tuple[int, bytes], cause: str, server: Server) -> None:
    sentence = f"^tracking store 'http://[^']*' failed during the run: {cause}.*`--resume "
    with serve(server.port, answer=answer) as proxy, pytest.raises(LabError, match=sentence):
        train(f"http://{proxy}")


# ---- before any training


@contextmanager
def mute() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield f"127.0.0.1:{taken.getsockname()[1]}"


@pytest.mark.parametrize(
    ("server", "cause"),
    [
        (nullcontext("127.0.0.1:9"), r"no connection to the server \(Connection refused\)"),
        (nullcontext("no-such-host.invalid"), r"no connection to the server \("),
        (mute(), "the server does not answer in time"),
        (serve(begun=True, answer=(401, b"")), r"the server refuses you \(HTTP 401\): give MLFLOW_TRACKING_USERNAME"),
        (serve(begun=True, answer=(200, b"<html></html>")), r"what answers there is no MLflow server \(HTTP 200\)"),
        (serve(begun=True, answer=(503, b"")), r"the server fails \(HTTP 503\): its own log says why"),
    ],
)
def test_what_is_no_server_is_refused_with_the_cause_first(server: AbstractContextManager[str], cause: str) -> None:
    refused = pytest.raises(LabError, match=rf"^tracking store 'https?://[^']+' can't be used: {cause}")
    with server as host, within(10), refused as refusal:
        open_store(f"http://bob:pass-word@{host}")
    assert "pass-word" not in str(refusal.value)


def test_a_certificate_that_is_not_trusted_is_named_first() -> None:
    inner = ssl.SSLCertVerificationError(1, "certificate verify failed: self-signed certificate")
    nested = requests.exceptions.SSLError(MaxRetryError(HTTPSConnectionPool("runs"), "/", SSLError(inner)))
    assert why_refused(nested).endswith("(certificate verify failed: self-signed certificate)")
