"""The only room that writes to MLflow: the store, and what one run leaves in it (docs/metrics.md lists it)."""

from __future__ import annotations

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read once, when mlflow is imported
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import copy
import gc
import importlib.metadata
import io
import json
import logging
import signal
import socket
import sqlite3
import tempfile
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import mlflow
import numpy as np
import psutil
import torch
from filelock import FileLock
from mlflow.data.numpy_dataset import from_numpy
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.models import infer_signature
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from sqlalchemy.exc import SQLAlchemyError
from torch import Tensor, nn

from mnist_lab.data import Mnist
from mnist_lab.errors import LabError
from mnist_lab.store import EXPERIMENT_NAME, SQLITE, UI_VIEW, check_readable, sqlite_file, tracking_uri

FIRST_USE_TIMEOUT = 120  # seconds; making a new database takes 1.4, and 6 on a busy machine
# MLflow's table shows no metric unless a view is chosen; this is its own way of sharing one, by name in the address.
UI_COLUMNS = [
    *(f"metrics.`{name}`" for name in ("final_test_accuracy", "best_test_accuracy", "train_accuracy", "num_params")),
    *(f"metrics.`final_test_accuracy_{name}`" for name in ("mean", "sd")),  # of a study
    "tags.`targets`",
]
MAX_DIGEST = 36  # characters that MLflow keeps of a dataset's digest
MAX_RUNS = 50_000  # the most that MLflow gives at once


@dataclass(frozen=True)
class Store:
    """A tracking store that is ready: its URI and the id of the MLflow experiment that holds the runs."""

    uri: str
    experiment_id: str


def open_store(uri: str | None = None) -> Store:
    """Make the store ready for runs, creating it on first use; several processes may do so at once.

    A SQLite database gets its artifacts in `artifacts/` beside it, and write-ahead logging, so that reading does not
    block writing. Elsewhere the tracking server decides.

    Raises:
        LabError: if the store can't be opened or made.
    """
    uri = tracking_uri(uri)
    database = sqlite_file(uri)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # the default, 7, waits for minutes
    try:
        if database is None:
            return Store(uri, _experiment_id(uri, artifacts=None))
        if database.exists():
            check_readable(uri)  # before a lock file is left beside what is not ours
        database.parent.mkdir(parents=True, exist_ok=True)
        # Two processes that make the same new database at once would break it.
        with FileLock(f"{database}.lock", timeout=FIRST_USE_TIMEOUT):
            if not database.exists():
                _create(database)
            check_readable(uri)
            return Store(uri, _experiment_id(uri, artifacts=_artifacts(database)))
    except (MlflowException, SQLAlchemyError, ImportError, OSError, sqlite3.Error) as error:
        raise LabError(f"tracking store {uri!r} can't be used: {_one_line(error)}") from error


def _create(database: Path) -> None:
    """Make the database under another name first: a process killed half-way must not leave half a store."""
    new = database.with_name(f"{database.name}.new")
    new.unlink(missing_ok=True)
    _experiment_id(f"{SQLITE}{new}", artifacts=_artifacts(database))
    with closing(sqlite3.connect(new)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")  # it stays so
    new.replace(database)


def _artifacts(database: Path) -> Path:
    return database.parent / "artifacts"


def _experiment_id(uri: str, artifacts: Path | None) -> str:
    with _quiet():
        client = mlflow.MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name(EXPERIMENT_NAME)
        if experiment is None:
            location = artifacts.as_uri() if artifacts else None
            view = {f"mlflow.sharedViewState.{UI_VIEW}": json.dumps({"selectedColumns": UI_COLUMNS})}
            return str(client.create_experiment(EXPERIMENT_NAME, artifact_location=location, tags=view))
    if experiment.lifecycle_stage == "deleted":
        raise LabError(f"tracking store {uri!r}: the experiment {EXPERIMENT_NAME!r} is deleted; restore it in MLflow")
    return str(experiment.experiment_id)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold back the signals that end a program until the block is through; a second Ctrl-C is not held back.

    An interrupt in the midst of MLflow's work can leave the database locked by a transaction that nobody ends,
    and then the run can't be closed: it would stay RUNNING.
    """
    if threading.current_thread() is not threading.main_thread():  # signals interrupt no other thread
        yield
        return
    arrived: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and signum in arrived:
            raise KeyboardInterrupt
        arrived.append(signum)

    handlers = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if arrived:
            signal.raise_signal(arrived[0])


@dataclass(frozen=True)
class FinishedRun:
    """A finished run as it stands in the store: its seed, and the last value of each metric."""

    run_id: str
    seed: int
    metrics: Mapping[str, float]


def finished_runs(store: Store, params: Mapping[str, object], tags: Mapping[str, str]) -> dict[int, FinishedRun]:
    """Return the newest finished run of each seed that has these tags and, but for the seed, exactly these params.

    Raises:
        LabError: if the store can't be read.
    """
    wanted = {name: str(value) for name, value in params.items()}
    found: dict[int, FinishedRun] = {}
    for run in _search(store, f"attributes.status = 'FINISHED' AND tags.code_sha256 = '{tags['code_sha256']}'"):
        seed = run.data.params.get("seed", "")
        alike = {**run.data.params, "seed": seed} == {**wanted, "seed": seed}
        tagged = all(run.data.tags.get(name) == value for name, value in tags.items())
        if alike and tagged and seed.isdecimal() and "final_test_accuracy" in run.data.metrics:
            found.setdefault(int(seed), FinishedRun(run.info.run_id, int(seed), dict(run.data.metrics)))
    return found


def read_run(store: Store, run_id: str) -> FinishedRun:
    """Return a finished run of one seed."""
    run = mlflow.MlflowClient(tracking_uri=store.uri).get_run(run_id)
    return FinishedRun(run_id, int(run.data.params["seed"]), dict(run.data.metrics))


def adopt(store: Store, parent_run_id: str, run_id: str) -> None:
    """Make a run the child of a study's run, whatever study it belonged to before."""
    with _uninterrupted():
        mlflow.MlflowClient(tracking_uri=store.uri).set_tag(run_id, MLFLOW_PARENT_RUN_ID, parent_run_id)


def close_abandoned(store: Store) -> None:
    """Mark the runs KILLED that stand as RUNNING though their process, on this machine, is gone: killed, or power lost.

    Raises:
        LabError: if the store can't be read.
    """
    client = mlflow.MlflowClient(tracking_uri=store.uri)
    for run in _search(store, "attributes.status = 'RUNNING'"):
        if _is_gone(run.data.tags.get("process", "")):
            client.set_terminated(run.info.run_id, "KILLED")


def _search(store: Store, condition: str) -> list[Run]:
    """Return the runs that meet the condition, newest first."""
    try:
        client = mlflow.MlflowClient(tracking_uri=store.uri)
        order = ["attributes.start_time DESC"]
        return list(client.search_runs([store.experiment_id], condition, max_results=MAX_RUNS, order_by=order))
    except (MlflowException, SQLAlchemyError) as error:
        raise LabError(f"tracking store {store.uri!r} can't be read: {_one_line(error)}") from error


def _process_tag() -> str:
    """Name this process, so that another one can say later whether it has ended: host, number, start."""
    process = psutil.Process()
    return f"{socket.gethostname()} {process.pid} {process.create_time()}"


def _is_gone(tag: str) -> bool:
    host, _, process = tag.partition(" ")
    number, _, created = process.partition(" ")
    if host != socket.gethostname() or not number.isdecimal():  # another machine's, or another program's
        return False
    try:
        # Numbers are used again. The clock may be corrected by a second meanwhile.
        return abs(psutil.Process(int(number)).create_time() - float(created)) > 2
    except psutil.NoSuchProcess:
        return True


class TrackedRun:
    """One run being written. Made by `track`. Signals that end the program wait until what is being logged is.

    end_status: the status that the run gets when its block comes to its end.
    """

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.end_status = "FINISHED"

    @_uninterrupted()
    def log_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Log one point of each metric at `step=epoch`."""
        mlflow.log_metrics(dict(metrics), step=epoch)

    @_uninterrupted()
    def log_missing(self, epochs: Mapping[int, Mapping[str, float]]) -> None:
        """Log those points of these epochs that the run does not have yet, so that each is there once."""
        client = mlflow.MlflowClient()
        names = {name for metrics in epochs.values() for name in metrics}
        logged = {(name, point.step) for name in names for point in client.get_metric_history(self.run_id, name)}
        for epoch, metrics in epochs.items():
            if missing := {name: value for name, value in metrics.items() if (name, epoch) not in logged}:
                mlflow.log_metrics(missing, step=epoch)

    @_uninterrupted()
    def log_once(self, metrics: Mapping[str, float]) -> None:
        """Log metrics that a run has one value of; of a resumed run, those that it does not have yet."""
        logged = mlflow.MlflowClient().get_run(self.run_id).data.metrics
        if missing := {name: value for name, value in metrics.items() if name not in logged}:
            mlflow.log_metrics(missing)

    @_uninterrupted()
    def set_tags(self, tags: Mapping[str, str]) -> None:
        mlflow.set_tags(dict(tags))

    @_uninterrupted()
    def log_file(self, file: Path, folder: str) -> None:
        mlflow.log_artifact(str(file), folder)

    @_uninterrupted()
    def log_text(self, text: str, artifact_file: str) -> None:
        mlflow.log_text(text, artifact_file)

    @_uninterrupted()
    def log_json(self, value: Mapping[str, object], artifact_file: str) -> None:
        mlflow.log_text(json.dumps(value, indent=2) + "\n", artifact_file)

    @_uninterrupted()
    def log_figures(self, figures: Mapping[str, Any]) -> None:
        """Log matplotlib figures as `figures/<name>.png`."""
        for name, figure in figures.items():
            mlflow.log_figure(figure, f"figures/{name}.png", save_kwargs={"dpi": 120})

    @_uninterrupted()
    def log_data(self, mnist: Mnist, source: Path) -> None:
        """Log the parts of MNIST as MLflow inputs, with the SHA-256 of the files as digest (its first 36 digits)."""
        for context, images, labels in (
            ("training", mnist.train_images, mnist.train_labels),
            ("validation", mnist.validation_images, mnist.validation_labels),
            ("test", mnist.test_images, mnist.test_labels),
        ):
            if images is None or labels is None:
                continue
            with _quiet():
                dataset = from_numpy(
                    images.cpu().numpy(),
                    source=str(source),
                    targets=labels.cpu().numpy(),
                    name=f"MNIST {context}",
                    digest=mnist.sha256[:MAX_DIGEST],
                )
                mlflow.log_input(dataset, context=context)

    @_uninterrupted()
    def log_predictions(self, truth: Tensor, logits: Tensor) -> None:
        """Log truth (N,), prediction (N,) and logits (N, 10) of the test images as `predictions.npz`, pickle-free."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "predictions.npz"
            np.savez_compressed(
                file,
                truth=truth.cpu().numpy().astype(np.uint8),
                prediction=logits.argmax(dim=1).cpu().numpy().astype(np.uint8),
                logits=logits.float().cpu().numpy(),
            )
            mlflow.log_artifact(str(file))

    @_uninterrupted()
    def log_model(self, net: nn.Module, images: Tensor) -> str | None:
        """Log the trained network so that `mlflow.pytorch.load_model` gives it back, for any batch size.

        images: a few of the network's inputs (N, 1, 28, 28), at least two, as the input example.
        The format is torch.export's, which holds no pickle. Where it can't express the network, the weights are
        logged as `state_dict.pt`, and the reason is returned.
        """
        net = copy.deepcopy(net).cpu().eval()
        example = images.cpu()
        with torch.inference_mode():
            output = net(example)
        signature = infer_signature(example.numpy(), output.numpy())
        packages = [f"{name}=={importlib.metadata.version(name)}" for name in ("torch", "numpy")]
        try:
            with _quiet(), redirect_stderr(io.StringIO()):  # torch.export prints the graph that it can't express
                mlflow.pytorch.log_model(
                    net,
                    name="model",
                    signature=signature,
                    input_example=example.numpy(),
                    pip_requirements=packages,
                    serialization_format="pt2",
                )
        except MlflowException:
            raise
        except Exception as error:  # torch.export has many ways to say no
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "state_dict.pt"
                torch.save(net.state_dict(), file)
                mlflow.log_artifact(str(file))
            return _one_line(error)
        finally:
            _forget_exports()
        return None


@contextmanager
def track(
    store: Store,
    run_name: str,
    *,
    params: Mapping[str, object],
    tags: Mapping[str, str],
    parent_run_id: str | None = None,
    resume_run_id: str | None = None,
) -> Iterator[TrackedRun]:
    """Open a run, and close it by how the block ends.

    FINISHED at its end or by `sys.exit(0)`, KILLED by KeyboardInterrupt, else FAILED, with the traceback as
    `traceback.txt` unless it is a LabError.
    parent_run_id: the study's run that this one is a child of; that may be open in this process or in another.
    resume_run_id: go on with this run, with its name, params and tags.

    Raises:
        LabError: if the store fails on the way, e.g. because its disk is full, or the run to resume is not there, has
            finished, or is in training elsewhere.
    """
    before = os.environ.get("MLFLOW_TRACKING_URI")
    run_id, status = None, "FAILED"
    if resume_run_id is not None:
        _check_resumable(store, resume_run_id)
    try:
        with _uninterrupted():
            mlflow.set_tracking_uri(store.uri)
            if resume_run_id is not None:
                run_id = mlflow.start_run(resume_run_id, nested=parent_run_id is not None).info.run_id
                mlflow.set_tag("process", _process_tag())
                if parent_run_id is not None:
                    mlflow.set_tag(MLFLOW_PARENT_RUN_ID, parent_run_id)
            else:
                run_id = mlflow.start_run(
                    experiment_id=store.experiment_id,
                    run_name=run_name,
                    tags={**tags, "process": _process_tag()},
                    nested=parent_run_id is not None,
                    parent_run_id=parent_run_id,
                ).info.run_id
                mlflow.log_params(dict(params))
        tracked = TrackedRun(run_id)
        yield tracked
        status = tracked.end_status
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    except SystemExit as end:
        status = "FINISHED" if end.code in (0, None) else "FAILED"
        raise
    except MlflowException as error:
        raise LabError(f"tracking store {store.uri!r} failed during the run: {_one_line(error)}") from error
    except Exception as error:
        if run_id is not None and not isinstance(error, LabError):
            _log_traceback(error)
        raise
    finally:
        with _uninterrupted():
            try:
                if run_id is not None:
                    _end_run(run_id, status)
            finally:  # MLflow has set the environment variable too, by which the next store would be found
                mlflow.set_tracking_uri(before)  # type: ignore[arg-type]


def can_resume(store: Store, run_id: str) -> bool:
    """Say whether `track` would go on with this run."""
    try:
        _check_resumable(store, run_id)
    except LabError:
        return False
    return True


def _check_resumable(store: Store, run_id: str) -> None:
    try:
        status = mlflow.MlflowClient(tracking_uri=store.uri).get_run(run_id).info.status
    except MlflowException as error:
        raise LabError(f"resume: run {run_id} can't be read from {store.uri!r}: {_one_line(error)}") from error
    if status == "FINISHED":
        raise LabError(f"resume: run {run_id} has finished")
    if status == "RUNNING":
        raise LabError(f"resume: run {run_id} is still in training, in another process")


def _forget_exports() -> None:
    """Let go of what torch.export keeps of each network for as long as the process lives: 0.4 MB of step 4's.

    The caches of ShapeEnv's methods have no limit and are shared by all of its instances. The tensors that an instance
    tracks hold it in turn, from C++, where Python can't see that nobody else does.
    """
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # slow to import, but for an export it was

    for method in vars(ShapeEnv).values():
        if hasattr(method, "cache_clear"):
            method.cache_clear()
    for instance in gc.get_objects():
        if type(instance) is ShapeEnv:
            instance.tracked_fakes = None


def _log_traceback(error: Exception) -> None:
    """Keep the traceback with the run; where even that fails, the error itself matters more."""
    with suppress(MlflowException, OSError), _uninterrupted():
        mlflow.log_text("".join(traceback.format_exception(error)), "traceback.txt")


def _end_run(run_id: str, status: str) -> None:
    """Close the run. Where that fails, what ended the block matters more, unless nothing did."""
    try:
        mlflow.end_run(status)
    except MlflowException as error:
        message = f"tracking store: the run {run_id} could not be marked {status}: {_one_line(error)}"
        if status == "FINISHED":
            raise LabError(message) from error
        logging.getLogger(__name__).warning(message)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' remarks (migrations, deprecations) off the user's console; errors still show."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
