"""Trains on a Ray cluster: a task of Ray Core for each seed, wherever there is room.

Ray carries script, lab and MNIST to the nodes, and begins a lost task anew, which closes the lost run and goes on.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from optuna.storages import RDBStorage

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reads these when it is imported
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
os.environ.setdefault("RAY_task_oom_retries", "2")

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayError, RayTaskError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mnist_lab.data import read_files
from mnist_lab.errors import LabError, one_line
from mnist_lab.paths import OWN_FOLDER, PROJECT_ROOT, own_folder, sqlite_file
from mnist_lab.running import identity
from mnist_lab.running.identity import LAB, place
from mnist_lab.running.job import Job
from mnist_lab.running.machine import available_cores
from mnist_lab.running.progress import Progress
from mnist_lab.running.workers import END_SECONDS, LOOK_SECONDS, Failed, Outcome, SeedTask, Trainers, outcome_of
from mnist_lab.tracking.store import ON_CLUSTER, Store

AUTO = "auto"
ANSWER_SECONDS = 30  # that a cluster has to answer, on a busy machine too
LOST = (WorkerCrashedError, NodeDiedError, OutOfMemoryError)  # raised when a process was lost for the third time
NO_CLUSTER = (RayActorError, ConnectionError)  # raised once it, or the way to it, is gone

logger = logging.getLogger(__name__)


class Cluster(Trainers):
    """The trainers of a Ray cluster. It is connected to when there is something to train, and left by `close`.

    address: HOST:PORT of the head, where this machine is a node; or "auto": RAY_ADDRESS, else the cluster that runs on
        this machine, else one of this machine's cores that is started, and ended by `close`.
    """

    def __init__(self, address: str, workers: int | None = None) -> None:
        self.address, self.workers = address, workers

    def prepare(self, job: Job, store: Store) -> None:
        """Connect; raises LabError if the cluster does not answer, or has several nodes and the store is no server."""
        cpus, gpus = job.threads or 1, 0.0 if job.device.type == "cpu" else 0.25
        self._needs = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
        self._begin = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=2)(_train_there)
        with tempfile.TemporaryDirectory(prefix="mnist_lab-") as folder:
            _pack(job, Path(folder))
            _join(self.address, Path(folder))
        self._name = f"the cluster {ray.get_runtime_context().gcs_address}"
        nodes = [node for node in ray.nodes() if node["Alive"]]
        if len(nodes) > 1 and sqlite_file(store.uri) is not None:
            advice = "start a server with `make server` and name it with --tracking-uri or MLFLOW_TRACKING_URI"
            raise LabError(f"tracking store {store.name!r}: {len(nodes)} nodes can't write to SQLite; {advice}")
        environment = {name: text for name, text in os.environ.items() if name.startswith("MLFLOW_")}
        if OWN_FOLDER in os.environ:
            environment[OWN_FOLDER] = str(own_folder(store.uri))
        self._order = identity.versions(), environment
        if self._look_for_room() < 1:
            raise LabError(f"cluster: {self._name} has no {' and '.join(self._needs)} to train on")
        logger.warning("%s: nodes: %d, trained at a time: %d", self._name, len(nodes), self.room)

    def storage(self, storage: RDBStorage) -> RemoteStorage:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return RemoteStorage(ray.remote(num_cpus=0, scheduling_strategy=here)(RDBStorage).remote(storage.url))

    def _look_for_room(self) -> float:  # nodes that join are used too, unless workers were asked for
        resources = ray.cluster_resources()
        there = min(float(resources.get(name, 0)) / needed for name, needed in self._needs.items())
        self.room = self.workers or max(1, int(there))
        return there

    def train(self, *given: Any) -> Generator[tuple[SeedTask, Outcome], None, None]:
        try:
            yield from super().train(*given)
        except NO_CLUSTER as error:
            raise LabError(f"cluster: {self._name} is lost: {one_line(error)[:200]}") from error

    def start(self, task: SeedTask) -> ray.ObjectRef:
        return self._begin.remote(task, *self._order)

    def ended(self, progress: Progress) -> Iterator[tuple[ray.ObjectRef, Outcome]]:
        ready, _ = ray.wait([*self.running], timeout=LOOK_SECONDS)
        self._look_for_room()
        for ref in ready:
            try:
                yield ref, ray.get(ref)
            except RayError as error:
                cause = error.cause if isinstance(error, RayTaskError) else error
                reason = str(cause) if isinstance(cause, LabError) else f"cluster: {one_line(cause)[:200]}"
                yield ref, Failed(reason, lost=isinstance(error, LOST))

    def stop(self) -> None:
        """Interrupt the tasks, so that they close their runs; those that do not are killed."""
        running = [*self.running]
        with suppress(*NO_CLUSTER):  # the tasks of a cluster that is gone end by themselves
            for ref in running:
                ray.cancel(ref)
            left = ray.wait(running, num_returns=len(running), timeout=END_SECONDS)[1] if running else []
            for ref in left:
                ray.cancel(ref, force=True)

    def close(self) -> None:  # and with it a cluster that was started for this command
        ray.shutdown()


@dataclass(eq=False)
class RemoteStorage:
    """Optuna's storage in an actor beside the command. Optuna's own proxy would open a port that no token guards."""

    server: Any

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__") or name == "server":  # asked for while it is unpickled
            raise AttributeError(name)

        def call(*arguments: Any, **named: Any) -> Any:
            try:
                return ray.get(getattr(self.server, name).remote(*arguments, **named))
            except RayActorError:
                raise KeyboardInterrupt from None  # the process that gave the work is gone

        return call


def _pack(job: Job, folder: Path) -> None:
    """Put the lab, the script, what it imports, and MNIST into a folder, as a project has them."""
    shutil.copytree(LAB, folder / LAB.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name, file in job.sources.items():
        copy = folder / place(name, file)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    (folder / "data").mkdir()
    for name, content in read_files(job.data_dir).items():
        (folder / "data" / name).write_bytes(content)


def _join(address: str, code: Path) -> None:
    """Connect this process to the cluster, whose workers are given the code; raises LabError."""
    named = os.environ.get("RAY_ADDRESS", AUTO) if address == AUTO else address
    settings: dict[str, Any] = {"runtime_env": {"working_dir": str(code)}, "log_to_driver": False}
    settings |= {"configure_logging": False, "logging_level": logging.CRITICAL}
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    logger.info("Looking for a Ray cluster (%s)", named)
    command = [str(Path(sys.executable).with_name("ray")), "status", *([] if named == AUTO else ["--address", named])]
    try:  # Ray itself would wait for minutes, or end this process
        subprocess.run(command, capture_output=True, timeout=ANSWER_SECONDS, check=True)
    except subprocess.SubprocessError as error:
        if named != AUTO:
            needed = "it must be HOST:PORT of its head, with this machine as a node and its token (docs/cluster.md)"
            silent = f"{named} does not answer as a Ray cluster in {ANSWER_SECONDS} seconds"
            raise LabError(f"cluster: {silent}; {needed}") from error
        logger.info("Starting Ray on this machine, which can take a minute")
        settings |= {"num_cpus": available_cores(), "include_dashboard": False}
        named = "local"
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        ray.init(address=named, **settings)
    except Exception as error:  # Ray raises bare ones too
        ray.shutdown()
        advice = "on a busy machine, try again (docs/cluster.md)"
        raise LabError(f"cluster: Ray does not start ({named}): {one_line(error)[:200]}; {advice}") from error
    finally:
        for number, handler in handlers.items():  # Ray sets its own, by which a study that is ended would have failed
            signal.signal(number, handler)


# ---- on a node


def _settle(versions: Mapping[str, str], environment: Mapping[str, str]) -> None:
    """Make this process one that trains, with these variables; raises LabError if it has other versions than these."""
    node = f"cluster: node {socket.gethostname()}"
    for name, here in identity.versions().items():
        if here != versions[name]:
            raise LabError(f"{node} has {name} {here}, and the machine that gives it work has {versions[name]}")
    os.environ.update({**environment, ON_CLUSTER: "yes", "OMP_NUM_THREADS": "1"})
    torch.set_num_threads(1)
    os.environ.setdefault(OWN_FOLDER, str(Path.home() / ".local" / "state" / "mnist_lab"))
    # Ray's workers have SIGINT blocked. What is interrupted while a run is written is interrupted by it afterwards.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _train_there(task: SeedTask, *order: Any) -> Outcome:
    _settle(*order)
    task.job.lies_in(PROJECT_ROOT)
    sys.argv = [str(task.job.script)]  # by which MLflow names a run's source
    return outcome_of(task, Progress())
