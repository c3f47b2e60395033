"""Who trains the runs of a study or a search: processes of one thread each on a CPU, this process on a GPU.

`cluster` has the same interface for a Ray cluster; `choose_trainers` is the one place that knows of both.

The processes are started by `multiprocessing` with "spawn": torch's threads don't survive a fork. They are no `Pool`:
that breaks as a whole when one of its processes dies, while here only that seed fails.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from mnist_lab.errors import LabError
from mnist_lab.running import checkpoint, declaration
from mnist_lab.running.job import Job
from mnist_lab.running.output import lasting_output
from mnist_lab.running.progress import Progress, Pruned
from mnist_lab.running.record import RunResult
from mnist_lab.running.run import run
from mnist_lab.running.threads import available_cores
from mnist_lab.tracking.connection import environment_variables
from mnist_lab.tracking.store import FinishedRun, Store, can_resume, open_store
from mnist_lab.training.loop import EpochMetrics

if TYPE_CHECKING:  # Ray is imported where it is asked for only
    from mnist_lab.running.cluster import Cluster

LOOK_SECONDS = 1.0  # how often the display is told that time passes
END_SECONDS = 20.0  # that a worker gets to close its run when the study is stopped


class Task(NamedTuple):
    """What all seeds of a study, or of a trial, have in common.

    parent_run_id: the run of the study or the search.
    again: whether to begin anew where a run was interrupted.
    trial: its number in a search, whose runs are asked about after each epoch: see `Judge`.
    """

    job: Job
    parent_run_id: str
    again: bool
    trial: int | None = None


class Epoch(NamedTuple):
    """A seed has finished an epoch."""

    seed: int
    metrics: EpochMetrics


class Done(NamedTuple):
    """A seed has finished its run."""

    run: FinishedRun


class Failed(NamedTuple):
    """A seed has no run, and why."""

    seed: int
    reason: str


Message = Epoch | Done | Failed
Take = Callable[[], tuple[Task, int] | None]  # gives the task and the seed to train next, or None for nothing now
Judge = Callable[[Task, EpochMetrics], bool]  # says whether a trial's run is worth another epoch
Messages = Generator[tuple[Task, Message], None, None]


class TrainTasks(Protocol):
    """Trains what `take` gives, `count` at a time, and yields each message with the task that it is about.

    It asks for more when a message of an earlier one has been dealt with. However this ends, the trainings end before
    it.
    """

    def __call__(self, take: Take, count: int, on_time: Callable[[], None], judge: Judge | None = None) -> Messages: ...


def choose_trainers(
    job: Job, store: Store, workers: int | None, cluster: Cluster | None = None
) -> tuple[TrainTasks, int]:
    """Return who trains the tasks, and how many at a time; raises LabError."""
    if cluster is not None:
        cluster.connect(job, store)
        return cluster.train_tasks, cluster.at_a_time(workers)
    check_workers(workers, job.device)
    if job.device.type == "cpu":
        return train_tasks, workers or max(1, available_cores() // (job.threads or 1))
    return train_here, 1


class EpochListener(Progress):
    """Listens to one seed's run and passes its epochs on."""

    def __init__(self, report: Callable[[EpochMetrics], None]) -> None:
        self.report = report

    def on_epoch(self, seed: int, metrics: EpochMetrics) -> None:
        self.report(metrics)


def train_one_by_one(
    task: Task, seeds: Sequence[int], on_epoch: Callable[[int, EpochMetrics], None]
) -> Generator[Message, None, None]:
    """Train the seeds one after another in this process; their epochs go to `on_epoch` as they come."""
    for seed in seeds:
        yield outcome_of(seed, lambda seed: train(task, seed, partial(on_epoch, seed)))


def train_here(take: Take, count: int, on_time: Callable[[], None], judge: Judge | None = None) -> Messages:
    """Train one run after another in this process; as `TrainTasks`, but that `judge` alone hears of the epochs."""
    while (given := take()) is not None:
        task, seed = given

        def on_epoch(seed: int, metrics: EpochMetrics, task: Task = task) -> None:
            if judge is not None and not judge(task, metrics):
                raise Pruned

        for message in train_one_by_one(task, [seed], on_epoch):
            yield task, message


def train(
    task: Task, seed: int, on_epoch: Callable[[EpochMetrics], None], files: Mapping[str, bytes] | None = None
) -> RunResult:
    """Train and track one seed, and go on with an interrupted run of it where there is one; `files` as in `run`."""
    resume = None
    if not task.again:
        store = open_store(task.job.tracking_uri)
        found = checkpoint.alike(store.uri, task.job.identity, seed)
        resume = next((one for one in found if can_resume(store, one.run_id)), None)
    listener = EpochListener(on_epoch)
    return run(task.job, seed, listener, parent_run_id=task.parent_run_id, resume=resume, files=files)


def outcome_of(seed: int, train: Callable[[int], RunResult]) -> Done | Failed:
    """Return what comes of training a seed; an error fails this seed alone."""
    try:
        result = train(seed)
    except Exception as error:
        return Failed(seed, _reason(error))
    return Done(FinishedRun(result.run_id, seed, result.measured))


def _reason(error: Exception) -> str:
    """Return the sentence of a LabError; of a bug, the traceback."""
    return str(error) if isinstance(error, LabError) else "".join(traceback.format_exception(error)).rstrip()


def check_workers(workers: int | None, device: torch.device) -> None:
    """Refuse a number of processes that can't be; raises LabError."""
    if workers is not None and workers < 1:
        raise LabError(f"workers: {workers} is not a whole number of at least 1")
    if workers is not None and device.type != "cpu":
        raise LabError(f"workers: {workers} is for a CPU; on {device.type} the seeds train in one process")


class _Worker:
    """A process that trains one seed after another, and the connection to it."""

    def __init__(self, number: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs,), name=f"{declaration.WORKER} {number}", daemon=True)
        self.given: tuple[Task, int] | None = None
        resource_tracker.ensure_running()  # starting it would let the signals through again
        # Ctrl-C and a closed terminal reach all processes at once. This one sees them, and ends its workers by SIGTERM.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
        try:
            with environment_variables({"OMP_NUM_THREADS": "1"}):
                self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()  # so that this end hears of it when the process ends

    def give(self, given: tuple[Task, int] | None) -> None:
        """Let it train a seed of a task next, or with None come to its end."""
        self.given = given
        self.send(given)

    def send(self, what: object) -> None:
        with suppress(OSError):  # where it has died: receiving says so too
            self.connection.send(what)


def train_seeds(
    trainers: TrainTasks, task: Task, seeds: Sequence[int], count: int, on_time: Callable[[], None]
) -> Generator[Message, None, None]:
    """Let the trainers train these seeds of one task."""
    yield from _messages(trainers, deque((task, seed) for seed in seeds), count, on_time)


def _messages(
    trainers: TrainTasks, waiting: deque[tuple[Task, int]], count: int, on_time: Callable[[], None]
) -> Generator[Message, None, None]:
    with closing(trainers(lambda: waiting.popleft() if waiting else None, count, on_time)) as messages:
        for _, message in messages:
            yield message


def train_tasks(take: Take, count: int, on_time: Callable[[], None], judge: Judge | None = None) -> Messages:
    """Train in processes of this machine, as `TrainTasks` says."""
    workers: list[_Worker] = []
    started = 0
    try:
        while True:
            while len(workers) < count and (given := take()) is not None:
                started += 1
                workers.append(worker := _Worker(started))
                worker.give(given)
            if not workers:
                return
            ready = wait([worker.connection for worker in workers], timeout=LOOK_SECONDS)
            for worker in [worker for worker in workers if worker.connection in ready]:
                try:
                    message: Message = worker.connection.recv()
                except (EOFError, OSError):
                    workers.remove(worker)
                    worker.process.join()
                    if worker.given is not None:
                        task, seed = worker.given
                        yield task, Failed(seed, f"its process ended early ({_ending(worker.process.exitcode)})")
                    continue
                assert worker.given is not None
                task, _ = worker.given
                if isinstance(message, Epoch) and judge is not None:
                    worker.send(judge(task, message.metrics))
                yield task, message
                if not isinstance(message, Epoch):
                    worker.give(take())
            on_time()
    finally:  # the workers close their runs and end; those that do not are killed
        for worker in workers:
            worker.process.terminate()
        deadline = time.monotonic() + END_SECONDS
        for worker in workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            worker.process.kill()
            worker.process.join()
            worker.connection.close()


def _ending(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"exit code {exitcode}"
    try:
        return signal.Signals(-exitcode).name
    except ValueError:
        return f"signal {-exitcode}"


def _work(connection: Connection) -> None:
    """Train the seeds that come over the connection, and send back what comes of them."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    logging.getLogger("mnist_lab").setLevel(logging.WARNING)  # a script that imports mlflow.pytorch raises the root's
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)

    def train_given(task: Task, seed: int) -> RunResult:
        task.job.read_experiment()
        return train(task, seed, partial(send, task, seed))

    def send(task: Task, seed: int, metrics: EpochMetrics) -> None:
        try:
            connection.send(Epoch(seed, metrics))
            worth_it = task.trial is None or connection.recv()
        except (OSError, EOFError):
            raise KeyboardInterrupt from None  # the study's process is gone
        if not worth_it:
            raise Pruned

    try:
        with lasting_output():
            while (given := connection.recv()) is not None:
                task, seed = given
                connection.send(outcome_of(seed, partial(train_given, task)))
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
