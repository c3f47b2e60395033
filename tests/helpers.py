"""Wait for what programs do, and read what they left, with nothing but the standard library."""

import dataclasses
import io
import os
import resource
import shutil
import signal
import socket
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

from forkserver import PATIENCE, Program

if TYPE_CHECKING:
    from multiprocessing.synchronize import Barrier

    import psutil

    from mnist_lab.data import Mnist
    from mnist_lab.tracking.store import Store

ROOT = Path(__file__).parent.parent
TINY = Path(__file__).parent / "tiny.py"  # a script of an experiment that trains in a moment


def first(mnist: "Mnist", training: int, test: int) -> "Mnist":
    return dataclasses.replace(
        mnist,
        train_images=mnist.train_images[:training],
        train_labels=mnist.train_labels[:training],
        test_images=mnist.test_images[:test],
        test_labels=mnist.test_labels[:test],
    )


@dataclass(frozen=True)
class Evil:
    """Makes a file when it is unpickled."""

    file: Path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.file,)


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def write_search(folder: Path, declared: str) -> Path:
    """Write the tiny script with a space to search in, whose lower end `LOW` is declared by this line."""
    space = f'{declared}\nSEARCH = {{"lr": FloatDistribution(LOW, 1.0, log=True)}}\n\n'
    text = TINY.read_text().replace("main(EXPERIMENT)", "main(EXPERIMENT, search=SEARCH)")
    text = text.replace("import torch\n", "import torch\nfrom optuna.distributions import FloatDistribution\n", 1)
    (folder / "idea.py").write_text(text.replace("if __name__", f"{space}if __name__"))
    return folder / "idea.py"


def copy_store(empty_store: Path, database: Path) -> Path:
    """Copy the database of a store without runs, which keeps its artifacts beside it; return the copy."""
    database.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(empty_store, database)
    with closing(sqlite3.connect(database)) as connection, connection:
        location = (database.parent / "artifacts").as_uri()
        connection.execute("UPDATE experiments SET artifact_location = ? WHERE name = 'mnist'", (location,))
    return database


@dataclass(frozen=True)
class TrackedRun:
    run_id: str
    name: str
    status: str
    params: dict[str, str]
    tags: dict[str, str]
    metrics: dict[str, list[tuple[int, float]]]  # (step, value) in order, by name
    artifacts: Path


def read_runs(database: Path) -> list[TrackedRun]:
    """Return the runs in an MLflow database, oldest first, by SQL alone."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=30)) as connection:
        query = "SELECT run_uuid, name, status, artifact_uri FROM runs ORDER BY start_time, run_uuid"
        return [
            TrackedRun(
                run_id,
                name,
                status,
                params=dict(connection.execute("SELECT key, value FROM params WHERE run_uuid = ?", (run_id,))),
                tags=dict(connection.execute("SELECT key, value FROM tags WHERE run_uuid = ?", (run_id,))),
                metrics=_metrics(connection, run_id),
                artifacts=Path(artifact_uri.removeprefix("file://")),
            )
            for run_id, name, status, artifact_uri in connection.execute(query).fetchall()
        ]


def _metrics(connection: sqlite3.Connection, run_id: str) -> dict[str, list[tuple[int, float]]]:
    points: dict[str, list[tuple[int, float]]] = {}
    query = "SELECT key, step, value FROM metrics WHERE run_uuid = ? ORDER BY step, timestamp"
    for key, step, value in connection.execute(query, (run_id,)):
        points.setdefault(key, []).append((step, value))
    return points


def read_value(database: Path, query: str) -> Any:
    with closing(sqlite3.connect(database, timeout=30)) as connection:
        ((value,),) = connection.execute(query).fetchall()
    return value


def wait_until(condition: Callable[[], object], program: Program | None = None) -> None:
    """Wait until the condition holds; an error that it raises counts as "not yet".

    There is nothing to wait for where the program that should bring it about has ended.
    """
    deadline = time.monotonic() + PATIENCE
    error: Exception | None = None
    ended = False
    while time.monotonic() < deadline and not ended:
        ended = program is not None and program.poll() is not None  # it may be so by what it did last
        try:
            if condition():
                return
        except (OSError, sqlite3.Error) as raised:
            error = raised
        time.sleep(0.05)
    said = program and f": {program.returncode}, {program.stdout}{program.stderr}"
    raise AssertionError(f"not so after {PATIENCE} seconds, or at the program's end{said or ''}") from error


@contextmanager
def serving(job: str, *flags: str, cwd: Path) -> Iterator[Program]:
    """Start a job that serves until it is stopped, and stop it at the end of the block."""
    process = Program("-m", "mnist_lab", job, *flags, cwd=cwd)
    try:
        wait_until(lambda: "Ctrl-C stops the server." in process.stdout, process)
        yield process
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A real tracking server over a SQLite store, which can be killed, frozen and started again at its address."""

    def __init__(self, folder: Path, empty_store: Path) -> None:
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.folder = folder
        self.database = folder / "mlflow.db"
        self.process: Program | None = None
        shutil.copy(empty_store, self.database)
        with closing(sqlite3.connect(self.database)) as connection, connection:
            # Its experiment keeps its artifacts in a folder; let the server make one that it serves itself.
            connection.execute("UPDATE experiments SET name = 'template' WHERE name = 'mnist'")

    def start(self) -> None:
        flags = ["--workers", "1", "--host", "127.0.0.1", "--port", str(self.port)]
        flags += ["--backend-store-uri", f"sqlite:///{self.database}"]
        flags += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self.process = Program("-m", "mlflow", "server", *flags, cwd=self.folder, env=environment)
        wait_until(lambda: not urlopen(f"{self.uri}/health", timeout=10).close(), self.process)

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def artifacts(self, run: TrackedRun) -> Path:
        return self.folder / "artifacts" / str(run.artifacts).partition("mlflow-artifacts:")[2].lstrip("/")


def all_gone(processes: Iterable["psutil.Process"]) -> bool:
    return not [one for one in processes if one.is_running() and one.status() != "zombie"]


def ports_of(processes: Iterable["psutil.Process"]) -> set[tuple[str, int]]:
    connections = [one for process in processes for one in process.net_connections("inet")]
    return {tuple(one.laddr) for one in connections if one.status == "LISTEN"}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file grow beyond so many bytes: to a program it is as a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Check that the block takes no longer; time in which other programs have the processors does not count."""
    start, waited = time.monotonic(), _waited()
    yield
    assert time.monotonic() - start - (_waited() - waited) < seconds


def _waited() -> float:
    """Return for how many seconds this thread could have run and did not, where the system says so (Linux)."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return 0.0


def log_points(
    store: "Store", writer: int, epochs: int, names: list[str], together: "Barrier", env: Mapping[str, str]
) -> None:
    """Log one run of `epochs` points of each metric, in a process of its own, beginning when all writers are there."""
    from mnist_lab.tracking.run import track

    os.environ.update(env)
    together.wait(PATIENCE)
    with track(store, f"writer {writer}", params={"writer": writer}, tags={}) as run:
        for epoch in range(1, epochs + 1):
            run.log_missing({epoch: {name: point(writer, epoch, number) for number, name in enumerate(names)}})


def point(writer: int, epoch: int, number: int) -> float:
    return writer * 1_000_000 + epoch * 10 + number
