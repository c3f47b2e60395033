"""From a picture to a digit: pictures are prepared as MNIST's digits were, and read by a tracked network."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy import ndimage

from mnist_lab.errors import LabError, text_of
from mnist_lab.experiment import MNIST_PIXELS, quoted
from mnist_lab.paths import is_there, script_named
from mnist_lab.paths import tracking_uri as resolve_uri
from mnist_lab.tracking.sqlite import check_readable

if TYPE_CHECKING:  # a file that is no picture is refused before MLflow and torch are imported
    from torch import nn

# Pillow's other formats are rare, and one of them starts a program (EPS).
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
SUFFIXES = {".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}
BOX, FIELD = 20, 28  # pixels: a digit of MNIST, and the image that it is centred in
THINNEST, USUAL = 1.5, 2.5  # pixels: the width of a stroke in MNIST
UNSURE = 0.8  # probability of the likeliest digit below which a picture may show something else

Ink = NDArray[np.float64]


def find_pictures(paths: Iterable[Path]) -> list[Path]:
    """Return the files, and for each folder the pictures in it, by their names; LabError if one has or is none."""
    found: list[Path] = []
    for path in paths:
        try:
            inside = [path] * path.is_file()  # a pipe would be waited for
            if path.is_dir():
                inside = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
        except OSError as error:
            raise LabError(f"{shown(path)}: it can't be read: {error.strerror}") from error
        if not inside:
            suffixes = ", ".join(sorted(SUFFIXES))
            raise LabError(f"{shown(path)}: there is no file of this name, nor a folder with a picture ({suffixes})")
        found += inside
    if not found:
        raise LabError("image: which one? e.g. `make predict IMAGE=photo.png`")
    return found


def read_digit(file: Path | BytesIO) -> NDArray[np.uint8]:
    """Return the digit in a picture, a file or its content, as MNIST has it: (28, 28), light ink on black.

    In a picture of at most 112x112 the ink is what differs from the colour of the edge; in a larger one, which may be a
    photo, it is found by `_digit_on`. Its box is scaled to 20x20, keeping its proportions, and its centre of mass is
    put at the centre of the 28x28. LabError if the file can't be read as one picture; NoDigit if nothing is seen in it.
    """
    return _as_mnist(_ink(_open(file), shown(file)))


class Predictions(NamedTuple):
    """What a network reads in N images: digits (N,), and the probability of each digit for each image (N, 10)."""

    digits: NDArray[np.int64]
    probabilities: NDArray[np.float32]


def predict(images: object, *, model: str | None = None, tracking_uri: str | None = None) -> Predictions:
    """Read the digits in images.

    images: in MNIST's form, light ink on black, as an array or tensor of (28, 28), (N, 28, 28) or (N, 1, 28, 28): whole
        numbers from 0 to 255, or floats from 0 to 1. Or one picture of Pillow, or several: of any size and colour, and
        prepared as MNIST's digits were.
    model, tracking_uri: as for `find_reader`. It takes seconds to load, so give many images at once.

    Raises LabError if images are neither, there is no digit to see in a picture, or the network can't be loaded.
    """
    pictures = [images] if isinstance(images, Image.Image) else images
    if isinstance(pictures, list | tuple) and pictures and all(isinstance(one, Image.Image) for one in pictures):
        upright = [_flat(ImageOps.exif_transpose(picture)) for picture in pictures]
        digits = np.stack([_as_mnist(_ink(picture, f"images: number {n}")) for n, picture in enumerate(upright)])
    else:
        digits = _in_mnists_form(images)
    probabilities = find_reader(model, tracking_uri=tracking_uri).probabilities(digits)
    return Predictions(probabilities.argmax(axis=1), probabilities)


def _in_mnists_form(images: object) -> NDArray[Any]:
    """Return an array or a tensor as (N, 28, 28), whole numbers from 0 to 255 or floats from 0 to 1."""
    try:
        array = np.asarray(images.detach().cpu() if hasattr(images, "detach") else images)
    except (TypeError, ValueError) as error:
        raise LabError(f"images: they can't be read as an array: {error}") from error
    image = (FIELD, FIELD)
    if array.shape != image and array.shape[1:] not in (image, (1, *image)):
        advice = "give pictures of other sizes as Pillow's images"
        raise LabError(f"images: {array.dtype} {array.shape} is not (28, 28), (N, 28, 28) or (N, 1, 28, 28); {advice}")
    array = array.reshape(-1, *image)
    kind, most = array.dtype.kind, 1 if array.dtype.kind == "f" else 255
    if kind not in "uif" or not ((array >= 0) & (array <= most)).all():
        raise LabError(f"images: {array.dtype} values are to be whole numbers from 0 to 255, or floats from 0 to 1")
    if kind != "f" and array.max(initial=0) == 1:
        raise LabError(f"images: {array.dtype} values go to 255, and these only to 1: divide by 1.0 to have floats")
    if (array[:, [0, 0, -1, -1], [0, -1, 0, -1]] > most / 2).all(axis=1).any():  # all four corners
        raise LabError(f"images: one is dark on light; digits are light on black here: give {most} - images")
    return array


@dataclass(frozen=True)
class Reader:
    run_id: str
    run_name: str
    net: nn.Module

    def probabilities(self, digits: NDArray[Any]) -> NDArray[np.float32]:
        """Return the probability of each digit, (N, 10), for images (N, 28, 28): from 0 to 255, or floats to 1."""
        import torch

        from mnist_lab.training.loop import normalize

        scale = 1 if digits.dtype.kind == "f" else 255
        images = torch.from_numpy(np.ascontiguousarray(digits, dtype=np.float32))[:, None] / scale
        with torch.inference_mode():
            shares = [self.net(normalize(part)).softmax(dim=1) for part in torch.split(images, 1_000)]
        return torch.cat(shares).numpy()


def find_reader(model: str | None = None, *, tracking_uri: str | None = None) -> Reader:
    """Return a tracked network.

    model: `runs:/<id>`, `models:/<name>/<version>`, `models:/<name>@<alias>` or a script's name, "step4" for short, of
        which the newest finished run counts. None for `models:/mnist@champion` of the store, and if it has none, for
        the one that comes with the project, "docs/results". LabError if it is not there, or can't be loaded.
    """
    import torch

    from mnist_lab.tracking import models
    from mnist_lab.tracking.store import open_store

    uri = resolve_uri(tracking_uri)
    if model in (None, "docs/results"):
        if model or not is_there(uri) or not models.is_registered(open_store(uri)):
            net, origin = models.load_committed()
            return Reader(origin.run_id, f"{origin.step} seed {origin.seed}, the champion of docs/results", net)
        model = models.CHAMPION
    elif re.fullmatch(r"runs:/[^/]+", model):
        model += "/model"
    else:
        model = script_named(model)
    check_readable(uri)
    store = open_store(uri)
    found = models.find_teacher(store, model, holdout=0, called="model")
    net = models.load_teacher(store, found, torch.device("cpu"), MNIST_PIXELS, called="model")
    return Reader(found.run_id, str(store.client.get_run(found.run_id).info.run_name), net)


def picture_of(digit: NDArray[np.uint8]) -> str:
    """Return a (28, 28) image as 28 lines of text, two letters a pixel."""
    return "\n".join("".join(2 * " .:-=+*#%@"[value * 10 // 256] for value in row.tolist()) for row in digit)


def shown(file: Path | BytesIO) -> str:
    """Return a file's name as it can be printed on one line."""
    if isinstance(file, BytesIO):
        return "picture"
    return str(file) if str(file).isprintable() else quoted(str(file))


def _open(file: Path | BytesIO) -> Image.Image:
    """Return a picture upright, without transparency, in RGB, and no larger than needed."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of odd tags
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # a telephone's JPEG
                image.load()
                flat = _flat(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise LabError(f"{shown(file)}: it is not a picture that can be read ({', '.join(FORMATS)})") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise LabError(f"{shown(file)}: it can't be read: {text_of(error)}") from error
    if frames > 1:
        raise LabError(f"{shown(file)}: it holds {frames} pictures; give one that is still")
    return flat


def _flat(image: Image.Image) -> Image.Image:
    """Return an image in RGB; what is transparent becomes white behind dark ink, and black behind light ink."""
    if image.mode.startswith(("I", "F")):  # 16 bits and more
        values = np.asarray(image, dtype=np.float32)
        image = Image.fromarray(((values - values.min()) / max(float(np.ptp(values)), 1e-9) * 255).astype(np.uint8))
    image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    image.thumbnail((640, 640))  # of which a digit gets 20
    if image.mode == "RGB":
        return image
    pixels = np.asarray(image, dtype=np.float64)
    colours, alpha = pixels[..., :3], pixels[..., 3]
    light_ink = (colours.mean(axis=2) * alpha).sum() > 127 * alpha.sum()
    paper = Image.new("RGBA", image.size, "black" if light_ink else "white")
    return Image.alpha_composite(paper, image).convert("RGB")


def _ink(image: Image.Image, name: str) -> Ink:
    """Return how much ink each pixel has, 0 to 1; raises LabError where there is no digit, or more than one."""
    pixels = np.asarray(image, dtype=np.float64) / 255
    ink: Ink = np.abs(pixels - np.median(_edge(pixels), axis=0)).max(axis=2)
    is_even = (_edge(ink) >= LEAST_CONTRAST).mean() < 0.1 and (ink > ink.max() / 2).mean() < 0.5
    stays = is_even and max(image.size) <= PHOTO  # like MNIST's own; another is looked at in a photo's size
    if not stays or image.size != (FIELD, FIELD):
        sides = [max(side, round(side * PHOTO / max(image.size))) for side in image.size]
        found = _digit_on(np.asarray(image.resize(sides, Image.Resampling.BICUBIC), dtype=np.float64) / 255, name)
    if ink.max() < LEAST_CONTRAST:
        raise NoDigit(f"{name}: there is no digit to see: it has nearly one colour all over")
    return ink / ink.max() if stays else found


def _edge(image: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])


def _thickened(box: Ink) -> Ink:
    """Return the ink in its box, strokes as wide as MNIST's at least: a hair's line fades when it is scaled down."""
    pixel = max(box.shape) / BOX  # the size of a pixel of MNIST's
    if pixel <= 1:
        return box
    inked = np.pad(box > 0.5, 1)
    # Across a stroke of w pixels the distances to its edge are 1, 2, ... 2, 1: on average w / 4 + 1 / 2.
    stroke = 4 * (float(ndimage.distance_transform_edt(inked)[inked].mean()) - 0.5)
    if stroke >= THINNEST * pixel:
        return box
    radius = (USUAL * pixel - stroke) / 2
    distance = ndimage.distance_transform_edt(~np.pad(box > 0.5, int(np.ceil(radius))))
    return np.clip(radius + 0.5 - distance, 0, 1)  # type: ignore[no-any-return]


def _as_mnist(ink: Ink) -> NDArray[np.uint8]:
    box = _thickened(ink[ndimage.find_objects((ink > 0.05).astype(int))[0]])  # but for the faintest ink
    height, width = (max(1, round(side * BOX / max(box.shape))) for side in box.shape)
    if box.shape != (height, width):
        resized = Image.fromarray(box.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
        box = np.asarray(resized, dtype=np.float64)
        box = box / box.max()
    centres = zip(ndimage.center_of_mass(box), box.shape, strict=True)
    top, left = (int(np.clip(round(FIELD / 2 - centre), 0, FIELD - side)) for centre, side in centres)
    field = np.zeros((FIELD, FIELD))
    field[top : top + height, left : left + width] = box
    return np.rint(field * 255).astype(np.uint8)


# ---- where the ink of a digit is in a photo: the ground is taken away, and the strokes of one digit are kept


class NoDigit(LabError):
    """A picture without a digit in it."""


PHOTO = 4 * FIELD  # pixels of the longer side of what is looked at as a photo; a smaller picture is enlarged
LEAST_CONTRAST = 0.08  # between ink and paper, of all that there can be
INK = 0.9  # of a part's border is an edge in the picture; of ground that was cut off, less
REAL, LEAST_SCORE = 0.3, 0.3  # of a stroke; faint and blurred digits had more, shades alone had less
EVEN = 0.008  # a ground that differs less over half of the picture is not a photo's
THICKEST = 4  # of the longer side: a stroke that is wider than a fourth of it is ground


def _digit_on(pixels: Ink, name: str) -> Ink:
    """Return the ink, (H, W) from 0 to 1, of the digit in pixels (H, W, 3) from 0 to 1; raises LabError.

    Ink is what a closing (dark ink, as a share of the light on the paper) or an opening (light ink) of the picture
    takes away: whatever is narrower than their window. Shades, shadows and the margin of a sheet are wider, and stay.
    Of what is left, connected parts that are no thin strokes, or go on beyond the picture, are not the digit.
    https://en.wikipedia.org/wiki/Top-hat_transform
    """
    window = (max(pixels.shape) // THICKEST, max(pixels.shape) // THICKEST, 1)
    smooth = ndimage.gaussian_filter(pixels, (1, 1, 0))
    steep = np.max([ndimage.gaussian_gradient_magnitude(smooth[..., channel], 1) for channel in range(3)], axis=0)
    from_ground = np.abs(smooth - np.median(smooth, axis=(0, 1)))
    if (from_ground.max(axis=2) < EVEN).mean() > 0.5:  # drawn, not photographed: all else is ink, however thick
        changes = [(from_ground, steep)]
    else:
        paper = ndimage.grey_closing(smooth, window) + 0.1  # above nothing, as it is divided by
        dark = (paper - 0.1 - smooth) / paper, steep / paper.min(axis=2)
        changes = [dark, (smooth - ndimage.grey_opening(smooth, window), steep)]
    inks = [(np.clip(change.max(axis=2) - np.median(change.max(axis=2)), 0, None), edges) for change, edges in changes]
    score, where, several, ink = max(((*_likeliest(ink, edges), ink) for ink, edges in inks), key=itemgetter(0))
    if score < LEAST_SCORE:
        uneven = np.ptp(smooth, axis=(0, 1)).max() >= 2 * LEAST_CONTRAST
        why = "the ground is uneven; crop to the digit" if uneven else "it has nearly one colour all over"
        raise NoDigit(f"{name}: there is no digit to see: {why}")
    if several:
        raise LabError(f"{name}: there is more than one digit in it; crop to one")
    ink = np.where(ndimage.binary_dilation(where, iterations=2), ink, 0)
    return np.minimum(ink / float(np.percentile(ink[ink > 0], 95)), 1)


def _likeliest(ink: Ink, steep: Ink) -> tuple[float, NDArray[np.bool_], bool]:
    """Score the connected part of the ink that is most like a stroke; below nothing where there is no ink.

    Returns also where that part and the rest of its digit are, and whether there is another digit beside it.
    """
    strong = ink > max(LEAST_CONTRAST, _otsu(ink[ink > LEAST_CONTRAST / 2]))
    labels, count = ndimage.label(strong, np.ones((3, 3)))
    if not count:
        return -1, strong, False
    numbers = np.arange(1, count + 1)
    areas = ndimage.sum_labels(strong, labels, numbers)
    distance = ndimage.distance_transform_edt(np.pad(strong, 1))[1:-1, 1:-1]  # to the border of the stroke
    length = np.minimum(areas / (2 * ndimage.maximum(distance, labels, numbers)) ** 2, 4)  # in widths
    inside = np.where(np.isin(numbers, _edge(labels)), 0.1, 1)
    contrast = ndimage.mean(ink, labels, numbers)
    # Ground that the window cut off has borders where the picture has none.
    border = np.where(strong & ~ndimage.binary_erosion(strong, np.ones((3, 3), bool)), labels, 0)
    is_edge = np.minimum(steep / (0.1 * np.append(1, contrast)[labels]), 1)
    real = ndimage.mean(is_edge, border, numbers)
    scores = np.where(real > REAL, contrast * areas**0.25 * length * inside * real**4, 0)
    first, best = int(scores.argmax()), scores.max()
    boxes = np.array([[(side.start, side.stop) for side in box] for box in ndimage.find_objects(labels)])
    starts, stops = boxes[..., 0], boxes[..., 1]  # (N, 2): down and across
    sides = stops[first] - starts[first]
    # How far each box is from the likeliest one's; below nothing where they overlap, by how much.
    down, across = (np.maximum(starts, starts[first]) - np.minimum(stops, stops[first])).T
    beside = (across >= 0) & (-down > 0.6 * sides[0]) & (scores > 0.4 * best) & (np.minimum(real, real[first]) > INK)
    chosen = (scores >= 0.2 * best) & (np.maximum(down, across) < 0.25 * sides.max())
    return float(best), np.isin(labels, np.flatnonzero(chosen) + 1), bool(beside.any())


def _otsu(values: NDArray[np.float64]) -> float:
    """Return the threshold that parts values into two classes that differ most. Otsu, 1979."""
    below = np.arange(1, values.size)
    if not below.size:
        return 1
    ordered, above = np.sort(values), values.size - below
    sums = ordered.cumsum()
    gap = sums[:-1] / below - (sums[-1] - sums[:-1]) / above
    return float(ordered[(below * above * gap**2).argmax()])
