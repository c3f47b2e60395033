"""The tracking store: opens it, finds runs in it, and closes those whose process is gone."""

import logging
import os
import secrets
import shutil
import signal
import socket
import sqlite3
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import mlflow
import psutil
from filelock import FileLock, Timeout
from mlflow.entities import LifecycleStage, Run
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from sqlalchemy import Engine, event
from sqlalchemy.exc import SQLAlchemyError

from mnist_lab.errors import LabError, without_password
from mnist_lab.paths import EXPERIMENT_NAME, LOCKS, artifacts_of, is_there, own_folder, sqlite_file, tracking_uri
from mnist_lab.tracking import view
from mnist_lab.tracking.connection import ask, short_timeouts, why_refused
from mnist_lab.tracking.sqlite import check_writable, follow_move
from mnist_lab.verdicts.comparison import rounds_alike

# MLflow shows each error of the database with its traceback, and raises it too; one sentence is made of that.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)

MAX_RUNS = 50_000  # the most that MLflow gives at once
RESTORED = "restored"  # the tag of a run that was not trained into this store: the commit that it comes from
ON_CLUSTER = "MNIST_LAB_ON_CLUSTER"  # set in a cluster's worker, which ends when the process that gives it work does
OF_CLUSTER = "cluster"  # the last word of such a process's tag

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Store:
    uri: str
    experiment_id: str  # of the MLflow experiment that holds the runs
    database: os.stat_result | None = None  # of SQLite: what names the file, whatever its path is
    clock: Callable[[], int] | None = None  # in place of the machine's: milliseconds since 1970

    @property
    def name(self) -> str:
        return without_password(self.uri)

    @property
    def client(self) -> mlflow.MlflowClient:
        return mlflow.MlflowClient(tracking_uri=self.uri)

    @contextmanager
    def failures(self, what: str, then: str = "") -> Iterator[None]:
        """Turn an error of the store, its server or a full disk into a LabError: store, `what`, the cause, `then`."""
        try:
            yield
        except (MlflowException, SQLAlchemyError, ImportError, OSError) as error:
            raise LabError(f"tracking store {self.name!r} {what}: {why_refused(error, self.uri)}{then}") from error

    def check_in_place(self) -> None:
        """Refuse a SQLite database that is not where it was opened: MLflow would go on with a removed one; LabError."""
        file = sqlite_file(self.uri)
        with suppress(OSError):
            if file is None or self.database is None or os.path.samestat(file.stat(), self.database):
                return
        what = f"tracking store {self.name!r}: its database was removed, moved or replaced in the middle of the run"
        how = "name it with --tracking-uri where it is now, and what was in training goes on from its checkpoint"
        raise LabError(f"{what}; {how}")


def open_store(uri: str | None = None) -> Store:
    """Make the store ready for runs, and close those in it whose process is gone; several processes may do so at once.

    A SQLite database is made on first use, with `artifacts/` beside it. Raises LabError.
    """
    uri = tracking_uri(uri)
    if time.time() < 0:  # MLflow takes no time before 1970
        raise LabError(f"clock: this machine's says {time.ctime()}: set it")
    database = sqlite_file(uri)
    check_writable(uri)  # before a lock file is left beside what is not ours
    try:
        if database is None:
            ask(uri)
            with short_timeouts():
                store = Store(uri, experiment_of(uri).experiment_id)
        else:
            database.parent.mkdir(parents=True, exist_ok=True)
            # Two processes that make the same new database at once would break it. It takes 1 to 6 seconds.
            with FileLock(f"{database}.lock", timeout=120):
                if not database.exists():
                    _create(database)
                follow_move(uri)
                store = Store(uri, experiment_of(uri, artifacts_of(database)).experiment_id, database.stat())
    except LabError:
        raise
    except (MlflowException, SQLAlchemyError, ImportError, OSError, sqlite3.Error, ValueError) as error:
        raise LabError(f"tracking store {without_password(uri)!r} can't be used: {why_refused(error, uri)}") from error
    close_abandoned(store)
    return store


def _create(database: Path) -> None:
    """Make the database in a folder of its own first: a process that fails half-way must not leave half a store."""
    folder = database.with_name(f"{database.name}.new")
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    folder.mkdir()
    new = folder / f"{secrets.token_hex(4)}.db"  # MLflow takes a path that it has seen for one that it has made

    def write_unsynced(connection: sqlite3.Connection, _: object) -> None:
        # So the disk is waited for once, at the end, and not at each of the 1,000 commits that make the tables.
        connection.execute("PRAGMA synchronous=OFF")

    event.listen(Engine, "connect", write_unsynced)
    try:
        experiment_of(f"sqlite:///{new}", artifacts_of(database))
        with closing(sqlite3.connect(new)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")  # it stays so: reading blocks no writing. Waits for the disk
        new.replace(database)
    finally:
        event.remove(Engine, "connect", write_unsynced)
        shutil.rmtree(folder, ignore_errors=True)


def experiment_of(uri: str, artifact_location: str | None = None) -> mlflow.entities.Experiment:
    """Return the experiment that holds all runs, made if it is not there; LabError if it was deleted."""
    client = mlflow.MlflowClient(tracking_uri=uri)
    with quiet():
        experiment = client.get_experiment_by_name(EXPERIMENT_NAME)
        if experiment is None:
            experiment = client.get_experiment(client.create_experiment(EXPERIMENT_NAME, artifact_location))
    check_not_deleted(uri, experiment)
    if experiment.tags.get(view.TAG) != view.state():
        with quiet(), suppress(MlflowException):  # who may not change it still may read
            client.set_experiment_tag(experiment.experiment_id, view.TAG, view.state())
    return experiment


def check_not_deleted(uri: str, experiment: mlflow.entities.Experiment) -> None:
    if experiment.lifecycle_stage == "deleted":
        what = f"the experiment {EXPERIMENT_NAME!r} is deleted; restore it in MLflow"
        raise LabError(f"tracking store {without_password(uri)!r}: {what}")


@contextmanager
def uninterrupted(*, interrupted: bool = False) -> Iterator[None]:
    """Hold back the signals that end a program until the block is through; a second Ctrl-C ends it at once.

    An interrupt within MLflow can leave the database locked. interrupted: whether the next Ctrl-C is a second one.
    """
    if threading.current_thread() is not threading.main_thread():  # signals interrupt no other thread
        yield
        return
    arrived: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        arrived.append(signum)
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # no handler of Python's runs while SQLite waits for a lock

    handlers = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    if interrupted and handlers[signal.SIGINT] != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if arrived:
            signal.raise_signal(arrived[0])


class FinishedRun(NamedTuple):
    """A finished run in the store: its seed, and the last value of each metric."""

    run_id: str
    seed: int
    metrics: Mapping[str, float]


def finished_runs(
    store: Store,
    params: Mapping[str, str],
    tags: Mapping[str, str],
    figure: str = "final_test_accuracy",
    *,
    seeds: Sequence[int] = (),
    hardware: str = "",
) -> dict[int, FinishedRun]:
    """Return the newest finished run of each seed that has these tags and, but for the seed, exactly these params.

    figure: the metric that makes it a whole run.
    hardware: as the tag of that name. A restored run counts only for a seed that has no other run, and only if it was
        made on hardware that rounds sums alike; a notice names those of `seeds` that don't count.
    """
    own, restored, elsewhere = (dict[int, FinishedRun]() for _ in range(3))
    for run in search(store, f"attributes.status = 'FINISHED' AND tags.code_sha256 = '{tags['code_sha256']}'"):
        seed = run.data.params.get("seed", "")
        alike = run.data.params == {**params, "seed": seed} and tags.items() <= run.data.tags.items()
        if alike and seed.isdecimal() and figure in run.data.metrics:
            kind = own
            if RESTORED in run.data.tags:
                kind = restored if rounds_alike(run.data.tags.get("hardware", ""), hardware) else elsewhere
            kind.setdefault(int(seed), FinishedRun(run.info.run_id, int(seed), dict(run.data.metrics)))
    found = restored | own
    if missing := ", ".join(str(seed) for seed in sorted({*seeds} & elsewhere.keys() - found.keys())):
        message = "restored runs of seed %s are not reused: they were made on other hardware than this, %r"
        logger.warning(message, missing, hardware)
    return found


def adopt(store: Store, parent_run_id: str, run_id: str) -> None:
    """Make a run the child of a study's run, whatever study it belonged to before."""
    with store.failures("can't be written"), uninterrupted(), short_timeouts():
        store.client.set_tag(run_id, MLFLOW_PARENT_RUN_ID, parent_run_id)


def close_abandoned(store: Store) -> None:
    """Mark as KILLED the runs that are RUNNING though their process is gone, as its lock shows.

    If the lock shows nothing, as on another machine, the run is left alone, unless it is of a cluster's worker, which
    ends with the process that wrote the parent's run.
    """
    running = {run.info.run_id: run for run in reversed(search(store, "attributes.status = 'RUNNING'"))}
    for run_id, run in [*running.items()]:  # parents first
        parent, process = run.data.tags.get(MLFLOW_PARENT_RUN_ID), run.data.tags.get("process", "").split()
        is_orphan = parent not in (None, *running) and process[-1:] == [OF_CLUSTER]
        # Another machine may reach the folder of locks by a network that shows it none. What counts is that the process
        # ran under this system, in whatever container, or on this machine before its restart.
        is_of_here = _boot() in process or {socket.gethostname(), _machine()} <= {*process}
        seen = is_of_here and Path(lock_of(store, run_id).lock_file).exists()
        if (seen or is_orphan) and _kill_unless_locked(store, run_id):
            del running[run_id]


def close_lost(store: Store, parent_run_id: str, run_name: str | None = None) -> list[str]:
    """Mark as KILLED the child runs of this name, or all, that are RUNNING; return the ids of all of this name."""
    children = search(store, f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent_run_id}'")
    named = [run.info for run in children if run_name in (None, run.info.run_name)]
    for info in named:
        if info.status == "RUNNING":
            _kill_unless_locked(store, info.run_id)
    return [info.run_id for info in named]


def _kill_unless_locked(store: Store, run_id: str) -> bool:
    """Mark a RUNNING run as KILLED; False if a process on this machine still writes it."""
    with store.failures("can't be written"), suppress(Timeout), short_timeouts(), lock_of(store, run_id) as lock:
        if store.client.get_run(run_id).info.status == "RUNNING":  # it may have ended by itself since
            store.client.set_terminated(run_id, "KILLED")
        lock.remove()
        return True
    return False


def search(store: Store, condition: str) -> list[Run]:
    """Return the runs that meet the condition, newest first."""
    with store.failures("can't be read"), short_timeouts():
        return list(store.client.search_runs([store.experiment_id], condition, max_results=MAX_RUNS))


def process_tag() -> str:
    """Name this process: host, number, start; then the system's start, and the machine; "cluster" if it is one's."""
    process = psutil.Process()  # its number alone would not do: containers number anew, and machines share names
    words = [socket.gethostname(), process.pid, process.create_time(), _boot(), _machine()]
    return " ".join(map(str, [*words, OF_CLUSTER] if os.environ.get(ON_CLUSTER) else words))


def _boot() -> str:
    """Return what names the running system from its start on, the same in all containers."""
    return _content("/proc/sys/kernel/random/boot_id", f"{_machine()}@{psutil.boot_time():.0f}")


def _machine() -> str:
    return _content("/etc/machine-id", f"{uuid.getnode():012x}")


def _content(file: str, default: str) -> str:
    with suppress(OSError):
        return Path(file).read_text().strip() or default
    return default


class RunLock(FileLock):
    """What a process holds while it writes a run; the system frees it when the process ends."""

    def remove(self) -> None:
        Path(self.lock_file).unlink(missing_ok=True)  # first: whoever waits for it takes none that is removed
        self.release()


def lock_of(store: Store, run_id: str) -> RunLock:
    name = Path(run_id).name  # a database from elsewhere may hold a path
    return RunLock(own_folder(store.uri) / LOCKS / f"{name}.lock", timeout=0, thread_local=False)


def take_lock(store: Store, run_id: str) -> RunLock:
    """Take the lock of a run that this process is going to write; LabError if another process has it, or OSError."""
    lock = lock_of(store, run_id)
    try:
        lock.acquire(timeout=2)  # seconds; who looks whether a run is abandoned has its lock for some milliseconds
    except Timeout:
        raise LabError(f"resume: run {run_id} is still in training, in another process") from None
    return lock


@contextmanager
def alone(uri: str, work: str, sentence: str) -> Iterator[None]:
    """Keep other processes from this work on a store; raises LabError with the sentence if one is doing it."""
    try:
        with FileLock(own_folder(uri) / LOCKS / f"{work}.lock", timeout=0):
            yield
    except Timeout:
        raise LabError(sentence) from None


def can_resume(store: Store, run_id: str) -> bool:
    """Say whether `track` would go on with this run; why not is shown."""
    try:
        resumable_run(store, run_id)
    except LabError as error:
        logger.warning("not used: checkpoint of run %s: %s", run_id, str(error).removeprefix("resume: "))
        return False
    return True


def resumable_run(store: Store, run_id: str, *, finished_too: bool = False) -> Run:
    """Return the run; raises LabError if it is not there, was deleted, has finished, or is in training."""
    with store.failures(f"can't give run {run_id}"), short_timeouts():
        run = store.client.get_run(run_id)
    if run.info.lifecycle_stage == LifecycleStage.DELETED:
        raise LabError(f"resume: run {run_id} was deleted in MLflow: restore it there, or train anew")
    if run.info.status == "FINISHED" and not finished_too:
        raise LabError(f"resume: run {run_id} has finished")
    if run.info.status == "RUNNING":
        raise LabError(f"resume: run {run_id} is still in training, as far as can be told from here")
    return run


def find_run(uri: str, run_id: str) -> Run | None:
    """Return a run, though it was deleted; None where the store has none of that id. Other errors are MLflow's."""
    try:
        return mlflow.MlflowClient(tracking_uri=uri).get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def is_deleted(uri: str, run_id: str) -> bool:
    """Say whether a run was deleted in MLflow, and can be restored there; False where that can't be found out."""
    with suppress(MlflowException, SQLAlchemyError, ImportError, OSError, ValueError), quiet(), short_timeouts():
        run = find_run(uri, run_id) if is_there(uri) else None
        return run is not None and run.info.lifecycle_stage == LifecycleStage.DELETED
    return False


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' remarks (migrations, deprecations) off the user's console; errors still show."""
    root, disabled = logging.root, logging.root.manager.disable
    level, handlers = root.level, root.handlers[:]  # which the first import of mlflow.pytorch changes
    logging.disable(max(disabled, logging.WARNING))
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(disabled)
        root.setLevel(level)
        root.handlers[:] = handlers


# ---- files that are replaced whole: a reader or a power cut finds the old one or the new one


def replace_files(contents: Mapping[Path, str | bytes]) -> None:
    """Write these files; folders that are missing are made. Text is written as UTF-8 whatever the locale is.

    None is replaced before all are on disk. A link stays one. LabError if one can't be written; then none is changed.
    """
    new: dict[Path, Path] = {}
    try:
        for file, content in contents.items():
            target = file.resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            new[file] = target.with_name(f"{target.name}.{os.getpid()}.new")
            new[file].write_bytes(content.encode() if isinstance(content, str) else content)
            with new[file].open("rb") as stream:
                os.fsync(stream)
            if target.exists():
                shutil.copymode(target, new[file])
        for file, written in new.items():
            written.replace(file.resolve())
    except OSError as error:
        raise LabError(f"{file} can't be written: {error.strerror}") from error
    finally:
        for written in new.values():
            with suppress(OSError):  # where the file system is read-only, for one
                written.unlink()
