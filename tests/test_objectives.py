"""Objectives in place of a loss: what they compute, and what is refused."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from mnist_lab import Experiment
from mnist_lab.data import Mnist
from mnist_lab.errors import LabError
from mnist_lab.objectives import distillation, mixup
from mnist_lab.running.rehearsal import rehearse
from mnist_lab.training.loop import fit, initial_network

CPU = torch.device("cpu")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(784, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.flatten(1))


def declare(**changes: Any) -> Experiment:
    fields: dict[str, Any] = {"net": Net, "epochs": 1, "batch_size": 128, "optimizer": partial(SGD, lr=0.05)}
    return Experiment(**(fields | changes))


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 1, 28, 28, generator=generator)
    return images, torch.randint(10, (64,), generator=generator)


# ---- mixup


def test_mixup_trains_on_mixtures_in_the_shares_of_their_labels(batch: tuple[Tensor, Tensor]) -> None:
    """With one-hot labels as the network's only input, the mixture tells each image's share."""
    _, labels = batch
    images = F.one_hot(labels, 784).float().view(-1, 1, 28, 28)
    seen: list[Tensor] = []

    def net(mixed: Tensor) -> Tensor:
        seen.append(mixed.flatten(1)[:, :10])
        return seen[0] * 3

    torch.manual_seed(0)
    loss, logits = mixup(net, images, labels, alpha=0.5)  # type: ignore[arg-type]

    shares = seen[0]
    torch.testing.assert_close(shares.sum(1), torch.ones(64))
    own = shares.gather(1, labels[:, None])
    assert own.min() >= 0.5 - 1e-6  # the larger share is the image's own
    assert len(own.unique()) > 20  # drawn for each image
    torch.testing.assert_close(loss, F.cross_entropy(logits, shares))


def test_mixup_takes_probabilities_for_labels(batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    net = Net()
    losses = []
    for given in (labels, F.one_hot(labels, 10).float()):
        torch.manual_seed(1)
        losses.append(mixup(net, images, given, alpha=0.2)[0])
    torch.testing.assert_close(*losses)


# ---- distillation


def test_distillation_without_weight_is_the_cross_entropy(batch: tuple[Tensor, Tensor]) -> None:
    net, teacher = Net(), Net()
    loss, logits = distillation(net, *batch, teacher=teacher, temperature=4.0, weight=0.0)

    torch.testing.assert_close(loss, F.cross_entropy(net(batch[0]), batch[1]))
    torch.testing.assert_close(logits, net(batch[0]))


def test_distillation_is_the_divergence_from_the_teacher_times_the_squared_temperature(
    batch: tuple[Tensor, Tensor],
) -> None:
    net, teacher = Net(), Net()
    loss, _ = distillation(net, *batch, teacher=teacher, temperature=2.0, weight=1.0)

    taught, given = (F.softmax(one(batch[0]) / 2, dim=1) for one in (teacher, net))
    torch.testing.assert_close(loss, 4 * (taught * (taught / given).log()).sum(1).mean())
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize(
    ("objective", "sentence"),
    [
        (partial(mixup, alpha=0.0), "objective: alpha=0.0 is not above 0"),
        (partial(distillation, teacher=Net(), temperature=0.0, weight=0.5), "objective: temperature=0.0 is not"),
        (partial(distillation, teacher=Net(), temperature=1.0, weight=1.5), "objective: weight=1.5 is not between"),
    ],
)
def test_arguments_that_cannot_be_right_are_refused(objective: Any, sentence: str, small_mnist: Mnist) -> None:
    with pytest.raises(LabError, match=f"^{sentence}"):
        rehearse(declare(objective=objective), small_mnist)


# ---- the seam


def penalised(net: nn.Module, images: Tensor, labels: Tensor, weight: float = 0.0) -> tuple[Tensor, Tensor]:
    logits = net(images)
    return F.cross_entropy(logits, labels) + weight * sum(p.abs().sum() for p in net.parameters()), logits


def test_an_objective_without_anything_beyond_the_loss_trains_as_that_does(small_mnist: Mnist) -> None:
    trained = []
    for experiment in (declare(), declare(objective=penalised)):
        net = initial_network(experiment, 0, CPU)
        (metrics,) = fit(net, experiment, small_mnist, seed=0)
        trained.append((metrics.train_loss, metrics.train_correct, metrics.eval_loss))
    assert trained[0] == pytest.approx(trained[1], rel=1e-6)


def test_the_training_loss_is_the_cross_entropy_and_the_objective_is_its_own_figure(small_mnist: Mnist) -> None:
    experiment = declare(objective=partial(penalised, weight=0.01))
    (metrics,) = fit(initial_network(experiment, 0, CPU), experiment, small_mnist, seed=0)

    assert metrics.objective is not None
    assert metrics.objective > metrics.train_loss + 0.1


def test_an_objective_and_its_arguments_are_hyperparameters_and_the_loss_is_not() -> None:
    declared = declare(objective=penalised).hyperparameters()

    assert (declared["objective"], declared["weight"]) == ("penalised", 0.0)
    assert "loss" not in declared
    changed, different = declare(objective=partial(mixup, alpha=0.2)).override({"alpha": "0.4"})
    assert different == {"alpha": 0.4}
    assert changed.hyperparameters()["alpha"] == 0.4
    assert {"objective", "average", "normalize"}.isdisjoint(declare().hyperparameters())  # as before they were there


def loss_alone(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(net(images), labels)


def three(net: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return net(images).sum(), net(images), labels


def other_batch(net: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = net(torch.cat([images, images]))
    return logits.sum(), logits


def swapped(net: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = net(images)
    return logits, F.cross_entropy(logits, labels)


def of_nothing(net: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ones((), requires_grad=True) * 2, net(images).detach()


@pytest.mark.parametrize(
    ("objective", "sentence"),
    [
        (loss_alone, r"objective: gives a tensor of shape \(\), not a loss and the batch's logits"),
        (three, "objective: gives a tuple, not a loss and the batch's logits"),
        (other_batch, r"objective: gives an output of shape \(256, 10\) for 128 images"),
        (swapped, r"objective: gives a tensor of shape \(128, 10\) for the loss, not a single number"),
        (of_nothing, "objective: has no gradient in the network's parameters"),
    ],
)
def test_an_objective_that_cannot_work_is_refused(objective: Any, sentence: str, small_mnist: Mnist) -> None:
    with pytest.raises(LabError, match=f"^{sentence}"):
        rehearse(declare(objective=objective), small_mnist)


def test_loss_and_objective_together_are_refused() -> None:
    with pytest.raises(LabError, match="^objective: mixup and the loss nll_loss are both declared; give one of them"):
        declare(loss=F.nll_loss, objective=partial(mixup, alpha=0.2)).check()


def test_a_lambda_for_an_objective_is_refused() -> None:
    with pytest.raises(LabError, match="^objective: is a lambda; name the function"):
        declare(objective=lambda net, images, labels: penalised(net, images, labels)).check()


@pytest.mark.parametrize("value", [0.5, (0.5,), (0.5, 0.0), (0.5, -1.0), ("a", 1.0), (0.5, float("nan")), [0.5, 0.5]])
def test_a_normalisation_that_cannot_be_right_is_refused(value: Any) -> None:
    with pytest.raises(LabError, match="^normalize: .* is not a pair"):
        declare(normalize=value).check()


def test_the_network_is_given_images_that_are_normalised_as_declared(small_mnist: Mnist) -> None:
    seen: list[Tensor] = []

    class Watching(Net):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return super().forward(images)

    experiment = declare(net=Watching, normalize=(0.5, 0.5))
    list(fit(initial_network(experiment, 0, CPU), experiment, small_mnist, seed=0))

    assert {(images.min().item(), images.max().item()) for images in seen} == {(-1.0, 1.0)}
    assert experiment.hyperparameters()["normalize"] == (0.5, 0.5)
    assert declare().override({"normalize": "(0, 1)"})[0].normalize == (0, 1)
