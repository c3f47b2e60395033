"""Averaged weights are what is evaluated, judged, kept and logged; the network itself is trained on as it is."""

import io
from collections.abc import Callable, Iterable
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import StepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from helpers import read_runs
from mnist_lab import Experiment
from mnist_lab.data import Mnist
from mnist_lab.errors import LabError
from mnist_lab.objectives import mixup
from mnist_lab.running import run as runner
from mnist_lab.running.job import Job
from mnist_lab.running.progress import Progress
from mnist_lab.running.rehearsal import rehearse
from mnist_lab.training.loop import Training, evaluate, fit, initial_network, num_params, predict
from mnist_lab.training.states import own_parts

CPU = torch.device("cpu")
EMA = partial(AveragedModel, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=True)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 5, stride=3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Flatten(),
            nn.Linear(256, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def declare(**changes: Any) -> Experiment:
    fields: dict[str, Any] = {"net": Net, "epochs": 3, "batch_size": 128, "optimizer": partial(SGD, lr=0.05)}
    return Experiment(**(fields | {"average": EMA} | changes))


def start(experiment: Experiment, mnist: Mnist) -> Training:
    return Training(initial_network(experiment, 0, CPU), own_parts(experiment), mnist, seed=0)


def test_the_average_is_torchs_over_the_batches(small_mnist: Mnist) -> None:
    weights: list[Tensor] = []
    experiment = declare(epochs=1)
    net = initial_network(experiment, 0, CPU)

    training = Training(
        net,
        experiment,
        small_mnist,
        seed=0,
        on_batch=lambda *_: weights.append(net.layers[5].weight.detach().clone()),  # type: ignore[union-attr]
    )
    list(training.epochs())

    expected = weights[0]
    for later in weights[1:]:
        expected = 0.7 * expected + 0.3 * later
    torch.testing.assert_close(training.result.layers[5].weight, expected)  # type: ignore[union-attr]


def test_averaging_leaves_the_training_as_it_is_and_both_accuracies_are_reported(small_mnist: Mnist) -> None:
    experiment = declare()
    plain = list(fit(initial_network(experiment, 0, CPU), declare(average=None), small_mnist, seed=0))

    averaged = start(experiment, small_mnist)
    for metrics, raw in zip(averaged.epochs(), plain, strict=True):
        assert (metrics.train_loss, metrics.raw_correct) == (raw.train_loss, raw.eval_correct)
        assert raw.raw_correct is None
        loss, correct = evaluate(predict(averaged.result, small_mnist.test_images), small_mnist.test_labels)
        assert (metrics.eval_loss, metrics.eval_correct) == (loss, correct)
    assert metrics.eval_loss != raw.eval_loss


class Mode(IntEnum):
    LINEAR = 1


class WarmsUp(nn.Module):
    """Counts its batches in an attribute of its own, and gives smaller logits in the first ones."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(784, 10)
        self.batches = 0
        self.rate, self.mode = np.float64(0.05), Mode.LINEAR  # a checkpoint is not read back with these types

    def forward(self, images: Tensor) -> Tensor:
        self.batches += self.training
        return self.linear(images.flatten(1)) * min(1.0, self.batches * self.rate * self.mode)


class Centred(nn.Module):
    """Keeps a mean in a buffer that its state_dict leaves out, and a bias in a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(784, 10)
        self.register_buffer("mean", torch.zeros(784), persistent=False)
        self.bias = torch.zeros(10)

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.flatten(1)
        if self.training:
            self.mean.lerp_(pixels.mean(0), 0.1)
            self.bias = 0.9 * self.bias + 0.1 * self.linear.bias.detach()
        return self.linear(pixels - self.mean) + self.bias


class Holds(Optimizer):
    """Steps by an optimizer that it holds, whose groups are its own, as SAM and Lookahead do."""

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})
        self.base = SGD(self.param_groups, lr=lr, momentum=0.9)
        self.param_groups = self.base.param_groups

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return self.base.step()


class Means:
    """Divides the loss by its running mean."""

    def __init__(self) -> None:
        self.mean = torch.ones(())

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = state["mean"]

    def __call__(self, net: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = net(images)
        loss = F.cross_entropy(logits, labels)
        self.mean = 0.9 * self.mean + 0.1 * loss.detach()
        return loss / self.mean, logits


class Normed(nn.Module):
    """A loss that divides by a mean in a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(()))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, labels)
        self.mean.mul_(0.9).add_(0.1 * loss.detach())
        return loss / self.mean


class LazyGrid(Net):
    """Makes a buffer in its first batch, and changes it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("grid", None, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if self.grid is None:
            self.grid = torch.ones(10)
        if self.training:
            self.grid = self.grid * 0.99
        return super().forward(images) * self.grid


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"objective": partial(mixup, alpha=0.3)},
        {"average": AveragedModel},
        {"net": WarmsUp, "average": None},
        {"net": Centred, "average": None},
        {"net": Centred},
        {"optimizer": partial(Holds, lr=0.05), "scheduler": partial(StepLR, step_size=1, gamma=0.3)},
        {"objective": Means()},
        {"objective": Means().__call__},
        {"objective": partial(Means.__call__, Means())},
        {"loss": Normed()},
        {"net": LazyGrid, "average": None},
    ],
)
def test_a_training_that_is_taken_up_again_ends_as_if_never_broken_off(changes: Any, small_mnist: Mnist) -> None:
    experiment = declare(**changes)
    whole = start(experiment, small_mnist)
    epochs = list(whole.epochs())

    first = start(experiment, small_mnist)
    next(first.epochs())
    kept = io.BytesIO()
    torch.save(first.state_dict(), kept)
    kept.seek(0)
    second = start(experiment, small_mnist)
    second.load_state_dict(torch.load(kept, weights_only=True))
    rest = list(second.epochs())

    assert [(one.train_loss, one.eval_loss, one.raw_correct) for one in rest] == [
        (one.train_loss, one.eval_loss, one.raw_correct) for one in epochs[1:]
    ]
    for name, value in whole.result.state_dict().items():
        assert torch.equal(value, second.result.state_dict()[name])


@pytest.fixture
def job(small_mnist: Mnist, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Job]:
    monkeypatch.setattr(runner, "load_mnist", lambda folder, device: small_mnist)
    script = tmp_path / "averaged.py"
    script.touch()

    def make(**changes: Any) -> Job:
        return Job(script=script, experiment=declare(**changes), tracking_uri=uri, threads=1)

    return make


def frozen(net: nn.Module) -> AveragedModel:
    average = AveragedModel(net)
    average.requires_grad_(False)
    return average


def test_a_frozen_average_counts_what_is_trained(small_mnist: Mnist) -> None:
    training = start(declare(average=frozen), small_mnist)
    assert num_params(training.result) == num_params(training.net) > 0


def test_a_run_logs_the_average_as_its_model_with_both_numbers_of_the_normalisation(
    job: Callable[..., Job], uri: str, database: Path, small_mnist: Mnist
) -> None:
    result = runner.run(job(normalize=(0.5, 0.5)), 0, Progress())

    (run,) = read_runs(database)
    mlflow.set_tracking_uri(uri)
    try:
        model = mlflow.pytorch.load_model(f"runs:/{run.run_id}/{run.tags['step']}")
        metadata = mlflow.models.get_model_info(f"runs:/{run.run_id}/{run.tags['step']}").metadata
    finally:
        mlflow.set_tracking_uri(None)
    mean, deviation = metadata["normalize"]
    logits = model((small_mnist.test_images.float() / 255 - mean) / deviation)
    correct = (logits.argmax(1) == small_mnist.test_labels).sum().item()
    assert correct == result.epochs[-1].eval_correct
    raw = [(epoch.epoch, epoch.raw_accuracy) for epoch in result.epochs]
    assert run.metrics["raw_test_accuracy"] == raw
    assert run.metrics["num_params"][0][1] == sum(p.numel() for p in Net().parameters())
    assert run.params["average"] == "AveragedModel"
    assert "decay=0.7" in run.params["multi_avg_fn"]


def of_another(net: nn.Module) -> AveragedModel:
    return AveragedModel(nn.Linear(784, 10))


def of_the_same_class(net: nn.Module) -> AveragedModel:
    return AveragedModel(Net())


def no_average(net: nn.Module) -> nn.Module:
    return net


@pytest.mark.parametrize(
    ("average", "sentence"),
    [
        (of_another, "average: is of another network than the one that it is given"),
        (of_the_same_class, "average: is of another network than the one that it is given"),
        (no_average, r"average: gives a Net, not a torch\.optim\.swa_utils\.AveragedModel"),
    ],
)
def test_an_average_that_is_none_of_this_network_is_refused(average: Any, sentence: str, small_mnist: Mnist) -> None:
    with pytest.raises(LabError, match=f"^{sentence}"):
        rehearse(declare(average=average), small_mnist)


def test_it_is_said_where_the_statistics_of_batch_norm_are_not_averaged(small_mnist: Mnist) -> None:
    (said,) = rehearse(declare(average=AveragedModel), small_mnist).notices
    assert "use_buffers=True" in said
    assert "use_buffers" not in str(rehearse(declare(), small_mnist).notices)
