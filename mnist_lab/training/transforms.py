"""Applies what a script declares as augmentation: a function on batches, or transforms of torchvision."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from mnist_lab.augmentation import image_by_image

MIXING = ("MixUp", "CutMix")  # of torchvision: they mix the images of a batch, and so need all of them and the labels


def augment(augmentation: Callable[..., Any], images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the augmented images (N, 1, 28, 28) and their labels, (N,) or probabilities (N, 10).

    torchvision's transforms draw once per call, so each is applied image by image. Those that mix images are called
    once for the batch.
    """
    for transform in parts(augmentation):
        if takes_labels(transform):
            images, labels = transform(images, labels)
        elif is_torchvision(transform):
            images = image_by_image(images, transform)
        else:
            images = transform(images)
    return images, labels


def parts(augmentation: Any) -> Iterator[Any]:
    """Yield the transforms that a Compose or nn.Sequential applies one after another, or the augmentation itself."""
    if isinstance(augmentation, nn.Sequential):
        chained = list(augmentation)
    elif is_torchvision(augmentation) and type(augmentation).__name__ == "Compose":
        chained = list(augmentation.transforms)
    else:
        yield augmentation
        return
    for transform in chained:
        yield from parts(transform)


def is_torchvision(augmentation: object) -> bool:
    """Say whether it is one of torchvision's transforms, or extends one."""
    return any(kind.__module__.startswith("torchvision.transforms.") for kind in type(augmentation).__mro__)


def takes_labels(augmentation: Callable[..., Any]) -> bool:
    """Say whether it maps images and labels to images and labels: it mixes images, or has an argument `labels`."""
    if is_torchvision(augmentation):
        return any(is_mixing(transform) for transform in parts(augmentation))
    if isinstance(augmentation, nn.Sequential):
        return any(map(takes_labels, parts(augmentation)))
    if isinstance(augmentation, nn.Module):
        augmentation = augmentation.forward
    try:
        labels = inspect.signature(augmentation).parameters.get("labels")
    except (TypeError, ValueError):  # a callable written in C has no signature
        return False
    return labels is not None and labels.default is labels.empty


def is_mixing(transform: object) -> bool:
    """Say whether it is a transform of torchvision that mixes the images of a batch."""
    return is_torchvision(transform) and any(kind.__name__ in MIXING for kind in type(transform).__mro__)
