"""Step 4 on a CUDA device: the lab, and the write-ups' way on the same machine.

The first use of the device is measured apart, as a training of one epoch before the rounds.
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
from mnist_lab.training.loop import Training, initial_network

STEP = "step4_augment_steplr"
LAB, WRITE_UPS = "lab", "write-ups"


def seconds(train: Callable[[], None]) -> float:
    """Return the seconds of a training, all work of the device included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    train()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def train(experiment: Experiment, mnist: Mnist) -> None:
    net = initial_network(experiment, 0, mnist.train_images.device)
    for _ in Training(net, experiment, mnist, seed=0).epochs():
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
    first = seconds(partial(train, dataclasses.replace(experiment, epochs=1), mnist))
    report.section("first use", {f"{LAB}: first epoch": Sample((first,))}, {}, unit="s")
    ways: dict[str, Callable[[], float]] = {
        LAB: partial(seconds, partial(train, experiment, mnist)),
        WRITE_UPS: partial(write_ups, arguments.write_up_epochs, arguments.epochs),
    }
    walls = {name: Sample(tuple(rounds)) for name, rounds in interleave(ways, arguments.rounds).items()}
    ratios = {f"{WRITE_UPS} / {LAB}": walls[WRITE_UPS].per(walls[LAB])}
    report.section(f"{arguments.epochs} epochs", walls, ratios, unit="s")
    report.write()


if __name__ == "__main__":
    main()
