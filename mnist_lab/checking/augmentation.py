"""Tries an augmentation on a batch: what it gives, and whether it draws for each image or once for a whole batch."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy

import torch
from torch import Tensor

from mnist_lab.checking.network import kind, sums_to_one
from mnist_lab.data import Mnist
from mnist_lab.errors import text_of
from mnist_lab.experiment import Experiment
from mnist_lab.training.loop import training_batch
from mnist_lab.training.states import load_parts_state, parts_state, seed_generators
from mnist_lab.training.transforms import Augmentation, is_mixing, is_torchvision

DRAWS_SEED = 2**31  # of what is drawn twice alike; not a network's, so that one built meanwhile is another
OUTSIDE = 0.01  # by which an augmented pixel may lie outside [0, 1]: an interpolation may overshoot
DONE_BY_THE_LAB = ("ToPILImage", "ToTensor", "PILToTensor", "Normalize")  # of torchvision's transforms
# Wald's sequential test: two images of one batch are more alike in half of the trials where each has a draw of its own,
# and in most of them where both share one. https://en.wikipedia.org/wiki/Sequential_probability_ratio_test
SHARED = 0.8
REFUSED, PASSED = -math.log(1e-6), math.log(1e-2)  # with so many wrongly refused, and missed
SAME = 1e-3  # difference in the sum over an image's pixels that rounding may make
IMAGE_BY_IMAGE = "partial(image_by_image, transform=...) from mnist_lab.augmentation"
UNSEEDED = "the run's seed does not decide what augmentation draws; draw from torch, random or np.random themselves"
ENOUGH, MANY = 20, 0.3  # images, and the share of them
MAX_TRIALS = 500
MAX_SECONDS = 2.0


def check_augmentation(experiment: Experiment, mnist: Mnist, size: int) -> tuple[Tensor, Tensor, list[str]]:
    """Return an augmented batch of so many images, its labels, and notices; raises ValueError if it can't be used."""
    augment = Augmentation(experiment.augmentation)
    names = [type(transform).__name__ for _, transform in augment.parts if is_torchvision(transform)]
    if done := [name for name in names if name in DONE_BY_THE_LAB]:
        advice = "images are tensors in [0, 1], and `normalize` is a field of its own"
        raise ValueError(f"leave out {', '.join(done)}: {advice}")
    indices = torch.arange(size, device=mnist.train_images.device)
    start, state = time.perf_counter(), deepcopy(parts_state(experiment))
    seed_generators(DRAWS_SEED)
    try:
        images, labels = training_batch(mnist, indices, augment)
        _check_batch(images, labels, size)
    except Exception as error:
        message = f"{text_of(error)}{_image_by_image(augment, mnist, size)}"
        raise ValueError(message).with_traceback(error.__traceback__) from error
    if experiment.augmentation is None:
        return images, labels, []
    notices = [*_notice_transforms(augment, mnist, (time.perf_counter() - start) / size)]
    load_parts_state(experiment, state)
    seed_generators(DRAWS_SEED)
    again, _ = training_batch(mnist, indices, augment)
    return images, labels, [*notices, *_notice_images(images, again)]


def _check_batch(images: object, labels: object, size: int) -> None:
    if not isinstance(images, Tensor) or images.shape != (size, 1, 28, 28) or images.dtype != torch.float32:
        raise ValueError(f"gives {kind(images)}, not torch.float32 images of shape ({size}, 1, 28, 28)")
    if not images.isfinite().all():
        raise ValueError("gives pixels that are not finite")
    are_digits = isinstance(labels, Tensor) and labels.shape == (size,) and labels.dtype == torch.int64
    are_shares = isinstance(labels, Tensor) and labels.shape == (size, 10) and labels.is_floating_point()
    if not are_digits and not are_shares:
        wanted = f"torch.int64 digits of shape ({size},) or probabilities of shape ({size}, 10)"
        raise ValueError(f"gives {kind(labels)} for the labels, not {wanted}")
    if isinstance(labels, Tensor) and are_shares and not sums_to_one(labels):
        raise ValueError("gives probabilities for the labels that do not sum to 1")


def _image_by_image(augment: Augmentation, mnist: Mnist, size: int) -> str:
    for _, transform in [part for part in augment.parts if part[0] == "batch"]:
        with suppress(Exception):
            if transform(mnist.train_images[0].float() / 255).shape == (1, 28, 28):
                return f"; it is given a batch ({size}, 1, 28, 28); image by image: {IMAGE_BY_IMAGE}"
    return ""


def _notice_transforms(augment: Augmentation, mnist: Mnist, seconds: float) -> Iterator[str]:
    """Refuse what draws once for a whole batch, and name what can't be tried; seconds: that an image took."""
    images = mnist.train_images
    for given, transform in augment.parts:
        name = type(transform).__name__
        if given == "batch":
            check_draws(transform, images[0].float() / 255)
        elif given == "labels" and is_mixing(transform):
            yield f"augmentation: torchvision's {name} draws once for all images of a batch"
    if any(given == "image" for given, _ in augment.parts):
        cost = f"some {math.ceil(seconds * len(images))} s of an epoch; those of mnist_lab.augmentation are faster"
        yield f"augmentation: torchvision's transforms are applied image by image, {cost}"


def _notice_images(images: Tensor, again: Tensor) -> Iterator[str]:
    if not torch.allclose(images, again, atol=1e-5):
        yield UNSEEDED
    low, high = images.min().item(), images.max().item()
    if low < -OUTSIDE or high > 1 + OUTSIDE:
        yield f"augmentation gives pixels from {low:.2f} to {high:.2f}: outside [0, 1], in which the test images are"
    corners = images[..., :: images.shape[-1] - 1, :: images.shape[-1] - 1].amax(dim=(1, 2, 3))
    if len(images) >= ENOUGH and (share := (corners > 0.5).float().mean().item()) > MANY:
        light = f"{100 * share:.0f} % of the images a light corner, where MNIST's are black"
        yield f"augmentation gives {light}; is it a fill? fill=0 is black"


def check_draws(augmentation: Callable[[Tensor], Tensor], image: Tensor) -> None:
    """Refuse, by ValueError, an augmentation that changes all images of a batch alike, by one random draw.

    It is given the same image (1, 28, 28) twice in a batch, again and again. With a draw for each image, the two come
    out as different from one another as from those of another call. With one draw for both they are more alike, also
    where noise, drawn for each pixel, comes on top.
    """
    twice = image.expand(2, *image.shape)
    for_shared = 0.0  # the logarithm of the likelihood ratio
    seed_generators(0)  # so that the answer is the same each time
    end = time.perf_counter() + MAX_SECONDS
    for _ in range(MAX_TRIALS):
        (first, beside), (_, other) = augmentation(twice.clone()), augmentation(twice.clone())
        within, across = (first - beside).abs().sum().item(), (first - other).abs().sum().item()
        if abs(within - across) > SAME:
            for_shared += math.log((SHARED if within < across else 1 - SHARED) / 0.5)
        if not PASSED < for_shared < REFUSED or time.perf_counter() > end:
            break
    if for_shared >= REFUSED:
        raise ValueError(
            f"draws once for a whole batch, and changes all its images alike; image by image: {IMAGE_BY_IMAGE}"
        )
