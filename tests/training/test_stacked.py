"""Seeds as a dimension: each is trained as it would be alone."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from mnist_lab.data import Mnist
from mnist_lab.errors import LabError
from mnist_lab.experiment import Experiment
from mnist_lab.training.loop import fit
from mnist_lab.training.stacked import can_stack, fit_stacked

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
    assert can_stack(without_draws, 300)
    assert not can_stack(mixing, 300)
    with pytest.raises(LabError, match=r"^optimizer: LBFGS can't train seeds together"):
        next(fit_stacked(initial_networks(mixing, SEEDS), mixing, few_images, SEEDS))

    def hooked(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        optimizer.register_step_pre_hook(lambda *_: None)
        return optimizer

    assert not can_stack(dataclasses.replace(without_draws, optimizer=hooked, scheduler=None), 300)
    plateau = dataclasses.replace(without_draws, scheduler=ReduceLROnPlateau)
    with pytest.raises(LabError, match=r"^scheduler: ReduceLROnPlateau follows one run's loss"):
        next(fit_stacked(initial_networks(plateau, SEEDS), plateau, few_images, SEEDS))
