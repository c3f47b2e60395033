"""Seconds per epoch of one training, in one process, by the ways that people train MNIST:

the write-ups' way (benchmarks/writeups.py), the loop of pytorch/examples on the same data, the lab with everything that
an epoch of `Training` does, and two floors: the bare training step on one batch that stays in memory, without data,
augmentation or logging, plus an evaluation.
The lab's floor has its network prepared as the lab prepares it, the plain floor has it as torch builds it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import writeups
from measure import (
    TEST_IMAGES,
    TRAIN_IMAGES,
    Laps,
    Report,
    Sample,
    Setting,
    interleave,
    load_experiment,
    make_parser,
    parse,
    silenced,
)
from torch import nn

from mnist_lab.data import Mnist, load_mnist
from mnist_lab.experiment import Experiment
from mnist_lab.training.dropout import SparseDropout
from mnist_lab.training.loop import Training, normalize, predict

STEPS = ("step1_baseline", "step2_dropout", "step3_gap", "step4_augment_steplr", "four_conv")
CPU = torch.device("cpu")
LAB, FLOOR, PLAIN_FLOOR = "lab", "lab's floor", "plain floor"
WRITE_UPS, EXAMPLES = "write-ups", "pytorch/examples"


@dataclass(frozen=True)
class Epoch:
    """Seconds of one epoch on all 60,000 training images, as scaled from fewer, and of its evaluation on 10,000."""

    training: float
    evaluation: float

    @property
    def total(self) -> float:
        return self.training + self.evaluation


@dataclass(frozen=True)
class Task:
    """What each way gets: an experiment, and how many images one measurement takes."""

    step: str
    experiment: Experiment
    mnist: Mnist  # already cut to those images

    @property
    def batches(self) -> float:
        """Batches in a whole epoch; the last, smaller one counts by its images."""
        return TRAIN_IMAGES / self.experiment.batch_size

    def loaders(self) -> tuple[torch.utils.data.DataLoader, torch.utils.data.DataLoader]:
        sizes = {"images": len(self.mnist.train_images), "test_images": len(self.mnist.test_images)}
        return writeups.loaders(self.step, self.experiment.batch_size, **sizes)

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        return self.experiment.net()


def write_ups(task: Task) -> Epoch:
    """Train as the write-ups do: tqdm, `.item()` and a new description of the bar after each batch."""
    return _loaded(task, writeups.train)


def examples(task: Task) -> Epoch:
    """Train with the loop of pytorch/examples' mnist/main.py: a line with the loss after every tenth batch."""
    return _loaded(task, _train_as_examples)


def _loaded(task: Task, train: Callable[..., object]) -> Epoch:
    """Train and evaluate by loaders; the two evaluations are the same."""
    net, (train_loader, test_loader) = task.network(), task.loaders()
    optimizer = task.experiment.optimizer(net.parameters())
    training = Laps()
    train(net, CPU, train_loader, optimizer, training.lap)
    training.stop()
    testing = Laps()
    writeups.evaluate(net, CPU, test_loader, testing.lap)
    testing.stop()
    return Epoch(training.seconds(task.batches), testing.seconds(TEST_IMAGES / task.experiment.batch_size))


def _train_as_examples(
    net: nn.Module,
    device: torch.device,
    loader: torch.utils.data.DataLoader,
    optimizer: torch.optim.Optimizer,
    lap: Callable[[], None],
) -> None:
    net.train()
    for batch_idx, (data, target) in enumerate(loader):
        data, target = data.to(device), target.to(device)
        optimizer.zero_grad()
        output = net(data)
        loss = F.cross_entropy(output, target)
        loss.backward()
        optimizer.step()
        if batch_idx % 10 == 0:
            done, share = batch_idx * len(data), 100.0 * batch_idx / len(loader)
            print(f"Train Epoch: 1 [{done}/{len(loader.dataset)} ({share:.0f}%)]\tLoss: {loss.item():.6f}")
        lap()


def lab(task: Task) -> Epoch:
    """Train by `mnist_lab.training.loop.Training`, with the network prepared as mnist_lab.running.run does."""
    net = task.network().to(memory_format=torch.channels_last)
    laps = Laps()
    experiment = dataclasses.replace(task.experiment, epochs=1)
    for _ in Training(net, experiment, task.mnist, seed=0, on_batch=laps.lap).epochs():
        laps.stop()
    evaluation = laps.end - laps.laps[-1]  # all that `epochs` does after the last batch
    laps.end = laps.laps[-1]
    return Epoch(laps.seconds(task.batches), evaluation * TEST_IMAGES / len(task.mnist.test_images))


def floor(task: Task) -> Epoch:
    """Do the bare step on one batch in memory, with the lab's memory format and dropout."""
    net = task.network().to(memory_format=torch.channels_last)
    with SparseDropout():
        return _bare(task, net)


def plain_floor(task: Task) -> Epoch:
    """Do the bare step on one batch in memory, with the network as torch builds it."""
    return _bare(task, task.network())


def _bare(task: Task, net: nn.Module) -> Epoch:
    size = task.experiment.batch_size
    images = normalize(task.mnist.train_images[:size].float() / 255)
    labels = task.mnist.train_labels[:size]
    optimizer = task.experiment.optimizer(net.parameters())
    net.train()
    training = Laps()
    for _ in range(len(task.mnist.train_images) // size):
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
        training.lap()
    training.stop()
    testing = Laps()
    predict(net, task.mnist.test_images)
    testing.stop()
    evaluation = (testing.end - testing.start) * TEST_IMAGES / len(task.mnist.test_images)
    return Epoch(training.seconds(task.batches), evaluation)


WAYS: dict[str, Callable[[Task], Epoch]] = {
    WRITE_UPS: write_ups,
    EXAMPLES: examples,
    LAB: lab,
    FLOOR: floor,
    PLAIN_FLOOR: plain_floor,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(
        "training",
        __doc__,
        rounds=Setting(5, 1, "rounds"),
        images=Setting(2560, 256, "training images that one measurement takes; at least two batches are"),
        test_images=Setting(2000, 500, "test images that one measurement takes; at least two batches are"),
    )
    parser.add_argument("--steps", nargs="+", default=STEPS, choices=STEPS, metavar="STEP", help="default: all five")
    arguments = parse(parser, argv)
    report = Report(arguments)
    mnist = load_mnist()
    for step in arguments.steps:
        experiment = load_experiment(step)

        def task(batches: int, step: str = step, experiment: Experiment = experiment) -> Task:
            test_images = max(arguments.test_images, 2 * experiment.batch_size)
            return Task(step, experiment, first(mnist, batches * experiment.batch_size, test_images))

        whole, warm_up = task(max(2, arguments.images // experiment.batch_size)), task(2)
        with silenced():
            for way in WAYS.values():
                way(warm_up)
        results = interleave({name: quiet(way, whole) for name, way in WAYS.items()}, arguments.rounds)
        epochs = {name: Sample(tuple(epoch.total for epoch in results[name])) for name in results}
        evaluations = {
            f"{name}: evaluation": Sample(tuple(epoch.evaluation for epoch in results[name]))
            for name in (WRITE_UPS, LAB)
        }
        ratios = {f"{name} / lab": epochs[name].per(epochs[LAB]) for name in (WRITE_UPS, EXAMPLES)}
        for name in (FLOOR, PLAIN_FLOOR):
            ratios[f"lab / {name}"] = epochs[LAB].per(epochs[name])
        report.section(step, {**epochs, **evaluations}, ratios, unit="s per epoch")
    report.note(
        f"Scaled to an epoch of {TRAIN_IMAGES:,} images from {arguments.images:,} in each round (whole batches, two at "
        f"least): what comes before the second batch counts once, the rest by batches. Each epoch includes an "
        f"evaluation on {TEST_IMAGES:,} images, scaled likewise from {arguments.test_images:,}."
    )
    report.write()


def first(mnist: Mnist, images: int, test_images: int) -> Mnist:
    """Return the data cut to its first images."""
    return dataclasses.replace(
        mnist,
        train_images=mnist.train_images[:images],
        train_labels=mnist.train_labels[:images],
        test_images=mnist.test_images[:test_images],
        test_labels=mnist.test_labels[:test_images],
    )


def quiet(way: Callable[[Task], Epoch], task: Task) -> Callable[[], Epoch]:
    """Return what measures a way with its output on the null device."""

    def measure() -> Epoch:
        with silenced():
            return way(task)

    return measure


if __name__ == "__main__":
    main()
