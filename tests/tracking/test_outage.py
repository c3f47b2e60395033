"""Tracking servers that are killed, frozen or gone in the middle of a run: the run goes on, and nothing is lost."""

import http.client
import multiprocessing
import os
import shutil
import signal
import socket
import sqlite3
import ssl
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

import mlflow
import numpy as np
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from mlflow.entities import LoggedModel

import tiny
from forkserver import PATIENCE, Program, processes
from helpers import TINY, TrackedRun, read_runs, wait_until, within
from mnist_lab import __main__ as jobs
from mnist_lab import paths
from mnist_lab.errors import LabError
from mnist_lab.experiment import Experiment
from mnist_lab.running import checkpoint
from mnist_lab.running import run as runner
from mnist_lab.running.job import Job
from mnist_lab.running.progress import Progress
from mnist_lab.tracking import delivery
from mnist_lab.tracking import run as tracking
from mnist_lab.tracking.outbox import Outbox, Record, all_outboxes
from mnist_lab.tracking.run import track
from mnist_lab.tracking.store import open_store
from mnist_lab.training.loop import EpochMetrics

EPOCHS = 4
fork = multiprocessing.get_context("fork")


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
def outboxes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Keep what waits in this test's own folder, and ask a server that is away again at once."""
    monkeypatch.setattr("mnist_lab.paths.PROJECT_ROOT", tmp_path / "project")
    monkeypatch.setattr(tracking, "ASK_AGAIN_SECONDS", 0)
    return tmp_path / "project" / "mlruns" / "outbox"


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


def test_runs_whose_server_is_killed_or_frozen_and_comes_back_lack_nothing_and_have_each_point_once(
    whole: TrackedRun, server: Server, experiment: Experiment, outboxes: Path, caplog: pytest.LogCaptureFixture
) -> None:
    killed = train(experiment, server.uri, After(epoch_1=server.kill, epoch_3=server.start))
    assert "is away" in caplog.text
    assert "is back, and has what waited" in caplog.text
    check_same(by_id(server, killed), whole, server)

    frozen = train(
        experiment,
        server.uri,
        After(epoch_2=lambda: server.signal(signal.SIGSTOP), epoch_3=lambda: server.signal(signal.SIGCONT)),
    )
    check_same(by_id(server, frozen), whole, server)

    caplog.clear()
    to_the_end = train(experiment, server.uri, After(epoch_2=server.kill))
    assert "still away" in caplog.text
    assert by_id(server, to_the_end).status == "RUNNING"  # as far as the database knows
    assert [delivery.sync(server.uri)[0].sent, len(delivery.sync(server.uri))] == [0, 1]
    server.start()
    (sent,) = delivery.sync(server.uri)
    assert (sent.run_id, sent.waiting, sent.reason) == (to_the_end, 0, "")
    assert sent.sent > 8
    check_same(by_id(server, to_the_end), whole, server)
    assert delivery.sync(server.uri) == []
    assert list(outboxes.iterdir()) == []


class Forgetful(BaseHTTPRequestHandler):
    """Hands each request on to the real server; the first answer to each kind of request is lost on the way back."""

    lost: ClassVar[set[str]] = set()
    port: ClassVar[int]
    losing: ClassVar[bool] = False

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        kind = f"{self.command} {urlsplit(self.path).path.rpartition('/artifacts/')[0] or urlsplit(self.path).path}"
        Forgetful.losing |= self.path.endswith("log-inputs")  # a run has to be begun before anything can wait for it
        if self.losing and kind not in self.lost:
            self.lost.add(kind)
            return
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_PUT = do_PATCH = do_GET

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def forgetful(server: Server) -> Iterator[str]:
    """Return the address of a proxy of the server that loses answers."""
    Forgetful.port, Forgetful.losing = server.port, False
    Forgetful.lost.clear()
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Forgetful)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{proxy.server_port}"
    proxy.shutdown()
    proxy.server_close()


def test_what_is_sent_again_because_the_answer_was_lost_is_there_once(
    whole: TrackedRun, server: Server, forgetful: str, experiment: Experiment, outboxes: Path
) -> None:
    run_id = train(experiment, forgetful)
    for _ in range(10):
        delivery.sync(forgetful)

    lost = {kind.rpartition("/mlflow")[2] for kind in Forgetful.lost}
    assert lost >= {"/runs/log-batch", "/runs/log-inputs", "/runs/outputs", "/runs/update", "/logged-models"}
    assert {kind.partition(" ")[0] for kind in Forgetful.lost} >= {"GET", "POST", "PUT", "PATCH"}
    check_same(by_id(server, run_id), whole, server)
    assert list(outboxes.iterdir()) == []


def test_what_waits_is_sent_by_the_next_run_and_by_the_sync_job(
    server: Server,
    experiment: Experiment,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["mnist_lab", "sync", "--tracking-uri", server.uri])
    first = train(experiment, server.uri, After(epoch_4=server.kill))

    with pytest.raises(SystemExit):
        jobs.main()
    said = capsys.readouterr()
    assert f"run {first} on {server.uri}: 0 records sent; " in said.out
    assert said.err.startswith("error: not all could be sent; what waits stays on disk")
    server.start()
    second = train(experiment, server.uri, seed=6)
    assert by_id(server, first).status == by_id(server, second).status == "FINISHED"
    jobs.main()
    assert capsys.readouterr().out.endswith("Nothing waits for a tracking server.\n")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_without_a_server(experiment: Experiment, uri: str, server_pid: int, project: Path) -> None:
    paths.PROJECT_ROOT = project
    tracking.ASK_AGAIN_SECONDS = 0
    train(experiment, uri, After(epoch_1=lambda: os.kill(server_pid, signal.SIGKILL), epoch_3=die))


def test_a_run_killed_while_its_server_is_away_can_be_resumed(
    whole: TrackedRun, server: Server, experiment: Experiment, tmp_path: Path
) -> None:
    assert server.process is not None
    started = (experiment, server.uri, server.process.pid, tmp_path / "project")
    process = processes.Process(target=die_without_a_server, args=started)
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGKILL
    server.kill()
    server.start()

    found = checkpoint.find(server.uri)
    runner.run(job_of(experiment, server.uri), found.seed, After(), resume=found)

    check_same(by_id(server, found.run_id), whole, server)


def test_what_a_server_refuses_is_an_error_and_not_an_outage(server: Server, outboxes: Path) -> None:
    def log_into_a_deleted_run() -> None:
        with track(open_store(server.uri), "a run", params={}, tags={}) as tracked:
            mlflow.MlflowClient(server.uri).delete_run(tracked.run_id)
            tracked.log_epoch(1, {"test_accuracy": 98.0})

    with pytest.raises(LabError, match=r"failed during the run: .*deleted"):
        log_into_a_deleted_run()
    assert not list(outboxes.glob("*"))


# ---- records that wait, without a server


def a_record_waits(uri: str, run_id: str, record: Record) -> Outbox:
    outbox = Outbox.of_run(uri, run_id)
    outbox.add(uri, record)
    return outbox


def an_interrupted_run(uri: str) -> str:
    with suppress(KeyboardInterrupt), track(open_store(uri), "a run", params={}, tags={}) as tracked:
        raise KeyboardInterrupt
    return tracked.run_id


ONE_POINT = Record("metrics", {"step": 1, "timestamp": 1_000, "values": {"test_accuracy": 98.0}})


def test_what_another_process_has_sent_meanwhile_is_left_alone(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outbox = a_record_waits(uri, "a" * 32, ONE_POINT)
    listed = list(all_outboxes(uri))
    assert len(listed) == 1
    shutil.rmtree(outbox.folder)
    monkeypatch.setattr(delivery, "all_outboxes", lambda uri: listed)

    assert delivery.sync(uri) == []


def test_a_record_that_is_damaged_keeps_no_other_run_from_being_sent(uri: str) -> None:
    run_id = an_interrupted_run(uri)
    damaged = a_record_waits(uri, "0" * 32, ONE_POINT)
    (damaged.waiting()[0] / "record.json").write_text("{")
    a_record_waits(uri, run_id, ONE_POINT)

    found = {one.run_id: one for one in delivery.sync(uri)}

    assert (found[run_id].sent, found[run_id].waiting) == (1, 0)
    assert (found["0" * 32].sent, found["0" * 32].waiting) == (0, 1)
    assert "record.json can't be read: Expecting property name" in found["0" * 32].reason


def test_a_run_that_goes_on_first_sends_what_waits_for_it(uri: str) -> None:
    run_id = an_interrupted_run(uri)
    outbox = a_record_waits(uri, run_id, ONE_POINT)
    outbox.add(uri, Record("end", {"status": "KILLED", "end_time": 2_000}))

    with track(open_store(uri), "a run", params={}, tags={}, resume_run_id=run_id) as tracked:
        tracked.log_missing({1: {"test_accuracy": 98.0}, 2: {"test_accuracy": 98.5}})
    assert delivery.sync(uri) == []

    client = mlflow.MlflowClient(tracking_uri=uri)
    assert client.get_run(run_id).info.status == "FINISHED"
    points = client.get_metric_history(run_id, "test_accuracy")
    assert [(point.step, point.value) for point in points] == [(1, 98.0), (2, 98.5)]


def test_a_run_whose_records_another_process_is_sending_does_not_go_on(uri: str) -> None:
    run_id = an_interrupted_run(uri)
    other = a_record_waits(uri, run_id, ONE_POINT)
    assert other.lock()

    with (
        pytest.raises(
            LabError, match=r"^resume: what run .* logged is being sent by another process; try again later$"
        ),
        track(open_store(uri), "a run", params={}, tags={}, resume_run_id=run_id),
    ):
        pytest.fail("it went on")
    assert mlflow.MlflowClient(tracking_uri=uri).get_run(run_id).info.status == "KILLED"


def test_a_model_that_a_slow_server_made_twice_is_there_once(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the first request, which was given up, is carried out just after the second one."""
    create = mlflow.MlflowClient.create_logged_model

    def twice(client: mlflow.MlflowClient, *given: object, **named: object) -> object:
        create(client, *given, **named)  # type: ignore[arg-type]
        return create(client, *given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(mlflow.MlflowClient, "create_logged_model", twice)
    with track(open_store(uri), "a run", params={}, tags={}) as tracked:
        assert tracked.log_model("a", torch.nn.Flatten(), torch.zeros(2, 1, 28, 28), (0, 1)) is None

    assert only_model(mlflow.MlflowClient(uri), tracked.run_id).status == "READY"


# ---- before any training


class _Answers(BaseHTTPRequestHandler):
    status = 404

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(b"<html>no such page</html>")

    do_POST = do_GET

    def log_message(self, *_: object) -> None: ...


class _Broken(_Answers):
    status = 500


@pytest.fixture(params=[_Answers, _Broken])
def another_server(request: pytest.FixtureRequest) -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), request.param)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_server_of_something_else_is_refused_within_ten_seconds(another_server: str) -> None:
    with within(10), pytest.raises(LabError, match=r"^tracking store 'http://127.* can't be used: "):
        open_store(another_server)


@pytest.fixture(scope="module")
def untrusted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the address of a server with a certificate that it has signed itself."""
    folder = tmp_path_factory.mktemp("certificate")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    no_password = serialization.NoEncryption()
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, no_password)
    (folder / "both.pem").write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "both.pem")
    server = HTTPServer(("127.0.0.1", 0), _Answers)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"https://bob:pass-word@127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def check_refused_by(uri: str, cause: str) -> None:
    """Check that the sentence begins with the cause, comes within ten seconds, and does not give the password away."""
    refused = pytest.raises(LabError, match=rf"^tracking store 'https?://[^']+' can't be used: {cause}")
    with within(10), refused as refusal:
        open_store(uri)
    assert "pass-word" not in str(refusal.value)


def test_a_certificate_that_is_not_trusted_is_named_first(untrusted: str) -> None:
    check_refused_by(untrusted, r"the server's certificate is not trusted \(self-signed certificate\); ")


@pytest.mark.parametrize(
    ("host", "cause"),
    [
        ("bob:pass-word@127.0.0.1:9", r"no server listens there \(Connection refused\)"),
        ("bob:pass-word@no-such-host.invalid", r"its host's name can't be resolved \("),
    ],
)
def test_what_the_network_says_comes_first(host: str, cause: str) -> None:
    check_refused_by(f"http://{host}", cause)


@pytest.mark.parametrize(
    ("status", "body", "cause"),
    [
        (401, b"who are you?", r"the server refuses you \(HTTP 401\): give MLFLOW_TRACKING_USERNAME"),
        (403, b'{"detail": "no"}', r"the server refuses you \(HTTP 403\)"),
        (404, b'{"detail": "Not Found"}', r"what answers there is no MLflow server \(HTTP 404\)"),
        (200, b"<html>a router</html>", r"what answers there is no MLflow server \(HTTP 200\)"),
        (200, b"[1, 2]", r"what answers there is no MLflow server \(HTTP 200\)"),
        (503, b"", r"the server answers that it fails \(too many 503 error responses\)"),
    ],
)
def test_what_a_server_answers_is_said_in_a_sentence(status: int, body: bytes, cause: str) -> None:
    class Handler(_Answers):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

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


def test_a_server_that_cannot_write_is_refused_before_the_training(server: Server) -> None:
    before = len(read_runs(server.database))
    # As on a read-only disk; root may write to a read-only file.
    execute(server.database, "CREATE TRIGGER ro BEFORE INSERT ON runs BEGIN SELECT RAISE(ABORT, 'read-only'); END")
    try:
        with (
            pytest.raises(LabError, match=r"^tracking store 'http://127.* can't be written: "),
            track(open_store(server.uri), "a run", params={}, tags={}),
        ):
            raise AssertionError("the run began")
    finally:
        execute(server.database, "DROP TRIGGER ro")
    assert len(read_runs(server.database)) == before


def execute(database: Path, statement: str) -> None:
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute(statement)


# ---- the outbox


def test_records_come_back_in_order_with_their_files(tmp_path: Path) -> None:
    note, folder = tmp_path / "note.txt", tmp_path / "model"
    note.write_text("hello")
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "weights").write_bytes(b"\0\1")
    outbox = Outbox(tmp_path / "outbox" / "abc")
    for number in range(12):
        outbox.add("http://x", Record("metrics", {"step": number, "loss": float("nan")}))
    outbox.add("http://x", Record("artifact", {"folder": None}, note))
    outbox.add("http://x", Record("model", {"name": "model"}, folder))
    note.unlink()
    shutil.rmtree(folder)

    records = [outbox.read(entry) for entry in outbox.waiting()]

    assert [record.content["step"] for record in records[:12]] == list(range(12))
    assert records[12].path is not None
    assert records[12].path.read_text() == "hello"
    assert records[13].path is not None
    assert (records[13].path / "data" / "weights").read_bytes() == b"\0\1"
    assert (outbox.target("http://x"), outbox.run_id) == ("http://x", "abc")


def test_a_process_killed_while_it_writes_leaves_whole_records_only(tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.write_bytes(os.urandom(200_000))

    def write() -> None:
        outbox = Outbox(tmp_path / "outbox" / "abc")
        while True:
            outbox.add("http://x", Record("artifact", {"folder": "f"}, big))

    before = 0
    for _ in range(20):
        process = fork.Process(target=write)
        process.start()
        time.sleep(0.05 + int.from_bytes(os.urandom(1)) / 4000)
        process.kill()
        process.join()
        outbox = Outbox(tmp_path / "outbox" / "abc")
        records = [outbox.read(entry) for entry in outbox.waiting()]
        assert len(records) >= before
        before = len(records)
        assert all(record.path and record.path.read_bytes() == big.read_bytes() for record in records[-3:])
    assert before > 20


def test_one_process_at_a_time_sends_what_waits(tmp_path: Path) -> None:
    outbox, other = (Outbox(tmp_path / "outbox" / "abc") for _ in range(2))
    outbox.add("http://x", Record("tags", {}))
    assert outbox.lock()
    assert not other.lock()
    outbox.unlock()
    assert other.lock()
    (entry,) = other.waiting()
    other.remove(entry)
    other.unlock()
    assert list((tmp_path / "outbox").iterdir()) == []
