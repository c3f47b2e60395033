"""Seeds as a dimension: each is trained as it would be alone."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from mnist_lab.data import Mnist
from mnist_lab.errors import LabError
from mnist_lab.experiment import Experiment
from mnist_lab.training.loop import fit
from mnist_lab.training.stacked import fit_stacked, why_not_stacked

Load = Callable[[str], ModuleType]
SEEDS = (3, 0, 11)


class InDouble(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net.double()

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images.double())


@pytest.fixture
def few_images(mnist: Mnist) -> Mnist:
    return dataclasses.replace(
        mnist,
        train_images=mnist.train_images[:300],
        train_labels=mnist.train_labels[:300],
        test_images=mnist.test_images[:200],
        test_labels=mnist.test_labels[:200],
    )


@pytest.fixture
def without_draws(load_script: Load) -> Experiment:
    """Step 4's network and schedule with the random parts off; two epochs, and a last batch of another size.

    In float64: training makes rounding errors grow a thousandfold within some steps, and nothing may hide there.
    """
    script = load_script("step4_augment_steplr")
    return dataclasses.replace(
        script.EXPERIMENT,
        net=lambda: InDouble(script.Net(dropout=0.0)),
        augmentation=None,
        scheduler=partial(StepLR, step_size=1, gamma=0.5),
        epochs=2,
    )


def initial_networks(experiment: Experiment, seeds: Sequence[int]) -> list[nn.Module]:
    nets = []
    for seed in seeds:
        torch.manual_seed(seed)
        nets.append(experiment.net())
    return nets


def test_stacked_seeds_equal_separate_ones(without_draws: Experiment, few_images: Mnist) -> None:
    stacked_nets = initial_networks(without_draws, SEEDS)
    *_, stacked_epochs = fit_stacked(stacked_nets, without_draws, few_images, SEEDS)

    for index, seed in enumerate(SEEDS):
        torch.manual_seed(seed)
        net = without_draws.net()
        alone = list(fit(net, without_draws, few_images, seed=seed))[-1]
        stacked = stacked_epochs[index]
        assert stacked.train_loss == pytest.approx(alone.train_loss, rel=1e-6)  # summed in float32
        assert stacked.eval_loss == pytest.approx(alone.eval_loss, rel=1e-9)
        assert stacked.eval_correct == alone.eval_correct
        assert stacked.train_correct == alone.train_correct
        assert (stacked.epoch, stacked.lr, stacked.train_images) == (alone.epoch, alone.lr, alone.train_images)
        expected = net.state_dict()
        for name, tensor in stacked_nets[index].state_dict().items():  # the running statistics of batch norm too
            torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-9, msg=lambda text, n=name: n + text)


def test_stacked_seeds_report_the_loss_that_separate_ones_do(without_draws: Experiment, few_images: Mnist) -> None:
    summed = dataclasses.replace(
        without_draws,
        loss=partial(F.cross_entropy, reduction="sum"),
        optimizer=partial(torch.optim.SGD, lr=0.001),
        scheduler=None,
        epochs=1,
    )
    (stacked,) = fit_stacked(initial_networks(summed, SEEDS), summed, few_images, SEEDS)

    for metrics, net, seed in zip(stacked, initial_networks(summed, SEEDS), SEEDS, strict=True):
        (alone,) = fit(net, summed, few_images, seed=seed)
        assert metrics.train_loss == pytest.approx(alone.train_loss, rel=1e-5)
        assert metrics.objective == pytest.approx(alone.objective, rel=1e-5)
        assert metrics.objective != pytest.approx(metrics.train_loss, rel=0.5)


def test_each_seed_has_draws_of_its_own(load_script: Load, few_images: Mnist) -> None:
    experiment = dataclasses.replace(load_script("step4_augment_steplr").EXPERIMENT, epochs=1)
    experiment, _ = experiment.override({"dropout": 0.2})

    nets = initial_networks(experiment, [5, 5])  # one seed twice: the same weights and order
    (epochs,) = fit_stacked(nets, experiment, few_images, [5, 5])

    first, second = (torch.cat([p.flatten() for p in net.parameters()]) for net in nets)
    assert not torch.allclose(first, second, atol=1e-4)
    assert epochs[0].train_loss != epochs[1].train_loss


def test_what_would_mix_the_seeds_is_refused(without_draws: Experiment, few_images: Mnist) -> None:
    mixing = dataclasses.replace(without_draws, optimizer=torch.optim.LBFGS, scheduler=None)
    assert why_not_stacked(without_draws, few_images) is None
    assert why_not_stacked(mixing, few_images)
    with pytest.raises(LabError, match=r"^optimizer: LBFGS can't train seeds together"):
        next(fit_stacked(initial_networks(mixing, SEEDS), mixing, few_images, SEEDS))

    def hooked(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        optimizer.register_step_pre_hook(lambda *_: None)
        return optimizer

    assert why_not_stacked(dataclasses.replace(without_draws, optimizer=hooked, scheduler=None), few_images)
    plateau = dataclasses.replace(without_draws, scheduler=ReduceLROnPlateau)
    with pytest.raises(LabError, match=r"^scheduler: ReduceLROnPlateau follows one run's loss"):
        next(fit_stacked(initial_networks(plateau, SEEDS), plateau, few_images, SEEDS))


class Layers(nn.Module):
    """Two layers, of which the second can be frozen."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(784, 12), nn.Linear(12, 10)
        self.second.requires_grad_(not frozen)

    def forward(self, images: Tensor) -> Tensor:
        return self.second(self.first(images.flatten(1)).relu())


def declare(net: Callable[[], nn.Module], **changes: Any) -> Experiment:
    fields = {"net": net, "epochs": 1, "batch_size": 100, "optimizer": partial(torch.optim.SGD, lr=0.1)}
    return Experiment(**fields | changes)


def test_frozen_parameters_stay_as_they_are(few_images: Mnist) -> None:
    experiment = declare(
        partial(Layers, frozen=True), optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1)
    )
    stacked, alone = initial_networks(experiment, SEEDS), initial_networks(experiment, SEEDS)
    assert why_not_stacked(experiment, few_images) is None

    list(fit_stacked(stacked, experiment, few_images, SEEDS))

    for seed, net, other in zip(SEEDS, stacked, alone, strict=True):
        before = other.second.weight.clone()
        list(fit(other, experiment, few_images, seed=seed))
        assert torch.equal(net.second.weight, before)
        torch.testing.assert_close(net.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-5)


def clipped_parameter() -> nn.Module:
    net = Layers()
    net.first.weight.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    return net


def stepped_in_backward() -> nn.Module:
    net = Layers()
    net.first.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    return net


def hooked_module() -> nn.Module:
    net = Layers()
    net.first.register_full_backward_hook(lambda *_: None)
    return net


def no_decay_of_biases(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    parameters = list(parameters)
    weights, biases = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim == 1]
    groups = [{"params": group, "weight_decay": 0.1 * (group is weights)} for group in (weights, biases) if group]
    return torch.optim.SGD(groups, lr=0.1)


def rate_by_width(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [p], "lr": 1 / p.shape[-1] + p.ndim} for p in parameters])


@pytest.mark.parametrize(
    ("experiment", "said"),
    [
        (declare(clipped_parameter), "net: a hook on a parameter's gradient"),
        (declare(stepped_in_backward), "net: a hook on a parameter's gradient"),
        (declare(hooked_module), "net: a backward hook"),
        (declare(Layers, optimizer=no_decay_of_biases), "optimizer: its groups depend on the parameters' shapes"),
        (declare(Layers, optimizer=rate_by_width), "optimizer: its groups depend on the parameters' shapes"),
    ],
)
def test_what_stacking_would_leave_out_is_refused(experiment: Experiment, said: str, few_images: Mnist) -> None:
    assert why_not_stacked(experiment, few_images)
    with pytest.raises(LabError, match=f"^{said}"):
        next(fit_stacked(initial_networks(experiment, SEEDS), experiment, few_images, SEEDS))


def test_groups_by_place_and_a_schedule_can_be_stacked(few_images: Mnist) -> None:
    def first_slower(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        first, *others = parameters
        return torch.optim.SGD([{"params": [first], "lr": 0.01}, {"params": others}], lr=0.1)

    schedule = partial(torch.optim.lr_scheduler.LinearLR, start_factor=0.5)
    assert why_not_stacked(declare(Layers, optimizer=first_slower, scheduler=schedule), few_images) is None
