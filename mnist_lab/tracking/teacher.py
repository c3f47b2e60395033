"""Teachers: trained networks in MLflow that another network learns from."""

from __future__ import annotations

import hashlib
import logging
import re
from dataclasses import dataclass
from pathlib import Path

import mlflow
import torch
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from torch import Tensor, nn

from mnist_lab.errors import LabError
from mnist_lab.tracking.delivery import briefly, one_line
from mnist_lab.tracking.store import Store, quiet, search

logger = logging.getLogger(__name__)

RUN_URI = re.compile(r"runs:/(?P<run_id>[^/]+)/.+")
STEP = re.compile(r"\w[\w.-]*")
MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(/(?P<version>[0-9]+)|@(?P<alias>.+))?")
EXPORTED = "data/model.pt2"  # by torch.export, in an MLflow model's folder


@dataclass(frozen=True)
class Teacher:
    """A model in MLflow. uri: where it is; run_id: the run that logged it; sha256: of its file."""

    uri: str
    run_id: str
    sha256: str

    @property
    def tags(self) -> dict[str, str]:
        return {"teacher_run_id": self.run_id, "teacher_sha256": self.sha256}


def find_teacher(store: Store, declared: str, holdout: int) -> Teacher:
    """Return the model that is declared as `runs:/<id>/model`, as `models:/<name>/<version>`, or by a script's name.

    holdout: how many training images are held out; the teacher must not have been trained on them.

    Raises:
        LabError: if it is not there, its run is not finished, or it has seen images that are held out.
    """
    client = mlflow.MlflowClient(tracking_uri=store.uri)
    try:
        with quiet(), briefly():
            if match := RUN_URI.fullmatch(declared):
                uri, run = declared, client.get_run(match["run_id"])
            elif match := MODEL_URI.fullmatch(declared):
                uri, run = declared, client.get_run(_source_run(client, match))
            elif STEP.fullmatch(declared):
                run = _newest_run(store, declared, holdout)
                uri = f"runs:/{run.info.run_id}/model"
            else:
                raise LabError(
                    f"objective: teacher {declared!r} is neither runs:/<id>/model nor models:/<name>/<version> nor the "
                    "name of a script"
                )
            if run.info.status != "FINISHED" or run.info.lifecycle_stage != "active":
                is_now = run.info.status if run.info.lifecycle_stage == "active" else "deleted"
                raise LabError(f"objective: teacher {declared!r}: run {run.info.run_id} is {is_now}, not FINISHED")
            _check_holdout(run, declared, holdout)
            file = _folder(store, uri) / EXPORTED
    except (MlflowException, OSError) as error:
        raise LabError(f"objective: teacher {declared!r} is not in {store.name!r}: {one_line(error)}") from error
    if not file.is_file():
        raise LabError(
            f"objective: teacher {declared!r}: the model is not a torch.export archive, the format that runs no code "
            "of a file's; log it with serialization_format='pt2'"
        )
    with file.open("rb") as stream:
        return Teacher(uri, run.info.run_id, hashlib.file_digest(stream, "sha256").hexdigest())


def load_teacher(store: Store, teacher: Teacher, device: torch.device, normalize: tuple[float, float]) -> nn.Module:
    """Return the teacher, frozen, in evaluation mode, on the device.

    normalize: of the images that it will be given; where it was trained with others, it gets its own.

    Raises:
        LabError: if it can't be loaded, is another one by now, or does not give one logit per digit.
    """
    from torch.export.passes import move_to_device_pass  # slow to import

    try:
        with quiet(), briefly():
            folder = _folder(store, teacher.uri)
            with (folder / EXPORTED).open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != teacher.sha256:
                    raise ValueError("the file is another one than when the run began")
            net = move_to_device_pass(torch.export.load(folder / EXPORTED), device).module()
            own = (Model.load(str(folder)).metadata or {}).get("normalize", normalize)
            net.requires_grad_(False)
            with torch.inference_mode():
                shape = tuple(net(torch.zeros(2, 1, 28, 28, device=device)).shape)
    except Exception as error:  # torch has many ways to refuse a file
        raise LabError(f"objective: teacher {teacher.uri} can't be loaded: {one_line(error)}") from error
    if shape != (2, 10):
        raise LabError(f"objective: teacher {teacher.uri} gives an output of shape {shape} for 2 images, not (2, 10)")
    return net if tuple(own) == normalize else _Renormalized(net, normalize, own)


class _Renormalized(nn.Module):
    """A network that is given images normalised for another one."""

    def __init__(self, net: nn.Module, given: tuple[float, float], own: tuple[float, float]) -> None:
        super().__init__()
        self.net, self.given, self.own = net, given, own

    def forward(self, images: Tensor) -> Tensor:
        (mean, deviation), (own_mean, own_deviation) = self.given, self.own
        return self.net((images * deviation + mean - own_mean) / own_deviation)  # type: ignore[no-any-return]


def _source_run(client: mlflow.MlflowClient, match: re.Match[str]) -> str:
    """Return the run that a registered or logged model comes from."""
    name, version, alias = match["name"], match["version"], match["alias"]
    if version:
        run_id = client.get_model_version(name, version).run_id
    elif alias:
        run_id = client.get_model_version_by_alias(name, alias).run_id
    else:
        run_id = client.get_logged_model(name).source_run_id
    if not run_id:
        raise LabError(f"objective: teacher {match.group()!r} comes from no run, so what it was trained on is unknown")
    return str(run_id)


def _newest_run(store: Store, step: str, holdout: int) -> Run:
    """Return the newest finished run of a script, as it is declared, with this hold-out."""
    for run in search(store, f"attributes.status = 'FINISHED' AND tags.step = '{step}'"):
        as_declared = not run.data.tags.get("overrides") and run.data.params.get("holdout", "0") == str(holdout)
        if as_declared and "model" not in run.data.tags:
            return run
    with_holdout = f" with --holdout {holdout}" if holdout else ""
    raise LabError(
        f"objective: teacher {step!r}: {store.name!r} has no finished run of that script as declared{with_holdout}; "
        "train it first, or give runs:/<id>/model or models:/<name>/<version>"
    )


def _check_holdout(run: Run, declared: str, holdout: int) -> None:
    seen = run.data.params.get("holdout", "0")
    if holdout and seen != str(holdout):
        raise LabError(
            f"objective: teacher {declared!r}: run {run.info.run_id} was trained with a hold-out of {seen} images, and "
            f"so has seen some of the {holdout} that are held out here; train it with --holdout {holdout}"
        )


def _folder(store: Store, uri: str) -> Path:
    return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, tracking_uri=store.uri))
