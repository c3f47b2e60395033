"""What is handed to whoever trains, in this process or another: tasks, and the messages that come back.

`workers` trains on this machine, `cluster` on a Ray cluster; what both have in common is `Trainers`.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple, Protocol

from mnist_lab.errors import LabError
from mnist_lab.running import checkpoint
from mnist_lab.running.job import Job
from mnist_lab.running.progress import Progress, RunResult
from mnist_lab.running.record import run_name_of
from mnist_lab.running.run import run
from mnist_lab.tracking.store import FinishedRun, Store, can_resume, close_lost, open_store
from mnist_lab.training.loop import EpochMetrics

if TYPE_CHECKING:  # Optuna is for searches only
    from optuna.storages import BaseStorage

logger = logging.getLogger(__name__)


class Epoch(NamedTuple):
    """A seed has finished an epoch."""

    seed: int
    metrics: EpochMetrics


class Done(NamedTuple):
    """A seed has finished its run."""

    run: FinishedRun


class Tried(NamedTuple):
    """A trial of a search has ended; `number` is its number in Optuna's storage, which says how."""

    seed: int
    number: int


class Failed(NamedTuple):
    """A seed has no run, and why. lost: because its process is gone."""

    seed: int
    reason: str
    lost: bool = False


Message = Epoch | Done | Tried | Failed
OnEpoch = Callable[[EpochMetrics], None]


class Task(Protocol):
    """What is trained with one seed after another. It can be sent to another process."""

    @property
    def job(self) -> Job: ...
    @property
    def parent_run_id(self) -> str: ...

    def train(self, seed: int, on_epoch: OnEpoch) -> Done | Tried: ...


Given = tuple[Task, int]  # a task, and the seed to train it with
OnMessage = Callable[[Task, Message], None]


class Trainers(Protocol):
    """Who trains."""

    def check(self, job: Job) -> None:
        """Refuse what can't be, before anything is opened; raises LabError."""

    def prepare(self, job: Job, store: Store) -> int:
        """Get ready for tasks of this job, and return how many can train at a time; raises LabError."""

    def storage(self, url: str) -> str | BaseStorage:
        """Return how tasks reach the storage of Optuna that has this URL here."""

    def train(self, waiting: Iterable[Given], count: int, on_message: OnMessage, on_time: Callable[[], None]) -> None:
        """Train what is waiting, `count` at a time; `on_time` is called now and then.

        However this ends, the trainings end before it.
        """


class SeedTask(NamedTuple):
    """The runs of one job, one per seed.

    parent_run_id: the run of the study or the search.
    again: do not go on with runs that were interrupted before.
    """

    job: Job
    parent_run_id: str
    again: bool = False

    def train(self, seed: int, on_epoch: OnEpoch) -> Done:
        result = train(self.job, seed, self.parent_run_id, on_epoch, again=self.again)
        return Done(FinishedRun(result.run_id, seed, result.measured))


def train(
    job: Job, seed: int, parent_run_id: str, on_epoch: OnEpoch, *, again: bool = False, is_lost: bool = True
) -> RunResult:
    """Train and track one seed. An interrupted run of it goes on, with `again` only one that began for this parent.

    is_lost: whether a run of this seed that the parent has as RUNNING can only be one whose process is gone.
    """
    store = open_store(job.tracking_uri)
    name = run_name_of(job, f"seed {seed}")
    own = close_lost(store, parent_run_id, name) if is_lost else []
    if own:
        logger.warning("%s begins again: its process was lost", name)
    found = (one for one in checkpoint.alike(store.uri, job.identity, seed) if not again or one.run_id in own)
    resume = next((one for one in found if can_resume(store, one.run_id)), None)
    return run(job, seed, EpochListener(on_epoch), parent_run_id=parent_run_id, resume=resume)


def outcome_of(task: Task, seed: int, on_epoch: OnEpoch) -> Done | Tried | Failed:
    """Return what comes of training a seed; an error fails this seed alone."""
    try:
        if task.job.experiment is None:  # a job is sent without it
            task.job.read_experiment()
        return task.train(seed, on_epoch)
    except Exception as error:
        return Failed(seed, reason_of(error))


def reason_of(error: Exception) -> str:
    """Return the sentence of a LabError; of a bug, the traceback."""
    return str(error) if isinstance(error, LabError) else "".join(traceback.format_exception(error)).rstrip()


class EpochListener(Progress):
    """Listens to one seed's run and passes its epochs on."""

    def __init__(self, report: OnEpoch) -> None:
        self.report = report

    def on_epoch(self, seed: int, metrics: EpochMetrics) -> None:
        self.report(metrics)
