"""Trains on a Ray cluster: a task of Ray Core for each seed, wherever there is room.

Ray carries the script, the lab and MNIST to the nodes, and begins a task anew whose process or node is lost; the task
then closes the run that was lost, and goes on with it. What tasks have to say comes through a queue of Ray's.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import logging
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from logging.handlers import QueueHandler
from pathlib import Path
from typing import Any, NamedTuple

import torch
from optuna.storages import RDBStorage

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reads these when it is imported
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
os.environ.setdefault("RAY_task_oom_retries", "2")

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayError, RayTaskError, WorkerCrashedError
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mnist_lab.data import read_files
from mnist_lab.errors import LabError, one_line
from mnist_lab.paths import OWN_FOLDER, PROJECT_ROOT, own_folder, sqlite_file
from mnist_lab.running.identity import LAB, place
from mnist_lab.running.job import Job
from mnist_lab.running.machine import available_cores
from mnist_lab.running.workers import Done, Epoch, Failed, Given, OnMessage, Task, outcome_of
from mnist_lab.tracking.store import ON_CLUSTER, Store, close_lost
from mnist_lab.training.loop import EpochMetrics

AUTO = "auto"
TRIES = 3  # of a seed whose process or node is lost
ANSWER_SECONDS = 30  # that a cluster has to answer, on a busy machine too
LOOK_SECONDS = 1.0  # how often the queue is read
END_SECONDS = 20.0  # that tasks get to close their runs when the command is stopped
GPU_SHARE = 0.25  # of a GPU, that a task takes
LOST = (WorkerCrashedError, NodeDiedError, OutOfMemoryError)
NO_CLUSTER = (RayActorError, ConnectionError)  # raised once it, or the way to it, is gone
PACKAGES = ("torch", "torchvision", "numpy", "mlflow")  # of which each node must have the same version
STATE = Path(".local") / "state" / "mnist_lab"  # in the home folder of a node that has no other place

logger = logging.getLogger(__name__)


class Order(NamedTuple):
    """What all tasks of a command are sent.

    versions: of what each node must have the same.
    environment: variables that MLflow reads.
    folder: where this machine keeps locks and checkpoints.
    """

    tracking_uri: str
    versions: Mapping[str, str]
    environment: Mapping[str, str]
    folder: Path
    commit_tags: dict[str, str]


class Cluster:
    """The trainers of a Ray cluster. It is connected to when there is something to train, and left by `close`.

    address: HOST:PORT of the head, where this machine is a node; or "auto": RAY_ADDRESS, else the cluster that runs on
        this machine, else one of this machine's cores that is started, and ended by `close`.
    workers: how many tasks train at once; by default as many as the cluster has room for.
    """

    def __init__(self, address: str, workers: int | None = None) -> None:
        self.address, self.workers = address, workers

    def prepare(self, job: Job, store: Store) -> int:
        """Connect; raises LabError if the cluster does not answer, or has several nodes and the store is no server."""
        on_gpu = job.device.type != "cpu"
        self._task = {"num_cpus": job.threads or 1, "num_gpus": GPU_SHARE if on_gpu else 0, "max_retries": TRIES - 1}
        with tempfile.TemporaryDirectory(prefix="mnist_lab-") as folder:
            _pack(job, Path(folder))
            _join(self.address, Path(folder))
        self._name = f"the cluster {ray.get_runtime_context().gcs_address}"
        nodes = [node for node in ray.nodes() if node["Alive"]]
        if len(nodes) > 1 and sqlite_file(store.uri) is not None:
            raise LabError(
                f"tracking store {store.name!r}: {len(nodes)} nodes can't write to SQLite; start a server with "
                "`make server` and name it with --tracking-uri or MLFLOW_TRACKING_URI"
            )
        environment = {name: text for name, text in os.environ.items() if name.startswith("MLFLOW_")}
        self._store = store
        self._order = ray.put(Order(store.uri, _versions(), environment, own_folder(store.uri), job.commit_tags))
        self._queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": _here()})
        room = self._room()
        if room < 1:
            raise LabError(f"cluster: {self._name} has no {'GPU' if on_gpu else 'core'} to train on")
        logger.warning("%s: nodes: %d, trained at a time: %d", self._name, len(nodes), self.workers or room)
        return self.workers or room

    def _room(self) -> int:
        resources = ray.cluster_resources()
        needs = {"CPU": self._task["num_cpus"], "GPU": self._task["num_gpus"]}
        return int(min(resources.get(name, 0) / needed for name, needed in needs.items() if needed))

    def storage(self, url: str) -> RemoteStorage:
        return RemoteStorage(ray.remote(num_cpus=0, scheduling_strategy=_here())(RDBStorage).remote(url))

    def train(  # as `Trainers` says; nodes that join are used too, unless workers were asked for
        self, waiting: Iterable[Given], count: int, on_message: OnMessage, on_time: Callable[[], None]
    ) -> None:
        following = iter(waiting)
        running: dict[ray.ObjectRef, Given] = {}
        parents: set[str] = set()
        begin = ray.remote(**self._task)(_train_there)
        try:
            while True:
                room = self.workers or max(count, self._room())
                while len(running) < room and (given := next(following, None)) is not None:
                    running[begin.remote(self._order, self._queue, *given)] = given
                    parents.add(given[0].parent_run_id)
                if not running:
                    return
                ready, _ = ray.wait([*running], timeout=LOOK_SECONDS)
                self._pass_on(running, on_message)
                for ref in ready:
                    task, seed = running.pop(ref)
                    on_message(task, _outcome(ref, seed))
                on_time()
        except NO_CLUSTER as error:
            raise LabError(f"cluster: {self._name} is lost: {one_line(error)[:200]}") from error
        finally:
            _stop([*running])
            for parent in parents:
                with suppress(LabError):  # a server that is away: the next command closes them
                    close_lost(self._store, parent)

    def _pass_on(self, running: Mapping[ray.ObjectRef, Given], on_message: OnMessage) -> None:
        """Pass on what tasks have said: their epochs, and notices for the user."""
        tasks = {seed: task for task, seed in running.values()}
        for message in self._queue.get_nowait_batch(self._queue.qsize()):
            if isinstance(message, logging.LogRecord):
                logger.handle(message)
            elif message.seed in tasks:
                on_message(tasks[message.seed], message)

    def close(self) -> None:
        """Leave the cluster; one that was started for this command ends."""
        ray.shutdown()


def _stop(running: list[ray.ObjectRef]) -> None:
    """Interrupt the tasks, so that they close their runs; those that do not are killed."""
    if not running:
        return
    with suppress(*NO_CLUSTER):  # the tasks of a cluster that is gone end by themselves
        for ref in running:
            ray.cancel(ref)
        _, left = ray.wait(running, num_returns=len(running), timeout=END_SECONDS)
        for ref in left:
            ray.cancel(ref, force=True)


def _outcome(ref: ray.ObjectRef, seed: int) -> Done | Failed:
    try:
        outcome: Done | Failed = ray.get(ref)
        return outcome
    except LOST as error:
        reason = one_line(error).partition(". ")[0][:200]
        return Failed(seed, f"its process was lost {TRIES} times, the last time so: {reason}", lost=True)
    except RayError as error:
        return Failed(seed, _why(error))


def _why(error: RayError) -> str:
    """Say in a sentence's rest why a node can't do something."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    return str(cause) if isinstance(cause, LabError) else f"can't run the lab: {one_line(cause)[:200]}"


class RemoteStorage:
    """Optuna's storage in an actor beside the command. Optuna's own proxy would open a port that no token guards."""

    def __init__(self, server: Any) -> None:
        self.server = server

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__") or name == "server":  # asked for while it is unpickled
            raise AttributeError(name)

        def call(*arguments: Any, **named: Any) -> Any:
            try:
                return ray.get(getattr(self.server, name).remote(*arguments, **named))
            except RayActorError:
                raise KeyboardInterrupt from None  # the process that gave the work is gone

        return call


# ---- to the cluster


def _pack(job: Job, folder: Path) -> None:
    """Put the lab, the script, what it imports, and MNIST into a folder, as a project has them."""
    shutil.copytree(LAB, folder / LAB.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name, file in job.sources.items():
        copy = folder / place(name, file)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    (folder / "data").mkdir()
    for name, content in read_files(job.data_dir).items():
        (folder / "data" / f"{name}.gz").write_bytes(gzip.compress(content, 1, mtime=0))


def _join(address: str, code: Path) -> None:
    """Connect this process to the cluster, whose workers are given the code; raises LabError."""
    named = os.environ.get("RAY_ADDRESS", AUTO) if address == AUTO else address
    settings: dict[str, Any] = {
        "runtime_env": {"working_dir": str(code)},
        "log_to_driver": False,
        "configure_logging": False,
        "logging_level": logging.CRITICAL,
    }
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    logger.info("Looking for a Ray cluster (%s)", named)
    if not _answers(named):
        if named != AUTO:
            raise LabError(
                f"cluster: {named} does not answer as a Ray cluster within {ANSWER_SECONDS} seconds; it must be "
                "HOST:PORT of its head, with this machine as a node of it and the head's token (docs/cluster.md)"
            )
        logger.info("Starting Ray on this machine, which can take a minute")
        settings |= {"num_cpus": available_cores(), "include_dashboard": False}
        named = "local"
    with _own_signals():
        try:
            ray.init(address=named, **settings)
        except Exception as error:  # Ray raises bare ones too
            ray.shutdown()
            raise LabError(
                f"cluster: Ray does not start ({named}): {one_line(error)[:200]}; Ray gives its own agents 15 seconds "
                "to be there, which may not do on a busy machine: then try again (docs/cluster.md)"
            ) from error


def _answers(address: str) -> bool:
    """Say whether a cluster answers in time; Ray itself would wait for minutes, or end this process."""
    flags = [] if address == AUTO else ["--address", address]
    command = [str(Path(sys.executable).with_name("ray")), "status", *flags]
    try:
        return subprocess.run(command, capture_output=True, timeout=ANSWER_SECONDS, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the handlers of signals: Ray has its own, with which a study that is ended would count as failed."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _here() -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def _versions() -> dict[str, str]:
    """Return what must be the same on each node; the lab itself is sent there."""
    return {"Python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


# ---- on a node


def _settle(order: Order) -> None:
    """Make this process one that trains for the order; raises LabError if it has other versions."""
    here = _versions()
    for name, wanted in order.versions.items():
        if here[name] != wanted:
            message = f"has {name} {here[name]}, and the machine that gives it work has {wanted}"
            raise LabError(f"cluster: node {socket.gethostname()} {message}")
    os.environ.update(order.environment)
    os.environ[ON_CLUSTER] = "yes"
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    os.environ.setdefault(OWN_FOLDER, str(_own_folder(order.folder)))
    # Ray's workers have SIGINT blocked. What is interrupted while a run is written is interrupted by it afterwards.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _own_folder(folder: Path) -> Path:
    """Return the folder if it can be used on this node, as the machine is the same or shares it; else one at home."""
    with suppress(OSError):
        folder.mkdir(exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    return Path.home() / STATE


def _train_there(order: Order, queue: Queue, task: Task, seed: int) -> Done | Failed:
    """Train a seed of a task on this node."""

    def report(metrics: EpochMetrics) -> None:
        try:
            queue.put(Epoch(seed, metrics))
        except RayError:
            raise KeyboardInterrupt from None  # the process that gave the work is gone

    notices = QueueHandler(queue)
    notices.setLevel(logging.WARNING)
    notices.setFormatter(logging.Formatter(f"seed {seed} on {socket.gethostname()}: %(message)s"))
    logging.getLogger(LAB.name).addHandler(notices)
    try:
        _settle(order)
        task.job.lies_in(PROJECT_ROOT, order.commit_tags)
        sys.argv = [str(task.job.script)]  # by which MLflow names a run's source
        return outcome_of(task, seed, report)
    finally:
        logging.getLogger(LAB.name).removeHandler(notices)
