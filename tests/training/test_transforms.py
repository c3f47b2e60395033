"""torchvision's transforms as augmentation: a draw for each image, or for a batch where that is said."""

import random
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torchvision import transforms
from torchvision.transforms import v2

from mnist_lab import Experiment
from mnist_lab.data import Mnist
from mnist_lab.errors import LabError
from mnist_lab.running.rehearsal import rehearse
from mnist_lab.training.loop import fit, initial_network
from mnist_lab.training.transforms import Augmentation, takes_labels

CPU = torch.device("cpu")


def declare(augmentation: Any, **changes: Any) -> Experiment:
    fields: dict[str, Any] = {"net": network, "epochs": 1, "batch_size": 100, "optimizer": partial(SGD, lr=0.05)}
    return Experiment(**(fields | {"augmentation": augmentation} | changes))


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


class Mine(v2.RandomRotation):
    """A transform that extends torchvision's."""


def rotated(image: Tensor) -> Tensor:
    return v2.functional.rotate(image, random.uniform(-30, 30))


PER_IMAGE = {
    "v1": transforms.RandomRotation(30),
    "v2": v2.RandomRotation(30),
    "extended": Mine(30),
    "v1 Compose": transforms.Compose([transforms.RandomAffine(7), transforms.RandomCrop(28, padding=2)]),
    "v2 Compose": v2.Compose([v2.ToImage(), v2.RandomRotation(30), v2.ToDtype(torch.float32, scale=True)]),
    "Compose of Compose": v2.Compose([v2.Compose([v2.RandomAffine(0, translate=(0.1, 0.1))])]),
    "Sequential": nn.Sequential(v2.RandomRotation(30), v2.RandomErasing(p=1.0)),
    "one's own in a Compose": v2.Compose([rotated, v2.ToImage()]),
    "other sizes on the way": transforms.Compose(
        [
            transforms.RandomApply([transforms.CenterCrop(22)], p=0.5),
            transforms.Resize(28),
            transforms.RandomRotation(9),
        ]
    ),
    "RandomApply": v2.RandomApply([v2.RandomRotation(30)], p=0.5),
}


@pytest.mark.parametrize("transform", PER_IMAGE.values(), ids=PER_IMAGE)
def test_each_image_has_a_draw_of_its_own(transform: Any, small_mnist: Mnist) -> None:
    alike = (small_mnist.train_images[:1].float() / 255).expand(12, 1, 28, 28)
    torch.manual_seed(0)

    images, labels = Augmentation(transform)(alike, torch.arange(12))

    assert type(images) is Tensor
    assert (images.shape, images.dtype) == (alike.shape, torch.float32)
    assert len(images.unique(dim=0)) >= 4
    assert torch.equal(labels, torch.arange(12))


def test_a_compose_trains_and_its_cost_and_what_it_holds_are_said(small_mnist: Mnist) -> None:
    experiment = declare(v2.Compose([v2.RandomRotation(7), v2.RandomErasing(p=0.1)]))

    (said,) = rehearse(experiment, small_mnist).notices

    assert re.search(r"torchvision's transforms draw once per call, .* image by image, some \d+ s of an epoch", said)
    assert "RandomRotation(degrees=[-7.0, 7.0]" in str(experiment.hyperparameters()["transforms"])
    (metrics,) = fit(network(), experiment, small_mnist, seed=0)
    assert metrics.train_images == 500


# ---- labels


def swapped(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return images.flip(0), labels.flip(0)


def softened(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return images, F.one_hot(labels, 10) * 0.9 + 0.01


MIXING: dict[str, Any] = {
    "MixUp": v2.MixUp(num_classes=10),
    "CutMix": v2.CutMix(num_classes=10),
    "a choice": v2.RandomChoice([v2.CutMix(num_classes=10), v2.MixUp(num_classes=10)]),
    "in a Compose": v2.Compose([v2.RandomRotation(7), v2.MixUp(num_classes=10)]),
    "probabilities": softened,
}


@pytest.mark.parametrize("augmentation", [*MIXING.values(), swapped], ids=[*MIXING, "a function"])
def test_an_augmentation_may_take_the_labels_too(augmentation: Any, small_mnist: Mnist) -> None:
    experiment = declare(augmentation)

    rehearse(experiment, small_mnist)
    (metrics,) = fit(network(), experiment, small_mnist, seed=0)

    assert takes_labels(augmentation)
    assert 0 < metrics.train_loss < 10
    assert 0 <= metrics.train_correct <= 500


def test_it_is_said_of_a_function_that_takes_labels_that_its_draws_are_not_tried(small_mnist: Mnist) -> None:
    (said,) = rehearse(declare(swapped), small_mnist).notices
    assert "it can't be tried out whether it draws for each image" in said


def test_labels_follow_their_images(small_mnist: Mnist) -> None:
    experiment = declare(swapped)
    plain, flipped = (
        list(fit(initial_network(one, 0, CPU), one, small_mnist, seed=0)) for one in (declare(None), experiment)
    )
    assert plain[0].train_loss == pytest.approx(flipped[0].train_loss, rel=1e-5)


def test_it_is_said_that_mixup_of_torchvision_draws_once_for_a_batch(small_mnist: Mnist) -> None:
    (said,) = rehearse(declare(v2.MixUp(num_classes=10)), small_mnist).notices
    assert said.startswith("augmentation: torchvision's MixUp draws once for all images of a batch")


# ---- what is refused, and what is said


def labels_lost(images: Tensor, labels: Tensor) -> Tensor:
    return images


def too_few_labels(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return images, labels[1:]


def nine_classes(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return images, torch.zeros(len(labels), 9)


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "Normalize": (v2.Normalize([0.5], [0.5]), r"Normalize .* declare normalize=\(mean, deviation\)"),
    "v1 Normalize": (transforms.Normalize([0.5], [0.5]), r"Normalize .* declare normalize=\(mean, deviation\)"),
    "ToTensor": (transforms.Compose([transforms.ToTensor()]), "ToTensor .* leave it out"),
    "another size": (v2.Resize(14), r"gives torch\.float32 images of shape \(100, 1, 14, 14\)"),
    "no labels": (labels_lost, "not enough values|too many values|gives"),
    "few labels": (too_few_labels, r"gives torch\.int64 labels of shape \(99,\), not digits"),
    "nine classes": (nine_classes, r"gives torch\.float32 labels of shape \(100, 9\), not digits"),
}


@pytest.mark.parametrize(("augmentation", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_an_augmentation_is_refused(augmentation: Any, sentence: str, small_mnist: Mnist) -> None:
    with pytest.raises(LabError, match=f"^augmentation: .*({sentence})"):
        rehearse(declare(augmentation), small_mnist)


def test_a_class_in_place_of_a_transform_is_refused() -> None:
    for given in (v2.RandomRotation, partial(v2.RandomRotation, degrees=7)):
        with pytest.raises(
            LabError, match=r"^augmentation: RandomRotation is a class; give .* RandomRotation\(\.\.\.\)"
        ):
            declare(given).check()


def brighter(images: Tensor) -> Tensor:
    return images * 2 - 0.5


def test_pixels_outside_of_0_to_1_are_said(small_mnist: Mnist) -> None:
    (said,) = rehearse(declare(brighter), small_mnist).notices
    assert said.startswith("augmentation gives pixels from -0.50 to 1.50")
