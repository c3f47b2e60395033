"""Applies what a script declares as augmentation: a function on batches, or transforms of torchvision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from typing import Any, Literal

from torch import Tensor, nn

from mnist_lab.arguments import parameters_of
from mnist_lab.augmentation import image_by_image

MIXING = ("MixUp", "CutMix")  # of torchvision: they mix the images of a batch, and so need all of them and the labels
# What a transform is given: a batch of images, one image, or a batch of images and their labels.
Given = Literal["batch", "image", "labels"]


class Augmentation:
    """Maps images (N, 1, 28, 28) and labels (N,) to augmented images and their labels, (N,) or probabilities (N, 10).

    torchvision's transforms draw once per call, so they are applied image by image, and so is whatever stands in a
    Compose with them. Those that mix images are called once for the batch.
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


def parts(augmentation: Any) -> Iterator[tuple[Given, Any]]:
    """Yield the transforms that are applied one after another, each with what it is given."""
    if chained := _chained(augmentation):
        for transform in chained:
            if _chained(transform):
                yield from parts(transform)
            else:
                yield "labels" if takes_labels(transform) else "image", transform
    elif takes_labels(augmentation):
        yield "labels", augmentation
    else:
        yield "image" if is_torchvision(augmentation) else "batch", augmentation


def _chained(augmentation: Any) -> list[Any]:
    """Return the members of a Compose, or of an nn.Sequential that holds transforms of torchvision; else nothing."""
    if isinstance(augmentation, nn.Sequential):
        return list(augmentation) if any(is_torchvision(member) or _chained(member) for member in augmentation) else []
    is_compose = is_torchvision(augmentation) and type(augmentation).__name__ == "Compose"
    return list(augmentation.transforms) if is_compose else []


def is_torchvision(transform: object) -> bool:
    """Say whether it is one of torchvision's transforms, or extends one."""
    return any(kind.__module__.startswith("torchvision.transforms.") for kind in type(transform).__mro__)


def takes_labels(augmentation: Any) -> bool:
    """Say whether it maps images and labels to images and labels: it mixes images, or has an argument `labels`."""
    if is_torchvision(augmentation) or _chained(augmentation):
        return any(map(takes_labels, members)) if (members := _members(augmentation)) else is_mixing(augmentation)
    labels = parameters_of(getattr(augmentation, "forward", augmentation)).get("labels")
    return labels is not None and labels.default is labels.empty


def is_mixing(transform: object) -> bool:
    """Say whether it is a transform of torchvision that mixes the images of a batch, or a choice among such."""
    kinds = type(transform).__mro__
    return is_torchvision(transform) and (
        any(kind.__name__ in MIXING for kind in kinds) or any(map(is_mixing, _members(transform)))
    )


def _members(transform: Any) -> list[Any]:
    """Return what a container of torchvision's or torch's holds: RandomChoice, RandomApply, Compose and the like."""
    return list(transform) if isinstance(transform, nn.Sequential) else list(getattr(transform, "transforms", []))
