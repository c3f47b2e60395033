"""Tracking servers that are away in the middle of a run: it waits, or ends and can go on, and nothing is lost."""

import http.client
import os
import shutil
import signal
import socket
import ssl
import threading
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import mlflow
import numpy as np
import pytest
import requests
import torch
from mlflow.entities import LoggedModel
from urllib3 import HTTPSConnectionPool
from urllib3.exceptions import MaxRetryError, SSLError

import tiny
from forkserver import PATIENCE, Program
from helpers import TINY, TrackedRun, read_runs, wait_until, within
from mnist_lab.errors import LabError
from mnist_lab.experiment import Experiment
from mnist_lab.running import checkpoint
from mnist_lab.running import run as runner
from mnist_lab.running.job import Job
from mnist_lab.running.progress import Progress
from mnist_lab.tracking import run as tracking
from mnist_lab.tracking.connection import why_refused
from mnist_lab.tracking.store import open_store
from mnist_lab.training.loop import EpochMetrics

EPOCHS = 4


class Server:
    """A real tracking server over a SQLite store, which can be killed, frozen and started again at its address."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.folder = folder
        self.database = folder / "mlflow.db"
        self.process: Program | None = None

    def start(self) -> None:
        flags = ["--workers", "1", "--host", "127.0.0.1", "--port", str(self.port)]
        flags += ["--backend-store-uri", f"sqlite:///{self.database}"]
        flags += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self.process = Program("-m", "mlflow", "server", *flags, cwd=self.folder, env=environment)
        wait_until(self._is_there, self.process)

    def _is_there(self) -> bool:
        with urllib.request.urlopen(f"{self.uri}/health", timeout=10):
            return True

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        if self.process is not None:
            self.signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def artifacts(self, run: TrackedRun) -> Path:
        return self.folder / "artifacts" / str(run.artifacts).partition("mlflow-artifacts:")[2].lstrip("/")


@pytest.fixture(scope="module")
def one_server(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    shutil.copy(empty_store, server.database)
    # The template's experiment keeps its artifacts in a folder; let the server make one that it serves itself.
    client = mlflow.MlflowClient(f"sqlite:///{server.database}")
    client.rename_experiment(client.get_experiment_by_name("mnist").experiment_id, "template")
    yield server
    server.kill()


@pytest.fixture
def server(one_server: Server) -> Server:
    """Return a tracking server that is there; starting one takes seconds, so the tests share it, and its runs."""
    if one_server.process is None:
        one_server.start()
    return one_server


@pytest.fixture(autouse=True)
def _own_checkpoints(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("mnist_lab.paths.PROJECT_ROOT", tmp_path / "project")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let MLflow ask twice only, as if its minutes were over."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")


class After(Progress):
    """Listens to a run, and does something after each of its epochs."""

    def __init__(self, **deeds: Callable[[], None]) -> None:
        self.deeds = deeds

    def on_run(self, *_: object) -> None:
        self.deeds.get("start", lambda: None)()

    def on_epoch(self, seed: int, metrics: EpochMetrics) -> None:
        self.deeds.get(f"epoch_{metrics.epoch}", lambda: None)()


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return tiny.EXPERIMENT.override({"epochs": EPOCHS})[0]  # type: ignore[no-any-return]


def train(experiment: Experiment, uri: str, listener: After | None = None, seed: int = 5) -> str:
    return runner.run(job_of(experiment, uri), seed, listener or After()).run_id


def job_of(experiment: Experiment, uri: str) -> Job:
    changes = {"epochs": EPOCHS}
    return Job(script=TINY, experiment=experiment, overrides=changes, threads=1, tracking_uri=uri, limit=256)


def check_same(run: TrackedRun, whole: TrackedRun, server: Server) -> None:
    """Check that a run is as one that nothing disturbed: each point once, and every artifact."""
    assert (run.name, run.status, run.params) == (whole.name, "FINISHED", whole.params)
    own = {"process", "mlflow.user", "mlflow.source.name"}
    assert {k: v for k, v in run.tags.items() if k not in own} == {k: v for k, v in whole.tags.items() if k not in own}
    timeless = {name: points for name, points in run.metrics.items() if name != "epoch_seconds"}
    assert timeless == {name: points for name, points in whole.metrics.items() if name != "epoch_seconds"}
    assert [step for step, _ in run.metrics["epoch_seconds"]] == list(range(1, EPOCHS + 1))
    mine, theirs = server.artifacts(run), server.artifacts(whole)
    names = sorted(str(file.relative_to(mine)) for file in mine.rglob("*") if file.is_file())
    assert names == sorted(str(file.relative_to(theirs)) for file in theirs.rglob("*") if file.is_file())
    assert {"predictions.npz", "model_summary.txt", "figures/training.png", f"source/{TINY.name}"} <= set(names)
    assert (mine / "source" / TINY.name).read_bytes() == TINY.read_bytes()
    with np.load(mine / "predictions.npz") as a, np.load(theirs / "predictions.npz") as b:
        assert np.array_equal(a["logits"], b["logits"])
    client = mlflow.MlflowClient(server.uri)
    inputs, wanted = (client.get_run(one.run_id).inputs.dataset_inputs for one in (run, whole))
    assert sorted(map(str, inputs)) == sorted(map(str, wanted))
    model, theirs_too = (only_model(client, one.run_id) for one in (run, whole))
    assert model.status == "READY"
    assert sorted((m.key, m.step, m.value) for m in model.metrics) == sorted(
        (m.key, m.step, m.value) for m in theirs_too.metrics
    )
    mlflow.set_tracking_uri(server.uri)
    try:
        nets = [mlflow.pytorch.load_model(f"runs:/{one.run_id}/{one.tags['step']}") for one in (run, whole)]
    finally:
        mlflow.set_tracking_uri(None)
    images = torch.rand(3, 1, 28, 28)
    assert torch.equal(nets[0](images), nets[1](images))


def only_model(client: mlflow.MlflowClient, run_id: str) -> LoggedModel:
    experiment_id = client.get_run(run_id).info.experiment_id
    (model,) = client.search_logged_models([experiment_id], f"source_run_id = '{run_id}'")
    return model


def by_id(server: Server, run_id: str) -> TrackedRun:
    return next(run for run in read_runs(server.database) if run.run_id == run_id)


@pytest.fixture(scope="module")
def whole(one_server: Server, experiment: Experiment) -> TrackedRun:
    """Return a run that nothing disturbed."""
    if one_server.process is None:
        one_server.start()
    return by_id(one_server, train(experiment, one_server.uri))


def resume(experiment: Experiment, uri: str) -> None:
    found = checkpoint.find(uri)
    runner.run(job_of(experiment, uri), found.seed, After(), resume=found)


@pytest.mark.parametrize("seconds", [2, pytest.param(20, marks=pytest.mark.long)])  # and those that its start takes
def test_a_server_that_is_away_for_a_while_is_waited_for(
    seconds: int, whole: TrackedRun, server: Server, experiment: Experiment, caplog: pytest.LogCaptureFixture
) -> None:
    def go_away() -> None:
        server.kill()
        threading.Timer(seconds, server.start).start()

    run_id = train(experiment, server.uri, After(epoch_1=go_away))

    assert "the run waits for it" in caplog.text
    check_same(by_id(server, run_id), whole, server)


@pytest.mark.long
def test_a_server_that_hangs_for_a_while_is_waited_for(
    whole: TrackedRun, server: Server, experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")

    def hang() -> None:
        server.signal(signal.SIGSTOP)
        threading.Timer(8, server.signal, (signal.SIGCONT,)).start()

    run_id = train(experiment, server.uri, After(epoch_2=hang))

    check_same(by_id(server, run_id), whole, server)


@pytest.mark.usefixtures("impatient")
def test_a_run_whose_server_stays_away_ends_and_goes_on_when_it_is_back(
    whole: TrackedRun, server: Server, experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = tracking.TrackedRun._logged_model

    def make_and_die(*given: Any) -> LoggedModel:
        find(*given)
        server.kill()
        return find(*given)

    monkeypatch.setattr(tracking.TrackedRun, "_logged_model", make_and_die)  # the worst moment: a model is half there
    with pytest.raises(LabError, match=r"^tracking store .* failed during the run: .*`--resume \w+` goes on") as end:
        train(experiment, server.uri)
    run_id = str(end.value).partition("--resume ")[2].partition("`")[0]
    monkeypatch.setattr(tracking.TrackedRun, "_logged_model", find)

    server.start()
    resume(experiment, server.uri)

    check_same(by_id(server, run_id), whole, server)


def test_ctrl_c_ends_the_wait_for_a_server(whole: TrackedRun, server: Server, experiment: Experiment) -> None:
    def go_away() -> None:
        server.kill()
        threading.Timer(3, os.kill, (os.getpid(), signal.SIGINT)).start()

    with within(60), pytest.raises(KeyboardInterrupt):
        train(experiment, server.uri, After(epoch_1=go_away))

    server.start()
    found = checkpoint.find(server.uri)
    resume(experiment, server.uri)
    check_same(by_id(server, found.run_id), whole, server)


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


@pytest.fixture
def proxy(server: Server) -> Iterator[str]:
    """Return the address of a proxy of the server."""
    Proxy.port, Proxy.begun, Proxy.lost, Proxy.answer = server.port, False, set(), None
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{proxy.server_port}"
    proxy.shutdown()
    proxy.server_close()


def test_what_is_asked_again_because_the_answer_was_lost_is_there_once(
    whole: TrackedRun, server: Server, proxy: str, experiment: Experiment
) -> None:
    run_id = train(experiment, proxy)

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
def test_a_server_that_refuses_or_fails_in_mid_run_is_said_cause_first(
    answer: tuple[int, bytes], cause: str, proxy: str, experiment: Experiment
) -> None:
    Proxy.answer = answer
    ended = pytest.raises(LabError, match=f"^tracking store '{proxy}' failed during the run: {cause}.*`--resume ")
    with ended:
        train(experiment, proxy)


# ---- before any training


def check_refused_by(uri: str, cause: str) -> None:
    """Check that the sentence begins with the cause, comes within ten seconds, and does not give the password away."""
    refused = pytest.raises(LabError, match=rf"^tracking store 'https?://[^']+' can't be used: {cause}")
    with within(10), refused as refusal:
        open_store(uri)
    assert "pass-word" not in str(refusal.value)


@pytest.mark.parametrize(
    ("host", "cause"),
    [
        ("bob:pass-word@127.0.0.1:9", r"no connection to the server \(Connection refused\)"),
        ("bob:pass-word@no-such-host.invalid", r"no connection to the server \("),
    ],
)
def test_what_the_network_says_comes_first(host: str, cause: str) -> None:
    check_refused_by(f"http://{host}", cause)


def test_a_certificate_that_is_not_trusted_is_named_first() -> None:
    inner = ssl.SSLCertVerificationError(1, "certificate verify failed: self-signed certificate")
    nested = requests.exceptions.SSLError(MaxRetryError(HTTPSConnectionPool("runs"), "/", SSLError(inner)))
    assert why_refused(nested).endswith("(certificate verify failed: self-signed certificate)")


@pytest.mark.parametrize(
    ("status", "body", "cause"),
    [
        (401, b"who are you?", r"the server refuses you \(HTTP 401\): give MLFLOW_TRACKING_USERNAME"),
        (200, b"<html>a router</html>", r"what answers there is no MLflow server \(HTTP 200\)"),
        (503, b"", r"the server fails \(HTTP 503\): its own log says why"),
    ],
)
def test_what_a_server_answers_is_said_in_a_sentence(status: int, body: bytes, cause: str) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        check_refused_by(f"http://bob:pass-word@127.0.0.1:{server.server_port}", cause)
        server.shutdown()


@pytest.mark.parametrize("listens", [True, False])
def test_a_server_that_does_not_answer_is_refused_within_ten_seconds(listens: bool) -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        if listens:
            mute.listen()  # it takes connections and says nothing
        with within(10), pytest.raises(LabError, match=r"^tracking store 'http://127.* can't be used: "):
            open_store(f"http://127.0.0.1:{mute.getsockname()[1]}")
