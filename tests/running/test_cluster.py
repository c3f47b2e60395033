"""A study and a search over two Ray nodes, each of them real processes: nodes and drivers are killed in the middle."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from forkserver import PATIENCE
from helpers import TINY, Server, TrackedRun, free_port, read_runs, wait_until, write_search
from mnist_lab.errors import LabError

PARENT = "mlflow.parentRunId"
STARTS = 10  # of a node
TOKEN = "a-token-of-the-tests-" + "0" * 32
RAY = {
    **{"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0"},
    **{"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""},
}
on_nodes = pytest.mark.load  # and long: Ray gives the agents of each node 15 seconds to start


class Process(subprocess.Popen[str]):
    """A program in a session of its own, what it has printed, and all that it has started."""

    def __init__(self, *command: str | Path, cwd: Path, **environment: str) -> None:
        self.output = (cwd / f"output-{time.monotonic_ns()}.txt").open("w+")
        streams = {"stdin": subprocess.DEVNULL, "stdout": self.output, "stderr": subprocess.STDOUT}
        super().__init__(command, cwd=cwd, env={**os.environ, **environment}, start_new_session=True, **streams)

    @property
    def said(self) -> str:
        return Path(self.output.name).read_text()

    def end(self) -> None:
        with suppress(psutil.NoSuchProcess):
            program = psutil.Process(self.pid)
            every = [program, *program.children(recursive=True)]
            for one in every:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            psutil.wait_procs(every, timeout=PATIENCE)
        self.wait()


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.folder, port = folder, free_port()
        self.address = f"127.0.0.2:{port}"
        head = self._start("--head", f"--port={port}", "--include-dashboard=false")
        self.nodes = [head, self._start(f"--address={self.address}")]

    def _start(self, *flags: str) -> Process:
        """Start a node; again where a busy machine did not start Ray's agents within the 15 seconds that Ray allows."""
        common = ("--node-ip-address=127.0.0.2", "--num-cpus=1", "--object-store-memory=500000000", "--block")
        command = (Path(sys.executable).with_name("ray"), "start", *flags, *common)
        for _ in range(STARTS):
            # Two nodes in one folder would unpack the code over one another's; its path must be short.
            own = f"--temp-dir={tempfile.mkdtemp(prefix='ray-', dir=self.folder)}"
            process = Process(*command, own, cwd=self.folder, **RAY)
            wait_until(lambda started=process: "Ray runtime started" in started.said or started.poll() is not None)
            if process.poll() is None:
                return process
        raise AssertionError(process.said)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        cluster = Cluster(Path(folder))
        yield cluster
        for node in reversed(cluster.nodes):
            node.end()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Return what starts, with flags, a script with a space to search in, which imports a module beside it."""
    (tmp_path / "places.py").write_text("LOW = 0.01\n")
    script = write_search(tmp_path, "from places import LOW")
    started = []

    def start(*flags: str, **variables: str) -> Process:
        variables = {"MNIST_LAB_MLRUNS": str(tmp_path), **RAY, **variables}
        started.append(Process(sys.executable, script, *flags, cwd=tmp_path, **variables))
        return started[-1]

    yield start
    for process in started:
        process.end()


def runs_since(server: Server) -> Callable[[], list[TrackedRun]]:
    before = {run.run_id for run in read_runs(server.database)}
    return lambda: [run for run in read_runs(server.database) if run.run_id not in before]


@pytest.mark.long
@on_nodes
def test_a_study_goes_on_when_a_node_dies(cluster: Cluster, one_server: Server, start: Callable[..., Process]) -> None:
    runs = runs_since(one_server)
    flags = ("--limit", "6000", "--epochs", "3", "--tracking-uri", one_server.uri)
    program = start("--seeds", "6", "--cluster", cluster.address, *flags)
    wait_until(lambda: len([run for run in runs() if PARENT in run.tags and "test_accuracy" in run.metrics]) >= 2)
    cluster.nodes[1].end()
    assert program.wait(PATIENCE) == 0, program.said

    parent, *children = runs()
    assert parent.metrics["seeds"] == [(0, 6.0)]
    assert {run.status for run in runs()} == {"FINISHED"}  # the lost run went on
    assert sorted(run.params["seed"] for run in children) == ["0", "1", "2", "3", "4", "5"]
    assert {tuple(epoch for epoch, _ in run.metrics["test_accuracy"]) for run in children} == {(1, 2, 3)}

    again = runs_since(one_server)
    local = start("--seeds", "2", "--again", *flags)
    assert local.wait(PATIENCE) == 0, local.said
    for run in again()[1:]:  # to the last digit
        (there,) = [one for one in children if one.params["seed"] == run.params["seed"]]
        assert run.metrics["test_loss"] == there.metrics["test_loss"]
        for tag in ("git_commit", "mlflow.source.name"):
            assert run.tags[tag] == there.tags[tag]


@pytest.mark.long
@on_nodes
def test_search_goes_on_after_ctrl_c(
    cluster: Cluster, one_server: Server, start: Callable[..., Process], uri: str
) -> None:
    flags = ("--limit", "3000", "--cluster", cluster.address, "--tracking-uri")
    assert_refused(start("--seeds", "2", *flags, uri), "error: tracking store")  # SQLite is for one node

    runs = runs_since(one_server)
    program = start("--search", "6", *flags, one_server.uri)
    wait_until(lambda: len([run for run in runs() if "validation_accuracy" in run.metrics]) >= 2)
    program.send_signal(signal.SIGINT)
    assert program.wait(PATIENCE) == 130, program.said
    assert "Traceback" not in program.said
    assert {run.status for run in runs()} <= {"FINISHED", "KILLED"}

    program = start("--search", "6", *flags, one_server.uri)
    wait_until(lambda: [run for run in runs() if "final_validation_accuracy" in run.metrics])
    program.kill()
    program.wait(PATIENCE)
    again = start("--search", "6", *flags, one_server.uri)
    assert again.wait(PATIENCE) == 0, again.said

    assert {run.status for run in runs()} <= {"FINISHED", "KILLED"}
    (parent,) = [run for run in runs() if PARENT not in run.tags]
    assert parent.metrics["trials"] == [(6, 6.0)]
    finished = [run for run in runs() if PARENT in run.tags and run.status == "FINISHED"]
    assert [run.tags[PARENT] for run in finished] == [parent.run_id] * 6
    assert not [name for run in finished for name in run.metrics if "test" in name]


def test_ray_that_does_not_start(start: Callable[..., Process], uri: str, tmp_path: Path) -> None:
    too_long = tmp_path / ("x" * 120)  # for the path of a socket
    program = start("--seeds", "2", "--tracking-uri", uri, "--cluster", "auto", RAY_TMPDIR=str(too_long))
    assert_refused(program, "error: cluster: Ray does not start (local): ")
    assert str(too_long) not in "".join(map(str, (one.info["cmdline"] for one in psutil.process_iter(["cmdline"]))))


@pytest.mark.long
def test_what_is_no_cluster(start: Callable[..., Process], uri: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        program = start("--seeds", "2", "--tracking-uri", uri, "--cluster", address)
        assert_refused(program, f"error: cluster: {address} ")


def assert_refused(program: Process, sentence: str) -> None:
    assert program.wait(PATIENCE) == 1
    assert sentence in program.said
    assert "Traceback" not in program.said
    assert len(program.said.strip().splitlines()) <= 2, program.said


@pytest.mark.long  # a minute: five processes import torch
def test_auto_starts_a_cluster_on_loopback(start: Callable[..., Process], uri: str, database: Path) -> None:
    flags = ("--seeds", "2", "--limit", "500", "--epochs", "1", "--tracking-uri", uri)
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # its path must be short
        (Path(folder) / "ray").mkdir()
        (Path(folder) / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")  # Ray's note of one that was killed
        program = start("--cluster", "auto", *flags, RAY_TMPDIR=folder)
        program.wait(PATIENCE)
    if program.wait(PATIENCE) == 1 and "Ray does not start" in program.said:
        pytest.skip(program.said.strip())  # on a busy one: Ray gives its own agents 15 seconds
    assert program.wait(PATIENCE) == 0, program.said
    children = [run for run in read_runs(database) if PARENT in run.tags]
    assert [run.status for run in children] == ["FINISHED"] * 2
    assert {run.tags["process"].split()[-1] for run in children} == {"cluster"}


# ---- on a node


@pytest.mark.usefixtures("mnist")  # which are there
def test_a_node_finds_the_script_and_mnist_in_what_it_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mnist_lab import data
    from mnist_lab.running.cluster import _pack
    from mnist_lab.running.job import Job, read_declaration

    job = Job(script=TINY, experiment=read_declaration(TINY), tracking_uri="")
    _pack(job, tmp_path)
    job.lies_in(tmp_path)

    monkeypatch.setattr(data, "WAYS", {})  # it need not reach the internet
    assert data.read_files(job.data_dir).keys() == data.FILES.keys()
    assert read_declaration(job.sources["script"]).epochs == job.experiment.epochs


def test_a_node_with_another_version_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    from mnist_lab.running import cluster, identity

    for variable in ("OMP_NUM_THREADS", cluster.OWN_FOLDER, cluster.ON_CLUSTER):
        monkeypatch.setenv(variable, os.environ.get(variable, ""))
    cluster._settle(identity.versions(), {})
    with pytest.raises(LabError, match="has torch "):
        cluster._settle({**identity.versions(), "torch": "0"}, {})
