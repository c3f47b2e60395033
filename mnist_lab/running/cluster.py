"""Who trains the runs of a study or a search on a Ray cluster: a task of one core for each, wherever one is free.

The interface is that of `workers`. Ray Core runs the tasks and carries the script, the lab and MNIST to them. What a
run says goes through a mailbox, an actor beside this process, where a trial waits for the word whether to go on. Ray
would repeat a lost task by itself; here this process does, once the run that was lost is closed, so that it can go on.

A process on a machine that is no node joins by Ray's client: a process on the head does for it what it asks for.
"""

from __future__ import annotations

import asyncio
import hashlib
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
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reads these when it is imported
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
os.environ.setdefault("RAY_CLIENT_RECONNECT_GRACE_PERIOD", "0")  # else tasks go on when their command is dead

import grpc
import ray
from ray._private import ray_constants, services
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated import ray_client_pb2, ray_client_pb2_grpc
from ray.exceptions import (
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mnist_lab.data import parse_files, read_files
from mnist_lab.errors import LabError, one_line
from mnist_lab.paths import OWN_FOLDER, PROJECT_ROOT, own_folder, sqlite_file
from mnist_lab.running import provenance
from mnist_lab.running.job import Job
from mnist_lab.running.progress import Pruned
from mnist_lab.running.provenance import Commit
from mnist_lab.running.record import RunResult, run_name_of
from mnist_lab.running.sources import LAB, place
from mnist_lab.running.threads import available_cores
from mnist_lab.running.workers import (
    END_SECONDS,
    LOOK_SECONDS,
    Done,
    Epoch,
    Failed,
    Judge,
    Messages,
    Take,
    Task,
    outcome_of,
    train,
)
from mnist_lab.tracking.store import ON_CLUSTER, Store, close_lost, close_orphans, open_store
from mnist_lab.training.loop import EpochMetrics

AUTO = "auto"
CLIENT = "ray://"  # begins an address of Ray's client
ANSWER_SECONDS = 10  # that a cluster has to answer
LOOK_AT_NODES_SECONDS = 180  # that all nodes have to show themselves; a first import of torch is slow
TRIES = 3  # of a seed whose process or node is lost
GPU_SHARE = 0.25  # of a GPU, that a task takes
CALLS = 100_000  # that the mailbox can have open at once
LOST = (WorkerCrashedError, NodeDiedError, OutOfMemoryError)
NO_CLUSTER = (RayActorError, ConnectionError, grpc.RpcError)  # raised once it, or the way to it, is gone
PACKAGES = ("torch", "torchvision", "numpy", "mlflow")  # of which each node must have the same version
STATE = Path(".local") / "state" / "mnist_lab"  # in the home folder of a node that has no other place

logger = logging.getLogger(__name__)


class Order(NamedTuple):
    """What all tasks of a command are sent.

    versions: of what each node must have the same.
    environment: variables that MLflow and the lab read.
    folder: where this machine keeps locks, checkpoints and what waits for a server.
    sha256: of MNIST.
    """

    tracking_uri: str
    versions: Mapping[str, str]
    environment: Mapping[str, str]
    folder: Path
    commit: Commit
    sha256: str


class Notice(NamedTuple):
    """What a task has to say to the user."""

    text: str


class Attempt(NamedTuple):
    """A task that is running or waits for a core: which it is, what it trains, and how often that was begun."""

    key: int
    task: Task
    seed: int
    tries: int


class Mailbox:
    """An actor. Tasks say something and wait for an answer; the process that gave them work hears it and answers."""

    def __init__(self) -> None:
        self.said: asyncio.Queue[tuple[int, Epoch | Notice]] = asyncio.Queue()
        self.answers: dict[int, asyncio.Future[bool]] = {}

    async def say(self, key: int, what: Epoch | Notice) -> bool:
        """Return whether the run is worth another epoch, once that is known; of a notice, at once."""
        if isinstance(what, Notice):
            self.said.put_nowait((key, what))
            return True
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.answers[key] = answer
        self.said.put_nowait((key, what))
        return await answer

    async def hear(self) -> tuple[int, Epoch | Notice]:
        return await self.said.get()

    async def answer(self, key: int, worth_it: bool) -> None:
        answer = self.answers.pop(key)
        if not answer.done():
            answer.set_result(worth_it)


class Cluster:
    """A Ray cluster by its address. It is connected to when there is something to train, and left by `close`.

    address: HOST:PORT of the head where this machine is a node, else ray://HOST:PORT; or "auto": RAY_ADDRESS, else the
        cluster that runs on this machine, else one of this machine's cores that is started, and ended by `close`.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._workers: int | None = None

    def connect(self, job: Job, store: Store) -> None:
        """Connect, and see that each node can train this job.

        Raises:
            LabError: if the cluster does not answer, a node can't train the job or has other versions, or there are
                several nodes and the store is no server.
        """
        self._job, self._store = job, store
        with tempfile.TemporaryDirectory(prefix="mnist_lab-") as folder:
            _pack(job, Path(folder))
            _join(self.address, Path(folder))
        nodes = [node for node in ray.nodes() if node["Alive"]]
        self._name = f"the cluster {ray.get_runtime_context().gcs_address}"
        self._check_store(nodes)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        mailbox = ray.remote(num_cpus=0, max_concurrency=CALLS)(Mailbox)
        self._mailbox = mailbox.options(scheduling_strategy=here).remote()
        self._hearing = self._mailbox.hear.remote()
        files = read_files(job.data_dir)
        order = Order(
            store.uri,
            _versions(),
            {name: text for name, text in os.environ.items() if name.startswith("MLFLOW_")},
            own_folder(store.uri),
            job.commit,
            parse_files(files).sha256,
        )
        self._order = ray.put(order)
        self._look_at([node for node in nodes if node["Resources"].get("CPU")])
        self._files = ray.put({name: _shared(content) for name, content in files.items()})
        close_orphans(store)

    def at_a_time(self, workers: int | None) -> int:
        """Return how many tasks train at once, as many as the cluster has room for unless told otherwise."""
        self._workers, room = workers, self._room()
        if room < 1:
            raise LabError(f"cluster: {self._name} has no {self._unit} to train on")
        if workers is not None and not 1 <= workers <= room:
            raise LabError(f"workers: {workers} is not between 1 and {room}, for which {self._name} has room")
        return workers or room

    def train_tasks(self, take: Take, count: int, on_time: Callable[[], None], judge: Judge | None = None) -> Messages:
        """Train on the cluster, as `TrainTasks` says; nodes that join it are used too, unless workers were asked for.

        A seed whose process or node is lost is trained again, from its last checkpoint where that can be reached.
        """
        running: dict[ray.ObjectRef, Attempt] = {}
        lost: deque[Attempt] = deque()
        keys = 0
        try:
            while True:
                room = count if self._workers else max(count, self._room())
                while len(running) < room:
                    if lost:
                        attempt = lost.popleft()
                    elif (given := take()) is not None:
                        attempt = Attempt(0, *given, 0)
                    else:
                        break
                    keys += 1
                    attempt = attempt._replace(key=keys, tries=attempt.tries + 1)
                    running[self._begin(attempt)] = attempt
                if not running:
                    return
                ready, _ = ray.wait([self._hearing, *running], timeout=LOOK_SECONDS)
                for done in ready:
                    if done == self._hearing:
                        key, said = ray.get(done)
                        self._hearing = self._mailbox.hear.remote()
                        speaker = next((one for one in running.values() if one.key == key), None)
                        if isinstance(said, Notice):
                            logger.warning("%s", said.text)
                        elif speaker is not None:
                            worth_it = judge is None or judge(speaker.task, said.metrics)
                            self._mailbox.answer.remote(key, worth_it)
                            yield speaker.task, said
                        continue
                    attempt = running.pop(done)
                    message = self._end(done, attempt)
                    if message is None:
                        lost.append(attempt)
                    else:
                        yield attempt.task, message
                on_time()
        except NO_CLUSTER as error:
            raise LabError(f"cluster: {self._name} is lost: {one_line(error)[:200]}") from error
        finally:
            self._stop(running)

    def close(self) -> None:
        """Leave the cluster; one that was started for this command ends."""
        ray.shutdown()

    @property
    def _unit(self) -> str:
        return "core" if self._job.device.type == "cpu" else "GPU"

    def _room(self) -> int:
        resources = ray.cluster_resources()
        if self._job.device.type == "cpu":
            return int(resources.get("CPU", 0))
        return int(min(resources.get("CPU", 0), resources.get("GPU", 0) / GPU_SHARE))

    def _check_store(self, nodes: list[dict[str, Any]]) -> None:
        if len(nodes) > 1 and sqlite_file(self._store.uri) is not None:
            raise LabError(
                f"tracking store {self._store.name!r}: {len(nodes)} nodes can't write to SQLite; start a server with "
                "`make server` and name it with --tracking-uri or MLFLOW_TRACKING_URI"
            )

    def _look_at(self, nodes: list[dict[str, Any]]) -> None:
        """See that each node has the same versions and reaches the store; raises LabError."""
        looking = {}
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            look = ray.remote(num_cpus=0, max_retries=0)(_look).options(scheduling_strategy=there)
            looking[look.remote(self._order)] = node["NodeManagerAddress"]
        ready, late = ray.wait([*looking], num_returns=len(looking), timeout=LOOK_AT_NODES_SECONDS)
        if late:
            raise LabError(f"cluster: node {looking[late[0]]} does not answer within {LOOK_AT_NODES_SECONDS} seconds")
        hardware = set()
        for ref in ready:
            try:
                hardware.add(ray.get(ref))
            except RayError as error:
                raise LabError(f"cluster: node {looking[ref]} {_why(error)}") from error
        logger.warning("%s: %d nodes, %d %ss", self._name, len(nodes), self._room(), self._unit)
        if len(hardware) > 1:
            said = "the nodes differ, and a seed's figures with them: %s"
            logger.warning(said, "; ".join(sorted(hardware)))

    def _begin(self, attempt: Attempt) -> ray.ObjectRef:
        on_gpu = self._job.device.type != "cpu"
        begin = ray.remote(num_cpus=1, num_gpus=GPU_SHARE if on_gpu else 0, max_retries=0)(_train_there)
        task = attempt.task if attempt.tries == 1 else attempt.task._replace(again=False)
        return begin.remote(self._order, self._files, self._mailbox, attempt.key, task, attempt.seed)

    def _end(self, done: ray.ObjectRef, attempt: Attempt) -> Done | Failed | None:
        """Return what came of an attempt, or None where it is to be made again."""
        try:
            ended: Done | Failed = ray.get(done)
            return ended
        except LOST as error:
            reason = one_line(error).partition(". ")[0][:200]
            self._close_lost(attempt)
            if attempt.tries == TRIES:
                return Failed(attempt.seed, f"its process was lost {TRIES} times, the last time so: {reason}")
            logger.warning("seed %d is trained again: its process was lost (%s)", attempt.seed, reason)
            return None
        except RayError as error:
            return Failed(attempt.seed, _why(error))

    def _close_lost(self, attempt: Attempt) -> None:
        with suppress(LabError):  # a server that is away: the next command closes the run
            name = run_name_of(attempt.task.job, f"seed {attempt.seed}")
            close_lost(self._store, attempt.task.parent_run_id, name)

    def _stop(self, running: Mapping[ray.ObjectRef, Attempt]) -> None:
        """Interrupt the tasks, so that they close their runs; those that do not are killed."""
        if not running:
            return
        with suppress(*NO_CLUSTER):  # the tasks of a cluster that is gone end by themselves
            for ref in running:
                ray.cancel(ref)
            _, left = ray.wait([*running], num_returns=len(running), timeout=END_SECONDS)
            for ref in left:
                ray.cancel(ref, force=True)
                self._close_lost(running[ref])


# ---- to the cluster


def _pack(job: Job, folder: Path) -> None:
    """Put the lab, the script and what it imports into a folder, as they are imported."""
    shutil.copytree(LAB, folder / LAB.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name, file in job.sources.items():
        copy = folder / place(name, file)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)


def _join(address: str, code: Path) -> None:
    """Connect this process to the cluster, whose workers are given the code; raises LabError."""
    settings: dict[str, Any] = {
        "runtime_env": {"working_dir": str(code)},
        "log_to_driver": False,
        "configure_logging": False,
        "logging_level": logging.CRITICAL,
    }
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    named = _find_head() if address == AUTO else address
    if named is not None:
        _check_answers(named)
    with _own_signals():
        try:
            if named is None:
                _start_here(settings)
            else:
                ray.init(address=named, **settings)
        except (ConnectionError, RayError, RuntimeError, ValueError) as error:
            raise LabError(f"cluster: {named} can't be used: {one_line(error)}") from error


def _find_head() -> str | None:
    """Return the address of RAY_ADDRESS, else of a head that runs on this machine, else None."""
    if (named := os.environ.get("RAY_ADDRESS", AUTO)) != AUTO:
        return named
    if not services.find_gcs_addresses():  # Ray's note of the last head outlives it, and Ray would wait for it
        return None
    head: str = services.get_ray_address_from_environment(AUTO, None)
    return head


def _start_here(settings: Mapping[str, Any]) -> None:
    """Start a cluster of this machine; raises LabError. Ray gives its own agents 15 seconds, too few on a busy one."""
    # Ray listens on loopback alone where it takes this machine for one that is in no cluster, as it does a Mac.
    ray_constants.ENABLE_RAY_CLUSTER = False
    for last in (False, True):
        try:
            ray.init(address="local", num_cpus=available_cores(), include_dashboard=False, **settings)
        except Exception as error:  # Ray raises a bare one
            ray.shutdown()
            if last:
                raise LabError(f"cluster: Ray can't be started on this machine: {one_line(error)[:200]}") from error
        else:
            return


def _check_answers(address: str) -> None:
    """Refuse an address where no cluster answers in time; raises LabError. Ray itself would wait for minutes."""
    place = address.removeprefix(CLIENT)
    host, _, port = place.rpartition(":")
    if not (host and port.isdecimal()):
        raise LabError(f"cluster: {address!r} is not HOST:PORT, {CLIENT}HOST:PORT, nor {AUTO}")
    try:
        with socket.create_connection((host, int(port)), ANSWER_SECONDS):
            pass
    except (OSError, OverflowError) as error:
        raise LabError(f"cluster: nothing answers at {address}: {error}") from error
    said = _ask_client_server(place) if address.startswith(CLIENT) else _ask_head(place)
    if said is None:
        raise LabError(f"cluster: {address} does not answer as a Ray cluster within {ANSWER_SECONDS} seconds")
    if "token" in said.lower() or "unauthenticated" in said.lower():
        raise LabError(f"cluster: {address} refuses the token: it must be that of the head (docs/cluster.md)")
    if said:
        raise LabError(f"cluster: {address} can't be used: {said.splitlines()[-1]}")


def _ask_client_server(place: str) -> str | None:
    """Return what the server of Ray's client at HOST:PORT objects to, if anything, or None if it does not answer."""
    with init_grpc_channel(place) as channel:
        ping = ray_client_pb2.ClusterInfoRequest(type=ray_client_pb2.ClusterInfoType.PING)
        try:
            ray_client_pb2_grpc.RayletDriverStub(channel).ClusterInfo(ping, timeout=ANSWER_SECONDS)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                return None
            said: str = error.details() or error.code().name
            return said
    return ""


def _ask_head(place: str) -> str | None:
    """Return what the head at HOST:PORT objects to, if anything, or None if it does not answer."""
    # `ray health-check`, in a process that can be ended; its imports take longer than the answer.
    program = "import sys; from ray.scripts.scripts import cli; print(flush=True); cli(sys.argv[1:])"
    command = [sys.executable, "-c", program, "health-check", "--address", place]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as asked:
        assert asked.stdout is not None
        asked.stdout.readline()
        try:
            _, said = asked.communicate(timeout=ANSWER_SECONDS)
        except subprocess.TimeoutExpired:
            asked.kill()
            return None
    return "" if asked.returncode == 0 else said.strip() or "no cluster"


@contextmanager
def _own_signals() -> Any:
    """Keep the handlers of signals: Ray has its own, with which a study that is ended would count as failed."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _shared(content: bytes) -> Any:
    """Return bytes so that Ray keeps them once for all processes of a node."""
    import numpy as np

    return np.frombuffer(content, dtype=np.uint8)


def _versions() -> dict[str, str]:
    """Return what must be the same on each node."""
    lab = hashlib.sha256()
    for file in sorted(LAB.rglob("*.py")):
        lab.update(f"{file.relative_to(LAB)}\0".encode() + file.read_bytes())
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"Python": platform.python_version(), **versions, "lab": lab.hexdigest()[:12]}


def _why(error: RayError) -> str:
    """Say in a sentence's rest why a node can't do something."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    return str(cause) if isinstance(cause, LabError) else f"can't run the lab: {one_line(cause)[:200]}"


# ---- on a node


def _look(order: Order) -> str:
    """Return this node's hardware; raises LabError if it can't train what the order is about."""
    _settle(order)
    if sqlite_file(order.tracking_uri) is None:
        try:
            open_store(order.tracking_uri)
        except LabError as error:
            raise LabError(f"can't reach it: {error}") from error
    return provenance.hardware(torch.device("cpu"))


def _settle(order: Order) -> None:
    """Make this process one that trains for the order; raises LabError if it has other versions."""
    here = _versions()
    for name, wanted in order.versions.items():
        if here[name] != wanted:
            raise LabError(f"has {name} {here[name]}, and the machine that gives it work has {wanted}")
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


def _train_there(
    order: Order, files: Mapping[str, Any], mailbox: Any, key: int, task: Task, seed: int
) -> Done | Failed:
    """Train a seed of a task on this node."""

    def say(metrics: EpochMetrics) -> None:
        try:
            worth_it = ray.get(mailbox.say.remote(key, Epoch(seed, metrics)))
        except RayError:
            raise KeyboardInterrupt from None  # the process that gave the work is gone
        if not worth_it:
            raise Pruned

    def train_given(seed: int) -> RunResult:
        _settle(order)
        if parse_files(contents).sha256 != order.sha256:
            raise LabError("data: MNIST is not on this node as it was sent")
        task.job.lies_in(PROJECT_ROOT, order.commit)
        sys.argv = [str(task.job.script)]  # by which MLflow names a run's source
        task.job.read_experiment()
        return train(task, seed, say, contents)

    contents = {name: bytes(content) for name, content in files.items()}
    where = f"seed {seed} on {socket.gethostname()}"
    notices = _Notices(lambda text: mailbox.say.remote(key, Notice(f"{where}: {text}")))
    logger = logging.getLogger(LAB.name)
    logger.addHandler(notices)
    try:
        return outcome_of(seed, train_given)
    finally:
        logger.removeHandler(notices)


class _Notices(logging.Handler):
    """Passes on what the lab has to say."""

    def __init__(self, pass_on: Callable[[str], object]) -> None:
        super().__init__(logging.WARNING)
        self.pass_on = pass_on

    def emit(self, record: logging.LogRecord) -> None:
        self.pass_on(record.getMessage())
