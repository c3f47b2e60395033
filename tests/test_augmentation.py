"""Batched transforms of real images, and torchvision's as augmentation: a draw for each image."""

import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms import functional as tv

from mnist_lab.augmentation import affine, image_by_image, random_affine, random_center_crop, random_rotation, rotate
from mnist_lab.checking.augmentation import check_draws
from mnist_lab.checking.rehearsal import rehearse
from mnist_lab.data import Mnist
from mnist_lab.training.transforms import Augmentation, takes_labels
from networks import declare, train

TOLERANCE = 1e-5  # of pixels in [0, 1]; measured: 4.1e-6 for rotation, 1.1e-6 for the crop


@pytest.fixture(scope="module")
def images(mnist: Mnist) -> Tensor:
    return mnist.train_images[:400].float() / 255


def rotated_one_by_one(images: Tensor, angles: Tensor) -> Tensor:
    pairs = zip(images, angles.tolist(), strict=True)
    return torch.stack([tv.rotate(image, angle, InterpolationMode.BILINEAR) for image, angle in pairs])


def test_rotate_is_torchvisions_rotation_of_each_image(images: Tensor) -> None:
    angles = torch.linspace(-180, 180, len(images))

    torch.testing.assert_close(rotate(images, angles), rotated_one_by_one(images, angles), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("size", [1, 21, 28])
def test_center_crop_is_torchvisions_crop_and_resize_of_each_image(images: Tensor, size: int) -> None:
    expected = [tv.resize(tv.center_crop(image, [size, size]), [28, 28]) for image in images]
    torch.testing.assert_close(random_center_crop(images, size, p=1), torch.stack(expected), rtol=0, atol=TOLERANCE)


def test_each_image_has_its_own_angle_uniform_in_the_range(images: Tensor) -> None:
    degrees, number = 7, 500
    torch.manual_seed(0)
    turned = random_rotation(images[:1].expand(number, -1, -1, -1), degrees)

    # Recover each angle: which of torchvision's rotations of the image, 0.1 degrees apart, comes nearest?
    candidates = torch.linspace(-10, 10, 201)
    references = rotated_one_by_one(images[:1].expand(len(candidates), -1, -1, -1), candidates)
    distances = torch.cdist(turned.flatten(1), references.flatten(1))
    angles = candidates[distances.argmin(dim=1)].sort().values

    assert distances.min(dim=1).values.max() < 0.06  # two neighbouring candidates are 0.066 to 0.078 apart
    assert angles.abs().max() <= degrees + 0.05
    assert len(angles.unique()) > 100  # of the 141 candidates in the range
    uniform = torch.linspace(-degrees, degrees, number)
    assert (angles - uniform).abs().max() < 0.1 * 2 * degrees  # Kolmogorov-Smirnov, 0.1 of the distribution


def test_crop_is_drawn_for_each_image(images: Tensor) -> None:
    torch.manual_seed(0)
    result = random_center_crop(images, 22, p=0.3)

    scaled = random_center_crop(images, 22, p=1)
    is_cropped = (result == scaled).flatten(1).all(dim=1)
    is_whole = (result == images).flatten(1).all(dim=1)
    assert (is_cropped ^ is_whole).all()
    assert 0.2 < is_cropped.float().mean() < 0.4


WRONG = [
    ("degrees=-1", partial(random_rotation, degrees=-1)),
    ("degrees=nan", partial(random_rotation, degrees=math.nan)),
    ("size=29", partial(random_center_crop, size=29, p=0.5)),
    ("p=1.1", partial(random_center_crop, size=22, p=1.1)),
    ("degrees=-1", partial(random_affine, degrees=-1, shift=0.0, scale=0.0)),
    ("shift=inf", partial(random_affine, degrees=0.0, shift=math.inf, scale=0.0)),
    ("scale=1.0", partial(random_affine, degrees=0.0, shift=0.0, scale=1.0)),
]


@pytest.mark.parametrize(("named", "transform"), WRONG)
def test_an_impossible_argument_is_refused(named: str, transform: Callable[[Tensor], Tensor], images: Tensor) -> None:
    with pytest.raises(ValueError, match=named):
        transform(images)


# ---- one draw for a batch


def mixed(images: Tensor) -> Tensor:
    share = random.random()
    return share * images + (1 - share) * images.flip(0)


SHARED = {
    "v1 compose": transforms.Compose([transforms.RandomAffine(7), transforms.RandomCrop(28, padding=2)]),
    "v2 compose with noise": v2.Compose([v2.RandomRotation(10), v2.GaussianNoise(sigma=0.05)]),
    "rarely applied": v2.RandomApply([v2.RandomRotation(30)], p=0.1),
    "Python's random": lambda images: images.flip(-1) if random.random() < 0.5 else images,
}
OWN = {
    "random_rotation": partial(random_rotation, degrees=7.0),
    "rare": partial(random_center_crop, size=22, p=0.01),
    "noise": torch.rand_like,
    "mixes images": mixed,
    "no draw": torch.clone,
    **{name: partial(image_by_image, transform=transform) for name, transform in SHARED.items()},
}


@pytest.mark.parametrize("augmentation", SHARED.values(), ids=SHARED)
def test_one_draw_for_a_whole_batch_is_found(augmentation: Callable[[Tensor], Tensor], images: Tensor) -> None:
    random.seed(0)
    with pytest.raises(ValueError, match=r"draws once for a whole batch, .*image_by_image"):
        check_draws(augmentation, images[0])


@pytest.mark.parametrize("augmentation", OWN.values(), ids=OWN)
def test_a_draw_for_each_image_passes(augmentation: Callable[[Tensor], Tensor], images: Tensor) -> None:
    random.seed(0)
    for image in images[:5]:
        check_draws(augmentation, image)


def test_affine_is_torchvisions(images: Tensor) -> None:
    few = images[:4]
    angles, scales = torch.tensor([0.0, 7.0, -12.5, 3.0]), torch.tensor([1.0, 0.9, 1.2, 1.0])
    shifts = torch.tensor([[1.0, 0.0, -2.0, 0.0], [0.0, 3.0, 1.0, 0.0]])

    expected = [
        tv.affine(image, -angle, (int(across), int(down)), scale, [0.0, 0.0], InterpolationMode.BILINEAR)
        for image, angle, scale, (across, down) in zip(few, angles.tolist(), scales.tolist(), shifts.T, strict=True)
    ]

    torch.testing.assert_close(affine(few, angles, scales, shifts), torch.stack(expected), atol=1e-4, rtol=0)


def test_random_affine_draws_each_part_for_each_image(images: Tensor) -> None:
    alike = images[:1].expand(200, 1, 28, 28)
    for part in ({"degrees": 20.0}, {"shift": 2.0}, {"scale": 0.2}):
        drawn = random_affine(alike, **({"degrees": 0.0, "shift": 0.0, "scale": 0.0} | part))
        assert len(drawn.unique(dim=0)) == 200
    torch.testing.assert_close(random_affine(alike, 0.0, 0.0, 0.0), alike)


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
    experiment = declare(epochs=1, augmentation=augmentation)

    rehearse(experiment, small_mnist)
    _, (metrics,) = train(experiment, small_mnist)

    assert takes_labels(augmentation)
    assert 0 < metrics.train_loss < 10
    assert 0 <= metrics.train_correct <= 500


def test_labels_follow_their_images(small_mnist: Mnist) -> None:
    trained = [train(declare(epochs=1, augmentation=one), small_mnist) for one in (None, swapped)]
    (_, (plain,)), (_, (flipped,)) = trained
    assert plain.train_loss == pytest.approx(flipped.train_loss, rel=1e-5)
