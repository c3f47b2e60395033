"""Trained networks in MLflow: teachers that another network learns from, and readers of pictures."""

from __future__ import annotations

import hashlib
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import mlflow
import torch
from mlflow.entities import LifecycleStage, LoggedModel, Run
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from torch import Tensor, nn

from mnist_lab.errors import LabError, one_line
from mnist_lab.tracking.connection import short_timeouts
from mnist_lab.tracking.store import Store, quiet, search, store_failures

if TYPE_CHECKING:
    from torch.export import ExportedProgram

RUN_URI = re.compile(r"runs:/(?P<run_id>[^/]+)/(?P<name>.+)")
STEP = re.compile(r"\w[\w.-]*")
MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(/(?P<version>[0-9]+)|@(?P<alias>.+))?")
CALLED = "objective: teacher"
EXPORTED = "data/model.pt2"  # by torch.export, in an MLflow model's folder
# What is in such a file: numbers, JSON, and an example of the inputs.
PLAIN_PARTS = re.compile(
    r"models/model\.json|data/sample_inputs/model\.pt|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)|archive_(format|version)|byteorder"
    r"|(\.data/)?(version|serialization_id)"
)


@dataclass(frozen=True)
class Teacher:
    """A logged model in MLflow: its id, the run that it comes from, and the SHA-256 of its file."""

    model_id: str
    run_id: str
    sha256: str

    @property
    def tags(self) -> dict[str, str]:
        return {"teacher_run_id": self.run_id, "teacher_sha256": self.sha256}


def find_teacher(store: Store, declared: str, holdout: int, *, called: str = CALLED) -> Teacher:
    """Return the model that is declared as `runs:/<id>/model`, as `models:/<name>/<version>`, or by a script's name.

    holdout: how many training images are held out. called: how sentences name it.

    Raises:
        LabError: if it is not there, its run is not finished, or it has seen images that are held out.
    """
    try:
        with quiet(), short_timeouts():
            model = _find_model(store, declared, holdout, called)
            run = store.client.get_run(str(model.source_run_id))
            sha256 = _sha256(_file(store, model, called))
    except (MlflowException, OSError) as error:
        raise LabError(f"{called} {declared!r} is not in {store.name!r}: {one_line(error)}") from error
    status = "deleted" if run.info.lifecycle_stage == LifecycleStage.DELETED else run.info.status
    if status != "FINISHED":
        raise LabError(f"{called} {declared!r}: run {run.info.run_id} is {status}, not FINISHED")
    seen = run.data.params.get("holdout", "0")
    if holdout and seen != str(holdout):
        raise LabError(
            f"{called} {declared!r}: run {run.info.run_id} held out {seen} images, and so has seen some of "
            f"the {holdout} that are held out here; train it with --holdout {holdout}"
        )
    return Teacher(model.model_id, run.info.run_id, sha256)


def runs_with_a_model(store: Store) -> set[str]:
    """Return the ids of the runs that have logged a model; raises LabError if the store does not answer."""
    found, token = set(), None
    with store_failures(store, "can't be read"), quiet(), short_timeouts():
        while True:
            page = store.client.search_logged_models([store.experiment_id], page_token=token)
            found |= {str(model.source_run_id) for model in page}
            if not (token := page.token):
                return found


def load_teacher(
    store: Store, teacher: Teacher, device: torch.device, normalize: tuple[float, float], *, called: str = CALLED
) -> nn.Module:
    """Return the teacher, frozen, in evaluation mode, on the device.

    normalize: of the images that it will be given; where it was trained with others, it gets its own.
    called: how sentences name it.
    """
    file, own = find_exported(store, teacher, normalize, called=called)
    named = f"{called} {teacher.model_id} of run {teacher.run_id}"
    return load_exported(file, teacher.sha256, device, normalize=normalize, own=own, named=named)


def find_exported(
    store: Store, teacher: Teacher, normalize: tuple[float, float], *, called: str = CALLED
) -> tuple[Path, tuple[float, float]]:
    """Return the teacher's file on this machine, and how its images were normalised: `normalize` if it does not say."""
    try:
        with quiet(), short_timeouts():
            file = _file(store, store.client.get_logged_model(teacher.model_id), called)
            mean, deviation = (Model.load(str(file.parents[1])).metadata or {}).get("normalize", normalize)
    except Exception as error:  # what a store gives can be broken in many ways
        named = f"{called} {teacher.model_id} of run {teacher.run_id}"
        raise LabError(f"{named} can't be loaded: {one_line(error)}") from error
    return file, (mean, deviation)


def load_exported(
    file: Path,
    sha256: str,
    device: torch.device,
    *,
    normalize: tuple[float, float],
    own: tuple[float, float],
    named: str,
) -> nn.Module:
    """Return the network in a file of torch.export's, frozen, in evaluation mode, on the device.

    sha256: of the file. own: the mean and standard deviation that it was trained with. named: what sentences call it.
    normalize: as in `load_teacher`.

    Raises:
        LabError: if it can't be loaded, is another file, or does not give one logit per digit.
    """
    from torch.export.passes import move_to_device_pass  # slow to import

    try:
        with quiet():
            if _sha256(file) != sha256:
                raise ValueError("its file is another one than its digest says")
            net = move_to_device_pass(read_exported(file), device).module()
            net.requires_grad_(False)
            with torch.inference_mode():
                shape = tuple(net(torch.zeros(2, 1, 28, 28, device=device)).shape)
    except Exception as error:  # torch has many ways to refuse a file
        raise LabError(f"{named} can't be loaded: {one_line(error)}") from error
    if shape != (2, 10):
        raise LabError(f"{named} gives an output of shape {shape} for 2 images, not (2, 10): one logit per digit")
    return net if own == normalize else _Renormalized(net, normalize, own)


def read_exported(file: Path) -> ExportedProgram:
    """Read a file of torch.export's. Torch itself would unpickle what such a file may hold besides numbers.

    Raises:
        ValueError: if it holds anything that torch.export does not write of a plain network.
    """
    from torch.export.pt2_archive._package import PT2ArchiveReader, load_pt2  # torch.export.load falls back to pickles

    content = file.read_bytes()
    archive = PT2ArchiveReader(io.BytesIO(content))
    for name in archive.get_file_names():
        if PLAIN_PARTS.fullmatch(name) is None:
            raise ValueError(f"it holds {name!r}, which may be code")
        if name.endswith("_config.json"):
            parts = json.loads(archive.read_bytes(name))["config"].values()
            if any(part["use_pickle"] for part in parts):
                raise ValueError(f"its {name!r} names a pickle, which may be code")
        elif name.endswith("model.pt"):
            torch.load(io.BytesIO(archive.read_bytes(name)), weights_only=True)
    program: ExportedProgram = load_pt2(io.BytesIO(content)).exported_programs["model"]
    return program


class _Renormalized(nn.Module):
    """A network that is given images normalised for another one."""

    def __init__(self, net: nn.Module, given: tuple[float, float], own: tuple[float, float]) -> None:
        super().__init__()
        self.net, self.given, self.own = net, given, own

    def forward(self, images: Tensor) -> Tensor:
        (mean, deviation), (own_mean, own_deviation) = self.given, self.own
        return self.net((images * deviation + mean - own_mean) / own_deviation)  # type: ignore[no-any-return]


def _find_model(store: Store, declared: str, holdout: int, called: str) -> LoggedModel:
    if match := RUN_URI.fullmatch(declared):
        return _model_of(store, store.client.get_run(match["run_id"]), match["name"], called)
    if STEP.fullmatch(declared):
        return _model_of(store, _newest_run(store, declared, holdout, called), "model", called)
    match = MODEL_URI.fullmatch(declared)
    if match is None:
        raise LabError(
            f"{called} {declared!r} is neither runs:/<id>/model nor models:/<name>/<version> nor the name of a script"
        )
    model_id, version, alias = match["name"], match["version"], match["alias"]
    if version or alias:
        by_alias = store.client.get_model_version_by_alias
        registered = store.client.get_model_version(model_id, version) if version else by_alias(model_id, alias)
        model_id = registered.model_id or str(registered.source).removeprefix("models:/")
    model = store.client.get_logged_model(model_id)
    if not model.source_run_id:
        raise LabError(f"{called} {declared!r} comes from no run, so what it was trained on is not known")
    return model


def _model_of(store: Store, run: Run, name: str, called: str) -> LoggedModel:
    """Return the model of that name that a run has logged; "model" means the only one, whatever its name."""
    outputs = [] if run.outputs is None else run.outputs.model_outputs
    models = [store.client.get_logged_model(output.model_id) for output in outputs]
    for model in models:
        if model.name == name or (name == "model" and len(models) == 1):
            return model
    raise LabError(f"{called}: run {run.info.run_id} ({run.info.status}) has no model {name!r}")


def _newest_run(store: Store, step: str, holdout: int, called: str) -> Run:
    """Return the newest finished run of a script, as it is declared, with this hold-out."""
    for run in search(store, f"attributes.status = 'FINISHED' AND tags.step = '{step}'"):
        as_declared = not run.data.tags.get("overrides") and run.data.params.get("holdout", "0") == str(holdout)
        if as_declared and "model" not in run.data.tags:  # that tag says why it has none
            return run
    with_holdout = f" with --holdout {holdout}" if holdout else ""
    raise LabError(
        f"{called} {step!r}: {store.name!r} has no finished run of that script as declared{with_holdout}; "
        "train it first, or give runs:/<id>/model or models:/<name>/<version>"
    )


def _file(store: Store, model: LoggedModel, called: str) -> Path:
    """Return the model's file on this machine; raises LabError if it is in another format than torch.export's."""
    folder = mlflow.artifacts.download_artifacts(artifact_uri=model.artifact_location, tracking_uri=store.uri)
    file = Path(folder) / EXPORTED
    if not file.is_file():
        raise LabError(
            f"{called} {model.model_id}: it is not kept by torch.export, so loading it might run code in its "
            "file; log it with serialization_format='pt2'"
        )
    return file


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
