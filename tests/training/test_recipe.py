"""What a run computes is what it computed: the losses of the first batches, kept in golden.json.

Where they differ, either the change was not meant, or `RECIPE` has to be raised and the file written anew:
python tests/training/test_recipe.py
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from helpers import first
from mnist_lab import Experiment
from mnist_lab.data import Mnist, hold_out, load_mnist
from mnist_lab.running.identity import hardware
from mnist_lab.training import RECIPE
from mnist_lab.training.loop import Training, initial_network

GOLDEN = Path(__file__).with_name("golden.json")
STEPS = ("step1_baseline", "step2_dropout", "step3_gap", "step4_augment_steplr", "four_conv", "under_20k")
BATCHES = 3
SEED = 7


class Small(nn.Sequential):
    """The parts that the steps have, in small."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__(
            nn.Conv2d(1, 4, 3, stride=2, bias=False),
            nn.BatchNorm2d(4),
            nn.Dropout(dropout),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3, bias=False),
            nn.AvgPool2d(11),
            nn.Flatten(),
            nn.Linear(6, 10),
        )


SMALL = Experiment(net=Small, epochs=2, batch_size=64, optimizer=partial(torch.optim.Adam, lr=0.01))


def losses(experiment: Experiment, mnist: Mnist) -> list[float]:
    few = first(mnist, BATCHES * experiment.batch_size, 500)
    experiment = dataclasses.replace(experiment, epochs=1)
    training = Training(initial_network(experiment, SEED, torch.device("cpu")), experiment, few, seed=SEED)
    (metrics,) = training.epochs()
    return [*torch.stack(training.losses).tolist(), metrics.eval_loss]


def computed(load_script: Callable[[str], ModuleType], mnist: Mnist) -> Iterator[tuple[str, list[float]]]:
    for step in STEPS:
        yield step, losses(load_script(step).EXPERIMENT, mnist)
    yield "small", losses(SMALL, mnist)
    held = hold_out(mnist, 10_000)
    assert held.validation_images is not None
    few = dataclasses.replace(
        held, validation_images=held.validation_images[:500], validation_labels=held.validation_labels[:500]
    )
    yield "small, 10,000 held out", losses(SMALL, few)
    by_batch = dataclasses.replace(SMALL, scheduler=partial(OneCycleLR, max_lr=0.1), scheduler_interval="batch")
    yield "small, a schedule by batch", losses(by_batch, mnist)


def where() -> str:
    """Name what the last digits depend on: torch and the processor with its vector instructions."""
    name, _, instructions = hardware(torch.device("cpu")).rsplit(", ", 2)
    return f"{name}, {instructions}, torch {torch.__version__}"


def test_the_first_losses_are_those_of_the_recipe(load_script: Callable[[str], ModuleType], mnist: Mnist) -> None:
    golden = json.loads(GOLDEN.read_text())
    assert golden["recipe"] == RECIPE, "RECIPE was changed: write golden.json anew"
    to_the_last_digit = golden["losses"].get(where())
    near = next(iter(golden["losses"].values()))
    for name, found in computed(load_script, mnist):
        assert found == pytest.approx(near[name], rel=1e-3), f"{name}: another recipe"
        if to_the_last_digit is not None:
            assert found == to_the_last_digit[name], f"{name}: another recipe"


if __name__ == "__main__":  # adds this machine's losses, or with another RECIPE begins anew
    import importlib

    torch.set_num_threads(1)
    kept = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {"recipe": None, "losses": {}}
    if kept["recipe"] != RECIPE:
        kept = {"recipe": RECIPE, "losses": {}}
    kept["losses"][where()] = dict(computed(importlib.import_module, load_mnist()))
    GOLDEN.write_text(json.dumps(kept, indent=1) + "\n")
