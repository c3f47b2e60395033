"""The training loop: what an epoch sees and reports, beside a plain loop written here; and its dropout by gaps."""

import contextlib
import math
import random
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import first
from mnist_lab import Experiment
from mnist_lab.augmentation import random_rotation
from mnist_lab.checking.rehearsal import rehearse
from mnist_lab.data import Mnist, load_mnist
from mnist_lab.errors import LabError
from mnist_lab.running.run import epoch_metrics
from mnist_lab.training.dropout import MAX_P, SparseDropout, draw_zeros
from mnist_lab.training.loop import Training, evaluate, initial_network, num_params, predict
from mnist_lab.training.states import seed_generators
from networks import CPU, DrawsElsewhere, Linear, Small, declare, train, warm_up_then_decay


@pytest.mark.parametrize("net", [Linear, Small])
def test_an_epoch_sees_each_image_once_in_the_order_of_torchs_cpu_generator(net: Any, small_mnist: Mnist) -> None:
    """The order depends on seed and epoch only, so that earlier runs can be repeated."""
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(((images * 255).round().to(torch.uint8), labels))
        return images, labels

    train(declare(net=net, augmentation=keep, batch_size=499), small_mnist, seed=3)

    generator = torch.Generator().manual_seed(3)
    orders = [torch.randperm(500, generator=generator) for _ in range(2)]
    expected = [batch for order in orders for batch in order.split(499)]
    for batch, (images, labels) in zip(expected, seen, strict=True):
        assert torch.equal(images, small_mnist.train_images[batch])
        assert torch.equal(labels, small_mnist.train_labels[batch])


# ---- the figures

ONE_CYCLE = partial(OneCycleLR, max_lr=0.2)


def reference_epochs(experiment: Experiment, mnist: Mnist, seed: int) -> Iterator[dict[str, float]]:
    """Train as a beginner would write it, one value read off at a time."""
    torch.manual_seed(seed)
    net = experiment.net()
    mean, deviation = experiment.normalize
    optimizer = experiment.optimizer(net.parameters())
    steps = experiment.epochs * math.ceil(len(mnist.train_images) / experiment.batch_size)
    scheduler = experiment.scheduler(optimizer, **({"total_steps": steps} if experiment.scheduler is ONE_CYCLE else {}))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(experiment.epochs):
        net.train()
        losses, corrects, lr = [], 0, optimizer.param_groups[0]["lr"]
        for batch in torch.randperm(len(mnist.train_images), generator=generator).split(experiment.batch_size):
            images, labels = mnist.train_images[batch] / 255, mnist.train_labels[batch]
            if experiment.augmentation is not None:
                images = experiment.augmentation(images)
            optimizer.zero_grad()
            with SparseDropout():
                log_probabilities = F.log_softmax(net((images - mean) / deviation), dim=1)
            loss = F.nll_loss(log_probabilities, labels)
            loss.backward()
            optimizer.step()
            losses += [loss.item()] * len(batch)
            corrects += int((log_probabilities.argmax(dim=1) == labels).sum())
            if experiment.scheduler_interval == "batch":
                scheduler.step()
        if experiment.scheduler_interval == "epoch":
            scheduler.step(*[statistics.fmean(losses)] * isinstance(scheduler, ReduceLROnPlateau))
        net.eval()
        with torch.no_grad():
            log_probabilities = F.log_softmax(net((mnist.test_images / 255 - mean) / deviation), dim=1)
        yield {
            "lr": lr,
            "train_loss": statistics.fmean(losses),
            "train_correct": corrects,
            "train_accuracy": 100 * corrects / len(losses),
            "eval_loss": F.nll_loss(log_probabilities, mnist.test_labels).item(),
            "eval_correct": int((log_probabilities.argmax(dim=1) == mnist.test_labels).sum()),
        }


def invert(images: Tensor) -> Tensor:
    return images.neg_().add_(1)  # in place: the data must not notice


@pytest.mark.parametrize(
    "experiment",
    [
        declare(
            net=Small,
            epochs=3,
            batch_size=48,
            scheduler=partial(StepLR, step_size=2, gamma=0.6),
            augmentation=partial(random_rotation, degrees=7.0),
        ),
        declare(
            epochs=3,
            optimizer=partial(AdamW, lr=0.01),
            augmentation=invert,
            normalize=(0.2, 0.5),
            scheduler=warm_up_then_decay,
            scheduler_interval="batch",
        ),
        declare(epochs=10, scheduler=partial(ReduceLROnPlateau, factor=0.5, patience=0, threshold=0.2)),
        declare(epochs=3, scheduler=ONE_CYCLE, scheduler_interval="batch"),
    ],
)
def test_figures_equal_those_of_a_plain_loop(experiment: Experiment, small_mnist: Mnist) -> None:
    before = small_mnist.train_images.clone()
    rehearse(experiment, small_mnist)
    _, epochs = train(experiment, small_mnist, seed=5)
    assert torch.equal(small_mnist.train_images, before)
    expected = list(reference_epochs(experiment, small_mnist, seed=5))

    for epoch, figures in zip(epochs, expected, strict=True):
        for name, figure in figures.items():
            assert getattr(epoch, name) == pytest.approx(figure, rel=0, abs=1e-5), f"{name} of epoch {epoch.epoch}"
    assert epochs[-1].train_loss < epochs[0].train_loss


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_trains_as_a_cpu_does(load_script: Callable[[str], ModuleType]) -> None:
    """Without draws, which are each device's own, and at a rate at which rounding, TF32's too, hardly grows."""
    changes = {"epochs": 2, "lr": 0.01, "dropout": 0.0, "degrees": 0.0}
    experiment, _ = load_script("step4_augment_steplr").EXPERIMENT.override(changes)
    losses = []
    for device in ("cpu", "cuda"):
        _, epochs = train(experiment, first(load_mnist(device=device), 3000, 500))
        losses.append([epoch.train_loss for epoch in epochs])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)  # of another seed, 3 % apart


def summed(net: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = net(images)
    return F.cross_entropy(logits, labels, reduction="sum"), logits


def spoiling(logits: Tensor, labels: Tensor) -> Tensor:
    loss = F.cross_entropy(logits, labels.clone(), reduction="sum")
    logits.data.zero_()
    labels.zero_()
    return loss


@pytest.mark.parametrize("minimised", [{"loss": spoiling}, {"objective": summed}])
def test_train_loss_is_the_cross_entropy_per_image(minimised: dict[str, Any], small_mnist: Mnist) -> None:
    """A sum with a rate divided by the batch's size trains as the mean does, even where it changes what it is given."""
    shared = partial(declare, epochs=1, batch_size=100)
    _, (of_sum,) = train(shared(optimizer=partial(SGD, lr=0.05 / 100), **minimised), small_mnist)
    _, (plain,) = train(shared(optimizer=partial(SGD, lr=0.05)), small_mnist)

    assert (of_sum.train_loss, of_sum.eval_loss) == pytest.approx((plain.train_loss, plain.eval_loss), rel=1e-5)
    assert of_sum.train_correct == plain.train_correct
    assert of_sum.objective == pytest.approx(100 * plain.train_loss, rel=1e-5)
    assert plain.objective is None


def test_a_loss_that_is_not_finite_is_named_by_its_epoch(small_mnist: Mnist) -> None:
    def breaks(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels) + (math.inf if len(labels) == 116 else 0.0)

    with pytest.raises(LabError, match="^loss: is inf in epoch 1 of 2"):
        train(declare(loss=breaks), small_mnist)


# ---- optimizers


def test_an_optimizer_that_evaluates_often_reports_the_loss_before_its_step(small_mnist: Mnist) -> None:
    """So that training loss means the same as with SGD: the network's on a batch that it has not been fitted to yet."""
    net, given = Linear(), set()
    net.register_forward_pre_hook(lambda _, images: given.add(images[0].neg_().mean().item()))  # which changes it
    before = evaluate(predict(net, small_mnist.train_images), small_mnist.train_labels)
    lbfgs = declare(epochs=1, batch_size=500, optimizer=partial(LBFGS, lr=0.5, max_iter=8))

    (epoch,) = Training(net, lbfgs, small_mnist, seed=0).epochs()

    assert len(given) <= 5  # two before, one in training, the mean but for the order of a sum, two of the test images
    assert (epoch.train_loss, epoch.train_correct) == (pytest.approx(before[0], abs=1e-5), before[1])
    assert evaluate(predict(net, small_mnist.train_images), small_mnist.train_labels)[0] < 0.9 * before[0]


def test_the_hooks_of_an_optimizer_find_the_gradients(small_mnist: Mnist) -> None:
    norms: list[float] = []

    def clip(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        norms.append(nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1e-3).item())

    def clipped(parameters: Iterator[nn.Parameter]) -> Optimizer:
        optimizer = SGD(parameters, lr=1.0)
        optimizer.register_step_pre_hook(clip)
        return optimizer

    experiment = declare(epochs=1, optimizer=clipped)
    start = initial_network(experiment, 0, CPU)
    training, _ = train(experiment, small_mnist)

    assert len(norms) == 4
    assert min(norms) > 1e-3
    moved = [after - before for after, before in zip(training.net.parameters(), start.parameters(), strict=True)]
    assert 0 < nn.utils.get_total_norm(moved) <= 4.1e-3


def test_an_optimizer_that_can_do_without_a_closure_gets_none(small_mnist: Mnist) -> None:
    given: list[object] = []

    class Watching(SGD):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            given.append(closure)
            return super().step(closure)

    train(declare(epochs=1, optimizer=partial(Watching, lr=0.05)), small_mnist)

    assert set(given) == {None}


def test_the_rate_of_each_parameter_group_is_reported(small_mnist: Mnist) -> None:
    def three_groups(parameters: Iterator[nn.Parameter]) -> Optimizer:
        weight, bias = parameters
        more = nn.Parameter(torch.zeros(1))
        groups = [{"params": [weight]}, {"params": [bias], "lr": 0.5}, {"params": [more], "lr": 0.0}]
        return SGD(groups, lr=0.1)

    _, epochs = train(declare(optimizer=three_groups, scheduler=partial(StepLR, step_size=1, gamma=0.5)), small_mnist)

    assert [(epoch.lr, *epoch.other_lrs) for epoch in epochs] == [(0.1, 0.5, 0.0), (0.05, 0.25, 0.0)]
    assert {"lr": 0.05, "lr_1": 0.25, "lr_2": 0.0}.items() <= epoch_metrics(epochs[1]).items()


# ---- on_batch and waiting for the device


def test_on_batch_sees_running_sums(small_mnist: Mnist) -> None:
    calls: list[tuple[int, float, int]] = []

    def on_batch(seen: int, loss_sum: Tensor, correct: Tensor) -> None:
        calls.append((seen, loss_sum.item(), int(correct.item())))

    _, epochs = train(declare(), small_mnist, on_batch=on_batch)

    assert [seen for seen, _, _ in calls] == [128, 256, 384, 500] * 2
    for batches, epoch in zip((calls[:4], calls[4:]), epochs, strict=True):
        assert batches == sorted(batches)
        assert batches[-1][1:] == (pytest.approx(500 * epoch.train_loss), epoch.train_correct)


class CountWaits(TorchDispatchMode):
    """Counts the operations that make the host wait for the device, whatever the device here."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        by_mask = name == "index" and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        self.count += name in self.WAITING or by_mask
        return func(*args, **(kwargs or {}))


def test_no_batch_waits_for_the_device(small_mnist: Mnist, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mnist_lab.training.dropout.MAX_P", 0)  # as on a GPU, where dropout is torch's own
    experiment = declare(
        net=Small,
        epochs=1,
        batch_size=16,
        loss=nn.CrossEntropyLoss(label_smoothing=0.1),
        optimizer=partial(SGD, lr=0.05, momentum=0.9, foreach=True),
        scheduler=partial(StepLR, step_size=2),
        scheduler_interval="batch",
        augmentation=partial(random_rotation, degrees=7.0),
    )

    def waits(images: int) -> int:
        net = experiment.net()
        with CountWaits() as waits:
            list(Training(net, experiment, first(small_mnist, images, 300), seed=0).epochs())
        return waits.count

    assert waits(480) == waits(32) <= 5  # the epoch's own: of 2 batches as of 30


def test_parameters_are_counted_once_bare_ones_too_frozen_ones_not() -> None:
    net = nn.Module()
    net.bare = nn.Parameter(torch.zeros(7))
    net.first = net.second = nn.Linear(4, 4)
    net.tied = nn.Linear(4, 4, bias=False)
    net.tied.weight = net.first.weight
    net.register_buffer("buffer", torch.zeros(100))
    assert num_params(net) == 7 + 16 + 4

    net.first.bias.requires_grad_(False)
    assert num_params(net) == 7 + 16
    assert num_params(net, untrained=["bare"]) == 16
    before = {name: p.detach().clone() for name, p in net.named_parameters()} | {"bare": torch.ones(7)}
    assert num_params(net, untrained=["bare"], before=before) == 16 + 7
    net.bare = nn.Parameter(torch.zeros(7, dtype=torch.cfloat))
    assert num_params(net) == 14 + 16


def test_a_rehearsal_leaves_random_numbers_data_and_declaration_alone(small_mnist: Mnist) -> None:
    lr = torch.tensor(0.1)
    experiment = declare(
        net=Small,
        optimizer=partial(SGD, lr=lr),
        scheduler=partial(StepLR, step_size=1, gamma=0.5),
        augmentation=DrawsElsewhere(),
    )
    images, labels = small_mnist.train_images.clone(), small_mnist.train_labels.clone()
    for declared in (experiment, declare(net=partial(Linear, outputs=9))):
        seed_generators(4)
        expected = random.random(), np.random.random(), torch.rand(1)  # noqa: NPY002
        seed_generators(4)

        with contextlib.suppress(LabError):  # the second is refused
            rehearse(declared, small_mnist)

        assert (random.random(), np.random.random(), torch.rand(1)) == expected  # noqa: NPY002
    assert torch.equal(small_mnist.train_images, images)
    assert torch.equal(small_mnist.train_labels, labels)
    assert lr == 0.1
    assert torch.is_grad_enabled()


# ---- dropout


@pytest.mark.parametrize("p", [0.007, 0.1, 0.25])
def test_each_place_is_zero_with_probability_p_independently_of_the_others(p: float) -> None:
    torch.manual_seed(0)
    total, rounds = 500, 8000
    drawn = torch.zeros(rounds, total)
    for row in drawn:
        row[draw_zeros(total, p)] = 1

    spread = (p * (1 - p) / rounds) ** 0.5
    assert (drawn.mean(dim=0) - p).abs().max() < 5 * spread  # of each place, the first and the last included
    counts = drawn.sum(dim=1)
    assert counts.mean() == pytest.approx(total * p, abs=5 * (total * p * (1 - p) / rounds) ** 0.5)
    assert counts.var() == pytest.approx(total * p * (1 - p), rel=0.1)  # binomial: the draws are independent
    neighbours = (drawn[:, 1:] * drawn[:, :-1]).mean()
    assert neighbours == pytest.approx(p * p, rel=0.15)


def test_drawing_goes_on_where_the_first_gaps_do_not_reach_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    monkeypatch.setattr("mnist_lab.training.dropout.math.sqrt", lambda _: -100.0)  # far too few at once
    assert len(draw_zeros(100_000, 0.1)) == pytest.approx(10_000, rel=0.05)


@pytest.mark.parametrize("shape", [(16, 8, 12, 12), (64, 50)])
def test_output_and_gradient_are_those_of_one_mask_in_both_layouts(shape: tuple[int, ...]) -> None:
    values, upstream = torch.rand(shape).add_(1), torch.rand(shape)
    masks = []
    for memory_format in (torch.contiguous_format, torch.channels_last)[: len(shape) // 2]:
        images = values.clone(memory_format=memory_format).requires_grad_()
        torch.manual_seed(3)
        with SparseDropout():
            dropped = F.dropout(images, 0.1)
        dropped.backward(upstream)

        mask = (dropped != 0).float()
        assert dropped.is_contiguous(memory_format=memory_format)
        assert 0 < (1 - mask).mean() < 0.2
        torch.testing.assert_close(dropped, images * mask / 0.9)
        assert images.grad is not None
        torch.testing.assert_close(images.grad, upstream * mask / 0.9)
        masks.append(mask)
    assert torch.equal(masks[0], masks[-1])


def test_modules_and_functions_are_covered_and_draw_anew() -> None:
    images = torch.ones(4, 8, 10, 10)
    torch.manual_seed(4)
    with SparseDropout():
        dropped = [F.dropout(images, 0.2), nn.Dropout(0.2)(images), F.dropout(images, p=0.2, training=True)]
    torch.manual_seed(4)
    dropped.append(F.dropout(images, 0.2))  # torch's own, by other random numbers
    assert len(torch.stack(dropped).unique(dim=0)) == 4


@pytest.mark.parametrize(
    "drop",
    [
        lambda images: F.dropout(images, 0.5 + MAX_P),
        lambda images: F.dropout(images, 0.1, training=False),
        lambda images: F.dropout(images.clone(), 0.1, inplace=True),
    ],
)
def test_everything_else_is_as_it_was(drop) -> None:  # type: ignore[no-untyped-def]
    images = torch.rand(4, 8, 10, 10)
    torch.manual_seed(5)
    expected = drop(images)
    torch.manual_seed(5)
    with SparseDropout():
        assert torch.equal(drop(images), expected)
