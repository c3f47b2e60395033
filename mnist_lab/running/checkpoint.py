"""What a run needs to go on after an interruption: written after each epoch, whole or not at all."""

import hashlib
import io
import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter

from mnist_lab.errors import LabError, one_line
from mnist_lab.experiment import quoted
from mnist_lab.paths import CHECKPOINTS, PROJECT_ROOT, own_folder
from mnist_lab.tracking.store import is_deleted, replace_files
from mnist_lab.training.loop import EpochMetrics

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    run_id: str
    script: Annotated[str, Field(pattern=r"^[^\x00]+$")]  # in the file relative to the project, which may be moved
    seed: Annotated[int, Field(ge=0)]
    changes: Mapping[str, Any]  # that the command line made, by name, without `limit`
    limit: Annotated[int, Field(ge=1)] | None
    holdout: Annotated[int, Field(ge=0)] | None
    identity: Mapping[str, str]  # Job.identity
    threads: Annotated[int, Field(ge=1)]  # of torch; another number would round sums in another order
    epochs: list[EpochMetrics]
    training: Mapping[str, Any]  # Training.state_dict()

    @property
    def step(self) -> str:
        return Path(self.script).stem

    @property
    def name(self) -> str:
        changed = {**self.changes, "limit": self.limit, "holdout": self.holdout}
        settings = "".join(f" {name}={value}" for name, value in changed.items() if value)
        return f"{self.run_id} ({self.step} seed {self.seed}{settings})"


def folder(uri: str) -> Path:
    return own_folder(uri) / CHECKPOINTS


def file_of(uri: str, run_id: str) -> Path:
    return folder(uri) / f"{run_id}.pt"


def save(checkpoint: Checkpoint, uri: str) -> None:
    """Replace the run's last checkpoint; a crash, or a LabError if it can't be written, leaves one of the two whole."""
    script, epochs = checkpoint.script.removeprefix(f"{PROJECT_ROOT}/"), [asdict(epoch) for epoch in checkpoint.epochs]
    content = io.BytesIO()
    torch.save({**vars(checkpoint), "script": script, "epochs": epochs}, content)
    replace_files({file_of(uri, checkpoint.run_id): sealed(content.getvalue())})


def sealed(content: bytes) -> bytes:
    """Put a digest of the whole content before it: torch would load weights with a flipped bit as they are."""
    return hashlib.sha256(content).hexdigest().encode() + b"\n" + content


def load(file: Path) -> Checkpoint:
    """Read a checkpoint: tensors and plain values only, so a file from elsewhere can run no code; raises LabError."""
    try:
        digest, _, content = file.read_bytes().partition(b"\n")
        if digest != hashlib.sha256(content).hexdigest().encode():
            raise ValueError("it is not what was written")
        saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        loaded = TypeAdapter(Checkpoint).validate_python(saved)
        if loaded.run_id != file.stem:  # which the name of the file to write next, or remove, is made of
            raise ValueError(f"it is named after another run than its own, {loaded.run_id!r}")
        if [epoch.epoch for epoch in loaded.epochs] != list(range(1, len(loaded.epochs) + 1)) or not loaded.epochs:
            raise ValueError("its epochs are not 1, 2 and so on")
    except Exception as error:  # what is no checkpoint can raise anything
        raise LabError(f"checkpoint {file} can't be read: {one_line(error)[:150]}") from error
    return replace(loaded, script=str(PROJECT_ROOT / loaded.script))


def newest_first(uri: str) -> Iterator[Checkpoint]:
    """Yield the readable checkpoints of a store, the newest first; a notice says why others are left out."""
    written = []
    for file in folder(uri).glob("*.pt"):
        with suppress(OSError):  # removed since by the process that finished the run
            written.append((file.stat().st_mtime, file))
    for _, file in sorted(written, reverse=True):
        try:
            yield load(file)
        except LabError as error:
            if file.exists():
                logger.warning("not used: %s", error)


def interrupted(uri: str) -> Iterator[Checkpoint]:
    """Yield the newest first, without trials of a search and folds: the same command goes on with those."""
    return (one for one in newest_first(uri) if not {"search", "folds"} & one.identity.keys())


def find(uri: str, changes: Mapping[str, object] | None = None, **wanted: str | int | None) -> Checkpoint:
    """Return the newest checkpoint of an interrupted run with these properties; raises LabError if there is none.

    changes: its overridden hyperparameters, by flat name; None for one that is as declared.
    wanted: its step, run_id, seed, limit, holdout and threads; None for any.
    """
    asked = {name: value for name, value in wanted.items() if value is not None}
    changes, others = changes or {}, []
    for one in interrupted(uri):
        has = {name: getattr(one, name) for name in asked} == asked
        if has and {name: one.changes.get(name) for name in changes} == changes:
            if "run_id" in asked or not is_deleted(uri, one.run_id):  # `track` says so of one that was named
                return one
            logger.warning("not used: checkpoint of run %s, which was deleted in MLflow", one.run_id)
        elif asked.get("step") in (None, one.step):
            others.append(one.name)
    properties = [*asked.items(), *changes.items()]
    wishes = [f"{name} {'as declared' if value is None else quoted(value)}" for name, value in properties]
    none = f"there is no interrupted run with {', '.join(wishes) or 'a finished epoch'} in {folder(uri)}"
    raise LabError(f"resume: {none}; there are: {', '.join(others) or 'none'}")


def alike(uri: str, identity: Mapping[str, str], seed: int) -> Iterator[Checkpoint]:
    """Yield the checkpoints of runs with this seed that differ in nothing else, the newest first."""
    return (one for one in newest_first(uri) if (one.identity, one.seed) == (identity, seed))


def remove_alike(uri: str, identity: Mapping[str, str], seed: int) -> None:
    """Remove the checkpoint of a run that has finished, and those of interrupted runs that it replaces."""
    for checkpoint in alike(uri, identity, seed):
        for file in folder(uri).glob(f"{checkpoint.run_id}.*"):  # one half written when its process was killed too
            file.unlink(missing_ok=True)
