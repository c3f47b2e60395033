"""Finds what loss, objective and augmentation remember from batch to batch and a resumed run begins anew."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mnist_lab.arguments import stable_text
from mnist_lab.experiment import Experiment
from mnist_lab.training.states import PARTS, load_parts_state, objects_in, own_parts, parts_state


class Remembered:
    """Compares the parts before and after the batches of a rehearsal.

    declared: the experiment as the script has it; `used` has the copies of its parts that the rehearsal changes.
    """

    def __init__(self, declared: Experiment, used: Experiment) -> None:
        self.declared, self.used = declared, used
        self.before = {part: stable_text(getattr(declared, part)) for part in PARTS}

    def notices(self) -> Iterator[str]:
        """Yield a notice for each part that changes what a checkpoint does not keep, or what has no copies."""
        resumed = own_parts(self.declared)
        load_parts_state(resumed, parts_state(self.used), torch.device("cpu"))
        for part in PARTS:
            after, anew = (_attributes(getattr(one, part)) for one in (self.used, resumed))
            if changed := sorted(name for name in after if after[name] != anew.get(name)):
                yield (
                    f"{part}: changes {', '.join(changed)} from batch to batch, which `--resume` begins anew; keep it "
                    "in a buffer, or write state_dict and load_state_dict"
                )
            elif stable_text(getattr(self.declared, part)) != self.before[part]:
                yield (
                    f"{part}: changes variables of an outer function from batch to batch: a run begins with what "
                    "others have left there; keep them in the attributes of an object"
                )


def _attributes(part: object) -> dict[str, str]:
    return {
        name: stable_text(value)
        for one in objects_in(part)
        for name, value in vars(one).items()
        if not name.startswith("__")
    }
