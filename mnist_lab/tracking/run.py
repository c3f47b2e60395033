"""What one run leaves in MLflow (docs/metrics.md lists it)."""

from __future__ import annotations

import copy
import gc
import importlib.metadata
import io
import json
import logging
import re
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from filelock import FileLock
from mlflow.data.numpy_dataset import from_numpy
from mlflow.entities import Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import infer_signature
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from torch import Tensor, nn

from mnist_lab.data import Mnist
from mnist_lab.errors import LabError, one_line, without_password
from mnist_lab.tracking.delivery import briefly, is_away, send, send_waiting
from mnist_lab.tracking.outbox import Outbox, Record
from mnist_lab.tracking.store import (
    Store,
    check_resumable,
    let_go,
    process_tag,
    quiet,
    store_failures,
    take_lock,
    uninterrupted,
)

MAX_DIGEST = 36  # characters that MLflow keeps of a dataset's digest
ASK_AGAIN_SECONDS = 30  # after a server gave no answer

logger = logging.getLogger(__name__)


class TrackedRun:
    """One run being written. Made by `track`. Signals that end the program wait until what is being logged is.

    What a tracking server that is away does not take waits on disk (`outbox`) and is sent when it is back. With a
    SQLite store an error ends the run.
    end_status: the status that the run gets when its block comes to its end.
    """

    def __init__(self, store: Store, run_id: str, lock: FileLock, logged_once: frozenset[str] = frozenset()) -> None:
        self.run_id = run_id
        self.end_status = "FINISHED"
        self._store = store
        self._lock = lock
        self._logged_once = logged_once
        self._client = store.client
        self._outbox = Outbox.of_run(store.uri, run_id)
        self._waiting = False  # whether the outbox has records: then what comes next waits behind them
        self._ask_again = 0.0  # when, by the monotonic clock

    def log_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Log one point of each metric at `step=epoch`."""
        self._write(_metrics(metrics, step=epoch))

    @uninterrupted()
    def log_missing(self, epochs: Mapping[int, Mapping[str, float]]) -> None:
        """Log those points of these epochs that the run does not have yet, so that each is there once."""
        names = {name for metrics in epochs.values() for name in metrics}
        with briefly():
            histories = [(name, self._client.get_metric_history(self.run_id, name)) for name in names]
        logged = {(name, point.step) for name, points in histories for point in points}
        for epoch, metrics in epochs.items():
            if missing := {name: value for name, value in metrics.items() if (name, epoch) not in logged}:
                self.log_epoch(epoch, missing)

    def log_once(self, metrics: Mapping[str, float]) -> None:
        """Log metrics that a run has one value of; of a resumed run, those that it does not have yet."""
        if missing := {name: value for name, value in metrics.items() if name not in self._logged_once}:
            self._write(_metrics(missing, step=0))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._write(Record("tags", dict(tags)))

    def log_file(self, file: Path, folder: str | None = None) -> None:
        self._write(Record("artifact", {"folder": folder}, file))

    def log_text(self, text: str, artifact_file: str) -> None:
        with self._artifact(artifact_file) as file:
            file.write_text(text, encoding="utf-8")

    def log_json(self, value: Mapping[str, object], artifact_file: str) -> None:
        self.log_text(json.dumps(value, indent=2) + "\n", artifact_file)

    def log_figures(self, figures: Mapping[str, Any]) -> None:
        """Log matplotlib figures as `figures/<name>.png`."""
        for name, figure in figures.items():
            with self._artifact(f"figures/{name}.png") as file:
                figure.savefig(file, dpi=120)

    def log_data(self, mnist: Mnist, source: Path) -> None:
        """Log the parts of MNIST as MLflow inputs, with the SHA-256 of the files as digest (its first 36 digits)."""
        for context, images, labels in (
            ("training", mnist.train_images, mnist.train_labels),
            ("validation", mnist.validation_images, mnist.validation_labels),
            ("test", mnist.test_images, mnist.test_labels),
        ):
            if images is None or labels is None or not len(images):  # a trial of a search has no test images
                continue
            with quiet():
                pixels, targets = images.cpu().numpy(), labels.cpu().numpy()
                digest, name = mnist.sha256[:MAX_DIGEST], f"MNIST {context}"
                dataset = from_numpy(pixels, source=str(source), targets=targets, name=name, digest=digest)
                self._write(Record("dataset", {"context": context, "dataset": dataset.to_dict()}))

    def log_predictions(self, truth: Tensor, logits: Tensor) -> None:
        """Log truth (N,), prediction (N,) and logits (N, 10) of the test images as `predictions.npz`, pickle-free."""
        with self._artifact("predictions.npz") as file:
            np.savez_compressed(
                file,
                truth=truth.cpu().numpy().astype(np.uint8),
                prediction=logits.argmax(dim=1).cpu().numpy().astype(np.uint8),
                logits=logits.float().cpu().numpy(),
            )

    def log_model(self, step: str, net: nn.Module, images: Tensor, normalize: tuple[float, float]) -> str | None:
        """Log the trained network so that `mlflow.pytorch.load_model` gives it back, for any batch size.

        step: which names it, as far as MLflow takes the name.
        images: a few of the network's inputs (N, 1, 28, 28), at least two, as the input example.
        normalize: the mean and standard deviation by which they were normalised, which the model's metadata keep.
        The format is torch.export's, which holds no pickle. Where it can't express the network, the weights are
        logged as `state_dict.pt`, and the reason is returned.
        """
        example = images.cpu()
        packages = [f"{name}=={importlib.metadata.version(name)}" for name in ("torch", "numpy")]
        with store_failures(self._store, "failed during the run"), tempfile.TemporaryDirectory() as temporary:
            model = Path(temporary) / "model"
            try:
                # torch.export prints the graph that it can't express, and takes long enough for a Ctrl-C to come in it.
                with uninterrupted(), quiet(), _own_logging(), redirect_stderr(io.StringIO()):
                    on_cpu = copy.deepcopy(net).cpu().eval()  # one that names its device fails there
                    with torch.inference_mode():
                        output = on_cpu(example)
                    mlflow.pytorch.save_model(
                        on_cpu,
                        str(model),
                        signature=infer_signature(example.numpy(), output.numpy()),
                        input_example=example.numpy(),
                        pip_requirements=packages,
                        metadata={"normalize": list(normalize)},
                        serialization_format="pt2",
                    )
            except MlflowException:
                raise
            except Exception as error:  # torch.export has many ways to say no
                with self._artifact("state_dict.pt") as file:
                    torch.save(net.state_dict(), file)
                return one_line(error)
            finally:
                _forget_exports()
            self._write(Record("model", {"name": model_name(step), "step": 0}, model))
        return None

    @contextmanager
    def _artifact(self, artifact_file: str) -> Iterator[Path]:
        """Give a file to write, then log it under this name."""
        folder, _, name = artifact_file.rpartition("/")
        with store_failures(self._store, "failed during the run"), tempfile.TemporaryDirectory() as temporary:
            yield (file := Path(temporary) / name)
            self.log_file(file, folder or None)

    def _write(self, record: Record) -> None:
        with store_failures(self._store, "failed during the run"), uninterrupted():
            self._write_now(record)

    def _write_now(self, record: Record) -> None:
        """Write the record into the run, or where its server is away, into the outbox."""
        if not self._waiting or self._catch_up():
            try:
                with briefly():
                    send(self._client, self.run_id, record)
                return
            except Exception as error:
                if not is_away(self._store.uri, error):
                    raise
                self._ask_again = time.monotonic() + ASK_AGAIN_SECONDS
                if not self._waiting:
                    self._outbox.lock()
                    self._waiting = True
                    said = "the tracking server %s is away: the run goes on, and what it logs waits in %s"
                    logger.warning(said, self._store.name, self._outbox.folder)
        self._outbox.add(self._store.uri, record)

    def _catch_up(self, *, now: bool = False) -> bool:
        """Send what waits, if it is time to ask again; say whether all of it is sent."""
        if not now and time.monotonic() < self._ask_again:
            return False
        try:
            sent = send_waiting(self._client, self._outbox)
        except Exception as error:
            if not is_away(self._store.uri, error):
                raise
            self._ask_again = time.monotonic() + ASK_AGAIN_SECONDS
            return False
        self._waiting = False
        self._outbox.unlock()
        logger.warning("the tracking server %s is back, and has what waited (%d records)", self._store.name, sent)
        return True

    def close(self, status: str) -> None:
        """Close the run, and send what waits for its server. Where that fails, what ended the block matters more.

        A run that can't be marked so keeps its lock's file, free: by that the next run here sees that it has ended.
        """
        marked = False
        try:
            self._write_now(Record("end", {"status": status, "end_time": int(1000 * time.time())}))
            marked = True
            if self._waiting and not self._catch_up(now=True):
                said = (
                    "the tracking server %s is still away: what it lacks of run %s waits on disk; "
                    "`make sync` sends it, and so does the next run there"
                )
                logger.warning(said, self._store.name, self.run_id)
        except (MlflowException, OSError) as error:
            message = f"tracking store: the run {self.run_id} could not be marked {status}: {one_line(error)}"
            if status == "FINISHED":
                raise LabError(message) from error
            logger.warning(message)
        finally:
            self._outbox.unlock()
            let_go(self._lock) if marked else self._lock.release()


@contextmanager
def track(
    store: Store,
    run_name: str,
    *,
    params: Mapping[str, object],
    tags: Mapping[str, str],
    parent_run_id: str | None = None,
    resume_run_id: str | None = None,
    reopen: bool = False,
) -> Iterator[TrackedRun]:
    """Open a run, and close it by how the block ends.

    FINISHED at its end or by `sys.exit(0)`, KILLED by KeyboardInterrupt, else FAILED, with the traceback as
    `traceback.txt` unless it is a LabError.
    parent_run_id: the study's run that this one is a child of; that may be open in this process or in another.
    resume_run_id: go on with this run, with its name, params and tags.
    reopen: that run may have finished too, and has this name and these tags from now on.

    Raises:
        LabError: if the run can't be opened or resumed, or the store fails on the way, e.g. because its disk is full. A
            tracking server that goes away once the run is open is no error.
    """
    parent = {} if parent_run_id is None else {MLFLOW_PARENT_RUN_ID: parent_run_id}
    tracked, status = None, "FAILED"
    try:
        with uninterrupted(), briefly():
            if resume_run_id is None:
                tracked = _create_run(store, run_name, params, {**tags, **parent})
            elif reopen:
                tracked = _reopen_run(store, resume_run_id, {**tags, **parent}, run_name)
            else:
                tracked = _reopen_run(store, resume_run_id, parent)
        yield tracked
        status = tracked.end_status
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    except SystemExit as end:
        status = "FINISHED" if end.code in (0, None) else "FAILED"
        raise
    except MlflowException as error:
        when = "failed during the run" if tracked else "can't be written"
        raise LabError(f"tracking store {store.name!r} {when}: {one_line(error)}") from error
    except Exception as error:
        if tracked is not None and not isinstance(error, LabError):
            # Where even that fails, the error itself matters more.
            with suppress(LabError):
                tracked.log_text(without_password("".join(traceback.format_exception(error))), "traceback.txt")
        raise
    finally:
        if tracked is not None:
            with uninterrupted(interrupted=status == "KILLED"):
                tracked.close(status)


def _create_run(store: Store, run_name: str, params: Mapping[str, object], tags: Mapping[str, str]) -> TrackedRun:
    client = store.client
    all_tags = resolve_tags({**tags, "process": process_tag()})  # with MLflow's own: user, source
    all_tags = {name: without_password(str(value)) for name, value in all_tags.items()}
    run_id = client.create_run(store.experiment_id, tags=all_tags, run_name=run_name).info.run_id
    tracked = None
    try:
        tracked = TrackedRun(store, run_id, take_lock(store, run_id))
        client.log_batch(run_id, params=[Param(name, str(value)) for name, value in params.items()])
    except BaseException:
        tracked.close("FAILED") if tracked else client.set_terminated(run_id, "FAILED")
        raise
    return tracked


def _reopen_run(store: Store, run_id: str, tags: Mapping[str, str], new_name: str | None = None) -> TrackedRun:
    lock, reopened = take_lock(store, run_id), False
    try:
        _send_waiting_records(store, run_id)
        check_resumable(store, run_id, finished_too=new_name is not None)
        client = store.client
        client.update_run(run_id, status="RUNNING", name=new_name)
        reopened = True
        tracked = TrackedRun(store, run_id, lock, frozenset(client.get_run(run_id).data.metrics))
        all_tags = {**tags, "process": process_tag()}
        client.log_batch(run_id, tags=[RunTag(name, without_password(value)) for name, value in all_tags.items()])
    except BaseException:
        lock.release() if reopened else let_go(lock)
        raise
    return tracked


def _send_waiting_records(store: Store, run_id: str) -> None:
    """Send what waits for a run that goes on: later it would be sent beside what the run logs anew."""
    outbox = Outbox.of_run(store.uri, run_id)
    if not outbox.waiting():
        return
    if not outbox.lock():
        raise LabError(f"resume: what run {run_id} logged is being sent by another process; try again later")
    try:
        outbox.target(store.uri)
        send_waiting(store.client, outbox)
    finally:
        outbox.unlock()


def model_name(step: str) -> str:
    """Return the name of a step's models in MLflow, which takes none of the characters / : . % " '."""
    return re.sub(r"[/:.%\"']", "_", step)


@contextmanager
def _own_logging() -> Iterator[None]:
    """Leave the program's logging as it is: the first import of mlflow.pytorch shows errors only from then on."""
    level, handlers = logging.root.level, list(logging.root.handlers)
    try:
        yield
    finally:
        logging.root.setLevel(level)
        logging.root.handlers[:] = handlers


def _forget_exports() -> None:
    """Free what torch.export keeps of each network for as long as the process lives: 0.4 MB of step 4's.

    The caches of ShapeEnv's methods have no limit. The tensors that an instance tracks hold it in turn, from C++, so
    Python never collects it.
    """
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # slow to import, but for an export it was

    for method in vars(ShapeEnv).values():
        if hasattr(method, "cache_clear"):
            method.cache_clear()
    for instance in gc.get_objects():
        if type(instance) is ShapeEnv:
            instance.tracked_fakes = None


def _metrics(metrics: Mapping[str, float], step: int) -> Record:
    return Record("metrics", {"step": step, "timestamp": int(1000 * time.time()), "values": dict(metrics)})
