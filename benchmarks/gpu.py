"""Step 4 on a CUDA device: the lab's way and the write-ups' on the same machine.

Compilation and the first use of the device are measured apart, as a training of one epoch before the rounds.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from measure import Report, Sample, Setting, interleave, load_experiment, make_parser, parse, run_fresh

from mnist_lab.data import Mnist, load_mnist
from mnist_lab.experiment import Experiment
from mnist_lab.training.loop import fit, initial_network

STEP = "step4_augment_steplr"
ONE, WRITE_UPS = "lab, 1 seed", "write-ups, 1 seed"


def seconds(train: Callable[[], None]) -> float:
    """Return the seconds of a training, all work of the device included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    train()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def train_one(experiment: Experiment, mnist: Mnist) -> None:
    """Train one seed."""
    net = initial_network(experiment, 0, mnist.train_images.device)
    for _ in fit(net, experiment, mnist, seed=0):
        pass


def write_ups(epochs: int, whole: int) -> float:
    """Return the seconds of `whole` epochs in the write-ups' way, scaled from `epochs` of them after a first one."""
    process = run_fresh("benchmarks/writeups.py", STEP, "--epochs", str(1 + epochs))
    trained = json.loads(process.output.splitlines()[-1])
    return sum(epoch["seconds"] for epoch in trained[1:]) * whole / epochs


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(
        "gpu",
        __doc__,
        rounds=Setting(3, 1, "rounds"),
        epochs=Setting(14, 1, "epochs of the lab's trainings"),
        write_up_epochs=Setting(2, 1, "epochs of the write-ups' training, scaled to those of the lab"),
    )
    arguments = parse(parser, argv)
    if not torch.cuda.is_available():
        print("gpu: there is no CUDA device here, so nothing is measured.")
        return
    device = torch.device("cuda")
    report = Report(arguments, device)
    mnist = load_mnist(device=device)
    experiment = dataclasses.replace(load_experiment(STEP), epochs=arguments.epochs)
    first = seconds(partial(train_one, dataclasses.replace(experiment, epochs=1), mnist))
    report.section("compilation and first use", {f"{ONE}: first epoch": Sample((first,))}, {}, unit="s")
    ways: dict[str, Callable[[], float]] = {
        ONE: partial(seconds, partial(train_one, experiment, mnist)),
        WRITE_UPS: partial(write_ups, arguments.write_up_epochs, arguments.epochs),
    }
    walls = {name: Sample(tuple(rounds)) for name, rounds in interleave(ways, arguments.rounds).items()}
    ratios = {f"{WRITE_UPS} / {ONE}": walls[WRITE_UPS].per(walls[ONE])}
    report.section(f"{arguments.epochs} epochs", walls, ratios, unit="s")
    report.write()


if __name__ == "__main__":
    main()
