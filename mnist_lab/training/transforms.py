"""Applies what a script declares as augmentation: a function on batches, or transforms of torchvision."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from typing import Any, Literal

from torch import Tensor, nn

from mnist_lab.arguments import parameters_of
from mnist_lab.augmentation import image_by_image

MIXING = {"MixUp", "CutMix"}  # of torchvision: they mix the images of a batch, and so need all of them and the labels
# What a transform is given: a batch of images, one image, or a batch of images and their labels.
Given = Literal["batch", "image", "labels"]


class Augmentation:
    """Maps images (N, 1, 28, 28) and labels (N,) to augmented images and their labels, (N,) or probabilities (N, 10).

    torchvision's transforms draw once per call, so they, and whatever stands in a Compose with them, are applied image
    by image. Those that mix images are called once for the batch.
    """

    def __init__(self, declared: Callable[..., Any] | None) -> None:
        self.parts = [] if declared is None else list(parts(declared))
        self.stages: list[tuple[Given, list[Any]]] = [
            (given, [transform for _, transform in transforms])
            for given, transforms in groupby(self.parts, key=lambda part: part[0])
        ]

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        for given, chain in self.stages:
            if given == "image":
                images = image_by_image(images, partial(_apply, chain))
            else:
                for transform in chain:
                    images, labels = transform(images, labels) if given == "labels" else (transform(images), labels)
        return images, labels


def _apply(chain: list[Callable[[Tensor], Tensor]], image: Tensor) -> Tensor:
    for transform in chain:
        image = transform(image)
    return image


def parts(augmentation: Any, alone: Given = "batch") -> Iterator[tuple[Given, Any]]:
    """Yield the transforms that are applied one after another, each with what it is given; `alone`: if no library's."""
    if is_torchvision(augmentation) and type(augmentation).__name__ == "Compose":
        for transform in augmentation.transforms:
            yield from parts(transform, alone="image")
    elif isinstance(augmentation, nn.Sequential) and any(map(is_torchvision, augmentation)):
        for transform in augmentation:
            yield from parts(transform, alone="image")
    elif takes_labels(augmentation):
        yield "labels", augmentation
    else:
        yield "image" if is_torchvision(augmentation) else alone, augmentation


def is_torchvision(transform: object) -> bool:
    """Say whether it is one of torchvision's transforms, or extends one."""
    return any(kind.__module__.startswith("torchvision.transforms.") for kind in type(transform).__mro__)


def takes_labels(augmentation: Any) -> bool:
    """Say whether it maps images and labels to images and labels: it mixes images, or has an argument `labels`."""
    if is_torchvision(augmentation):
        return is_mixing(augmentation)
    labels = parameters_of(getattr(augmentation, "forward", augmentation)).get("labels")
    return labels is not None and labels.default is labels.empty


def is_mixing(transform: Any) -> bool:
    """Say whether it is a transform of torchvision that mixes the images of a batch, or a choice among such."""
    if is_torchvision(transform):
        kinds = {kind.__name__ for kind in type(transform).__mro__}
        return bool(kinds & MIXING) or any(map(is_mixing, getattr(transform, "transforms", [])))
    return False
