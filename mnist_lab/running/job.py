"""What is to be run: an experiment with all settings of its run but the seed."""

from __future__ import annotations

import multiprocessing
import runpy
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mnist_lab.arguments import stable_text
from mnist_lab.data import find_data_dir
from mnist_lab.errors import LabError
from mnist_lab.experiment import Experiment, Targets
from mnist_lab.measures import Protocol, protocol
from mnist_lab.paths import EXPERIMENTS, PROJECT_ROOT, PUBLISHED, own_files
from mnist_lab.running import identity
from mnist_lab.running.identity import SCRIPT, code_sha256, find_sources, place

if TYPE_CHECKING:  # MLflow takes seconds to import
    from mnist_lab.tracking.models import Teacher

WORKER = "mnist_lab worker"  # the name of a study's worker processes
_reading = False


@dataclass(frozen=True, kw_only=True)
class Job:
    """One experiment as it is to be run, with any seed. It can be pickled, and so be sent to another process.

    Raises LabError for a script that is no file, and a declaration that can't be right on its face.
    """

    script: Path  # declares the experiment; its name names the step
    experiment: Experiment  # with `overrides` applied
    overrides: Mapping[str, object] = field(default_factory=dict)  # what differs from the declaration, by flat name
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    threads: int | None = None  # of torch on a CPU; None for one per core that this process may run on
    data_dir: Path | None = None  # where MNIST is kept; None for the default folder
    tracking_uri: str
    limit: int | None = None  # train on the first so many images only, which counts as an override too; None for all
    holdout: int = 0  # so many training images, taken before `limit`, judge the epochs; the test images the end only
    folds: int = 0  # the run with the seed k is judged on number k of so many parts of the training images, not tested
    search: str | None = None  # the name of the search that this is a trial of; no run of it is given the test images
    teacher: Teacher | None = None  # that the objective learns from, once `run.with_teacher` has found it
    sources: Mapping[str, Path] = field(default_factory=dict)  # the code, read once, for all that `replace` makes of it
    code_sha256: str = ""
    commit_tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] = field(init=False)  # but for the seed; read once, as objects may change in use

    def __post_init__(self) -> None:
        if not self.script.is_file():
            raise LabError(f"script: {str(self.script)!r} is not a file; a run is named after its script")
        self.experiment.check()
        vars(self)["params"] = self._read_params(self.experiment)
        if not self.sources:
            sources = find_sources(self.script)
            written = [*own_files(self.tracking_uri), find_data_dir(self.data_dir), PROJECT_ROOT / "reports"]
            commit = identity.commit_tags(self.script, written)
            vars(self).update(sources=sources, code_sha256=code_sha256(sources), commit_tags=commit)

    @property
    def step(self) -> str:
        return self.script.stem

    @property
    def protocol(self) -> Protocol:
        return protocol(self.holdout, self.folds)

    @property
    def targets(self) -> Targets:
        """What is judged. The declared targets are those of a network that is trained on all images, and tested."""
        return Targets() if self.folds else self.experiment.targets

    def _read_params(self, experiment: Experiment) -> dict[str, str]:
        held_out = {name: str(getattr(self, name)) for name in ("holdout", "folds") if getattr(self, name)}
        declared = {name: stable_text(value) for name, value in experiment.hyperparameters().items()}
        return {**declared, "device": self.device.type, **held_out}

    @property
    def tags(self) -> dict[str, str]:
        """The tags that, with the params, runs share if and only if they differ in nothing but the seed."""
        overrides = {**self.overrides, **({} if self.limit is None else {"limit": self.limit})}
        return {
            **({"step": self.step} if self.search is None else {"search": self.search}),
            "overrides": " ".join(f"{name}={stable_text(value)}" for name, value in sorted(overrides.items())),
            "code_sha256": self.code_sha256,
            **({} if self.teacher is None else self.teacher.tags),
        }

    @property
    def identity(self) -> dict[str, str]:
        return {**self.params, **self.tags}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the experiment behind: its network's class may live in the script, which the other process reads."""
        return {**vars(self), "experiment": None}

    def lies_in(self, folder: Path) -> None:
        """Read code and MNIST in this folder, where another machine sent them; `script` stays, and names the runs."""
        sources = {name: folder / place(name, file) for name, file in self.sources.items()}
        vars(self).update(sources=sources, data_dir=folder / "data")

    def check_unchanged(self) -> None:
        """Refuse to go on if the script, or what it imports, was saved since it was read; raises LabError."""
        with suppress(OSError):
            if code_sha256(self.sources) == self.code_sha256:
                return
        raise LabError(f"script: {self.script.name} or what it imports was changed since it was read; start again")

    def read_experiment(self) -> None:
        """Read the experiment from the script, in a process that was sent this job; LabError if it has changed."""
        self.check_unchanged()
        for name in {part for one in self.sources for part in (one, one.partition(".")[0])}:
            sys.modules.pop(name, None)  # a run before may have changed its globals
        declared = with_own_figures(read_declaration(script := self.sources[SCRIPT]), script)
        experiment, _ = declared.override(self.overrides)
        if self._read_params(experiment) != self.params:
            message = "does not declare the same experiment in a worker process, and a study needs one that does"
            raise LabError(f"script: {self.script.name} {message}")
        vars(self)["experiment"] = experiment


def choose_device(name: str | None) -> torch.device:
    """Return the device named, else this machine's accelerator, else the CPU; raises LabError if it is not here."""
    available = ["cpu"]
    if accelerator := torch.accelerator.current_accelerator(check_available=True):
        numbered = [f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count())]
        available = [accelerator.type, *numbered, "cpu"]
    if name is not None and name not in available:
        raise LabError(f"device: {name!r} is not available here; available are {', '.join(available)}")
    return torch.device(name or available[0])


def with_own_figures(experiment: Experiment, script: Path) -> Experiment:
    """Drop reported figures that are another script's: `replace` took them along, or they came with a published one."""
    figures = [f"{value:g}" for value in experiment.reported.values()]
    published = [one for csv in PUBLISHED.glob("*.csv") if (one := EXPERIMENTS / f"{csv.stem}.py").exists()]
    declared = [file.read_text(errors="ignore").partition("reported=")[2].partition("}")[0] for file in published]
    is_copy = script.resolve() not in published and any(all(one in text for one in figures) for text in declared)
    is_named = "reported" in script.read_text(errors="ignore")
    return experiment if is_named and not is_copy else replace(experiment, reported={})


class _MainCalled(BaseException):
    """Ends a script at its call of `main`. Not an Exception, so that no `except` of the script's own keeps it."""


def read_declaration(script: Path) -> Experiment:
    """Return what `script` gives to `main`, by running it up to there; raises LabError."""
    global _reading
    _reading = True
    try:
        runpy.run_path(str(script), run_name="__main__")
    except _MainCalled as declared:
        experiment: Experiment = declared.args[0]
        return experiment
    finally:
        _reading = False
    raise LabError(f"script: {script} came to its end without calling main(EXPERIMENT)")


def only_read(experiment: Experiment) -> bool:
    """End a script that `read_declaration` runs; say whether `main` is called in a worker, and must train nothing."""
    if _reading:
        raise _MainCalled(experiment)
    return multiprocessing.current_process().name == WORKER  # it imports the script, which may call `main` unguarded
