"""Networks and optimizers that do more than most: they pass the rehearsal and train."""

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.swa_utils import AveragedModel

from mnist_lab import Experiment
from mnist_lab.checking.rehearsal import rehearse
from mnist_lab.data import Mnist
from mnist_lab.training.loop import EpochMetrics, Training, initial_network


def trained(mnist: Mnist, **changes: Any) -> list[EpochMetrics]:
    fields = {"net": Flat, "epochs": 2, "batch_size": 100, "optimizer": partial(SGD, lr=0.05)} | changes
    experiment = Experiment(**fields)  # type: ignore[arg-type]
    experiment.check()
    rehearsal = rehearse(experiment, mnist)
    net = initial_network(experiment, 0, torch.device("cpu"), rehearsal.memory_format)
    epochs = list(Training(net, experiment, mnist, seed=0).epochs())
    assert epochs[1].train_loss < epochs[0].train_loss
    return epochs


class Flat(nn.Module):
    """Two linear layers and one between them."""

    def __init__(self, layer: Callable[[], nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(784, 16), layer(), nn.Linear(16, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


# ---- what evaluation leaves behind


class GhostNorm(nn.BatchNorm1d):
    """Keeps statistics of each half of a batch, and one mean of them when it is switched to evaluation."""

    def __init__(self) -> None:
        super().__init__(16)
        self.running_mean, self.running_var = torch.zeros(32), torch.ones(32)

    def train(self, mode: bool = True) -> "GhostNorm":
        if self.training and not mode:
            self.running_mean = self.running_mean.view(2, 16).mean(0).repeat(2)
            self.running_var = self.running_var.view(2, 16).mean(0).repeat(2)
        return super().train(mode)

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training or len(inputs) % 2:
            return nn.functional.batch_norm(
                inputs, self.running_mean[:16], self.running_var[:16], self.weight, self.bias
            )
        halves = inputs.view(2, -1, 16).transpose(0, 1).reshape(-1, 32)
        normed = nn.functional.batch_norm(halves, self.running_mean, self.running_var, None, None, True, self.momentum)
        return normed.view(-1, 2, 16).transpose(0, 1).reshape(-1, 16) * self.weight + self.bias


@pytest.mark.parametrize("average", [None, partial(AveragedModel, use_buffers=True)])
def test_a_layer_that_evaluation_changes_trains(average: Any, small_mnist: Mnist) -> None:
    trained(small_mnist, net=partial(Flat, layer=GhostNorm), average=average)


# ---- optimizers with a step of their own


class SharpSGD(SGD):
    """SAM on SGD: wants a closure beside the gradients."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        parameters = [p for group in self.param_groups for p in group["params"]]
        before = [p.clone() for p in parameters]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        for p in parameters:
            p.add_(p.grad, alpha=0.05 / (norm.item() + 1e-12))
        torch.enable_grad()(closure)()
        for p, value in zip(parameters, before, strict=True):
            p.copy_(value)
        return super().step()


class ClippedAdam(Adam):
    """Evaluates the loss by itself, though its signature says that it need not."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = closure()
        nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 1.0)
        super().step()
        return loss


class OfNothing(Optimizer):
    """A line search: evaluates the loss as often as it likes."""

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self, closure: Callable[[], Tensor]) -> Any:  # type: ignore[override]
        closure()
        for p in self.param_groups[0]["params"]:
            p.data.add_(p.grad, alpha=-self.param_groups[0]["lr"])
        return closure()


@pytest.mark.parametrize("optimizer", [SharpSGD, OfNothing, ClippedAdam])
def test_an_optimizer_with_a_step_of_its_own_trains(optimizer: type[Optimizer], small_mnist: Mnist) -> None:
    trained(small_mnist, optimizer=partial(optimizer, lr=0.005 if optimizer is ClippedAdam else 0.05))


# ---- weights that are computed


def test_a_network_whose_weights_are_computed_is_averaged(small_mnist: Mnist) -> None:
    def normed() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch has a newer weight_norm
            return nn.utils.weight_norm(nn.Linear(16, 16))  # type: ignore[no-any-return]

    trained(small_mnist, net=partial(Flat, layer=normed), average=partial(AveragedModel, use_buffers=True))
