"""A batch's work as a graph: the same training to the last digit, or none. Emulated on the CPU; some on a device."""

import contextlib
import dataclasses
import logging
import random
import re
import types
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import graph_emulator
import numpy as np
import pytest
import torch
from counting import Ramp, ramp
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, StepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mnist_lab import Experiment
from mnist_lab.augmentation import random_rotation
from mnist_lab.data import Mnist, load_mnist
from mnist_lab.objectives import mixup
from mnist_lab.training import cudagraph
from mnist_lab.training.loop import EpochMetrics, Training, initial_network, remembering
from mnist_lab.training.states import left_as_they_are

Load = Callable[[str], ModuleType]
CPU = torch.device("cpu")
SCRIPTS = (
    *("step1_baseline", "step2_dropout", "step3_gap", "step4_augment_steplr", "under_20k", "four_conv"),
    *("gap_alone", "steplr_alone", "augment_alone"),
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 5, stride=3, bias=False), nn.BatchNorm2d(4), nn.Dropout(0.1), nn.ReLU(), nn.Flatten()
        )
        self.linear = nn.Linear(256, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.layers(images))


def declare(**changes: Any) -> Experiment:
    fields: dict[str, Any] = {
        "net": Small,
        "epochs": 3,
        "batch_size": 32,
        "optimizer": partial(SGD, lr=0.05, momentum=0.9),
        "scheduler": partial(StepLR, step_size=1, gamma=0.5),
        "augmentation": partial(random_rotation, degrees=7.0),
    }
    return Experiment(**(fields | changes))


@pytest.fixture
def few(small_mnist: Mnist) -> Mnist:
    """Return 75 training images: two full batches and a short one."""
    return dataclasses.replace(
        small_mnist, train_images=small_mnist.train_images[:75], train_labels=small_mnist.train_labels[:75]
    )


def train(experiment: Experiment, mnist: Mnist, seed: int = 0) -> Training:
    net = initial_network(experiment, seed, mnist.train_images.device)
    training = Training(net, experiment, mnist, seed=seed)
    with left_as_they_are(*remembering(experiment).values()):
        training.seen = list(training.epochs())  # type: ignore[attr-defined]
    return training


def outcome(training: Training) -> list[Any]:
    """Return what training gives but for its time: each epoch, and all of the network."""
    epochs = [dataclasses.replace(epoch, epoch_seconds=0.0) for epoch in training.seen]  # type: ignore[attr-defined]
    return [epochs, {name: value.tolist() for name, value in training.result.state_dict().items()}]


@pytest.fixture
def compare(few: Mnist, monkeypatch: pytest.MonkeyPatch) -> Callable[[Experiment], Training]:
    """Return a function that trains one by one and by graphs, holds them to be the same, and returns the latter."""

    def compare(experiment: Experiment) -> Training:
        monkeypatch.setattr(graph_emulator.dropout, "MAX_P", -1.0)
        eager = train(experiment, few)
        with monkeypatch.context() as patched:
            graph_emulator.install(patched)
            graphed = train(experiment, few)
        assert outcome(graphed) == outcome(eager)
        return graphed

    return compare


# ---- the same training


@pytest.mark.parametrize("stem", SCRIPTS)
def test_a_script_trains_by_graphs_as_it_does_without(
    stem: str, load_script: Load, compare: Callable[[Experiment], Training]
) -> None:
    experiment = load_script(stem).EXPERIMENT
    training = compare(dataclasses.replace(experiment, epochs=3, batch_size=32))

    assert (training.captured.refused, len(training.captured.graphs)) == ("", 2)


def two_groups(parameters: Iterator[nn.Parameter]) -> Optimizer:
    first, *others = parameters
    return SGD([{"params": [first]}, {"params": others}], lr=0.05, momentum=0.9)


def second_group_falls(optimizer: Optimizer) -> LRScheduler:
    return LambdaLR(optimizer, [lambda step: 1.0, lambda step: 0.1**step])


class DecayRises(LRScheduler):
    """Changes nothing but the weight decay."""

    def get_lr(self) -> list[float]:  # type: ignore[override]
        return [group["lr"] for group in self.optimizer.param_groups]

    def step(self, epoch: int | None = None) -> None:
        super().step()
        for group in self.optimizer.param_groups:
            group["weight_decay"] = 0.2 * self.last_epoch


def clipping(parameters: Iterator[nn.Parameter]) -> Optimizer:
    optimizer = SGD(parameters, lr=0.05)
    optimizer.register_step_pre_hook(
        lambda *_: [torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.1), None][1]
    )
    return optimizer


class PartlyUsed(Small):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(3, 3)
        self.layers[0].weight.requires_grad_(False)


class Unfreezes(StepLR):
    """Lets the first layer be trained from the second epoch on."""

    def step(self, epoch: int | None = None) -> None:
        super().step()
        first = self.optimizer.param_groups[0]["params"][0]
        first.requires_grad_(self.last_epoch > 0)


class FirstFrozen(Small):
    def __init__(self) -> None:
        super().__init__()
        self.layers[0].weight.requires_grad_(False)


EMA = partial(AveragedModel, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=True)
SAME: dict[str, dict[str, Any]] = {
    "two groups, one scheduled": {"optimizer": two_groups, "scheduler": second_group_falls},
    "a scheduled weight decay": {"scheduler": DecayRises},
    "a schedule per batch": {"scheduler": partial(OneCycleLR, max_lr=0.1), "scheduler_interval": "batch"},
    "Adam": {"optimizer": partial(Adam, lr=1e-3)},
    "a tensor for lr": {"optimizer": partial(SGD, lr=torch.tensor(0.05))},
    "clipped gradients": {"optimizer": clipping},
    "an average": {"average": EMA},
    "an objective": {"objective": partial(mixup, alpha=0.3)},
    "no augmentation": {"augmentation": None},
    "frozen and unused parameters": {"net": PartlyUsed},
    "a layer that is trained later": {"net": FirstFrozen, "scheduler": partial(Unfreezes, step_size=1)},
    "one shape of batch": {"batch_size": 25},
    "one batch an epoch": {"batch_size": 75},
}


@pytest.mark.parametrize("changes", SAME.values(), ids=SAME)
def test_what_is_declared_trains_by_graphs_as_it_does_without(
    changes: dict[str, Any], compare: Callable[[Experiment], Training]
) -> None:
    captured = compare(declare(**changes)).captured

    assert captured.refused == ""
    graphs = {25: 1, 75: 1}.get(changes.get("batch_size", 32), 2)
    assert len(captured.graphs) == (4 if changes.get("net") is FirstFrozen else graphs)
    assert captured.tags == {}  # on a CPU that does not pass for a device


def test_a_resumed_training_goes_on_by_graphs_as_it_would_have(few: Mnist, monkeypatch: pytest.MonkeyPatch) -> None:
    graph_emulator.install(monkeypatch)
    experiment = declare(average=EMA)
    whole = train(experiment, few)
    first = Training(initial_network(experiment, 0, CPU), experiment, few, seed=0)
    metrics = next(first.epochs())
    state = first.state_dict()
    second = Training(initial_network(experiment, 0, CPU), experiment, few, seed=0)
    second.load_state_dict(state)
    second.seen = [metrics, *second.epochs()]  # type: ignore[attr-defined]

    assert outcome(second) == outcome(whole)
    assert second.captured.tags == {"cuda_graph": "used"}


# ---- what a graph would freeze


class Draws(Small):
    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * (1 + (self.draw() if self.training else 0))


class Counts(Small):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += self.training
        return super().forward(images) * (1 + 0.1 * self.calls)


class Looks(Small):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * (2.0 if images.mean() > 0 else 1.0)


class PutsAnotherBuffer(Small):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(10))

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * logits.detach().mean(0)
        return logits - self.mean


class NormOfAll(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 5, stride=3), nn.BatchNorm2d(4, momentum=None), nn.Flatten(), nn.Linear(256, 10)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def darkened(images: Tensor) -> Tensor:
    return torch.stack([image * random.choice([0.5, 1.0]) for image in images])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "Python's random": ({"net": partial(Draws, draw=random.random)}, "numbers are drawn on the CPU"),
    "numpy's random": ({"net": partial(Draws, draw=np.random.rand)}, "numbers are drawn on the CPU"),
    "an objective that counts": ({"objective": Ramp()}, "Ramp changes 'batches', which a graph"),
    "a count outside": ({"objective": ramp()}, "objective changes 'batches', which a graph"),
    "a count": ({"net": Counts}, "the network changes 'calls'"),
    "a value that is read": ({"net": Looks}, r"reads a value.* \(\w+\.py, line \d+\)"),
    "another buffer": ({"net": PutsAnotherBuffer}, "it computes something else"),
    "batch norm over all batches": ({"net": NormOfAll}, "reads a value"),
    "an augmentation that draws in Python": ({"augmentation": darkened}, "numbers are drawn on the CPU"),
}


@pytest.mark.parametrize(("changes", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_a_graph_would_freeze_is_trained_without_one_and_said(
    changes: dict[str, Any],
    reason: str,
    compare: Callable[[Experiment], Training],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        captured = compare(declare(**changes)).captured

    assert captured.graphs == {}
    (said,) = caplog.messages
    assert said.startswith("no CUDA graph, so slower: ")
    assert re.search(reason, captured.refused)


def test_nothing_is_recorded_of_a_network_that_reads_values(few: Mnist, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording that fails may spoil torch's generator for the rest of the program."""
    recorded: list[object] = []
    graph_emulator.install(monkeypatch)
    monkeypatch.setattr(cudagraph, "record", lambda device, work: recorded.append(work))

    assert "reads a value" in train(declare(net=Looks, epochs=1), few).captured.refused
    assert recorded == []


def test_an_optimizer_that_evaluates_by_itself_has_no_graph(compare: Callable[[Experiment], Training]) -> None:
    training = compare(declare(optimizer=partial(LBFGS, lr=0.1, max_iter=2), scheduler=None, augmentation=None))
    assert training.captured.graphs == {}


def test_a_refused_graph_is_tagged(few: Mnist, monkeypatch: pytest.MonkeyPatch) -> None:
    graph_emulator.install(monkeypatch)
    tags = train(declare(net=Counts, epochs=1), few).captured.tags
    assert tags == {"cuda_graph": "refused: the network changes 'calls', which a graph would repeat for all batches"}


# ---- the calls of torch.cuda


def test_a_graph_is_recorded_on_the_runs_device_on_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []

    @contextlib.contextmanager
    def noted(name: str, *arguments: Any, **named: Any) -> Iterator[None]:
        calls.append((name, arguments or named))
        yield

    fake = types.SimpleNamespace(
        CUDAGraph=lambda: types.SimpleNamespace(replay=lambda: calls.append(("replay", None))),
        Stream=lambda device: f"stream of {device}",
        device=partial(noted, "device"),
        graph=lambda graph, **named: noted("graph", **named),
    )
    monkeypatch.setattr(cudagraph.torch, "cuda", fake)

    replay = cudagraph.record(torch.device("cuda:1"), lambda: calls.append(("work", None)))
    replay()

    assert calls == [
        ("device", (torch.device("cuda:1"),)),
        ("graph", {"stream": "stream of cuda:1", "capture_error_mode": "thread_local"}),
        ("work", None),
        ("replay", None),
    ]


# ---- on a device


@pytest.fixture
def on_cuda() -> Mnist:
    mnist = load_mnist(device="cuda")
    return dataclasses.replace(mnist, train_images=mnist.train_images[:3000], train_labels=mnist.train_labels[:3000])


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("stem", SCRIPTS)
def test_a_graph_is_used_on_cuda_for_each_script(stem: str, load_script: Load, on_cuda: Mnist) -> None:
    training = train(dataclasses.replace(load_script(stem).EXPERIMENT, epochs=2), on_cuda)
    assert training.captured.tags == {"cuda_graph": "used"}


@needs_cuda
@pytest.mark.gpu
def test_a_graph_trains_as_single_launches_do_on_cuda(
    load_script: Load, on_cuda: Mnist, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = dataclasses.replace(load_script("step4_augment_steplr").EXPERIMENT, epochs=2)
    graphed: list[EpochMetrics] = train(experiment, on_cuda).seen  # type: ignore[attr-defined]
    monkeypatch.setattr(cudagraph, "can_record", lambda device: False)
    single: list[EpochMetrics] = train(experiment, on_cuda).seen  # type: ignore[attr-defined]

    for one, other in zip(graphed, single, strict=True):
        assert one.train_loss == pytest.approx(other.train_loss, rel=1e-2)


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize(("changes", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_a_graph_would_freeze_is_trained_without_one_on_cuda(
    changes: dict[str, Any], reason: str, on_cuda: Mnist
) -> None:
    assert train(declare(epochs=1, **changes), on_cuda).captured.refused
