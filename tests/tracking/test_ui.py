"""`python -m mnist_lab ui`: a real server over a real store."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pytest

from forkserver import PATIENCE, Program
from helpers import all_gone, ports_of, wait_until
from mnist_lab.errors import LabError
from mnist_lab.tracking import server as servers
from mnist_lab.tracking import view
from mnist_lab.tracking.run import track
from mnist_lab.tracking.store import open_store


@contextlib.contextmanager
def listening(host: str = "127.0.0.1", port: int = 0) -> Iterator[int]:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((host, port))
        taken.listen()
        yield taken.getsockname()[1]


def print_into(pipe: Path) -> None:
    os.dup2(os.open(pipe, os.O_WRONLY), 1)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115


def family(program: Program) -> list[psutil.Process]:
    return psutil.Process(program.pid).children(recursive=True)


@dataclass(frozen=True)
class Server:
    taken_port: int
    process: Program
    database: Path
    address: str

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"{self.address}{path}", timeout=PATIENCE) as answer:
            return answer.read().decode()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start the UI where the port that is asked for is taken, over a store that is not there yet."""
    folder = tmp_path_factory.mktemp("ui")
    with listening() as port:
        flags = ["--port", str(port), "--tracking-uri", "sqlite:///store/mlflow.db"]
        process = Program("-m", "mnist_lab", "ui", *flags, cwd=folder)
        try:
            wait_until(lambda: "Ready. Ctrl-C stops the server." in process.stdout, process)
            address = process.stdout.partition("/lab\n")[0].removeprefix("The runs: ")
            yield Server(port, process, folder / "store" / "mlflow.db", address)
        finally:
            process.terminate()
            process.wait()


def test_a_taken_port_gives_the_next_which_is_said_and_alone_listens_on_loopback(server: Server) -> None:
    port = int(server.address.rpartition(":")[2])
    assert server.taken_port < port < server.taken_port + servers.PORTS_TRIED
    assert server.process.stderr.startswith(f"Port {server.taken_port} is taken; using {port}.\n")
    assert "Warning" not in server.process.stderr
    assert ports_of(family(server.process)) == {("127.0.0.1", port)}


def test_it_serves_mlflow_with_the_page_that_leads_to_the_runs(server: Server) -> None:
    assert "<title>mnist_lab</title>" in server.get("/lab")
    assert "<title>MLflow</title>" in server.get("/")
    found = json.loads(server.get("/api/2.0/mlflow/experiments/get-by-name?experiment_name=mnist"))["experiment"]
    assert found["artifact_location"] == (server.database.parent / "artifacts").as_uri()  # not the server's own


def test_it_answers_nobody_who_is_led_to_it_by_another_page(server: Server) -> None:
    opener = urllib.request.build_opener()
    opener.process_response.clear()  # a refusal is an answer too
    address = f"{server.address}/api/2.0/mlflow/experiments/search"
    for headers, status in (({}, 200), ({"Host": "evil.example"}, 403), ({"Origin": "http://evil.example"}, 403)):
        asked = urllib.request.Request(
            address, data=b'{"max_results": 1}', headers={"Content-Type": "application/json", **headers}
        )
        with opener.open(asked, timeout=PATIENCE) as answer:
            assert answer.status == status


def test_a_server_that_is_running_needs_no_ui(
    server: Server, lab: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="1"):
        lab("ui", "--tracking-uri", server.address)
    (sentence,) = capsys.readouterr().err.splitlines()
    assert server.address in sentence


def test_kill_9_of_the_program_ends_all_that_it_started(server: Server) -> None:
    """The last test of this server."""
    started = family(server.process)
    # MLflow's command, its server, and who watches this program
    assert len(started) >= 3, (server.process.poll(), server.process.stderr)

    server.process.kill()

    wait_until(lambda: all_gone(started))


def test_it_shows_a_copys_artifacts_and_sigterm_ends_it_in_order(uri: str, database: Path, tmp_path: Path) -> None:
    with track(open_store(uri), "a run", params={}, tags={}) as tracked:
        tracked.log_text("hello", "figures/hello.txt")
    shutil.copytree(database.parent, tmp_path / "copy ü")
    (shown,) = (tmp_path / "copy ü").glob("artifacts/*/artifacts/figures/hello.txt")
    shown.write_text("hello from the copy")
    pipe = tmp_path / "printed"
    os.mkfifo(pipe)
    flags = ["--tracking-uri", "sqlite:///copy ü/mlflow.db"]
    process = Program("-m", "mnist_lab", "ui", *flags, cwd=tmp_path, first=partial(print_into, pipe))
    with pipe.open() as printed:
        line = printed.readline()
    assert line.startswith("The runs: "), process.stderr
    address = line.removeprefix("The runs: ").partition("/lab")[0]
    path = f"{address}/get-artifact?run_uuid={tracked.run_id}&path=figures%2Fhello.txt"
    with urllib.request.urlopen(path, timeout=PATIENCE) as answer:
        assert answer.read() == b"hello from the copy"
    started = family(process)

    process.send_signal(signal.SIGTERM)

    assert process.wait() == 0
    wait_until(lambda: all_gone(started))
    assert "Traceback" not in process.stderr


# ---- ports


def test_a_taken_port_is_passed_over_and_one_that_cannot_be_had_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("127.0.0.1", "0.0.0.0"):  # noqa: S104
        with listening(host) as port:
            assert port < servers.free_port(port) < port + servers.PORTS_TRIED
        assert servers.free_port(port) == port
    for wrong in (-1, 1023, 65536):
        with pytest.raises(LabError, match=f"^port: {wrong} .*1024 and 65535"):
            servers.free_port(wrong)
    monkeypatch.setattr(servers, "PORTS_TRIED", 1)
    with listening() as port, pytest.raises(LabError, match=f"^port: {port} to {port} "):
        servers.free_port(port)


# ---- the view


def test_the_server_imports_nothing_that_takes_seconds(tmp_path: Path) -> None:
    """MLflow and torch each do, and a person would wait."""
    program = (
        "import sys; from mnist_lab import __main__; from mnist_lab.tracking import server; "
        "print([name for name in ('mlflow', 'torch', 'sqlalchemy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "[]\n"


def test_a_store_gets_todays_view_studies_first_in_the_order_of_their_names_then_the_newest_runs(uri: str) -> None:
    store = open_store(uri)
    store.client.set_experiment_tag(store.experiment_id, view.TAG, "{}")
    open_store(uri)
    assert store.client.get_experiment(store.experiment_id).tags[view.TAG] == view.state()
    for name, tags in (("b", {"study": "step2"}), ("seed", {}), ("a", {"study": "step1"}), ("newest", {})):
        with track(store, name, params={}, tags=tags):
            pass
    shown = json.loads(view.state())
    order = f"{shown['orderByKey']} {'ASC' if shown['orderByAsc'] else 'DESC'}"
    runs = store.client.search_runs([store.experiment_id], order_by=[order])
    assert [run.info.run_name for run in runs] == ["a", "b", "newest", "seed"]
