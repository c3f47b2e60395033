"""Loss, objective and augmentation may count or remember: a rehearsal and each run get copies, and so begin anew."""

from __future__ import annotations

import copy
import dataclasses
import functools
import types
from typing import Any

from torch import nn

from mnist_lab.arguments import stable_text
from mnist_lab.experiment import Experiment
from mnist_lab.training.states import holders, kept_attributes, outer_variables

PARTS = ("loss", "objective", "augmentation")


def fresh(experiment: Experiment) -> Experiment:
    """Return the experiment with copies of the objects in its loss, objective and augmentation.

    Functions are not copied, nor is a teacher, nor what can't be.
    """
    keywords = experiment.objective.keywords if isinstance(experiment.objective, functools.partial) else {}
    memo: dict[int, Any] = {id(one): one for one in keywords.values() if isinstance(one, nn.Module)}
    try:
        copies = copy.deepcopy({name: getattr(experiment, name) for name in PARTS}, memo)
    except Exception:  # each class may refuse in its own way
        return experiment
    return dataclasses.replace(experiment, **copies)


class Remembered:
    """Finds out what loss, objective and augmentation remember from one batch to the next."""

    def __init__(self, experiment: Experiment) -> None:
        self.holders = {name: holders(getattr(experiment, name)) for name in PARTS}
        self.before = {name: list(map(_remembers, found)) for name, found in self.holders.items()}

    def notices(self) -> list[str]:
        """Say what has changed since and `fresh` does not copy, or a checkpoint does not keep."""
        said = []
        for name in PARTS:
            for holder, before in zip(self.holders[name], self.before[name], strict=True):
                changed = ", ".join(key for key, text in _remembers(holder).items() if text != before.get(key))
                if changed and isinstance(holder, types.FunctionType):
                    said.append(
                        f"{name}: changes {changed}, outside of it, from batch to batch: a run begins with what others "
                        "have left there, and `--resume` does not go on with it; count in an attribute of an object "
                        "with __call__"
                    )
                elif changed:
                    said.append(
                        f"{name}: changes its {changed} from batch to batch, which `--resume` does not go on with; a "
                        "checkpoint keeps attributes that are numbers, texts or tensors"
                    )
        return said


def _remembers(holder: object) -> dict[str, str]:
    """Return, as text, what a function sets outside of it, or attributes of an object that a checkpoint lacks."""
    if isinstance(holder, types.FunctionType):
        names = outer_variables(holder)
    else:
        kept, of_any_module = kept_attributes(holder), vars(nn.Module())
        names = {name: value for name, value in vars(holder).items() if name not in kept and name not in of_any_module}
    return {name: stable_text(value) for name, value in names.items()}
