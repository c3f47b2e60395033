"""torchvision's transforms as augmentation: a draw for each image, or for a batch where that is said."""

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms import v2

from mnist_lab import Experiment
from mnist_lab.checking.rehearsal import rehearse
from mnist_lab.data import Mnist
from mnist_lab.training.transforms import Augmentation, takes_labels
from networks import declare, train


def augmented(augmentation: Any) -> Experiment:
    return declare(epochs=1, augmentation=augmentation)


class Mine(v2.RandomRotation):
    pass


def rotated(image: Tensor) -> Tensor:
    return v2.functional.rotate(image, random.uniform(-30, 30))


PER_IMAGE = {
    "extended": Mine(30),
    "v1 Compose": transforms.Compose([transforms.RandomAffine(7), transforms.RandomCrop(28, padding=2)]),
    "v2 Compose": v2.Compose([v2.ToImage(), v2.RandomRotation(30), v2.ToDtype(torch.float32, scale=True)]),
    "Sequential": nn.Sequential(v2.RandomRotation(30), v2.RandomErasing(p=0.5)),
    "one's own in a Compose": v2.Compose([rotated, v2.ToImage()]),
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


# ---- labels


def swapped(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return images.flip(0), labels.flip(0)


def softened(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return images, F.one_hot(labels, 10) * 0.9 + 0.01


MIXING: dict[str, Any] = {
    "MixUp": v2.MixUp(num_classes=10),
    "a choice": v2.RandomChoice([v2.CutMix(num_classes=10), v2.MixUp(num_classes=10)]),
    "in a Compose": v2.Compose([v2.RandomRotation(7), v2.MixUp(num_classes=10)]),
    "probabilities": softened,
    "a function": swapped,
}


@pytest.mark.parametrize("augmentation", MIXING.values(), ids=MIXING)
def test_an_augmentation_may_take_the_labels_too(augmentation: Any, small_mnist: Mnist) -> None:
    experiment = augmented(augmentation)

    rehearse(experiment, small_mnist)
    _, (metrics,) = train(experiment, small_mnist)

    assert takes_labels(augmentation)
    assert 0 < metrics.train_loss < 10
    assert 0 <= metrics.train_correct <= 500


def test_labels_follow_their_images(small_mnist: Mnist) -> None:
    (_, (plain,)), (_, (flipped,)) = (train(augmented(one), small_mnist) for one in (None, swapped))
    assert plain.train_loss == pytest.approx(flipped.train_loss, rel=1e-5)
