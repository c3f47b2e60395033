"""What several test files share: the real data, the experiment scripts, tracking stores, and one real run."""

import os

# Before torch is imported, and for the programs that tests start. Two threads wait for each other by spinning, which
# makes training many times slower where another program is busy too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import importlib.util
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from forkserver import SIGNALS, run_program
from helpers import ROOT, Server, TrackedRun, copy_store, first, read_runs

if TYPE_CHECKING:  # torch takes seconds, and some files of tests need none of it
    from mnist_lab import Experiment
    from mnist_lab.data import Mnist
    from mnist_lab.tracking.store import Store
    from run_writer import Published

EXPERIMENTS = ROOT / "experiments"


@pytest.fixture(scope="session", autouse=True)
def _signals_reach_the_processes_under_test() -> None:
    """Undo what `nohup` and a shell's `&` do: signals that are ignored here would be ignored in every process begun."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def mnist() -> "Mnist":
    from mnist_lab.data import load_mnist

    return load_mnist()


@pytest.fixture(scope="session")
def small_mnist(mnist: "Mnist") -> "Mnist":
    """Return the first 500 training and 300 test images, for trainings that take no time."""
    return first(mnist, 500, 300)


@pytest.fixture(scope="session")
def load_script() -> Callable[[str], ModuleType]:
    """Return a function that imports experiments/<stem>.py as a module, by its path."""

    sys.path.append(str(EXPERIMENTS))  # where an ablation finds its step, as when it is started

    @cache
    def load(stem: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"experiments.{stem}", EXPERIMENTS / f"{stem}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(autouse=True)
def _signal_handlers_are_put_back() -> Iterator[None]:
    """Undo what the command line's `main` sets, where a test calls it in its own process."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _notices_reach_each_test() -> None:
    """Let loggers speak again that an earlier test, or a library that it used, has left silent."""
    logging.disable(logging.NOTSET)
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("mnist_lab") and isinstance(logger, logging.Logger):
            logger.disabled = False


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that does what `python -m mnist_lab` does with these words, and returns what it prints."""
    from mnist_lab.__main__ import main

    monkeypatch.setattr(signal, "signal", lambda *given: None)

    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["mnist_lab", *map(str, words)])
        main()
        return capsys.readouterr().out

    return run


# ---- tracking stores


@pytest.fixture(autouse=True)
def _no_test_touches_the_projects_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    nowhere = tmp_path_factory.getbasetemp() / "nowhere"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{nowhere}/mlflow.db")


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the database of a store without runs, to copy: making one takes seconds."""
    from mnist_lab.tracking.store import open_store

    database = tmp_path_factory.mktemp("empty_store") / "mlflow.db"
    open_store(f"sqlite:///{database}")
    return database


@pytest.fixture(scope="session")
def new_store(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> "Callable[[], Store]":
    """Return a function that makes a store without runs, which tests can share."""
    from mnist_lab.tracking.store import open_store

    return lambda: open_store(f"sqlite:///{copy_store(empty_store, tmp_path_factory.mktemp('store') / 'mlflow.db')}")


@pytest.fixture(scope="session")
def published(
    new_store: "Callable[[], Store]", mnist: "Mnist", tmp_path_factory: pytest.TempPathFactory
) -> "Published":
    from run_writer import publish_sample

    return publish_sample(new_store(), mnist, tmp_path_factory.mktemp("published") / "here")


@pytest.fixture
def database(empty_store: Path, tmp_path: Path) -> Path:
    """Return the database of a store of this test's own, without runs, in `tmp_path / "store"`."""
    return copy_store(empty_store, tmp_path / "store" / "mlflow.db")


@pytest.fixture
def uri(database: Path) -> str:
    return f"sqlite:///{database}"


@pytest.fixture
def store(uri: str) -> "Store":
    from mnist_lab.tracking.store import open_store

    return open_store(uri)


@pytest.fixture(scope="module")
def one_server(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start a tracking server; that takes seconds, so the tests of a file share it, and its runs."""
    server = Server(tmp_path_factory.mktemp("server"), empty_store)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def train_run(
    small_mnist: "Mnist", uri: str, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., TrackedRun]:
    """Return a function that trains an experiment, as that of a script of this name, in this test's own store."""
    from mnist_lab.running import run as runner
    from mnist_lab.running.job import Job
    from mnist_lab.running.progress import Progress

    monkeypatch.setattr(runner, "load_mnist", lambda folder, device: small_mnist)

    def train(
        experiment: "Experiment", name: str, seed: int = 0, listener: Progress | None = None, **more: Any
    ) -> TrackedRun:
        script = tmp_path / f"{name}.py"
        script.touch()
        job = Job(script=script, experiment=experiment, tracking_uri=uri, threads=1, **more)
        runner.run(job, seed, listener or Progress())
        return read_runs(database)[-1]

    return train


# ---- one real run


@dataclass(frozen=True)
class FullRun:
    script: Path
    commit: str  # of the project, when the run began
    stdout: str
    stderr: str
    database: Path

    @property
    def tracked(self) -> TrackedRun:
        (run,) = read_runs(self.database)
        return run


@pytest.fixture(scope="session")
def full_run(mnist: "Mnist", tmp_path_factory: pytest.TempPathFactory) -> FullRun:
    """Train step 1 for one epoch through its script, from another current folder, into a store not made yet."""
    from mnist_lab.running import identity

    script, folder = EXPERIMENTS / "step1_baseline.py", tmp_path_factory.mktemp("full_run")
    database, commit = folder / "store" / "mlflow.db", identity.commit_tags(script)["git_commit"]
    flags = ["--epochs", "1", "--limit", "5000", "--seed", "3", "--tracking-uri", f"sqlite:///{database}"]
    process = run_program(script, *flags, cwd=folder)
    assert process.returncode == 0, process.stderr
    return FullRun(script, commit, process.stdout, process.stderr, database)
