"""What loss, objective and augmentation remember from batch to batch, and no run begins anew or goes on with."""

from __future__ import annotations

import random
import types
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from mnist_lab.experiment import Experiment
from mnist_lab.training.loop import remembering
from mnist_lab.training.states import PLAIN, holders, variables

CONTAINERS = (list, dict, set, deque)
GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
MAX_ITEMS = 100  # of a container that is compared item by item


class Remembered:
    """Compares what the parts hold before the rehearsal, after its first batch, and at its end.

    Numbers, texts and tensors are not looked at: they are put back before each run, and kept in its checkpoint.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.holders = {part: holders(declared) for part, declared in remembering(experiment).items()}
        self.made = self._look(_made)
        self.inside = self._look(_inside)

    def _look(self, at: Callable[[Any], object]) -> dict[tuple[str, int, str], object]:
        return {
            (part, place, name): seen
            for part, found in self.holders.items()
            for place, holder in enumerate(found)
            for name, value in _reached(holder).items()
            if not (part == "augmentation" and isinstance(value, GENERATORS))  # of these the rehearsal says more
            and (seen := at(value)) is not None
        }

    def first_batch(self) -> None:
        """Take what stands now for what a batch finds: a cache that is filled once is no memory."""
        self.inside = self._look(_inside)

    def notices(self) -> list[str]:
        """Say what was made or changed."""
        made, inside = (
            sorted({(part, name) for (part, _, name) in now if now[part, _, name] != before.get((part, _, name))})
            for now, before in ((self._look(_made), self.made), (self._look(_inside), self.inside))
        )
        return [
            *(f"{part}: makes {name} in a batch, which `--resume` does not go on with" for part, name in made),
            *(
                f"{part}: changes what is in {name} from batch to batch: a run begins with what others have left "
                "there, and `--resume` does not go on with it; keep numbers, texts or tensors in attributes"
                for part, name in inside
            ),
        ]


def _reached(holder: object) -> dict[str, Any]:
    """Return a holder's variables, and the containers among the globals that a function reads."""
    if not isinstance(holder, types.FunctionType):
        return variables(holder)
    read = {name: holder.__globals__.get(name) for name in holder.__code__.co_names}
    return {**{name: one for name, one in read.items() if isinstance(one, CONTAINERS)}, **variables(holder)}


def _made(value: object) -> object:
    """Return what tells apart a network or optimizer from another; None for all else."""
    return id(value) if isinstance(value, nn.Module | Optimizer) else None


def _inside(value: object) -> object:
    """Return what is in a container, or the state of a generator, to be compared; None for all else."""
    if isinstance(value, CONTAINERS):
        items = list(value.values() if isinstance(value, dict) else value)
        return [one if isinstance(one, PLAIN) else id(one) for one in items] if len(items) <= MAX_ITEMS else len(items)
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return repr(value.get_state())
    return value.get_state().tolist() if isinstance(value, torch.Generator) else None
