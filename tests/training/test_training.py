"""The training loop, beside a plain one written here, and the rehearsal that comes before it."""

import dataclasses
import inspect
import itertools
import math
import random
import re
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adadelta, Adagrad, Adam, AdamW, Optimizer, RMSprop, Rprop
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.utils._python_dispatch import TorchDispatchMode

from mnist_lab import Experiment
from mnist_lab.augmentation import random_rotation
from mnist_lab.data import Mnist, hold_out
from mnist_lab.errors import LabError
from mnist_lab.running.record import epoch_metrics
from mnist_lab.running.rehearsal import rehearse
from mnist_lab.training.dropout import SparseDropout
from mnist_lab.training.generators import seed_generators
from mnist_lab.training.loop import (
    EpochMetrics,
    Training,
    evaluate,
    fit,
    initial_network,
    num_params,
    predict,
    step_takes,
)

TEST_FILE = "test_training.py"


class Linear(nn.Module):
    """The least that can be trained."""

    def __init__(self, outputs: int = 10) -> None:
        super().__init__()
        self.linear = nn.Linear(49, outputs)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(F.avg_pool2d(images, 4).flatten(1))


class Small(nn.Module):
    """A step's network in small: convolution, batch norm and dropout."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, bias=False),
            nn.BatchNorm2d(4),
            nn.Dropout(dropout),
            nn.ReLU(),
            nn.AvgPool2d(3),
            nn.Flatten(),
            nn.Linear(64, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def declare(**changes: Any) -> Experiment:
    fields: dict[str, Any] = {
        "net": Linear,
        "epochs": 2,
        "batch_size": 128,
        "optimizer": partial(SGD, lr=0.05, momentum=0.9),
    }
    return Experiment(**(fields | changes))


def train(experiment: Experiment, mnist: Mnist, seed: int = 0, **options: Any) -> tuple[nn.Module, list[EpochMetrics]]:
    torch.manual_seed(seed)
    net = experiment.net()
    return net, list(fit(net, experiment, mnist, seed=seed, **options))


def without_time(epochs: list[EpochMetrics]) -> list[EpochMetrics]:
    return [dataclasses.replace(epoch, epoch_seconds=0.0) for epoch in epochs]


def first(mnist: Mnist, number: int) -> Mnist:
    return dataclasses.replace(
        mnist, train_images=mnist.train_images[:number], train_labels=mnist.train_labels[:number]
    )


class Recorder:
    """Stands where an augmentation and a loss stand, and keeps what passes through, in order."""

    def __init__(self) -> None:
        self.images: list[Tensor] = []
        self.labels: list[Tensor] = []

    def augment(self, images: Tensor) -> Tensor:
        self.images.append((images * 255).round().to(torch.uint8))
        return images

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.labels.append(labels.clone())
        return F.cross_entropy(logits, labels)

    def epochs(self, batches: int) -> list[tuple[Tensor, Tensor]]:
        starts = range(0, len(self.images), batches)
        return [(torch.cat(self.images[i : i + batches]), torch.cat(self.labels[i : i + batches])) for i in starts]


def pairs(images: Tensor, labels: Tensor) -> list[tuple[bytes, int]]:
    """Return the images with their labels in an order that depends on the pixels only."""
    return sorted(zip((image.tobytes() for image in images.numpy()), labels.tolist(), strict=True))


# ---- what an epoch sees


def test_an_epoch_sees_every_image_once_with_its_label(mnist: Mnist) -> None:
    recorder = Recorder()

    _, (epoch,) = train(declare(epochs=1, augmentation=recorder.augment, loss=recorder.loss), mnist)

    assert [len(images) for images in recorder.images] == [128] * 468 + [96]
    ((images, labels),) = recorder.epochs(batches=469)
    assert pairs(images, labels) == pairs(mnist.train_images, mnist.train_labels)
    assert (epoch.train_images, epoch.eval_images) == (60_000, 10_000)


def test_so_does_each_epoch_after_it(small_mnist: Mnist) -> None:
    recorder = Recorder()

    train(declare(epochs=3, augmentation=recorder.augment, loss=recorder.loss), small_mnist)

    epochs = recorder.epochs(batches=4)
    assert len(epochs) == 3
    for images, labels in epochs:
        assert pairs(images, labels) == pairs(small_mnist.train_images, small_mnist.train_labels)


@pytest.mark.parametrize(("batch_size", "sizes"), [(500, [500]), (499, [499, 1]), (1000, [500]), (250, [250, 250])])
def test_the_last_batch_is_what_is_left(batch_size: int, sizes: list[int], small_mnist: Mnist) -> None:
    recorder = Recorder()
    train(declare(batch_size=batch_size, epochs=1, augmentation=recorder.augment), small_mnist)

    assert [len(images) for images in recorder.images] == sizes


def order_of(experiment: Experiment, mnist: Mnist, seed: int, draws_before: int = 0) -> list[Tensor]:
    recorder = Recorder()
    experiment = dataclasses.replace(experiment, augmentation=recorder.augment, loss=recorder.loss)
    torch.manual_seed(99)
    net = experiment.net()
    torch.rand(draws_before)
    list(fit(net, experiment, mnist, seed=seed))
    return [images for images, _ in recorder.epochs(batches=math.ceil(len(mnist.train_images) / experiment.batch_size))]


def test_the_order_depends_on_seed_and_epoch_only(small_mnist: Mnist) -> None:
    first_epoch, second_epoch = order_of(declare(), small_mnist, seed=3)

    assert not torch.equal(first_epoch, second_epoch)
    assert not torch.equal(first_epoch, order_of(declare(), small_mnist, seed=4)[0])
    assert not torch.equal(first_epoch, small_mnist.train_images)
    for other in (
        declare(net=Small),
        declare(batch_size=50),
        declare(epochs=5),
        declare(optimizer=partial(AdamW, lr=0.001)),
        declare(scheduler=partial(StepLR, step_size=1)),
    ):
        again = order_of(other, small_mnist, seed=3, draws_before=7)
        assert torch.equal(again[0], first_epoch)
        assert torch.equal(again[1], second_epoch)


def test_the_order_is_that_of_torchs_cpu_generator(small_mnist: Mnist) -> None:
    """The same on every device and in every version of the lab, so that earlier runs can be repeated."""
    generator = torch.Generator().manual_seed(3)

    for images in order_of(declare(), small_mnist, seed=3):
        assert torch.equal(images, small_mnist.train_images[torch.randperm(500, generator=generator)])


def test_pixels_are_normalized(mnist: Mnist) -> None:
    seen: list[Tensor] = []

    class Watching(Linear):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images.detach().clone())
            return super().forward(images)

    train(declare(net=Watching, epochs=1, batch_size=60_000), mnist)
    training_pixels, test_pixels = seen[0], torch.cat(seen[1:])

    assert training_pixels.shape == (60_000, 1, 28, 28)
    assert abs(training_pixels.mean()) < 0.001
    assert abs(training_pixels.std() - 1) < 0.001
    expected = (mnist.test_images.double() / 255 - 0.1307) / 0.3081
    torch.testing.assert_close(test_pixels.double(), expected, rtol=0, atol=1e-5)


def test_augmentation_is_for_training_images_as_fractions(small_mnist: Mnist) -> None:
    calls: list[Tensor] = []

    def invert(images: Tensor) -> Tensor:
        calls.append(images.clone())
        return images.neg_().add_(1)  # in place: the data must not notice

    before = small_mnist.train_images.clone()
    _, inverted = train(declare(epochs=1, augmentation=invert), small_mnist)

    assert sum(len(images) for images in calls) == 500
    assert all(images.dtype == torch.float32 and images.min() == 0 and images.max() == 1 for images in calls)
    assert torch.equal(small_mnist.train_images, before)
    negatives = dataclasses.replace(small_mnist, train_images=255 - small_mnist.train_images)
    _, plain = train(declare(epochs=1), negatives)
    assert inverted[0].train_loss == pytest.approx(plain[0].train_loss, abs=1e-5)
    assert inverted[0].eval_correct == pytest.approx(plain[0].eval_correct, abs=1)


# ---- the figures


def reference_epochs(experiment: Experiment, mnist: Mnist, seed: int) -> Iterator[dict[str, float]]:
    """Train as a beginner would write it, one value read off at a time."""
    torch.manual_seed(seed)
    net = experiment.net()
    optimizer = experiment.optimizer(net.parameters())
    scheduler = experiment.scheduler(optimizer) if experiment.scheduler else None
    generator = torch.Generator().manual_seed(seed)
    for _ in range(experiment.epochs):
        net.train()
        losses, corrects = [], 0
        for batch in torch.randperm(len(mnist.train_images), generator=generator).split(experiment.batch_size):
            images, labels = mnist.train_images[batch] / 255, mnist.train_labels[batch]
            if experiment.augmentation is not None:
                images = experiment.augmentation(images)
            optimizer.zero_grad()
            with SparseDropout():
                log_probabilities = F.log_softmax(net((images - 0.1307) / 0.3081), dim=1)
            loss = F.nll_loss(log_probabilities, labels)
            loss.backward()
            optimizer.step()
            losses += [loss.item()] * len(batch)
            corrects += int((log_probabilities.argmax(dim=1) == labels).sum())
        lr = optimizer.param_groups[0]["lr"]
        if scheduler is not None:
            scheduler.step()
        net.eval()
        with torch.no_grad():
            log_probabilities = F.log_softmax(net((mnist.test_images / 255 - 0.1307) / 0.3081), dim=1)
        yield {
            "lr": lr,
            "train_loss": statistics.fmean(losses),
            "train_correct": corrects,
            "train_accuracy": 100 * corrects / len(losses),
            "eval_loss": F.nll_loss(log_probabilities, mnist.test_labels).item(),
            "eval_correct": int((log_probabilities.argmax(dim=1) == mnist.test_labels).sum()),
        }


@pytest.mark.parametrize(
    "experiment",
    [
        declare(epochs=3),
        declare(net=Small, epochs=3),
        declare(
            net=Small,
            epochs=3,
            batch_size=48,
            scheduler=partial(StepLR, step_size=2, gamma=0.6),
            augmentation=partial(random_rotation, degrees=7.0),
        ),
        declare(net=partial(Small, dropout=0.0), epochs=3, optimizer=partial(AdamW, lr=0.01)),
    ],
)
def test_figures_equal_those_of_a_plain_loop(experiment: Experiment, small_mnist: Mnist) -> None:
    _, epochs = train(experiment, small_mnist, seed=5)
    expected = list(reference_epochs(experiment, small_mnist, seed=5))

    assert len(epochs) == len(expected) == 3
    for epoch, figures in zip(epochs, expected, strict=True):
        for name, figure in figures.items():
            assert getattr(epoch, name) == pytest.approx(figure, rel=0, abs=1e-5), f"{name} of epoch {epoch.epoch}"
    assert epochs[-1].train_loss < epochs[0].train_loss


def test_epochs_count_from_1_and_are_timed(small_mnist: Mnist) -> None:
    _, epochs = train(declare(epochs=3), small_mnist)

    assert [epoch.epoch for epoch in epochs] == [1, 2, 3]
    assert all(0 < epoch.epoch_seconds < 10 for epoch in epochs)


def test_an_epoch_is_there_as_soon_as_it_is_finished(small_mnist: Mnist) -> None:
    net = Linear()
    epochs = fit(net, declare(epochs=1000), small_mnist, seed=0)

    one = next(epochs)
    assert (one.eval_loss, one.eval_correct) == evaluate(predict(net, small_mnist.test_images), small_mnist.test_labels)
    two = next(epochs)
    assert (one.epoch, two.epoch) == (1, 2)
    assert two.eval_loss != one.eval_loss


def test_accuracies_are_percentages_of_the_images() -> None:
    epoch = EpochMetrics(
        epoch=1,
        train_loss=0.1,
        train_correct=59_000,
        train_images=60_000,
        eval_loss=0.1,
        eval_correct=9_946,
        eval_images=10_000,
        lr=0.1,
        epoch_seconds=1.0,
    )

    assert epoch.train_accuracy == pytest.approx(98.3333, abs=1e-4)
    assert epoch.eval_accuracy == 99.46


def test_the_declared_loss_is_minimised_and_the_test_loss_stays_cross_entropy(small_mnist: Mnist) -> None:
    smoothed = declare(loss=partial(F.cross_entropy, label_smoothing=0.2))
    net, epochs = train(smoothed, small_mnist)
    _, plain = train(declare(), small_mnist)

    assert epochs[-1].objective is not None
    assert epochs[-1].objective > plain[-1].train_loss + 0.1
    expected = F.cross_entropy(predict(net, small_mnist.test_images), small_mnist.test_labels).item()
    assert epochs[-1].eval_loss == pytest.approx(expected, abs=1e-6)
    assert epochs[-1].eval_loss != plain[-1].eval_loss


def test_train_loss_is_the_cross_entropy_per_image_whatever_is_minimised(small_mnist: Mnist) -> None:
    """A sum over the batch with a rate divided by its size trains as the mean does, so it shows the same figures."""
    summed = declare(
        epochs=1,
        batch_size=100,
        loss=partial(F.cross_entropy, reduction="sum"),
        optimizer=partial(SGD, lr=0.05 / 100),
    )
    _, (of_sum,) = train(summed, small_mnist)
    _, (of_mean,) = train(declare(epochs=1, batch_size=100, optimizer=partial(SGD, lr=0.05)), small_mnist)

    assert of_sum.train_loss == pytest.approx(of_mean.train_loss, rel=1e-5)
    assert of_sum.objective == pytest.approx(100 * of_mean.train_loss, rel=1e-5)
    assert of_mean.objective is None


def test_the_objective_is_the_mean_over_the_batches(small_mnist: Mnist) -> None:
    given: list[float] = []

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        result = F.multi_margin_loss(logits, labels)
        given.append(result.item())
        return result

    _, (epoch,) = train(declare(epochs=1, loss=loss), small_mnist)

    assert epoch.objective == pytest.approx(statistics.fmean(given))
    assert len(given) == 4  # 128, 128, 128 and 116 images


def test_a_divergence_is_seen_in_what_is_minimised(small_mnist: Mnist) -> None:
    def breaks(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels) + (math.inf if len(labels) == 116 else 0.0)

    with pytest.raises(LabError, match=r"^loss: is inf in epoch 1 of 2, batch 4 of 4; the training has diverged"):
        train(declare(loss=breaks), small_mnist)


def test_log_probabilities_give_the_same_figures_as_logits(small_mnist: Mnist) -> None:
    class LogSoftmax(Linear):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images).log_softmax(dim=1)

    _, epochs = train(declare(net=LogSoftmax), small_mnist)
    _, nll_epochs = train(declare(net=LogSoftmax, loss=F.nll_loss), small_mnist)
    _, expected = train(declare(), small_mnist)

    for other in (epochs, nll_epochs):
        assert other[-1].train_loss == pytest.approx(expected[-1].train_loss, abs=1e-5)
        assert other[-1].eval_loss == pytest.approx(expected[-1].eval_loss, abs=1e-5)


def test_evaluate_is_the_mean_cross_entropy_and_the_number_correct() -> None:
    logits = torch.tensor([[4.0, 1.0, 1.0], [0.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
    labels = torch.tensor([0, 1, 0])
    losses = [
        -row[label] + math.log(sum(map(math.exp, row)))
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True)
    ]

    loss, correct = evaluate(logits, labels)

    assert loss == pytest.approx(statistics.fmean(losses), abs=1e-6)
    assert correct == 2


# ---- evaluation


def test_evaluation_is_in_eval_mode_and_leaves_the_network_alone(mnist: Mnist) -> None:
    torch.manual_seed(0)
    net = Small(dropout=0.5)
    list(fit(net, declare(net=Small, epochs=1), first(mnist, 500), seed=0))
    net.train()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    random_state = torch.get_rng_state()

    logits = predict(net, mnist.test_images)

    assert logits.shape == (10_000, 10)
    assert torch.equal(predict(net, mnist.test_images), logits)  # no dropout
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name]), name
    with torch.no_grad():
        some = net.eval()((mnist.test_images[-7:] / 255 - 0.1307) / 0.3081)
    torch.testing.assert_close(logits[-7:], some, rtol=0, atol=1e-4)  # of this network, in the images' order


class SaysItsMode(nn.Module):
    """Gives logits that say whether it is in training mode; part of it is frozen in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Dropout()
        self.frozen.eval()

    def forward(self, images: Tensor) -> Tensor:
        return torch.full((len(images), 10), float(self.training))


def test_prediction_leaves_each_part_in_its_mode(small_mnist: Mnist) -> None:
    net = SaysItsMode()

    assert not predict(net, small_mnist.test_images).any()  # never in training mode
    assert (net.training, net.frozen.training) == (True, False)

    net.eval()
    predict(net, small_mnist.test_images)
    assert (net.training, net.frozen.training) == (False, False)


def test_prediction_that_fails_leaves_the_mode_too(small_mnist: Mnist) -> None:
    class RaisesInEvaluation(SaysItsMode):
        def forward(self, images: Tensor) -> Tensor:
            raise ArithmeticError("no")

    net = RaisesInEvaluation()

    with pytest.raises(ArithmeticError, match="no"):
        predict(net, small_mnist.test_images)

    assert (net.training, net.frozen.training) == (True, False)


def test_with_a_hold_out_the_test_images_are_not_read(mnist: Mnist) -> None:
    held_out = hold_out(first(mnist, 2000), 300)
    sizes = {"test_images": held_out.test_images.to("meta"), "test_labels": held_out.test_labels.to("meta")}
    blind = dataclasses.replace(held_out, **sizes)  # without values: reading one is an error

    rehearse(declare(), blind)
    net, epochs = train(declare(), blind)

    assert {(epoch.evaluated_on, epoch.train_images, epoch.eval_images) for epoch in epochs} == {
        ("validation", 1700, 300)
    }
    assert held_out.validation_images is not None
    assert held_out.validation_labels is not None
    logits = predict(net, held_out.validation_images)
    assert (epochs[-1].eval_loss, epochs[-1].eval_correct) == evaluate(logits, held_out.validation_labels)


def test_training_is_in_training_mode_in_every_epoch(small_mnist: Mnist) -> None:
    modes: list[bool] = []

    class Watching(Linear):
        def forward(self, images: Tensor) -> Tensor:
            modes.append(self.training)
            return super().forward(images)

    train(declare(net=Watching, epochs=2), small_mnist)

    assert modes == ([True] * 4 + [False]) * 2


# ---- optimizers and schedules


def a_group_for_each(parameters: Iterator[nn.Parameter]) -> Optimizer:
    return SGD([{"params": [parameter]} for parameter in parameters], lr=0.05)


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(SGD, lr=0.05, nesterov=True, momentum=0.9, weight_decay=1e-4),
        partial(Adam, lr=0.01),
        partial(AdamW, lr=0.01, foreach=True),
        partial(RMSprop, lr=0.005),
        partial(Adagrad, lr=0.05),
        partial(Adadelta, lr=1.0),
        partial(Rprop, lr=0.001),
        partial(LBFGS, lr=0.1, max_iter=4),
        a_group_for_each,
    ],
)
def test_any_optimizer_of_torch_trains(optimizer: Callable[..., Optimizer], small_mnist: Mnist) -> None:
    experiment = declare(optimizer=optimizer, epochs=4)
    experiment.check()
    rehearse(experiment, small_mnist)

    _, epochs = train(experiment, small_mnist)

    assert epochs[-1].train_loss < 0.9 * epochs[0].train_loss
    assert epochs[-1].eval_correct > epochs[0].eval_correct


def test_an_optimizer_that_evaluates_often_reports_the_loss_before_its_step(small_mnist: Mnist) -> None:
    """So that training loss means the same as with SGD: the network's on a batch that it has not been fitted to yet."""
    net = Linear()
    before = evaluate(predict(net, small_mnist.train_images), small_mnist.train_labels)
    lbfgs = declare(net=Linear, epochs=1, batch_size=500, optimizer=partial(LBFGS, lr=0.5, max_iter=8))

    (epoch,) = fit(net, lbfgs, small_mnist, seed=0)

    assert (epoch.train_loss, epoch.train_correct) == (pytest.approx(before[0], abs=1e-5), before[1])
    after = evaluate(predict(net, small_mnist.train_images), small_mnist.train_labels)
    assert after[0] < 0.9 * before[0]


def weights(net: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


def test_the_hooks_of_an_optimizer_find_the_gradients(small_mnist: Mnist) -> None:
    norms: list[tuple[float, float]] = []

    def clipped(parameters: Iterator[nn.Parameter]) -> Optimizer:
        optimizer = SGD(parameters, lr=1.0)

        def clip(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            group = optimizer.param_groups[0]["params"]
            before = nn.utils.clip_grad_norm_(group, 1e-3)
            norms.append((before.item(), nn.utils.get_total_norm([p.grad for p in group]).item()))

        optimizer.register_step_pre_hook(clip)
        return optimizer

    torch.manual_seed(0)
    start = weights(Linear())
    net, _ = train(declare(epochs=1, optimizer=clipped), small_mnist)

    assert len(norms) == 4
    assert all(before > 1e-3 and after == pytest.approx(1e-3, rel=1e-2) for before, after in norms)
    assert 0 < (weights(net) - start).norm() <= 4.1e-3


def test_an_optimizer_that_can_do_without_a_closure_gets_none(small_mnist: Mnist) -> None:
    given: list[object] = []

    class Watching(SGD):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            given.append(closure)
            return super().step(closure)

    train(declare(epochs=1, optimizer=partial(Watching, lr=0.05), scheduler=partial(StepLR, step_size=1)), small_mnist)

    assert set(given) == {None}


class OwnLBFGS(LBFGS):
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return super().step(closure)


class AnyArguments(LBFGS):
    def step(self, *args: Any, **kwargs: Any) -> Any:
        return super().step(*args, **kwargs)


class Around(Optimizer):
    def __init__(self, parameters: Iterator[nn.Parameter], base: Callable[..., Optimizer]) -> None:
        self.base = base(parameters)
        super().__init__(self.base.param_groups, {})

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return self.base.step(closure)


@pytest.mark.parametrize(
    ("optimizer", "takes"),
    [
        (partial(LBFGS, lr=0.1), "closure"),
        (partial(OwnLBFGS, lr=0.1), "closure"),
        (partial(AnyArguments, lr=0.1), "closure"),
        (partial(Around, base=partial(LBFGS, lr=0.1)), "closure"),
        (partial(Around, base=SGD), "gradients"),
        (Adam, "gradients"),
        (lambda parameters: [o := LBFGS(parameters, lr=0.1), StepLR(o, 1)][0], "closure"),
        (lambda parameters: [o := SGD(parameters), StepLR(o, 1)][0], "gradients"),
    ],
)
def test_a_closure_goes_to_optimizers_that_evaluate_by_themselves(
    optimizer: Callable[..., Optimizer], takes: str, small_mnist: Mnist
) -> None:
    assert step_takes(declare(optimizer=optimizer), Linear()) == takes
    rehearse(declare(optimizer=optimizer), small_mnist)
    _, (first, second) = train(declare(optimizer=optimizer), small_mnist)
    assert second.train_loss < first.train_loss


def test_the_rate_of_each_parameter_group_is_reported(small_mnist: Mnist) -> None:
    def three_groups(parameters: Iterator[nn.Parameter]) -> Optimizer:
        weight, bias = parameters
        more = nn.Parameter(torch.zeros(1))
        groups = [{"params": [weight]}, {"params": [bias], "lr": 0.5}, {"params": [more], "lr": 0.0}]
        return SGD(groups, lr=0.1)

    _, epochs = train(declare(optimizer=three_groups, scheduler=partial(StepLR, step_size=1, gamma=0.5)), small_mnist)

    assert [(epoch.lr, *epoch.other_lrs) for epoch in epochs] == [(0.1, 0.5, 0.0), (0.05, 0.25, 0.0)]
    assert {name: rate for name, rate in epoch_metrics(epochs[1]).items() if name.startswith("lr")} == {
        "lr": 0.05,
        "lr_1": 0.25,
        "lr_2": 0.0,
    }


def rates(experiment: Experiment, mnist: Mnist) -> tuple[list[float], list[float]]:
    """Return the learning rate as reported for each epoch, and as it stood for each batch."""
    optimizers: list[Optimizer] = []
    per_batch: list[float] = []

    def build(parameters: Iterator[nn.Parameter]) -> Optimizer:
        optimizers.append(experiment.optimizer(parameters))
        return optimizers[-1]

    def note_rate(images: Tensor) -> Tensor:
        per_batch.append(float(optimizers[0].param_groups[0]["lr"]))
        return images

    _, epochs = train(dataclasses.replace(experiment, optimizer=build, augmentation=note_rate), mnist)
    return [epoch.lr for epoch in epochs], per_batch


def torchs_rates(experiment: Experiment, steps: int, **arguments: object) -> list[float]:
    """Return the rates that torch's own scheduler gives, stepped `steps` times."""
    optimizer = experiment.optimizer([nn.Parameter(torch.zeros(1))])
    scheduler = experiment.scheduler(optimizer, **arguments)
    sequence = []
    for _ in range(steps):
        sequence.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return sequence


def warm_up_then_decay(optimizer: Optimizer) -> SequentialLR:
    warm_up = LambdaLR(optimizer, lambda step: (step + 1) / 3)
    return SequentialLR(optimizer, [warm_up, ExponentialLR(optimizer, 0.5)], milestones=[2])


SCHEDULES = [
    partial(StepLR, step_size=2, gamma=0.6),
    partial(CosineAnnealingLR, T_max=5),
    warm_up_then_decay,
]


@pytest.mark.parametrize("scheduler", SCHEDULES)
def test_schedule_per_epoch_is_torchs_own(scheduler: Callable[..., LRScheduler], small_mnist: Mnist) -> None:
    experiment = declare(epochs=5, batch_size=200, scheduler=scheduler)

    per_epoch, per_batch = rates(experiment, small_mnist)

    expected = torchs_rates(experiment, 5)
    assert len(set(expected)) > 2
    assert per_epoch == expected
    assert per_batch == [rate for rate in expected for _ in range(3)]


@pytest.mark.parametrize("scheduler", SCHEDULES)
def test_schedule_per_batch_is_torchs_own(scheduler: Callable[..., LRScheduler], small_mnist: Mnist) -> None:
    experiment = declare(epochs=2, batch_size=200, scheduler=scheduler, scheduler_interval="batch")

    per_epoch, per_batch = rates(experiment, small_mnist)

    expected = torchs_rates(experiment, 6)
    assert per_batch == expected
    assert per_epoch == expected[::3]  # of each epoch's first batch


def test_one_cycle_is_given_the_runs_epochs_and_batches(small_mnist: Mnist) -> None:
    experiment = declare(
        epochs=3, batch_size=128, scheduler=partial(OneCycleLR, max_lr=0.2), scheduler_interval="batch"
    )
    rehearse(experiment, small_mnist)

    _, per_batch = rates(experiment, small_mnist)

    assert per_batch == torchs_rates(experiment, 12, epochs=3, steps_per_epoch=4)
    assert max(per_batch) == pytest.approx(0.2, abs=0.01)
    assert per_batch[-1] < per_batch[0] / 100


def test_one_cycle_per_epoch_turns_once_in_the_run(small_mnist: Mnist) -> None:
    """One step is an epoch here: with a batch's worth of steps it would stay in its warm-up to the end."""
    experiment = declare(epochs=6, scheduler=partial(OneCycleLR, max_lr=0.2))
    rehearse(experiment, small_mnist)

    per_epoch, _ = rates(experiment, small_mnist)

    assert per_epoch == torchs_rates(experiment, 6, total_steps=6)
    assert per_epoch[-1] < per_epoch[0] / 100


@pytest.mark.parametrize("given", [{"total_steps": 20}, {"epochs": 5}, {"epochs": 5, "steps_per_epoch": 4}])
def test_what_the_script_gives_one_cycle_is_kept(given: dict[str, int], small_mnist: Mnist) -> None:
    experiment = declare(epochs=3, scheduler=partial(OneCycleLR, max_lr=0.2, **given), scheduler_interval="batch")
    rehearse(experiment, small_mnist)

    _, per_batch = rates(experiment, small_mnist)

    assert per_batch == torchs_rates(declare(scheduler=partial(OneCycleLR, max_lr=0.2)), 20, total_steps=20)[:12]


def test_a_schedule_of_the_scripts_own_is_given_what_it_asks_for(small_mnist: Mnist) -> None:
    def linear_to_zero(optimizer: Optimizer, epochs: int, steps_per_epoch: int) -> LambdaLR:
        return LambdaLR(optimizer, lambda step: 1 - step / (epochs * steps_per_epoch))

    experiment = declare(epochs=2, batch_size=250, scheduler=linear_to_zero, scheduler_interval="batch")
    rehearse(experiment, small_mnist)

    assert rates(experiment, small_mnist)[1] == pytest.approx([0.05, 0.0375, 0.025, 0.0125])


def test_reduce_on_plateau_follows_the_training_loss(small_mnist: Mnist) -> None:
    experiment = declare(epochs=10, scheduler=partial(ReduceLROnPlateau, factor=0.5, patience=0, threshold=0.2))
    rehearse(experiment, small_mnist)

    _, epochs = train(experiment, small_mnist)

    def rates_after(losses: list[float]) -> list[float]:
        optimizer = experiment.optimizer([nn.Parameter(torch.zeros(1))])
        scheduler = experiment.scheduler(optimizer)
        sequence = []
        for loss in losses:
            sequence.append(optimizer.param_groups[0]["lr"])
            scheduler.step(loss)
        return sequence

    measured = [epoch.lr for epoch in epochs]
    assert measured == rates_after([epoch.train_loss for epoch in epochs])
    assert measured != rates_after([epoch.eval_loss for epoch in epochs])
    assert measured != rates_after([1.0] * 10)


# ---- seeds


def test_one_seed_gives_one_result(small_mnist: Mnist) -> None:
    experiment = declare(
        net=Small, augmentation=partial(random_rotation, degrees=7.0), scheduler=partial(StepLR, step_size=1)
    )

    net, epochs = train(experiment, small_mnist, seed=1)
    twin, twin_epochs = train(experiment, small_mnist, seed=1)
    _, other_epochs = train(experiment, small_mnist, seed=2)

    assert without_time(epochs) == without_time(twin_epochs)
    for name, value in net.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name
    assert epochs[0].train_loss != other_epochs[0].train_loss


class DrawsElsewhere:
    """An augmentation that draws from Python's and numpy's generators."""

    def __call__(self, images: Tensor) -> Tensor:
        return torch.stack([self.change(image) for image in images])

    def change(self, image: Tensor) -> Tensor:
        return image.roll(random.randint(-2, 2), dims=-1) * float(np.random.uniform(0.5, 1.0))  # noqa: NPY002


def test_a_seed_decides_what_python_and_numpy_draw(small_mnist: Mnist) -> None:
    experiment = declare(net=partial(Small, dropout=0.0), augmentation=DrawsElsewhere())

    def trained(seed: int) -> list[EpochMetrics]:
        net = initial_network(experiment, seed, torch.device("cpu"))
        return without_time(list(fit(net, experiment, small_mnist, seed=0)))

    first = trained(5)
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002
    assert trained(5) == first
    assert trained(6) != first


def test_the_generators_are_seeded_before_the_network_is_built() -> None:
    class InitialisedByNumpy(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.linear.weight.data = torch.tensor(np.random.normal(size=(10, 49)) + random.random())  # noqa: NPY002

    first, second, other = (
        initial_network(declare(net=InitialisedByNumpy), seed, torch.device("cpu")) for seed in (1, 1, 2)
    )
    assert torch.equal(first.linear.weight, second.linear.weight)
    assert not torch.equal(first.linear.weight, other.linear.weight)


def test_dropout_and_augmentation_draw_from_torchs_seed(small_mnist: Mnist) -> None:
    """With the same weights and order, the default generator's seed alone makes the difference."""
    for experiment in (
        declare(net=partial(Small, dropout=0.3)),
        declare(net=partial(Small, dropout=0.0), augmentation=partial(random_rotation, degrees=15.0)),
    ):
        losses = []
        for draws_seed in (10, 10, 11):
            torch.manual_seed(0)
            net = experiment.net()
            torch.manual_seed(draws_seed)
            losses.append([epoch.train_loss for epoch in fit(net, experiment, small_mnist, seed=0)])
        assert losses[0] == losses[1]
        assert losses[0][0] != losses[2][0]


# ---- on_batch and waiting for the device


def test_on_batch_sees_running_sums(small_mnist: Mnist) -> None:
    calls: list[tuple[int, float, int]] = []

    def on_batch(seen: int, loss_sum: Tensor, correct: Tensor) -> None:
        assert loss_sum.shape == correct.shape == ()
        calls.append((seen, loss_sum.item(), int(correct.item())))

    _, epochs = train(declare(), small_mnist, on_batch=on_batch)

    assert [seen for seen, _, _ in calls] == [128, 256, 384, 500] * 2
    for batches, epoch in zip((calls[:4], calls[4:]), epochs, strict=True):
        assert all(0 < a[1] < b[1] and 0 <= a[2] <= b[2] for a, b in itertools.pairwise(batches))
        assert batches[0][1] < 128 * 5  # begins anew in each epoch
        assert batches[-1][1] / 500 == pytest.approx(epoch.train_loss, abs=1e-6)
        assert batches[-1][2] == epoch.train_correct


class CountWaits(TorchDispatchMode):
    """Counts the operations that make the host wait for the device, whatever the device here."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        by_mask = name == "index" and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        self.count += name in self.WAITING or by_mask
        self.operations += 1
        return func(*args, **(kwargs or {}))


def test_the_counter_counts_waits() -> None:
    numbers = torch.tensor([1.0, 2.0])
    with CountWaits() as waits:
        numbers.sum().item()
        if numbers.sum() > 0:
            numbers[numbers > 1].sum()
    assert waits.count == 3


def waits_in_epochs(experiment: Experiment, mnist: Mnist) -> tuple[int, int]:
    net = experiment.net()
    with CountWaits() as waits:
        list(fit(net, experiment, mnist, seed=0))
    return waits.count, waits.operations


@pytest.mark.parametrize("loss", [F.cross_entropy, nn.CrossEntropyLoss(label_smoothing=0.1)])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("interval", ["epoch", "batch"])
def test_no_batch_waits_for_the_device(
    loss: Callable[[Tensor, Tensor], Tensor],
    foreach: bool,
    interval: str,
    small_mnist: Mnist,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mnist_lab.training.dropout.MAX_P", 0)  # as on a GPU, where dropout is torch's own
    experiment = declare(
        net=Small,
        epochs=1,
        batch_size=16,
        loss=loss,
        optimizer=partial(SGD, lr=0.05, momentum=0.9, foreach=foreach),
        scheduler=partial(StepLR, step_size=2),
        scheduler_interval=interval,
        augmentation=partial(random_rotation, degrees=7.0),
    )

    few, few_operations = waits_in_epochs(experiment, first(small_mnist, 32))
    many, many_operations = waits_in_epochs(experiment, first(small_mnist, 480))

    assert many_operations > 10 * few_operations  # 2 and 30 batches
    assert many == few <= 6  # the epoch's own: loss and correct, of training and of test images


# ---- stopped and taken up again


@pytest.mark.parametrize(
    "changes",
    [
        {"scheduler": partial(StepLR, step_size=2)},
        {"augmentation": DrawsElsewhere()},
        {"loss": nn.CrossEntropyLoss(label_smoothing=0.1), "optimizer": partial(LBFGS, lr=0.1, max_iter=2)},
        {"scheduler": partial(OneCycleLR, max_lr=0.1), "scheduler_interval": "batch"},
        {"scheduler": partial(ReduceLROnPlateau, patience=0), "optimizer": partial(AdamW, lr=0.01)},
    ],
)
def test_a_training_that_is_taken_up_again_ends_as_one_that_never_stopped(
    changes: dict[str, Any], small_mnist: Mnist, tmp_path: Path
) -> None:
    mnist = first(small_mnist, 500)
    experiment = declare(
        **{"net": Small, "epochs": 4, "augmentation": partial(random_rotation, degrees=7.0), **changes}
    )
    net = initial_network(experiment, 3, torch.device("cpu"), torch.contiguous_format)
    whole = list(fit(net, experiment, mnist, seed=3))

    first_net = initial_network(experiment, 3, torch.device("cpu"), torch.contiguous_format)
    stopped = Training(first_net, experiment, mnist, seed=3)
    epochs = stopped.epochs()
    before = [next(epochs), next(epochs)]
    torch.save(stopped.state_dict(), tmp_path / "state.pt")
    seed_generators(99)
    again = Training(Small(), experiment, mnist, seed=12)  # all that counts comes from the state
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    after = list(again.epochs())

    assert without_time(before + after) == without_time(whole)
    assert all(torch.equal(tensor, again.net.state_dict()[name]) for name, tensor in net.state_dict().items())


# ---- a loss that is not finite


class Breaks(Linear):
    """Gives NaN in training from its sixth batch on."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = 0

    def forward(self, images: Tensor) -> Tensor:
        self.batches += self.training
        return super().forward(images) * (math.nan if self.batches >= 6 else 1)


def test_a_loss_that_is_not_finite_is_named_by_epoch_and_batch(small_mnist: Mnist) -> None:
    experiment = declare(net=Breaks, epochs=3, batch_size=125)  # four batches an epoch
    epochs = fit(Breaks(), experiment, small_mnist, seed=0)

    assert next(epochs).epoch == 1
    with pytest.raises(LabError, match=r"^loss: is nan in epoch 2 of 3, batch 2 of 4; the training has diverged"):
        next(epochs)


# ---- num_params


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bare = nn.Parameter(torch.zeros(7))
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.first.weight
        self.register_buffer("buffer", torch.zeros(100))


def test_parameters_are_counted_once_bare_ones_too_frozen_ones_not() -> None:
    net = Shared()
    assert num_params(net) == 7 + 16 + 4

    net.first.bias.requires_grad_(False)
    assert num_params(net) == 7 + 16

    assert num_params(nn.BatchNorm2d(8)) == 16
    assert num_params(nn.Flatten()) == 0


# ---- rehearse


def test_a_rehearsal_changes_nothing(small_mnist: Mnist) -> None:
    experiment = declare(
        net=Small,
        scheduler=partial(OneCycleLR, max_lr=0.1),
        scheduler_interval="batch",
        augmentation=DrawsElsewhere(),
    )
    copies = [tensor.clone() for tensor in (small_mnist.train_images, small_mnist.train_labels)]
    declared = experiment.hyperparameters()
    seed_generators(4)
    expected = random.random(), np.random.random(), torch.rand(1)  # noqa: NPY002
    seed_generators(4)

    rehearse(experiment, small_mnist)

    assert (random.random(), np.random.random(), torch.rand(1)) == expected  # noqa: NPY002
    assert torch.equal(small_mnist.train_images, copies[0])
    assert torch.equal(small_mnist.train_labels, copies[1])
    assert experiment.hyperparameters() == declared
    assert torch.is_grad_enabled()


def test_a_rehearsed_run_gives_the_same_result(small_mnist: Mnist) -> None:
    experiment = declare(net=Small, augmentation=partial(random_rotation, degrees=7.0))
    _, expected = train(experiment, small_mnist)

    torch.manual_seed(0)
    rehearse(experiment, small_mnist)
    net = experiment.net()
    epochs = list(fit(net, experiment, small_mnist, seed=0))

    assert without_time(epochs) == without_time(expected)


def test_a_refused_rehearsal_leaves_the_random_state_too(small_mnist: Mnist) -> None:
    random_state = torch.get_rng_state()
    with pytest.raises(LabError):
        rehearse(declare(net=partial(Linear, outputs=9)), small_mnist)

    assert torch.equal(torch.get_rng_state(), random_state)


class Raises(Linear):
    def forward(self, images: Tensor) -> Tensor:
        raise RuntimeError("nothing works\n  here")


class RaisesInTheStandardLibrary(Linear):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * statistics.mean([])


class RaisesInTorch(Linear):
    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images)


class GivesNaN(Linear):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) / 0 * 0


class GivesTuple(Linear):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images), images


class FailsInEvaluation(Linear):
    def forward(self, images: Tensor) -> Tensor:
        output = super().forward(images)
        return output if self.training else output[:, :9]


class FailsInBackward(Linear):
    def forward(self, images: Tensor) -> Tensor:
        output = super().forward(images).exp()
        output += 1  # exp's gradient needs what it gave
        return output


class NoParameters(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :10]


class Frozen(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)


def norm_1d() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.BatchNorm1d(10))


def gives_nan(images: Tensor) -> Tensor:
    return images / 0 * 0


def share_of_errors(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(dim=1) != labels).float().mean()


def gives_its_argument(argument: object) -> object:
    return argument


def cuts_the_border(images: Tensor) -> Tensor:
    return images[..., 2:-2, 2:-2]


def drops_an_image(images: Tensor) -> Tensor:
    return images[1:]


def gives_ints(images: Tensor) -> Tensor:
    return (images * 255).long()


def gives_nothing(images: Tensor) -> None:
    return None


def gives_a_float(logits: Tensor, labels: Tensor) -> float:
    return 0.5


def gives_infinity(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels) / 0


REFUSED = {
    "9 outputs": ("net", {"net": partial(Linear, outputs=9)}, r"shape \(128, 9\) .* not \(128, 10\)"),
    "11 outputs": ("net", {"net": partial(Linear, outputs=11)}, r"shape \(128, 11\) .* not \(128, 10\)"),
    "3 input channels": ("net", {"net": lambda: nn.Sequential(nn.Conv2d(3, 10, 28), nn.Flatten())}, "3 channels"),
    "not flattened": ("net", {"net": lambda: nn.Conv2d(1, 10, 28)}, r"shape \(128, 10, 1, 1\)"),
    "raises": ("net", {"net": Raises}, "nothing works here"),
    "raises when built": ("net", {"net": partial(Linear, outputs="ten")}, r"\(test_training\.py, line \d+\)"),
    "NaN": ("net", {"net": GivesNaN}, "not finite"),
    "a tuple": ("net", {"net": GivesTuple}, "gives a tuple"),
    "no module": ("net", {"net": lambda: torch.relu}, "not a torch.nn.Module"),
    "no parameters": ("net", {"net": NoParameters}, "no parameters"),
    "frozen": ("net", {"net": Frozen}, "no parameters"),
    "wrong in evaluation only": ("net", {"net": FailsInEvaluation}, r"shape \(2, 9\)"),
    "no backward pass": ("net", {"net": FailsInBackward}, "inplace operation"),
    "last batch of one image": ("net", {"net": norm_1d, "batch_size": 499}, "more than 1 value per channel"),
    "refused optimizer argument": ("optimizer", {"optimizer": partial(SGD, lr=-0.1)}, "Invalid learning rate"),
    "optimizer of another type": ("optimizer", {"optimizer": partial(StepLR, step_size=1)}, "not an Optimizer"),
    "no optimizer": ("optimizer", {"optimizer": list}, "gives a list"),
    "no scheduler": ("scheduler", {"scheduler": gives_its_argument}, "gives a SGD"),
    "scheduler too short": (
        "scheduler",
        {"scheduler": partial(OneCycleLR, max_lr=0.1, total_steps=7), "scheduler_interval": "batch"},
        "7",
    ),
    "plateau per batch": (
        "scheduler",
        {"scheduler": ReduceLROnPlateau, "scheduler_interval": "batch"},
        "scheduler_interval='epoch'",
    ),
    "schedule without bounds": ("scheduler", {"scheduler": partial(ExponentialLR, gamma=1e200)}, r"becomes .*e\+198, "),
    "schedule from beyond float32": ("scheduler", {"scheduler": partial(OneCycleLR, max_lr=1e40)}, "no float32 number"),
    "another shape": ("augmentation", {"augmentation": cuts_the_border}, r"\(128, 1, 24, 24\)"),
    "fewer images": ("augmentation", {"augmentation": drops_an_image}, r"\(127, 1, 28, 28\)"),
    "NaN pixels": ("augmentation", {"augmentation": gives_nan}, "not finite"),
    "ints": ("augmentation", {"augmentation": gives_ints}, "int64"),
    "no images": ("augmentation", {"augmentation": gives_nothing}, "NoneType"),
    "refused degrees": ("augmentation", {"augmentation": partial(random_rotation, degrees=-7.0)}, "degrees=-7.0"),
    "loss not scalar": ("loss", {"loss": partial(F.cross_entropy, reduction="none")}, "single number"),
    "loss not a tensor": ("loss", {"loss": gives_a_float}, "single number"),
    "infinite loss": ("loss", {"loss": gives_infinity}, "inf"),
    "loss without a gradient": ("loss", {"loss": share_of_errors}, "gradient"),
}


@pytest.mark.parametrize(("field", "changes", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_refused(field: str, changes: dict[str, Any], said: str, small_mnist: Mnist) -> None:
    experiment = declare(**changes)
    experiment.check()

    with pytest.raises(LabError, match=f"^{field}: .*{said}") as refusal:
        rehearse(experiment, small_mnist)

    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("net", [Raises, RaisesInTheStandardLibrary, RaisesInTorch])
def test_a_refusal_names_the_line_of_the_script(net: type[nn.Module], small_mnist: Mnist) -> None:
    line = inspect.getsourcelines(net.forward)[1] + 1

    with pytest.raises(LabError, match=rf"^net: .* \({re.escape(TEST_FILE)}, line {line}\)$"):
        rehearse(declare(net=net), small_mnist)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": partial(LBFGS, lr=0.1), "scheduler": partial(StepLR, step_size=1)},
        {"optimizer": AdamW, "scheduler": partial(OneCycleLR, max_lr=0.1), "scheduler_interval": "batch"},
        {"optimizer": partial(SGD, lr=torch.tensor(0.1)), "scheduler": partial(StepLR, step_size=1)},
        {"scheduler": partial(OneCycleLR, max_lr=0.1, total_steps=8), "scheduler_interval": "batch"},
        {"net": norm_1d, "batch_size": 498},
        {"batch_size": 10_000},
        {"loss": nn.CrossEntropyLoss(label_smoothing=0.1)},
    ],
)
def test_what_can_work_is_let_through(changes: dict[str, Any], small_mnist: Mnist) -> None:
    rehearse(declare(**changes), small_mnist)
    train(declare(**changes), small_mnist)


def test_a_learning_rate_that_is_a_tensor_stays_as_it_is_declared(small_mnist: Mnist) -> None:
    lr = torch.tensor(0.1)
    experiment = declare(optimizer=partial(SGD, lr=lr), scheduler=partial(StepLR, step_size=1, gamma=0.5))

    rehearse(experiment, small_mnist)
    _, epochs = train(experiment, small_mnist)

    assert lr.item() == pytest.approx(0.1)
    assert epochs[0].lr == pytest.approx(0.1)


def test_an_optimizer_that_minds_the_parameters_can_have_a_schedule(small_mnist: Mnist) -> None:
    def matrices_only(parameters: Iterator[nn.Parameter]) -> Optimizer:
        chosen = list(parameters)
        if any(parameter.shape != (10, 784) for parameter in chosen):
            raise ValueError("matrices only")
        return SGD(chosen, lr=0.1)

    experiment = declare(
        net=lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 10, bias=False)),
        optimizer=matrices_only,
        scheduler=partial(StepLR, step_size=1),
    )

    rehearse(experiment, small_mnist)


def test_interruptions_are_no_refusals(small_mnist: Mnist) -> None:
    def interrupt(images: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rehearse(declare(augmentation=interrupt), small_mnist)
