"""What one run leaves in MLflow (docs/metrics.md lists it)."""

import copy
import gc
import importlib.metadata
import io
import logging
import re
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from pathlib import Path
from typing import Any
from unittest.mock import DEFAULT, Mock, patch

import mlflow
import numpy as np
import torch
from mlflow.data.numpy_dataset import from_numpy
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModel, LoggedModelOutput, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import Model, infer_signature
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_PARENT_RUN_ID
from torch import Tensor, nn

from mnist_lab.data import Mnist
from mnist_lab.errors import LabError, one_line, without_password
from mnist_lab.measures import MEASURES, SHORT
from mnist_lab.paths import CHECKPOINTS, own_folder
from mnist_lab.tracking.connection import environment_variables, is_server, patience, short_timeouts
from mnist_lab.tracking.store import RunLock, Store, process_tag, quiet, resumable_run, take_lock, uninterrupted

CALLS = [name for name in dir(mlflow) if name.startswith(("log_", "set_tag")) or name in ("start_run", "end_run")]
# The names that the lab logs under, by the functions with which a script could.
METRICS = re.compile("|".join([*MEASURES, *SHORT, r"lr_\d+"]))
TAGS = re.compile(
    r"step|study|search|seeds|seeds_(reused|failed)|overrides|(code|data|teacher|restored)_sha256|teacher_run_id|targets"
    r"|(target|verdict|reported)_\w+|git_(commit|dirty)|hardware|torch|threads|memory_format|no_effect|restored|pruned"
    r"|model|process|mlflow\..*"
)
NAMES = {"log_metric": METRICS, "log_metrics": METRICS, "set_tag": TAGS, "set_tags": TAGS}

logger = logging.getLogger(__name__)


class TrackedRun:
    """One run being written, made by `track`; each of its methods raises LabError where the store fails.

    Signals wait until what is being logged is. A tracking server that goes away is waited for; a signal ends the wait.
    """

    def __init__(self, store: Store, run: Run, lock: RunLock) -> None:
        self.run_id: str = run.info.run_id
        self.end_status = "FINISHED"  # if its block comes to its end
        self.goes_on = f"`--resume {self.run_id}`"
        self._store, self._client, self._lock = store, store.client, lock
        self._logged_before, self._tags = frozenset(run.data.metrics), run.data.tags
        self._began: int = max(run.info.start_time, int(1000 * time.time()))
        self._clock = time.monotonic()

    def moved(self, tags: Mapping[str, str]) -> dict[str, str]:
        """Return the tags that say on what the run goes on, where that is not what it began with; a notice says so."""
        was = {name: self._tags.get(name, "") for name in ("hardware", "torch") if name in tags}
        now = {name: f"{old}; {tags[name]}" for name, old in was.items() if not old.endswith(tags[name])}
        if now:
            logger.warning(
                "resume: the run goes on with other %s: its figures are not those of one machine", " and ".join(now)
            )
        return now

    def log_once(self, metrics: Mapping[str, float]) -> None:
        """Log metrics that a run has one value of."""
        self.log_missing({0: metrics})

    def log_missing(self, epochs: Mapping[int, Mapping[str, float]]) -> None:
        """Log those points of these epochs that the run does not have yet, so that each is there once."""
        names = {name for metrics in epochs.values() for name in metrics} & self._logged_before
        now = self._now()
        with self._writing():  # MLflow drops a point that it has, with the same time and value
            logged = {(name, one.step) for name in names for one in self._client.get_metric_history(self.run_id, name)}
            missing = [
                Metric(name, value, now, epoch)
                for epoch, metrics in epochs.items()
                for name, value in metrics.items()
                if (name, epoch) not in logged
            ]
            for first in range(0, len(missing), 1_000):  # MLflow takes no more at once
                self._client.log_batch(self.run_id, metrics=missing[first : first + 1_000])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        with self._writing():
            self._client.log_batch(self.run_id, tags=[RunTag(name, value) for name, value in tags.items()])

    def log_file(self, file: Path, folder: str | None = None) -> None:
        with self._writing():
            self._client.log_artifact(self.run_id, str(file), folder)

    def log_text(self, text: str, artifact_file: str) -> None:
        with self._writing():
            self._client.log_text(self.run_id, text, artifact_file)

    def log_figures(self, figures: Mapping[str, Any]) -> None:
        """Log matplotlib figures as `figures/<name>.png`."""
        for name, figure in figures.items():
            with self._writing():
                self._client.log_figure(self.run_id, figure, f"figures/{name}.png", save_kwargs={"dpi": 120})

    def log_data(self, mnist: Mnist, source: Path) -> None:
        """Log the parts of MNIST as MLflow inputs."""
        inputs = []
        for context, images, labels in (
            ("training", mnist.train_images, mnist.train_labels),
            ("validation", mnist.validation_images, mnist.validation_labels),
            ("test", mnist.test_images, mnist.test_labels),
        ):
            if images is None or labels is None or not len(images):  # a trial of a search has no test images
                continue
            with quiet():
                pixels, targets = images.cpu().numpy(), labels.cpu().numpy()
                digest, name = f"{mnist.sha256[:29]}-{len(images)}", f"MNIST {context}"  # 36 letters at most
                dataset = from_numpy(pixels, source=str(source), targets=targets, name=name, digest=digest)
            inputs.append(DatasetInput(Dataset(**dataset.to_dict()), [InputTag(MLFLOW_DATASET_CONTEXT, context)]))
        with self._writing():
            self._log_inputs(inputs)

    def _log_inputs(self, inputs: list[DatasetInput]) -> None:
        """Log data sets. Of two runs that are the first to do so at the same moment, the database refuses one."""
        for pause in (0.05, 0.2, 0.5, 0):  # seconds until what another run was writing is written
            try:
                self._client.log_inputs(self.run_id, inputs)
                break
            except MlflowException as error:
                if not pause or not _is_there_already(error):
                    raise
            time.sleep(pause)

    def log_predictions(self, truth: Tensor, logits: Tensor, images: Tensor | None = None) -> None:
        """Log truth (N,), prediction (N,) and logits (N, 10) as `predictions.npz`, pickle-free.

        images: the numbers (N,) of the images; None for all test images in their order.
        """
        arrays = {"truth": truth.byte(), "prediction": logits.argmax(dim=1).byte(), "logits": logits.float()}
        arrays |= {} if images is None else {"image": images}
        with self._artifact("predictions.npz") as file:
            np.savez_compressed(file, **{name: array.cpu().numpy() for name, array in arrays.items()})  # type: ignore[arg-type]

    def log_model(self, step: str, net: nn.Module, images: Tensor, normalize: tuple[float, float]) -> str | None:
        """Log the trained network so that `mlflow.pytorch.load_model` gives it back, for any batch size.

        step: which names it. images: at least two of the network's inputs (N, 1, 28, 28), as the input example.
        normalize: the mean and standard deviation by which they were normalised, which the model's metadata keep.
        The format is torch.export's, which holds no pickle. Where it can't express the network, the weights are
        logged as `state_dict.pt`, and the reason is returned.
        """
        example = images.cpu()
        packages = [f"{name}=={importlib.metadata.version(name)}" for name in ("torch", "numpy")]
        with self._store.failures("failed during the run"), tempfile.TemporaryDirectory() as temporary:
            model = Path(temporary) / "model"
            try:
                # torch.export prints the graph that it can't express, and takes long enough for a Ctrl-C to come in it.
                with uninterrupted(), quiet(), redirect_stderr(io.StringIO()):
                    if isinstance(net, torch.jit.ScriptModule):
                        raise TypeError("TorchScript can't be exported")
                    plain = getattr(net, "_orig_mod", net)  # without what torch.compile puts around it
                    on_cpu = copy.deepcopy(plain).cpu()  # one that names its device fails there
                    on_cpu.eval()
                    with torch.no_grad():  # what inference_mode leaves in a network can't be exported
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
            except Exception as error:  # torch.export has many ways to say no
                with self._artifact("state_dict.pt") as file:
                    torch.save(net.state_dict(), file)
                return one_line(error)
            finally:
                _forget_exports()
            with self._writing():
                self._publish_model(re.sub(r"[/:.%\"']", "_", step), model)  # MLflow takes none of these characters
        return None

    def _publish_model(self, name: str, folder: Path) -> None:
        """Make a saved model the run's, in the steps of `mlflow.pytorch.log_model`; what is there already stays."""
        client, run_id = self._client, self.run_id
        run = client.get_run(run_id)
        logged = self._logged_model(run, name)
        try:
            client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, 0)])
        except MlflowException as error:  # by this run before it was resumed, or the answer was lost
            if not _is_there_already(error):
                raise
        points = [point for key in run.data.metrics for point in client.get_metric_history(run_id, key)]
        once = [(one.key, one.value, one.timestamp, 0) for one in points if one.step == 0]  # of the whole run
        client.log_batch(run_id, metrics=[Metric(*one, logged.model_id, run_id=run_id) for one in once])
        model = Model.load(str(folder))
        model.run_id, model.model_id, model.model_uuid = run_id, logged.model_id, logged.model_id
        model.artifact_path = logged.artifact_location
        model.save(str(folder / "MLmodel"))
        client.log_model_artifacts(logged.model_id, str(folder))
        client.finalize_logged_model(logged.model_id, "READY")

    def _logged_model(self, run: Run, name: str) -> LoggedModel:
        """Return the run's model of that name, made if there is none."""
        experiment_id, run_id = run.info.experiment_id, run.info.run_id

        def there() -> list[LoggedModel]:
            models = self._client.search_logged_models([experiment_id], f"source_run_id = '{run_id}'")
            return sorted((model for model in models if model.name == name), key=lambda model: model.creation_timestamp)

        if not there():
            self._client.create_logged_model(experiment_id, name, run_id, tags=resolve_tags(), params=run.data.params)
        oldest, *others = there()  # MLflow makes a second one where the answer to its first request was lost
        for surplus in others:
            self._client.delete_logged_model(surplus.model_id)
        return oldest

    @contextmanager
    def _artifact(self, name: str) -> Iterator[Path]:
        with self._store.failures("failed during the run"), tempfile.TemporaryDirectory() as temporary:
            yield (file := Path(temporary) / name)
            self.log_file(file)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Write into the store, and wait for its server; raises LabError if it fails or stays away."""
        waited_for = is_server(self._store.uri)  # a signal may end a wait; it must not leave a database locked
        with (
            self._store.failures("failed during the run", then=self._what_then()),
            patience(),
            nullcontext() if waited_for else uninterrupted(),
        ):
            self._store.check_in_place()
            yield

    def _what_then(self) -> str:
        kept = own_folder(self._store.uri) / CHECKPOINTS / f"{self.run_id}.pt"
        return f"; its checkpoint is kept, and {self.goes_on} goes on with it" if kept.exists() else ""

    def _now(self) -> int:
        """Return the time in milliseconds; it never goes back, though the clock be set back."""
        if self._store.clock is not None:
            return self._store.clock()
        return max(int(1000 * time.time()), self._began + int(1000 * (time.monotonic() - self._clock)))

    def close(self, status: str) -> None:
        """Close the run. Where that fails, its lock's file stays, free: so the next run here sees that it has ended."""
        finished = status == "FINISHED"
        what, then = f"fails: the run {self.run_id} could not be marked {status}", self._what_then() if finished else ""
        try:
            with self._store.failures(what, then), patience() if finished else short_timeouts():
                self._store.check_in_place()
                self._client.set_terminated(self.run_id, status, self._now())
                self._lock.remove()
        except LabError as error:
            if finished:
                raise
            logger.warning(str(error))  # what ended the block matters more
        finally:
            self._lock.release()


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
    """Open a run, and close it by how the block ends; raises LabError if it can't be opened or the store fails.

    FINISHED at its end or by `sys.exit(0)`, KILLED by KeyboardInterrupt, else FAILED, with the traceback as
    `traceback.txt` unless it is a LabError.
    parent_run_id: the study's run that this one is a child of. resume_run_id: go on with this run, with its name,
    params and tags. reopen: it may have finished too, and has this name and these tags from now on.
    """
    parent = {} if parent_run_id is None else {MLFLOW_PARENT_RUN_ID: parent_run_id}
    tracked, status = None, "FAILED"
    try:
        with store.failures("can't be written"), uninterrupted(), short_timeouts():
            if resume_run_id is None:
                tracked = _create_run(store, run_name, {**tags, **parent})
                written = [Param(name, str(value)) for name, value in params.items()]
                store.client.log_batch(tracked.run_id, params=written)
            else:
                tracked = _reopen_run(store, resume_run_id, run_name if reopen else None)
                new = {**(tags if reopen else tracked.moved(tags)), **parent, "process": process_tag()}
                store.client.log_batch(tracked.run_id, tags=[RunTag(name, value) for name, value in _safe(new).items()])
        if {"search", "folds"} & {*params, *tags}:  # a trial or a fold
            tracked.goes_on = "the same command"
        yield tracked
        status = tracked.end_status
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    except SystemExit as end:
        status = "FINISHED" if end.code in (0, None) else "FAILED"
        raise
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


def _create_run(store: Store, run_name: str, tags: Mapping[str, str]) -> TrackedRun:
    all_tags = _safe(resolve_tags({**tags, "process": process_tag()}))  # with MLflow's own: user, source
    started = None if store.clock is None else store.clock()
    run = store.client.create_run(store.experiment_id, started, all_tags, run_name)
    try:
        return TrackedRun(store, run, take_lock(store, run.info.run_id))
    except OSError:
        store.client.set_terminated(run.info.run_id, "FAILED")
        raise


def _reopen_run(store: Store, run_id: str, new_name: str | None) -> TrackedRun:
    lock = take_lock(store, run_id)
    try:
        run = resumable_run(store, run_id, finished_too=new_name is not None)
        store.client.update_run(run_id, status="RUNNING", name=new_name)
    except BaseException:
        lock.remove()
        raise
    return TrackedRun(store, run, lock)


def _safe(tags: Mapping[str, str]) -> dict[str, str]:
    return {name: without_password(str(value)) for name, value in tags.items()}


def _is_there_already(error: MlflowException) -> bool:
    words = "unique constraint|duplicate entry|duplicate key"  # of the databases
    return re.search(words, str(error), re.IGNORECASE) is not None


def _forget_exports() -> None:
    """Free what torch.export keeps of each network: caches without limit, and tensors that hold it in turn from C++."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # slow to import, but for an export it was

    for method in vars(ShapeEnv).values():
        if hasattr(method, "cache_clear"):
            method.cache_clear()
    for instance in gc.get_objects():
        if type(instance) is ShapeEnv:
            instance.tracked_fakes = None


# ---- what a script logs by MLflow's own functions: into the lab's run while it trains, and nowhere while it is tried


@contextmanager
def silenced() -> Iterator[Mapping[str, Mock]]:
    """Let these functions do nothing, also where a script has imported them; the context gives them as mocks."""
    mocked: dict[str, Any] = dict.fromkeys(CALLS, DEFAULT) | {name: _checked(name, Mock()) for name in NAMES}
    with (
        patch.multiple(mlflow.tracking.fluent, _get_or_start_run=DEFAULT, MlflowClient=DEFAULT),
        patch.multiple(mlflow, **mocked) as mocks,
    ):
        yield mocks


@contextmanager
def adopted(uri: str, run_id: str) -> Iterator[None]:
    """Let what a script logs go into this run, unless a run of its own is active or it has chosen another store."""
    checked: dict[str, Any] = {name: _checked(name, getattr(mlflow, name), run_id) for name in NAMES}
    with environment_variables({"MLFLOW_TRACKING_URI": uri}), patch.multiple(mlflow, **checked):
        is_its_store = mlflow.get_tracking_uri() == uri
        with environment_variables({"MLFLOW_RUN_ID": run_id} if is_its_store else {}):
            try:
                yield
            finally:
                if (active := mlflow.active_run()) is not None and active.info.run_id == run_id:
                    mlflow.end_run()  # the lab says how it has ended


def notices(silenced: Mapping[str, Mock]) -> Iterator[str]:
    """Yield a notice if a script logs elsewhere; `silenced` has its calls during the rehearsal."""
    log_here = "mlflow.log_metric and the like log into the lab's run"
    if (active := mlflow.active_run()) is not None:
        where = f"run {active.info.run_id}, in {active.info.artifact_uri}"
        yield f"mlflow: what the script logs goes to {where}; call mlflow.end_run() before main(), and {log_here}"
    elif silenced["start_run"].called:
        yield f"mlflow: the script calls mlflow.start_run, which begins runs beside the lab's; leave it out: {log_here}"
    elif silenced["end_run"].called:
        raise LabError("mlflow: the script calls mlflow.end_run, which would end the lab's run; leave it out")


def _checked(function: str, log: Callable[..., Any], run_id: str = "") -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        elsewhere = "run_id" in kwargs or ((run := mlflow.active_run()) is not None and run.info.run_id != run_id)
        given = args[0] if args else kwargs.get("metrics") or kwargs.get("tags") or kwargs.get("key", "")
        for name in [] if elsewhere else given if isinstance(given, dict) else [given]:
            if NAMES[function].fullmatch(str(name)):
                raise LabError(f"mlflow: {function} of {name!r}, which the lab logs itself; give it another name")
        return log(*args, **kwargs)

    return call
