"""The network that reads pictures by default: `models:/mnist@champion` in a store, or the committed one."""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from mlflow.exceptions import MlflowException
from pydantic import TypeAdapter, ValidationError
from torch import nn

from mnist_lab.errors import LabError, one_line
from mnist_lab.experiment import MNIST_PIXELS
from mnist_lab.paths import PROJECT_ROOT
from mnist_lab.tracking.connection import environment_variables, short_timeouts
from mnist_lab.tracking.disk import replace_files
from mnist_lab.tracking.store import Store, quiet, store_failures
from mnist_lab.tracking.teacher import find_exported, find_teacher, load_exported, read_exported

NAME, ALIAS = "mnist", "champion"
URI = f"models:/{NAME}@{ALIAS}"
COMMITTED = PROJECT_ROOT / "docs" / "results"
NETWORK, ORIGIN = "champion.pt2", "champion.json"
NO_SUCH = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # MLflow's words for no such model, and no such alias


@dataclass(frozen=True)
class Origin:
    """Where a committed network comes from, and how it is used.

    accuracy: of the run's last epoch on the 10,000 test images, in percent.
    normalize: the mean and standard deviation by which the network's input is normalised.
    sha256: of the file with the network.
    """

    step: str
    seed: int
    run_id: str
    accuracy: float
    num_params: int
    code_sha256: str
    git_commit: str
    hardware: str
    torch: str
    normalize: tuple[float, float] = MNIST_PIXELS
    sha256: str = ""


def register(store: Store, run_id: str) -> str:
    """Make the network of a finished run `models:/mnist@champion` and return its version; raises LabError."""
    found = find_teacher(store, f"runs:/{run_id}/model", holdout=0, called="model")
    client = store.client
    here = environment_variables({"MLFLOW_TRACKING_URI": store.uri})  # where MLflow looks for the model's files
    with store_failures(store, "can't be written"), quiet(), short_timeouts(), here:
        try:
            client.create_registered_model(NAME)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        versions = list(client.search_model_versions(f"name = '{NAME}' and run_id = '{run_id}'"))
        if not versions:
            source = f"models:/{found.model_id}"
            versions = [client.create_model_version(NAME, source, run_id=run_id, model_id=found.model_id)]
        client.set_registered_model_alias(NAME, ALIAS, versions[0].version)
    return str(versions[0].version)


def is_registered(store: Store) -> bool:
    """Say whether the store has a `models:/mnist@champion`. Raises LabError if it can't be read."""
    with store_failures(store, "can't be read"), quiet(), short_timeouts():
        try:
            store.client.get_model_version_by_alias(NAME, ALIAS)
        except MlflowException as error:
            if error.error_code in NO_SUCH:
                return False
            raise
    return True


def commit(store: Store, origin: Origin, folder: Path = COMMITTED) -> list[Path]:
    """Write the network of the run that `origin` names into the folder, with the origin beside it; return the files."""
    found = find_teacher(store, f"runs:/{origin.run_id}/model", holdout=0, called="model")
    file, normalize = find_exported(store, found, origin.normalize, called="model")
    network = _without_paths(file)
    said = asdict(origin) | {"normalize": normalize, "sha256": hashlib.sha256(network).hexdigest()}
    files: dict[Path, str | bytes] = {folder / NETWORK: network, folder / ORIGIN: json.dumps(said, indent=2) + "\n"}
    try:
        replace_files(files)
    except OSError as error:
        raise LabError(f"the champion can't be written: {error.strerror}: {error.filename}") from error
    return list(files)


def load_committed(folder: Path = COMMITTED) -> tuple[nn.Module, Origin]:
    """Return the committed network, for images normalised as MNIST's are, and where it comes from.

    Raises:
        LabError: if there is none, or it can't be loaded, or is another one than the file beside it says.
    """
    try:
        origin = TypeAdapter(Origin).validate_json((folder / ORIGIN).read_bytes())
    except FileNotFoundError as error:
        said = "name a network by --model, or choose one of your own by `make champion STEP=step8`"
        raise LabError(f"champion: there is none in the store, and none is committed in {folder}; {said}") from error
    except (OSError, ValidationError) as error:
        raise LabError(f"champion: {folder / ORIGIN} is not as the lab writes it: {one_line(error)}") from error
    cpu, named = torch.device("cpu"), f"champion {folder / NETWORK}"
    file = folder / NETWORK
    return load_exported(file, origin.sha256, cpu, normalize=MNIST_PIXELS, own=origin.normalize, named=named), origin


def _without_paths(file: Path) -> bytes:
    """Return an exported network's file without what torch notes of the files in which its layers are written."""
    with quiet():
        exported = read_exported(file)
        for module in exported.graph_module.modules():
            for node in module.graph.nodes if hasattr(module, "graph") else ():
                node.meta.pop("stack_trace", None)
        with tempfile.TemporaryDirectory() as temporary:
            new = Path(temporary) / NETWORK
            torch.export.save(exported, new)
            return new.read_bytes()
