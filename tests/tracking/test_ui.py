"""`python -m mnist_lab ui`: a real server over a real store."""

import contextlib
import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pytest

from forkserver import PATIENCE, Program, run_program
from helpers import read_runs, wait_until
from mnist_lab.errors import LabError
from mnist_lab.tracking import serving, ui, view
from mnist_lab.tracking.run import track
from mnist_lab.tracking.sqlite import has_experiment
from mnist_lab.tracking.store import open_store


@contextlib.contextmanager
def listening(host: str = "127.0.0.1", port: int = 0) -> Iterator[int]:
    """Take a port, as another program does."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((host, port))
        taken.listen()
        yield taken.getsockname()[1]


def begin(first: Callable[[], None]) -> None:
    serving.START_TIMEOUT = PATIENCE
    first()


def start(*flags: str, cwd: Path, first: Callable[[], None] = bool) -> Program:
    return Program("-m", "mnist_lab", "ui", *flags, cwd=cwd, first=partial(begin, first))


# ---- a server


@dataclass(frozen=True)
class Server:
    taken_port: int
    process: Program
    database: Path

    @property
    def first_line(self) -> str:
        return self.process.stdout.partition("\n")[0]

    @property
    def address(self) -> str:
        return self.first_line.removeprefix("The runs: ").removesuffix("/lab")

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"{self.address}{path}", timeout=PATIENCE) as answer:
            return answer.read().decode()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start the UI where the port that is asked for is taken, over a store that is not there yet."""
    folder = tmp_path_factory.mktemp("ui")
    with listening() as port:
        flags = ["--port", str(port), "--tracking-uri", "sqlite:///store/mlflow.db"]
        process = start(*flags, cwd=folder)
        try:
            wait_until(lambda: "\n" in process.stdout, process)
            yield Server(port, process, folder / "store" / "mlflow.db")
        finally:
            process.terminate()
            process.wait()


def test_a_taken_port_gives_the_next_and_says_so(server: Server) -> None:
    port = int(server.address.rpartition(":")[2])

    assert server.taken_port < port < server.taken_port + ui.PORTS_TRIED
    first, *servers = server.process.stderr.splitlines()
    assert first == f"Port {server.taken_port} is taken; using {port}."
    assert [line for line in servers if "Warning" in line] == []


def test_the_printed_address_is_that_of_the_runs_table(server: Server) -> None:
    assert re.fullmatch(r"The runs: http://127\.0\.0\.1:\d+/lab", server.first_line)
    assert "<title>mnist_lab</title>" in server.get("/lab")  # leads to the runs, as test_browser sees
    assert "<title>MLflow</title>" in server.get("/")


def test_the_server_knows_the_experiment(server: Server) -> None:
    found = json.loads(server.get("/api/2.0/mlflow/experiments/get-by-name?experiment_name=mnist"))["experiment"]

    assert found["experiment_id"] == "1"
    assert found["artifact_location"] == (server.database.parent / "artifacts").as_uri()  # not the server's own


def test_the_server_listens_on_loopback_only(server: Server) -> None:
    started = psutil.Process(server.process.pid)
    sockets = [
        connection.laddr
        for process in (started, *started.children(recursive=True))
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]

    port = int(server.address.rpartition(":")[2])
    assert {tuple(address) for address in sockets} == {("127.0.0.1", port)}


@pytest.mark.parametrize(
    ("headers", "status"),
    [({}, 200), ({"Host": "evil.example"}, 403), ({"Origin": "http://evil.example"}, 403)],
    ids=["its own page", "a foreign host", "a foreign page"],
)
def test_the_server_answers_nobody_who_is_led_to_it_by_another_page(
    headers: dict[str, str], status: int, server: Server
) -> None:
    asked = urllib.request.Request(
        f"{server.address}/api/2.0/mlflow/experiments/search",
        data=b'{"max_results": 1}',
        headers={"Content-Type": "application/json", **headers},
    )
    opener = urllib.request.build_opener()
    opener.process_response.clear()  # a refusal is an answer too
    with opener.open(asked, timeout=PATIENCE) as answer:
        assert answer.status == status


def test_runs_can_be_tracked_through_the_server(server: Server) -> None:
    with track(open_store(server.address), "by http", params={"lr": 0.1}, tags={"step": "a"}) as tracked:
        tracked.log_epoch(1, {"test_accuracy": 98.5})
        tracked.log_text("hello", "hello.txt")

    (run,) = read_runs(server.database)
    assert (run.name, run.status, run.metrics) == ("by http", "FINISHED", {"test_accuracy": [(1, 98.5)]})
    assert (run.artifacts / "hello.txt").read_text() == "hello"
    shown = json.loads(server.get(f"/api/2.0/mlflow/runs/get?run_id={run.run_id}"))["run"]
    assert shown["data"]["metrics"][0]["value"] == 98.5


def test_a_server_that_is_running_needs_no_ui(server: Server, tmp_path: Path) -> None:
    done = run_program("-m", "mnist_lab", "ui", "--tracking-uri", server.address, cwd=tmp_path)

    assert done.returncode == 1
    assert done.stderr == (f"error: tracking store '{server.address}' is a server already: open it in a browser\n")


def test_sigterm_ends_the_server_with_its_children(server: Server) -> None:
    """The last test of this server."""
    family = psutil.Process(server.process.pid).children(recursive=True)
    assert len(family) >= 2

    server.process.terminate()

    assert server.process.wait() == 0
    wait_until(lambda: not [process for process in family if process.is_running() and process.status() != "zombie"])
    assert server.process.stdout == f"{server.first_line}\nReady. Ctrl-C stops the server.\n"
    assert "Traceback" not in server.process.stderr
    with pytest.raises(OSError, match="refused"):
        server.get("/health")


def print_into(pipe: Path) -> None:
    file = os.open(pipe, os.O_WRONLY)
    os.dup2(file, 1)
    os.close(file)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115


def test_the_server_ends_with_its_program_though_nobody_reads_what_it_prints(uri: str, tmp_path: Path) -> None:
    pipe = tmp_path / "printed"
    os.mkfifo(pipe)
    process = start("--tracking-uri", uri, cwd=tmp_path, first=partial(print_into, pipe))
    with pipe.open() as printed:
        assert printed.readline().startswith("The runs: "), process.stderr
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 2

    process.terminate()

    assert process.wait() == 0
    wait_until(lambda: not [process for process in family if process.is_running() and process.status() != "zombie"])


class Answer(http.server.BaseHTTPRequestHandler):
    """Says that all is well, as an MLflow server of somebody else's would."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments: object) -> None: ...


def find_any_port_free() -> None:
    ui.free_port = lambda port: port


def test_anothers_server_on_the_port_is_not_taken_for_ours(uri: str, tmp_path: Path) -> None:
    """Two that start at once may find the same port free; the later one must not show the other's runs."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as other:
        threading.Thread(target=other.serve_forever).start()
        try:
            flags = ["--port", str(other.server_port), "--tracking-uri", uri]
            process = start(*flags, cwd=tmp_path, first=find_any_port_free)
            assert process.wait() == 1
        finally:
            other.shutdown()

    assert process.stdout == ""
    assert "address already in use" in process.stderr
    said = r"error: the MLflow server did not start: exit code \d, its messages are above"
    assert re.fullmatch(said, process.stderr.splitlines()[-1])


# ---- ports


def test_a_free_port_is_taken_as_it_is() -> None:
    with listening() as port:
        pass

    assert ui.free_port(port) == port


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])  # noqa: S104
def test_a_taken_port_is_passed_over(host: str) -> None:
    with listening(host) as port:
        assert port < ui.free_port(port) < port + ui.PORTS_TRIED


def test_ports_that_are_all_taken_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ui, "PORTS_TRIED", 1)
    with listening() as port, pytest.raises(LabError, match=f"^port: {port} to {port} are all taken; name another"):
        ui.free_port(port)


@pytest.mark.parametrize("port", [-1, 0, 80, 1023, 65536, 100_000])
def test_a_port_out_of_range_is_refused(port: int) -> None:
    with pytest.raises(LabError, match=f"^port: {port} is not between 1024 and 65535$"):
        ui.free_port(port)


def test_the_last_port_of_all_is_the_last_one_tried() -> None:
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # where another program has it
            stack.enter_context(listening(port=65535))
        with pytest.raises(LabError, match="^port: 65535 to 65535 are all taken"):
            ui.free_port(65535)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--port", "80"], "error: port: 80 is not between 1024 and 65535"),
        (["--tracking-uri", "sqlite:///{folder}"], "error: tracking store {folder} is not a file"),
    ],
    ids=["port", "store"],
)
def test_a_wrong_flag_is_refused_in_one_sentence(flags: list[str], sentence: str, tmp_path: Path) -> None:
    done = run_program("-m", "mnist_lab", "ui", *[flag.format(folder=tmp_path) for flag in flags], cwd=tmp_path)

    assert done.returncode == 1
    assert done.stderr == f"{sentence.format(folder=tmp_path)}\n"


# ---- the view


def test_a_store_with_the_view_of_an_earlier_version_gets_todays(uri: str) -> None:
    store = open_store(uri)
    store.client.set_experiment_tag(store.experiment_id, view.TAG, "{}")
    assert not has_experiment(uri, {view.TAG: view.state()})
    ui.make_ready(uri)
    assert has_experiment(uri, {view.TAG: view.state()})


def test_a_store_that_is_ready_is_served_without_importing_mlflow_or_torch(uri: str, tmp_path: Path) -> None:
    """Each takes seconds, for which a person would wait."""
    open_store(uri)
    program = (
        "import sys; from mnist_lab import __main__; from mnist_lab.tracking import front, ui; "
        f"ui.make_ready({uri!r}); print([name for name in ('mlflow', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "[]\n"
