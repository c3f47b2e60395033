"""Applies what a script declares as augmentation: a function on batches, or transforms of torchvision."""

from collections.abc import Callable, Iterator
from functools import partial, reduce
from itertools import groupby
from operator import itemgetter
from typing import Any, Literal

from torch import Tensor, nn

from mnist_lab.arguments import parameters_of
from mnist_lab.augmentation import image_by_image

# What a transform is given: a batch of images, one image, or a batch of images and their labels.
Given = Literal["batch", "image", "labels"]


class Augmentation:
    """Maps images (N, 1, 28, 28) and labels (N,) to augmented images and their labels, (N,) or probabilities (N, 10).

    torchvision's transforms draw once per call, so they, and whatever stands in a Compose with them, are applied image
    by image. Those that mix images are called once for the batch.
    """

    def __init__(self, declared: Callable[..., Any] | None) -> None:
        self.parts = [] if declared is None else list(parts(declared))
        stages = groupby(self.parts, key=itemgetter(0))
        self.stages: list[tuple[Given, list[Any]]] = [(given, [part for _, part in stage]) for given, stage in stages]

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        for given, chain in self.stages:
            if given == "image":
                images = image_by_image(images, partial(reduce, lambda image, part: part(image), chain))
            else:
                for transform in chain:
                    images, labels = transform(images, labels) if given == "labels" else (transform(images), labels)
        return images, labels


def parts(augmentation: Any, alone: Given = "batch") -> Iterator[tuple[Given, Any]]:
    """Yield the transforms in their order, each with what it gets; alone: what one that is not torchvision's gets."""
    composed = is_torchvision(augmentation) and type(augmentation).__name__ == "Compose"
    if composed or (isinstance(augmentation, nn.Sequential) and any(map(is_torchvision, augmentation))):
        for transform in augmentation.transforms if composed else augmentation:
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
    mixes = any(kind.__name__ in ("MixUp", "CutMix") for kind in type(transform).__mro__)
    return is_torchvision(transform) and (mixes or any(map(is_mixing, getattr(transform, "transforms", []))))
