"""Trained networks in MLflow: teachers that another network learns from, readers of pictures, and the champion.

The champion reads pictures by default: `models:/mnist@champion` in a store, or the committed one.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import mlflow
import torch
from mlflow.entities import LifecycleStage, Run
from mlflow.models import Model
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from mnist_lab.errors import LabError, did_you_mean, one_line
from mnist_lab.experiment import MNIST_PIXELS
from mnist_lab.paths import EXPERIMENTS, PUBLISHED
from mnist_lab.tracking.connection import environment_variables, short_timeouts
from mnist_lab.tracking.store import Store, quiet, replace_files, search

NAME, ALIAS = "mnist", "champion"
CHAMPION = f"models:/{NAME}@{ALIAS}"
NETWORK, ORIGIN = "champion.pt2", "champion.json"
CALLED = "objective: teacher"
Scale = tuple[float, float]  # the mean and standard deviation by which images are normalised
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

    holdout: how many training images are held out. called: how sentences name it. Raises LabError if it is not there,
    its run is not finished, or it has seen images that are held out.
    """
    try:
        with quiet(), short_timeouts():
            model_id = _model_id(store, declared, holdout)
            run = store.client.get_run(str(store.client.get_logged_model(model_id).source_run_id))
            status = "deleted" if run.info.lifecycle_stage == LifecycleStage.DELETED else run.info.status
            named, seen = f"run {run.info.run_id}", run.data.params.get("holdout", "0")
            if status != "FINISHED":
                raise ValueError(f"{named} is {status}, not FINISHED")
            if holdout and seen != str(holdout):
                why = f"{named} held out {seen} images, and so has seen some of the {holdout} that are held out here"
                raise ValueError(f"{why}; train it with --holdout {holdout}")
            content, _ = _network_of(store, model_id)
            return Teacher(model_id, run.info.run_id, hashlib.sha256(content).hexdigest())
    except Exception as error:  # what a store gives can be broken in many ways
        raise LabError(f"{called} {declared!r}: {one_line(error)}") from error


def load_teacher(
    store: Store, teacher: Teacher, device: torch.device, normalize: Scale, *, called: str = CALLED
) -> nn.Module:
    """Return the teacher, frozen, in evaluation mode, on the device; raises LabError.

    normalize: of the images that it will be given; where it was trained with others, it gets its own.
    """
    try:
        with quiet(), short_timeouts():
            content, own = _network_of(store, teacher.model_id, normalize)
            return _load_exported(content, teacher.sha256, device, normalize, own=own)
    except Exception as error:  # what a store gives can be broken in many ways
        named = f"{called} {teacher.model_id} of run {teacher.run_id}"
        raise LabError(f"{named} can't be loaded: {one_line(error)}") from error


def _load_exported(content: bytes, sha256: str, device: torch.device, given: Scale, *, own: Scale) -> nn.Module:
    """Return the network in a file of torch.export's, frozen, for images `given`; `own`: those it was trained with."""
    from torch.export.passes import move_to_device_pass  # slow to import

    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError("its file does not have the recorded digest")
    net: nn.Module = move_to_device_pass(_read_exported(content), device).module()
    net.requires_grad_(False)
    with torch.inference_mode():
        shape = tuple(net(torch.zeros(2, 1, 28, 28, device=device)).shape)
    if shape != (2, 10):
        raise ValueError(f"it gives an output of shape {shape} for 2 images, not (2, 10): one logit per digit")
    return net if own == given else _Renormalized(net, given, own)


def _read_exported(content: bytes) -> torch.export.ExportedProgram:
    """Read a file of torch.export's; ValueError if it holds more than a plain network, which torch would unpickle."""
    from torch.export.pt2_archive._package import PT2ArchiveReader, load_pt2  # torch.export.load falls back to pickles

    archive = PT2ArchiveReader(io.BytesIO(content))
    for name in archive.get_file_names():
        if PLAIN_PARTS.fullmatch(name) is None:
            raise ValueError(f"it holds {name!r}, which may be code")
        if name.endswith("_config.json"):
            if any(part["use_pickle"] for part in json.loads(archive.read_bytes(name))["config"].values()):
                raise ValueError(f"its {name!r} names a pickle, which may be code")
        elif name.endswith("model.pt"):
            torch.load(io.BytesIO(archive.read_bytes(name)), weights_only=True)
    return load_pt2(io.BytesIO(content)).exported_programs["model"]


class _Renormalized(nn.Module):
    def __init__(self, net: nn.Module, given: Scale, own: Scale) -> None:
        super().__init__()
        self.net, self.given, self.own = net, given, own

    def forward(self, images: Tensor) -> Tensor:
        (mean, deviation), (own_mean, own_deviation) = self.given, self.own
        return self.net((images * deviation + mean - own_mean) / own_deviation)  # type: ignore[no-any-return]


def _model_id(store: Store, declared: str, holdout: int) -> str:
    if declared.startswith("models:/"):
        with environment_variables({"MLFLOW_TRACKING_URI": store.uri}):
            return str(mlflow.models.get_model_info(declared).model_id)
    if match := re.fullmatch(r"runs:/([^/]+)/(.+)", declared):
        run, name = store.client.get_run(match[1]), match[2]
    elif re.fullmatch(r"\w[\w.-]*", declared):
        run, name = _newest_run(store, declared, holdout), "model"
    else:
        raise ValueError("it is neither runs:/<id>/model nor models:/<name>/<version> nor the name of a script")
    outputs = [] if run.outputs is None else run.outputs.model_outputs
    for output in outputs:  # "model" means the only one, whatever its name
        if (name == "model" and len(outputs) == 1) or store.client.get_logged_model(output.model_id).name == name:
            return str(output.model_id)
    raise ValueError(f"run {run.info.run_id} ({run.info.status}) has no model {name!r}")


def _newest_run(store: Store, step: str, holdout: int) -> Run:
    for run in search(store, f"attributes.status = 'FINISHED' AND tags.step = '{step}'"):
        as_declared = not run.data.tags.get("overrides") and run.data.params.get("holdout", "0") == str(holdout)
        if as_declared and "folds" not in run.data.params and "model" not in run.data.tags:
            return run
    declared = f"declared with --holdout {holdout}" if holdout else "declared"
    advice = f"train it first: make {step} (restored runs keep no network); or give runs:/<id>/model"
    scripts = {file.stem for file in EXPERIMENTS.glob("*.py")}
    hint = "" if step in scripts else did_you_mean(step, scripts)
    raise ValueError(f"{store.name!r} has no finished run of that script as {declared}{hint}; {advice}")


def _network_of(store: Store, model_id: str, normalize: Scale = MNIST_PIXELS) -> tuple[bytes, Scale]:
    """Return a model's file of torch.export's, and how its input is normalised, by default as given; ValueError."""
    location = store.client.get_logged_model(model_id).artifact_location
    folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=location, tracking_uri=store.uri))
    file = folder / "data" / "model.pt2"
    if not file.is_file():
        how = "log it with serialization_format='pt2'"
        raise ValueError(f"it is not kept by torch.export, so loading it might run code; {how}")
    mean, deviation = (Model.load(str(folder)).metadata or {}).get("normalize", normalize)
    return file.read_bytes(), (mean, deviation)


# ---- the champion


@dataclass(frozen=True)
class Origin:
    """Where a committed network comes from, and how its input is normalised."""

    step: str
    seed: int
    run_id: str
    accuracy: float  # of the run's last epoch on the 10,000 test images, in percent
    num_params: int
    code_sha256: str
    git_commit: str
    hardware: str
    torch: str
    normalize: Scale = MNIST_PIXELS
    sha256: str = ""  # of the file with the network


def register(store: Store, run_id: str) -> str:
    """Make the network of a finished run `models:/mnist@champion` and return its version; raises LabError."""
    found = find_teacher(store, f"runs:/{run_id}/model", holdout=0, called="model")
    client = store.client
    here = environment_variables({"MLFLOW_TRACKING_URI": store.uri})  # where MLflow looks for the model's files
    with store.failures("can't be written"), quiet(), short_timeouts(), here:
        if not client.search_registered_models(f"name = '{NAME}'"):
            client.create_registered_model(NAME)
        versions = list(client.search_model_versions(f"name = '{NAME}' and run_id = '{run_id}'"))
        if not versions:
            source = f"models:/{found.model_id}"
            versions = [client.create_model_version(NAME, source, run_id=run_id, model_id=found.model_id)]
        client.set_registered_model_alias(NAME, ALIAS, versions[0].version)
    return str(versions[0].version)


def is_registered(store: Store) -> bool:
    """Say whether the store has a `models:/mnist@champion`; raises LabError if it can't be read."""
    with store.failures("can't be read"), quiet(), short_timeouts():
        return any(ALIAS in model.aliases for model in store.client.search_registered_models(f"name = '{NAME}'"))


def commit(store: Store, origin: Origin, folder: Path = PUBLISHED) -> list[Path]:
    """Write the network of the run that `origin` names into the folder, with the origin beside it; return the files."""
    found = find_teacher(store, f"runs:/{origin.run_id}/model", holdout=0, called="model")
    (content, normalize), network = _network_of(store, found.model_id), io.BytesIO()
    with quiet():
        exported = _read_exported(content)
        for module in exported.graph_module.modules():  # torch notes in which files the layers are written
            for node in module.graph.nodes if hasattr(module, "graph") else ():
                node.meta.pop("stack_trace", None)
        torch.export.save(exported, network)
    digest = hashlib.sha256(network.getvalue()).hexdigest()
    kept = json.dumps(asdict(origin) | {"normalize": normalize, "sha256": digest}, indent=2)
    files = {folder / NETWORK: network.getvalue(), folder / ORIGIN: f"{kept}\n".encode()}
    replace_files(files)
    return list(files)


def load_committed(folder: Path = PUBLISHED) -> tuple[nn.Module, Origin]:
    """Return the committed network, for images normalised as MNIST's are, and where it comes from; raises LabError."""
    try:
        origin = TypeAdapter(Origin).validate_json((folder / ORIGIN).read_bytes())
    except FileNotFoundError as error:
        advice = "name a network by --model, or choose one of your own by `make champion STEP=step8`"
        raise LabError(f"champion: there is none in the store, and none is committed in {folder}; {advice}") from error
    except (OSError, ValidationError) as error:
        raise LabError(f"champion: {folder / ORIGIN} is not as the lab writes it: {one_line(error)}") from error
    file, cpu = folder / NETWORK, torch.device("cpu")
    try:
        with quiet():
            return _load_exported(file.read_bytes(), origin.sha256, cpu, MNIST_PIXELS, own=origin.normalize), origin
    except Exception as error:
        raise LabError(f"champion {file} can't be loaded: {one_line(error)}") from error
