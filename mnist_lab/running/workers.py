"""Who trains a study or a search: what they are handed, what they say of it, and those of this machine.

On a CPU it is trained in processes of one thread each, on a GPU in this process. The processes are started by
`multiprocessing` with "spawn": torch's threads don't survive a fork. They are no `Pool`: that breaks as a whole when
one of its processes dies, while here only that seed fails.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, Protocol

import torch

from mnist_lab.commandline import lasting_output
from mnist_lab.errors import LabError
from mnist_lab.running import checkpoint
from mnist_lab.running.job import WORKER, Job
from mnist_lab.running.machine import available_cores
from mnist_lab.running.progress import Progress
from mnist_lab.running.record import run_name_of
from mnist_lab.running.run import run
from mnist_lab.tracking.connection import environment_variables
from mnist_lab.tracking.store import FinishedRun, Store, can_resume, close_abandoned, close_lost, open_store
from mnist_lab.training.loop import EpochMetrics

LOOK_SECONDS = 1.0  # how often the display is told that time passes
END_SECONDS = 20.0  # that a worker gets to close its run when the study is stopped

logger = logging.getLogger(__name__)


class Epoch(NamedTuple):
    """A seed has finished an epoch."""

    seed: int
    metrics: EpochMetrics


class Done(NamedTuple):
    """A seed has finished its run. A trial of a search has none: Optuna's storage says what came of it."""

    seed: int
    run: FinishedRun | None


class Failed(NamedTuple):
    """A seed has no run, and why. lost: because its process is gone."""

    seed: int
    reason: str
    lost: bool = False


Message = Epoch | Done | Failed
OnEpoch = Callable[[EpochMetrics], None]


class Task(Protocol):
    """What is trained with one seed after another. It can be sent to another process."""

    @property
    def job(self) -> Job: ...
    @property
    def parent_run_id(self) -> str: ...

    def train(self, seed: int, on_epoch: OnEpoch) -> FinishedRun | None: ...


Given = tuple[Task, int]  # a task, and the seed to train it with
OnMessage = Callable[[Task, Message], None]


class Trainers(Protocol):
    """Who trains."""

    def prepare(self, job: Job, store: Store) -> int:
        """Get ready for tasks of this job, and return how many can train at a time; raises LabError."""

    def storage(self, url: str) -> Any:
        """Return how tasks reach the storage of Optuna that has this URL here: a URL, or a storage."""

    def train(self, waiting: Iterable[Given], count: int, on_message: OnMessage, on_time: Callable[[], None]) -> None:
        """Train what is waiting, `count` at a time; `on_time` is called now and then.

        However this ends, the trainings end before it.
        """


class SeedTask(NamedTuple):
    """The runs of one job, one per seed; see `train_seed`."""

    job: Job
    parent_run_id: str
    again: bool = False

    def train(self, seed: int, on_epoch: OnEpoch) -> FinishedRun:
        return train_seed(self.job, seed, self.parent_run_id, on_epoch, again=self.again)


def train_seed(
    job: Job, seed: int, parent_run_id: str, on_epoch: OnEpoch, *, again: bool = False, is_lost: bool = True
) -> FinishedRun:
    """Train and track one seed. An interrupted run of it goes on, with `again` only one that began for this parent.

    parent_run_id: the run of the study or the search.
    is_lost: whether a run of this seed that the parent has as RUNNING can only be one whose process is gone.
    """
    store = open_store(job.tracking_uri)
    name = run_name_of(job, f"{job.unit} {seed}")
    own = close_lost(store, parent_run_id, name) if is_lost else []
    if own:
        logger.warning("%s begins again: its process was lost", name)
    found = (one for one in checkpoint.alike(store.uri, job.identity, seed) if not again or one.run_id in own)
    resume = next((one for one in found if can_resume(store, one.run_id)), None)
    result = run(job, seed, _EpochListener(on_epoch), parent_run_id=parent_run_id, resume=resume)
    return FinishedRun(result.run_id, seed, result.measured)


class _EpochListener(Progress):
    """Passes the epochs of a run on."""

    def __init__(self, report: OnEpoch) -> None:
        self.report = report

    def on_epoch(self, seed: int, metrics: EpochMetrics) -> None:
        self.report(metrics)


def outcome_of(task: Task, seed: int, on_epoch: OnEpoch) -> Done | Failed:
    """Return what comes of training a seed; an error fails this seed alone."""
    try:
        if task.job.experiment is None:  # a job is sent without it
            task.job.read_experiment()
        return Done(seed, task.train(seed, on_epoch))
    except Exception as error:
        return Failed(seed, reason_of(error))


def reason_of(error: Exception) -> str:
    """Return the sentence of a LabError; of a bug, the traceback."""
    return str(error) if isinstance(error, LabError) else "".join(traceback.format_exception(error)).rstrip()


class Local:
    """The trainers of this machine. workers: how many processes train at once on a CPU; by default one per core."""

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers

    def prepare(self, job: Job, store: Store) -> int:
        self.store, self.in_processes = store, job.device.type == "cpu"
        if self.in_processes:
            return self.workers or max(1, available_cores() // (job.threads or 1))
        if self.workers is not None:
            raise LabError(f"workers: {self.workers} is for a CPU; on {job.device.type} the seeds train in one process")
        return 1

    def storage(self, url: str) -> str:
        return url

    def train(self, waiting: Iterable[Given], count: int, on_message: OnMessage, on_time: Callable[[], None]) -> None:
        try:
            if self.in_processes:
                _train_in_processes(waiting, count, on_message, on_time)
            else:
                _train_here(waiting, on_message)
        finally:
            with suppress(LabError):  # a server that is away: the next run there closes them
                close_abandoned(self.store)  # the runs of workers that died


def _train_here(waiting: Iterable[Given], on_message: OnMessage) -> None:
    for task, seed in waiting:

        def report(metrics: EpochMetrics, task: Task = task, seed: int = seed) -> None:
            on_message(task, Epoch(seed, metrics))

        on_message(task, outcome_of(task, seed, report))


def _train_in_processes(
    waiting: Iterable[Given], count: int, on_message: OnMessage, on_time: Callable[[], None]
) -> None:
    following = iter(waiting)
    started: list[_Worker] = []
    try:
        while True:
            busy = [worker for worker in started if worker.given is not None]
            while len(busy) < count and (given := next(following, None)) is not None:
                started.append(worker := _Worker(len(started) + 1))
                worker.give(given)
                busy.append(worker)
            if not busy:
                return
            ready = wait([worker.connection for worker in busy], timeout=LOOK_SECONDS)
            for worker in [worker for worker in busy if worker.connection in ready]:
                assert worker.given is not None
                task, message = worker.given[0], worker.receive()
                on_message(task, message)
                if isinstance(message, Failed) and message.lost:
                    worker.given = None
                elif not isinstance(message, Epoch):
                    worker.give(next(following, None))
            on_time()
    finally:
        _end(started)


class _Worker:
    """A process that trains one seed after another, and the connection to it."""

    def __init__(self, number: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs,), name=f"{WORKER} {number}", daemon=True)
        self.given: Given | None = None
        resource_tracker.ensure_running()  # starting it would let the signals through again
        # Ctrl-C and a closed terminal reach all processes at once. This one sees them, and ends its workers by SIGTERM.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
        try:
            with environment_variables({"OMP_NUM_THREADS": "1"}):
                self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()  # so that this end hears of it when the process ends

    def give(self, given: Given | None) -> None:
        """Let it train a seed of a task next, or with None come to its end."""
        self.given = given
        with suppress(OSError):  # where it has died: receiving says so too
            self.connection.send(given)

    def receive(self) -> Message:
        try:
            message: Message = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            assert self.given is not None
            code = self.process.exitcode or 0
            how = signal.strsignal(-code) if code < 0 else f"exit code {code}"
            return Failed(self.given[1], f"its process ended early ({how})", lost=True)
        return message


def _end(workers: Sequence[_Worker]) -> None:
    """Let the workers close their runs and end; those that do not are killed."""
    for worker in workers:
        worker.process.terminate()
    deadline = time.monotonic() + END_SECONDS
    for worker in workers:
        worker.process.join(max(0.0, deadline - time.monotonic()))
        worker.process.kill()
        worker.process.join()
        worker.connection.close()


def _work(connection: Connection) -> None:
    """Train the seeds that come over the connection, and send back what comes of them."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    logging.getLogger("mnist_lab").setLevel(logging.WARNING)  # a script that imports mlflow.pytorch raises the root's
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)

    def report(metrics: EpochMetrics) -> None:
        try:
            connection.send(Epoch(seed, metrics))
        except OSError:
            raise KeyboardInterrupt from None  # the study's process is gone

    try:
        with lasting_output():
            while (given := connection.recv()) is not None:
                task, seed = given
                connection.send(outcome_of(task, seed, report))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends by itself
    except (KeyboardInterrupt, EOFError, OSError):  # stopped, or the study's process is gone
        os._exit(1)


def _end_with_parent() -> None:
    """Wait for the end of the study's process, then end this one, and with it its run."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(END_SECONDS)
    os._exit(1)
