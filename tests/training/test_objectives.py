"""Averaged weights and objectives: what they compute, what is evaluated, judged and kept, and what is refused."""

from collections.abc import Callable
from functools import partial

import mlflow
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from helpers import TrackedRun
from mnist_lab.data import Mnist
from mnist_lab.errors import LabError
from mnist_lab.objectives import distillation, mixup
from mnist_lab.tracking.connection import environment_variables
from mnist_lab.training.loop import evaluate, num_params, predict
from networks import Linear, Small, declare, train

EMA = partial(AveragedModel, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=True)
averaged = partial(declare, net=Small, average=EMA)


def test_the_average_is_torchs_over_the_batches(small_mnist: Mnist) -> None:
    weights: list[Tensor] = []

    class Watched(Small):
        def forward(self, images: Tensor) -> Tensor:
            weights.append(self[6].weight.detach().clone())
            return super().forward(images)

    training, _ = train(averaged(net=Watched, epochs=1), small_mnist)

    _, first, *others = [*weights[:4], training.net[6].weight]  # type: ignore[index,misc]
    expected = first
    for later in others:
        expected = 0.7 * expected + 0.3 * later
    torch.testing.assert_close(training.result[6].weight, expected)  # type: ignore[index]


def test_averaging_leaves_the_training_as_it_is_and_both_accuracies_are_reported(small_mnist: Mnist) -> None:
    _, raw = train(declare(net=Small), small_mnist)
    training, epochs = train(averaged(), small_mnist)

    assert [(one.train_loss, one.raw_correct) for one in epochs] == [(one.train_loss, one.eval_correct) for one in raw]
    assert {one.raw_correct for one in raw} == {None}
    assert (epochs[-1].eval_loss, epochs[-1].eval_correct) == evaluate(
        predict(training.result, small_mnist.test_images), small_mnist.test_labels
    )
    assert epochs[-1].eval_loss != raw[-1].eval_loss


def frozen(net: nn.Module) -> AveragedModel:
    return EMA(net).requires_grad_(False)


def test_a_run_logs_its_average_as_model(train_run: Callable[..., TrackedRun], uri: str, small_mnist: Mnist) -> None:
    run = train_run(averaged(normalize=(0.5, 0.5), average=frozen), "averaged")

    with environment_variables({"MLFLOW_TRACKING_URI": uri}):
        model = mlflow.pytorch.load_model(f"runs:/{run.run_id}/averaged")
        metadata = mlflow.models.get_model_info(f"runs:/{run.run_id}/averaged").metadata
    mean, deviation = metadata["normalize"]
    logits = model((small_mnist.test_images.float() / 255 - mean) / deviation)
    accuracy = 100 * (logits.argmax(1) == small_mnist.test_labels).sum().item() / 300
    assert run.metrics["final_test_accuracy"] == [(0, pytest.approx(accuracy))]
    _, raw = train(declare(net=Small, normalize=(0.5, 0.5)), small_mnist, memory_format=torch.channels_last)
    assert run.metrics["raw_test_accuracy"] == [(epoch.epoch, epoch.eval_accuracy) for epoch in raw]
    assert run.metrics["num_params"][0][1] == num_params(Small())
    assert run.params["average"] == "frozen"


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 1, 28, 28, generator=generator)
    return images, torch.randint(10, (64,), generator=generator)


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


def test_distillation_weighs_the_teachers_divergence_and_the_cross_entropy(batch: tuple[Tensor, Tensor]) -> None:
    net, teacher = Linear(), Linear()
    loss, logits = distillation(net, *batch, teacher=teacher, temperature=2.0, weight=0.75)

    taught, given = (F.softmax(one(batch[0]) / 2, dim=1) for one in (teacher, net))
    divergence = 4 * (taught * (taught / given).log()).sum(1).mean()
    torch.testing.assert_close(loss, 0.75 * divergence + 0.25 * F.cross_entropy(net(batch[0]), batch[1]))
    torch.testing.assert_close(logits, net(batch[0]))
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
