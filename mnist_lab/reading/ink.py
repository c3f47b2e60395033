"""Where the ink of a digit is in a photo: the ground is taken away, and the strokes of one digit are kept."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from mnist_lab.errors import LabError

LEAST_CONTRAST = 0.08  # between ink and paper, of all that there can be
INK = 0.9  # of a part's border is an edge in the picture; of ground that was cut off, less
EVEN = 0.008  # a ground that differs less over half of the picture is not a photo's
THICKEST = 4  # of the longer side: a stroke that is wider than a fourth of it is ground
ONE_COLOUR = "there is no digit to see: it has nearly one colour all over"
UNEVEN = "there is no digit to see: the ground is uneven; crop to the digit"


class NoDigit(LabError):
    """A picture without a digit in it."""


def digit_on(pixels: NDArray[np.float64], name: str) -> NDArray[np.float64]:
    """Return the ink, (H, W) from 0 to 1, of the digit in pixels (H, W, 3) from 0 to 1.

    The ground may have shadows, a margin, ruled lines and specks.

    Ink is what a closing (dark ink, as a share of the light on the paper) or an opening (light ink) of the picture
    takes away: whatever is narrower than their window. Shades, shadows and the margin of a sheet are wider, and stay.
    Of what is left, connected parts that are no thin strokes, or go on beyond the picture, are not the digit.
    https://en.wikipedia.org/wiki/Top-hat_transform

    Raises:
        NoDigit: if there is no stroke; LabError if there are two digits.
    """
    window = (max(pixels.shape) // THICKEST, max(pixels.shape) // THICKEST, 1)
    smooth = ndimage.gaussian_filter(pixels, (1, 1, 0))
    steep = np.max([ndimage.gaussian_gradient_magnitude(smooth[..., channel], 1) for channel in range(3)], axis=0)
    found: list[tuple[float, NDArray[np.float64], _Parts]] = []
    from_ground = np.abs(smooth - np.median(smooth, axis=(0, 1)))
    if (from_ground.max(axis=2) < EVEN).mean() > 0.5:  # drawn, not photographed: all else is ink, however thick
        changes = [(from_ground, steep)]
    else:
        paper = ndimage.grey_closing(smooth, window) + 0.1  # above nothing, as it is divided by
        dark = (paper - 0.1 - smooth) / paper, steep / paper.min(axis=2)
        changes = [dark, (smooth - ndimage.grey_opening(smooth, window), steep)]
    for change, edges in changes:
        ink = change.max(axis=2)
        ink = np.clip(ink - np.median(ink), 0, None)
        if (parts := _Parts(ink, edges)).scores.size:
            found.append((float(parts.scores.max()), ink, parts))
    if not found:
        uneven = np.ptp(smooth, axis=(0, 1)).max() >= 2 * LEAST_CONTRAST
        raise NoDigit(f"{name}: {UNEVEN if uneven else ONE_COLOUR}")
    _, ink, parts = max(found, key=lambda one: one[0])
    ink = ink * ndimage.binary_dilation(parts.digit(name), iterations=2)
    return np.minimum(ink / float(np.percentile(ink[ink > 0], 95)), 1)


class _Parts:
    """The connected parts of ink, and how much each is like the stroke of a digit."""

    def __init__(self, ink: NDArray[np.float64], steep: NDArray[np.float64]) -> None:
        strong = ink > max(LEAST_CONTRAST, _otsu(ink[ink > LEAST_CONTRAST / 2]))
        self.labels, count = ndimage.label(strong, np.ones((3, 3)))
        numbers = np.arange(1, count + 1)
        self.boxes = [(b[0].start, b[0].stop, b[1].start, b[1].stop) for b in ndimage.find_objects(self.labels)]
        self.areas = ndimage.sum_labels(strong, self.labels, numbers)
        if not count:
            self.scores = np.array([])
            return
        distance = ndimage.distance_transform_edt(np.pad(strong, 1))[1:-1, 1:-1]  # to the border of the stroke
        half_widths = ndimage.maximum(distance, self.labels, numbers)
        length = np.minimum(self.areas / (4 * half_widths**2), 4)  # in widths
        edge = np.concatenate([self.labels[0], self.labels[-1], self.labels[:, 0], self.labels[:, -1]])
        inside = np.where(np.isin(numbers, edge), 0.1, 1)
        contrast = ndimage.mean(ink, self.labels, numbers)
        # Ground that the window cut off has borders where the picture has none.
        border = np.where(strong & ~ndimage.binary_erosion(strong, np.ones((3, 3), bool)), self.labels, 0)
        is_edge = np.minimum(steep / (0.1 * np.append(1, contrast)[self.labels]), 1)
        self.real = ndimage.mean(is_edge, border, numbers)
        self.scores = contrast * self.areas**0.25 * length * inside * self.real**4

    def digit(self, name: str) -> NDArray[np.bool_]:
        """Return where the likeliest stroke and the rest of its digit are; raises LabError if there are two."""
        first = int(self.scores.argmax())
        top, bottom, left, right = self.boxes[first]
        reach = 0.25 * max(bottom - top, right - left)
        chosen = [first]
        for n, (t, b, le, r) in enumerate(self.boxes):
            near = t < bottom + reach and b > top - reach and le < right + reach and r > left - reach
            if n == first or self.scores[n] < 0.2 * self.scores[first]:
                continue
            beside = (le > right or r < left) and min(b, bottom) - max(t, top) > 0.6 * (bottom - top)
            if beside and self.scores[n] > 0.4 * self.scores[first] and min(self.real[first], self.real[n]) > INK:
                raise LabError(f"{name}: there is more than one digit in it; crop to one")
            if near:
                chosen.append(n)
        mask: NDArray[np.bool_] = np.isin(self.labels, np.array(chosen) + 1)
        return mask


def _otsu(values: NDArray[np.float64]) -> float:
    """Return the threshold that parts values into two classes that differ most. Otsu, 1979."""
    if not values.size:
        return 1.0
    counts, edges = np.histogram(values, bins=128)
    middles = (edges[:-1] + edges[1:]) / 2
    below = counts.cumsum()[:-1]
    above = values.size - below
    sums = (counts * middles).cumsum()
    gap = sums[:-1] / np.maximum(below, 1) - (sums[-1] - sums[:-1]) / np.maximum(above, 1)
    return float(middles[:-1][(below * above * gap**2).argmax()])
