"""Finds out by trial whether an augmentation draws for each image, or once for a whole batch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from torch import Tensor

from mnist_lab.training.generators import seed_generators

# Wald's sequential test: two images of one batch are more alike in half of the trials where each has a draw of its own,
# and in most of them where both share one. https://en.wikipedia.org/wiki/Sequential_probability_ratio_test
SHARED = 0.8
WRONGLY_REFUSED, MISSED = 1e-6, 1e-2
SAME = 1e-3  # difference in the sum over an image's pixels that rounding may make
MAX_TRIALS = 500
MAX_SECONDS = 2.0


def check_draws(augmentation: Callable[[Tensor], Tensor], image: Tensor) -> None:
    """Refuse an augmentation that changes all images of a batch alike, by one random draw.

    It is given the same image (1, 28, 28) twice in a batch, again and again. With a draw for each image, the two come
    out as different from one another as from those of another call. With one draw for both they are more alike: this
    also holds where noise, drawn for each pixel, comes on top.

    Raises:
        ValueError: if it draws once for a whole batch.
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
        if not math.log(MISSED) < for_shared < -math.log(WRONGLY_REFUSED) or time.perf_counter() > end:
            break
    if for_shared >= -math.log(WRONGLY_REFUSED):
        raise ValueError(
            "draws once for a whole batch and changes all its images alike; "
            "augmentation=partial(image_by_image, transform=...) from mnist_lab.augmentation draws for each image"
        )
