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
DONE_BY_THE_LAB = ("ToPILImage", "ToTensor", "PILToTensor", "Normalize")  # of torchvision's transforms
# Wald's sequential test of 1/2, the share of trials in which two images of one batch are more alike than those of two
# where each has a draw of its own, against 4/5: log(0.8 / 0.5) is half of -log(0.2 / 0.5), so such a trial counts 1 and
# another -2. One in a million is wrongly refused, one in a hundred missed: log(1e6) and log(1e2) in that unit.
REFUSED, PASSED = 30, -10
IMAGE_BY_IMAGE = "partial(image_by_image, transform=...) from mnist_lab.augmentation"
UNSEEDED = "the run's seed does not decide what augmentation draws; draw from torch, random or np.random directly"


def check_augmentation(experiment: Experiment, mnist: Mnist, size: int) -> tuple[Tensor, Tensor, list[str]]:
    """Return an augmented batch of so many images, its labels, and notices; raises ValueError if it can't be used."""
    augment = Augmentation(experiment.augmentation)
    names = [type(transform).__name__ for _, transform in augment.parts if is_torchvision(transform)]
    if done := ", ".join(name for name in names if name in DONE_BY_THE_LAB):
        raise ValueError(f"leave out {done}: images are tensors in [0, 1], and `normalize` is a field of its own")
    indices = torch.arange(size, device=mnist.train_images.device)
    start, state = time.perf_counter(), deepcopy(parts_state(experiment))
    seed_generators(DRAWS_SEED)
    try:
        images, labels = training_batch(mnist, indices, augment)
        _check_batch(images, labels, size)
    except Exception as error:
        advice = _image_by_image(augment, mnist.train_images, size)
        raise ValueError(f"{text_of(error)}{advice}").with_traceback(error.__traceback__) from error
    if experiment.augmentation is None:
        return images, labels, []
    notices = [*_notice_transforms(augment, mnist.train_images, (time.perf_counter() - start) / size)]
    stays = size if any(given == "labels" for given, _ in augment.parts) else size - size // 2  # beside other images
    drawn = []
    for batch in (indices, indices % stays):
        load_parts_state(experiment, deepcopy(state))
        seed_generators(DRAWS_SEED)
        drawn.append(training_batch(mnist, batch, augment)[0])
    return images, labels, [*notices, *_notice_images(images, drawn[0], drawn[1][: size // 2])]


def _check_batch(images: object, labels: object, size: int) -> None:
    if not isinstance(images, Tensor) or images.shape != (size, 1, 28, 28) or images.dtype != torch.float32:
        raise ValueError(f"gives {kind(images)}, not torch.float32 images of shape ({size}, 1, 28, 28)")
    if not images.isfinite().all():
        raise ValueError("gives pixels that are not finite")
    if isinstance(labels, Tensor) and labels.shape == (size, 10) and labels.is_floating_point():
        if not sums_to_one(labels):
            raise ValueError("gives probabilities for the labels that do not sum to 1")
    elif not isinstance(labels, Tensor) or labels.shape != (size,) or labels.dtype != torch.int64:
        wanted = f"torch.int64 digits of shape ({size},) or probabilities of shape ({size}, 10)"
        raise ValueError(f"gives {kind(labels)} for the labels, not {wanted}")


def _image_by_image(augment: Augmentation, images: Tensor, size: int) -> str:
    for given, transform in augment.parts:
        with suppress(Exception):
            if given == "batch" and transform(images[0].float() / 255).shape == (1, 28, 28):
                return f"; it is given a batch ({size}, 1, 28, 28); image by image: {IMAGE_BY_IMAGE}"
    return ""


def _notice_transforms(augment: Augmentation, images: Tensor, seconds: float) -> Iterator[str]:
    """Refuse what draws once for a whole batch, and name what can't be tried; seconds: that an image took."""
    for given, transform in augment.parts:
        if given == "batch":
            check_draws(transform, images[0].float() / 255)
        elif is_mixing(transform):
            yield f"augmentation: torchvision's {type(transform).__name__} draws once for all images of a batch"
    if any(given == "image" for given, _ in augment.parts):
        cost = f"some {math.ceil(seconds * len(images))} s of an epoch; those of mnist_lab.augmentation are faster"
        yield f"augmentation: torchvision's transforms are applied image by image, {cost}"


def _notice_images(images: Tensor, again: Tensor, beside: Tensor) -> Iterator[str]:
    if not torch.allclose(images, again, atol=1e-5):
        yield UNSEEDED
    elif not torch.allclose(images[: len(beside)], beside, atol=1e-5):  # these stood beside other images
        mixed = "if it mixes them, an argument `labels` gives it the labels to mix too"
        yield f"augmentation: an image depends on the others of its batch, but its label does not; {mixed}"
    low, high = images.min().item(), images.max().item()
    if low < -0.01 or high > 1.01:  # an interpolation may overshoot
        yield f"augmentation gives pixels from {low:.2f} to {high:.2f}: outside [0, 1], in which the test images are"
    corners = images[..., :: images.shape[-1] - 1, :: images.shape[-1] - 1].amax(dim=(1, 2, 3))
    if len(images) >= 20 and (share := (corners > 0.5).float().mean().item()) > 0.3:
        light = f"{100 * share:.0f} % of the images a light corner"
        yield f"augmentation gives {light}, where MNIST's are black: does it fill with white? fill=0 is black"


def check_draws(augmentation: Callable[[Tensor], Tensor], image: Tensor) -> None:
    """Refuse, by ValueError, an augmentation that changes all images of a batch alike, by one random draw.

    It is given the same image (1, 28, 28) twice in a batch, again and again. With a draw for each image, the two come
    out as different from one another as from those of another call. With one draw for both they are more alike.
    """
    twice = image.expand(2, *image.shape)
    score = 0
    seed_generators(0)  # so that the answer is the same each time
    for _ in range(500):
        (first, beside), (_, other) = augmentation(twice.clone()), augmentation(twice.clone())
        within, across = (first - beside).abs().sum().item(), (first - other).abs().sum().item()
        if abs(within - across) > 1e-3:  # as rounding does not make in the sum over an image's pixels
            score += 1 if within < across else -2
        if not PASSED < score < REFUSED:
            break
    if score >= REFUSED:
        raise ValueError(f"draws once for a whole batch, whose images change alike; image by image: {IMAGE_BY_IMAGE}")
