"""Who trains a study or a search: in processes on a CPU, in this process on a GPU.

The processes are started with "spawn": torch's threads don't survive a fork. They are no `Pool`: that breaks as a whole
when one of its processes dies, while here only that task fails.
"""

import logging
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, NamedTuple

import torch

from mnist_lab.commandline import lasting_output
from mnist_lab.errors import LabError
from mnist_lab.running import checkpoint
from mnist_lab.running.job import WORKER, Job
from mnist_lab.running.machine import available_cores
from mnist_lab.running.progress import Progress
from mnist_lab.running.run import run, run_name_of
from mnist_lab.tracking.connection import environment_variables
from mnist_lab.tracking.store import FinishedRun, Store, can_resume, close_lost, open_store
from mnist_lab.training.loop import EpochMetrics

LOOK_SECONDS = 1.0  # how often the display is told that time passes
END_SECONDS = 20.0  # that a training gets to close its run when it is stopped

logger = logging.getLogger(__name__)


class Failed(NamedTuple):
    reason: str
    lost: bool = False  # because its process is gone


Outcome = FinishedRun | Failed | None  # a trial of a search has none: Optuna's storage says what came of it


@dataclass(frozen=True)
class SeedTask:
    """The training of a seed, which can be sent to another process. An interrupted run of it goes on."""

    job: Job
    number: int
    parent_run_id: str  # of the study or the search
    again: bool = False  # go on only with a run that began for this parent
    is_lost: bool = True  # whether a run of this seed that stands as RUNNING can only be one whose process is gone

    def train(self, progress: Progress) -> FinishedRun | None:
        store = open_store(self.job.tracking_uri)
        name = run_name_of(self.job, f"{self.job.protocol.unit} {self.number}")
        own = close_lost(store, self.parent_run_id, name) if self.is_lost else []
        if own:
            logger.warning("%s begins again: its process was lost", name)
        alike = checkpoint.alike(store.uri, self.job.identity, self.number)
        found = (one for one in alike if not self.again or one.run_id in own)
        resume = next((one for one in found if can_resume(store, one.run_id)), None)
        return run(self.job, self.number, progress, parent_run_id=self.parent_run_id, resume=resume)


def outcome_of(task: SeedTask, progress: Progress) -> Outcome:
    try:
        if task.job.experiment is None:  # a job is sent without it
            task.job.read_experiment()
        return task.train(progress)
    except Exception as error:
        return Failed(reason_of(error))


def reason_of(error: Exception) -> str:  # of a bug, the traceback
    return str(error) if isinstance(error, LabError) else "".join(traceback.format_exception(error)).rstrip()


class Trainers:
    """Trains tasks: in this process, one after another, as on a GPU."""

    running: dict[Any, SeedTask]  # the tasks that are being trained, by what `start` has returned for them
    room = 1  # for so many tasks at a time

    def prepare(self, job: Job, store: Store) -> None: ...  # gets ready for tasks of this job; raises LabError
    def stop(self) -> None: ...  # lets what is being trained close its run and end

    def storage(self, storage: Any) -> Any:  # what reaches Optuna's from where the tasks are trained
        return storage

    def start(self, task: SeedTask) -> Any:
        with suppress(Exception):  # anew, as a run before may have changed what the script's modules hold
            task.job.read_experiment()
        return task.number

    def ended(self, progress: Progress) -> Iterator[tuple[Any, Outcome]]:
        """Wait for a moment, and yield what has ended; report epochs to `progress`."""
        for number, task in [*self.running.items()]:
            yield number, outcome_of(task, progress)

    def train(
        self, store: Store, parent_run_id: str, tasks: Iterator[SeedTask], progress: Progress
    ) -> Generator[tuple[SeedTask, Outcome], None, None]:
        """Train the tasks of a study's or search's run, and yield each with what came of it; closing it ends them."""
        self.running = {}
        try:
            while True:
                while len(self.running) < self.room and (task := next(tasks, None)) is not None:
                    self.running[self.start(task)] = task
                if not self.running:
                    return
                for handle, outcome in self.ended(progress):
                    yield self.running.pop(handle), outcome
                progress.on_time()
        finally:
            self.stop()
            with suppress(LabError):  # a server that is away: the next run there closes them
                close_lost(store, parent_run_id)


class Processes(Trainers):
    """Trains in `count` processes of this machine, each of which trains one task after another."""

    def __init__(self, count: int) -> None:
        self.room = count
        self.started: dict[Connection, SpawnProcess] = {}

    def start(self, task: SeedTask) -> Connection:
        idle = (one for one, process in self.started.items() if one not in self.running and process.is_alive())
        connection = next(idle, None) or self._new_process()
        with suppress(OSError):  # where it has died: receiving says so too
            connection.send(task)
        return connection

    def _new_process(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs,), name=WORKER, daemon=True)
        resource_tracker.ensure_running()  # starting it would let the signals through again
        # Ctrl-C and a closed terminal reach all processes at once. This one sees them, and ends its workers by SIGTERM.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
        try:
            with environment_variables({"OMP_NUM_THREADS": "1"}):
                process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()  # so that this end hears of it when the process ends
        self.started[ours] = process
        return ours

    def ended(self, progress: Progress) -> Iterator[tuple[Connection, Outcome]]:
        for connection in self.running.keys() & wait([*self.running], timeout=LOOK_SECONDS):
            try:
                message: EpochMetrics | Outcome = connection.recv()
            except (EOFError, OSError):
                process = self.started[connection]
                process.join()
                code = process.exitcode or 0
                how = signal.strsignal(-code) if code < 0 else f"exit code {code}"
                message = Failed(f"its process ended early ({how})", lost=True)
            if isinstance(message, EpochMetrics):
                progress.on_epoch(self.running[connection].number, message)
            else:
                yield connection, message

    def stop(self) -> None:
        for process in self.started.values():
            process.terminate()
        deadline = time.monotonic() + END_SECONDS
        for connection, process in self.started.items():
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()
            connection.close()


def local(job: Job, workers: int | None = None) -> Trainers:
    """Return the trainers of this machine, on a CPU `workers` processes, by default one per core; raises LabError."""
    if job.device.type == "cpu":
        return Processes(workers or max(1, available_cores() // (job.threads or 1)))
    if workers is not None:
        raise LabError(f"workers: {workers} is for a CPU; on {job.device.type} the seeds train in one process")
    return Trainers()


class _Messages(Progress):
    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def on_epoch(self, seed: int, metrics: EpochMetrics) -> None:
        try:
            self.connection.send(metrics)
        except OSError:
            raise KeyboardInterrupt from None  # the study's process is gone


def _work(connection: Connection) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    logging.getLogger("mnist_lab").setLevel(logging.WARNING)  # a script that imports mlflow.pytorch raises the root's
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        with lasting_output():
            while True:
                connection.send(outcome_of(connection.recv(), _Messages(connection)))
    except (KeyboardInterrupt, EOFError, OSError):  # stopped, or the study's process is gone
        os._exit(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(END_SECONDS)
    os._exit(1)
