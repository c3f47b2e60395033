"""Trains on this machine: in processes of one thread each on a CPU, in this process on a GPU.

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
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait

import torch

from mnist_lab.commandline import lasting_output
from mnist_lab.errors import LabError
from mnist_lab.running.job import WORKER, Job
from mnist_lab.running.machine import available_cores
from mnist_lab.running.tasks import Epoch, Failed, Given, Message, OnMessage, Task, outcome_of
from mnist_lab.tracking.connection import environment_variables
from mnist_lab.tracking.store import Store, close_abandoned
from mnist_lab.training.loop import EpochMetrics

LOOK_SECONDS = 1.0  # how often the display is told that time passes
END_SECONDS = 20.0  # that a worker gets to close its run when the study is stopped


class Local:
    """The trainers of this machine. workers: how many processes train at once on a CPU; by default one per core."""

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers

    def check(self, job: Job) -> None:
        workers, device = self.workers, job.device.type
        if workers is not None and workers < 1:
            raise LabError(f"workers: {workers} is not a whole number of at least 1")
        if workers is not None and device != "cpu":
            raise LabError(f"workers: {workers} is for a CPU; on {device} the seeds train in one process")

    def prepare(self, job: Job, store: Store) -> int:
        self.store, self.in_processes = store, job.device.type == "cpu"
        if not self.in_processes:
            return 1
        return self.workers or max(1, available_cores() // (job.threads or 1))

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
