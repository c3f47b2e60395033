"""Objectives in place of a loss: what they compute, and what is refused."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mnist_lab.errors import LabError
from mnist_lab.objectives import distillation, mixup
from networks import Linear, declare


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


# ---- distillation


def test_distillation_without_weight_is_the_cross_entropy(batch: tuple[Tensor, Tensor]) -> None:
    net, teacher = Linear(), Linear()
    loss, logits = distillation(net, *batch, teacher=teacher, temperature=4.0, weight=0.0)

    torch.testing.assert_close(loss, F.cross_entropy(net(batch[0]), batch[1]))
    torch.testing.assert_close(logits, net(batch[0]))


def test_distillation_is_the_divergence_from_the_teacher(batch: tuple[Tensor, Tensor]) -> None:
    net, teacher = Linear(), Linear()
    loss, _ = distillation(net, *batch, teacher=teacher, temperature=2.0, weight=1.0)

    taught, given = (F.softmax(one(batch[0]) / 2, dim=1) for one in (teacher, net))
    torch.testing.assert_close(loss, 4 * (taught * (taught / given).log()).sum(1).mean())
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


# ---- as declared


def test_an_objective_and_its_arguments_are_hyperparameters_and_the_loss_is_not() -> None:
    declared = declare(objective=partial(mixup, alpha=0.2)).override({"alpha": "0.4"})[0].hyperparameters()

    assert (declared["objective"], declared["alpha"]) == ("mixup", 0.4)
    assert "loss" not in declared
    assert {"objective", "average", "normalize"}.isdisjoint(declare().hyperparameters())  # as before they were there


def test_an_objective_beside_a_loss_is_refused() -> None:
    with pytest.raises(LabError) as refusal:
        declare(loss=F.nll_loss, objective=partial(mixup, alpha=0.2)).check()
    assert refusal.value.field == "objective"
