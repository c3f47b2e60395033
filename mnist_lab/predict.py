"""From a picture to a digit: pictures are prepared as MNIST's digits were, and read by a tracked network."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mnist_lab.errors import LabError
from mnist_lab.experiment import MNIST_PIXELS, quoted
from mnist_lab.tracking.sqlite import PROJECT_ROOT

if TYPE_CHECKING:  # a file that is no picture is refused before MLflow and torch are imported
    from PIL import Image
    from torch import Tensor, nn

# Pillow's other formats are rare, and one of them starts a program (EPS).
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
SUFFIXES = {".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}
MOST_PIXELS = 60_000_000  # as many as a telephone's camera makes
WORKING_SIZE = 1024  # the longer side; a digit ends at 20 pixels
LEAST_CONTRAST = 0.08  # between ink and paper, of all that there can be
FAINTEST_INK = 0.05  # of the darkest: what is fainter doesn't count for the box around a digit
BOX, FIELD = 20, 28  # pixels: a digit of MNIST, and the image that it is centred in
THINNEST, USUAL = 1.5, 2.5  # pixels: the width of a stroke in MNIST
SHADES = " .:-=+*#%@"


def find_pictures(paths: Iterable[Path]) -> list[Path]:
    """Return the files, and for each folder the pictures in it, by their names.

    Raises:
        LabError: if there is none, or a folder has none.
    """
    found = []
    for path in paths:
        if path.is_dir():
            try:
                inside = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
            except OSError as error:
                raise LabError(f"{shown(path)}: this folder can't be read: {error.strerror}") from error
            if not inside:
                raise LabError(f"{shown(path)}: there is no picture in this folder ({', '.join(sorted(SUFFIXES))})")
            found += inside
        else:
            found.append(path)
    if not found:
        raise LabError("image: which one? e.g. `make predict IMAGE=photo.png`")
    return found


def read_digit(file: Path | BytesIO) -> NDArray[np.uint8]:
    """Return the digit in a picture, a file or its content, as MNIST has it: (28, 28), light ink on black.

    The ink is what differs from the colour of the picture's edge. Its box is scaled to 20x20, keeping its proportions,
    and its centre of mass is put at the centre of the 28x28.

    Raises:
        LabError: if the file can't be read as one picture, or there is nothing to see in it.
    """
    ink = _ink(_open(file))
    if ink is None:
        raise LabError(f"{shown(file)}: there is no digit to see: it has nearly one colour all over")
    return _as_mnist(ink)


@dataclass(frozen=True)
class Reading:
    """What a network reads in an image: the likeliest digit, the next one, and their probabilities (0 to 1)."""

    digit: int
    probability: float
    runner_up: int
    runner_up_probability: float


@dataclass(frozen=True)
class Reader:
    """A tracked network that reads digits."""

    run_id: str
    run_name: str
    net: nn.Module

    def probabilities(self, digits: Sequence[NDArray[np.uint8]]) -> Tensor:
        """Return (N, 10), the probability of each digit, 0 to 1, for images of (28, 28) in MNIST's form."""
        import torch

        from mnist_lab.training.loop import normalize

        images = torch.from_numpy(np.stack(digits))[:, None]
        with torch.inference_mode():
            return self.net(normalize(images.float() / 255)).softmax(dim=1)  # type: ignore[no-any-return]

    def read(self, digits: Sequence[NDArray[np.uint8]]) -> list[Reading]:
        """Read images of (28, 28) in MNIST's form."""
        top = self.probabilities(digits).topk(2, dim=1)
        return [
            Reading(first, p_first, second, p_second)
            for (first, second), (p_first, p_second) in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]


def find_reader(model: str | None = None, *, tracking_uri: str | None = None) -> Reader:
    """Return a tracked network.

    model: `runs:/<id>`, `models:/<name>/<version>`, `models:/<name>@<alias>` or a script's name, "step4" for short, of
        which the newest finished run counts. None for the script whose mean test accuracy in the store is the highest.

    Raises:
        LabError: if it is not there, or can't be loaded.
    """
    import torch

    from mnist_lab import results
    from mnist_lab.tracking.store import open_store
    from mnist_lab.tracking.teacher import find_teacher, load_teacher

    loaded = results.load_runs(tracking_uri)
    if model is None:
        table = results.compare_table(loaded=loaded)
        if table.empty:
            raise LabError(
                f"no finished runs as declared in {loaded.name}; train first, e.g. `make step4`, or name one by --model"
            )
        model = str(table.sort_values("last")["step"].iloc[-1])
    elif re.fullmatch(r"runs:/[^/]+", model):
        model += "/model"
    elif re.fullmatch(r"step\d+", model):
        scripts = list((PROJECT_ROOT / "experiments").glob(f"{model}_*.py"))
        model = scripts[0].stem if len(scripts) == 1 else model
    store = open_store(loaded.uri)
    found = find_teacher(store, model, holdout=0, called="model")
    net = load_teacher(store, found, torch.device("cpu"), MNIST_PIXELS, called="model")
    return Reader(found.run_id, str(store.client.get_run(found.run_id).info.run_name), net)


def picture_of(digit: NDArray[np.uint8]) -> str:
    """Return a (28, 28) image as 28 lines of text, two letters a pixel."""
    return "\n".join("".join(2 * SHADES[value * len(SHADES) // 256] for value in row.tolist()) for row in digit)


def shown(file: Path | BytesIO) -> str:
    """Return a file's name as it can be printed on one line."""
    if isinstance(file, BytesIO):
        return "picture"
    return str(file) if str(file).isprintable() else quoted(str(file))


def _open(file: Path | BytesIO) -> Image.Image:
    """Return a picture upright, without transparency, in RGB, and no larger than needed."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with _without_warnings(), Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise _too_large(file)
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:  # MPO: a telephone's JPEG
                raise LabError(f"{shown(file)}: it holds {image.n_frames} pictures; give one that is still")  # type: ignore[attr-defined]
            image.load()
            return _flat(ImageOps.exif_transpose(image))
    except LabError:  # a ValueError too
        raise
    except UnidentifiedImageError as error:
        raise LabError(f"{shown(file)}: it is not a picture that can be read ({', '.join(FORMATS)})") from error
    except Image.DecompressionBombError as error:
        raise _too_large(file) from error
    except FileNotFoundError as error:
        raise LabError(f"{shown(file)}: there is no such file") from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:  # as Pillow says what is broken
        raise LabError(f"{shown(file)}: it can't be read: {' '.join(str(error).split())}") from error


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Keep back Pillow's warnings, which are about sizes and tags; the size is checked here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _too_large(file: Path | BytesIO) -> LabError:
    return LabError(f"{shown(file)}: it has more than {MOST_PIXELS:,} pixels; give a smaller one")


def _flat(image: Image.Image) -> Image.Image:
    """Return an image in RGB; what is transparent becomes white behind dark ink, and black behind light ink."""
    from PIL import Image

    if image.mode.startswith(("I", "F")):  # 16 bits and more
        values = np.asarray(image, dtype=np.float32)
        image = Image.fromarray(((values - values.min()) / max(float(np.ptp(values)), 1e-9) * 255).astype(np.uint8))
    image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    image.thumbnail((WORKING_SIZE, WORKING_SIZE))
    if image.mode == "RGB":
        return image
    pixels = np.asarray(image, dtype=np.float64)
    colours, alpha = pixels[..., :3], pixels[..., 3]
    light_ink = (colours.mean(axis=2) * alpha).sum() > 127 * alpha.sum()
    paper = Image.new("RGBA", image.size, "black" if light_ink else "white")
    return Image.alpha_composite(paper, image).convert("RGB")


def _ink(image: Image.Image) -> NDArray[np.float64] | None:
    """Return how much ink each pixel has, 0 to 1; None where there is next to no contrast."""
    pixels = np.asarray(image, dtype=np.float64) / 255
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    paper = np.median(edge, axis=0)
    ink: NDArray[np.float64] = np.abs(pixels - paper).max(axis=2)
    noise = float(np.percentile(np.abs(edge - paper).max(axis=1), 75))  # of the paper; what is on the edge may be ink
    ink = np.clip(ink - 2 * noise, 0, None)
    darkest = float(ink.max())
    return ink / darkest if darkest >= LEAST_CONTRAST else None


def _thickened(box: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the ink in its box; strokes that would be thinner than MNIST's are drawn as wide as those.

    A hair's line fades when it is scaled down to 20 pixels, and no network has seen such digits.
    """
    from scipy import ndimage

    pixel = max(box.shape) / BOX  # the size of a pixel of MNIST's
    if pixel <= 1:
        return box
    inked = np.pad(box > 0.5, 1)
    # Across a stroke of w pixels the distances to its edge are 1, 2, ... 2, 1: on average w / 4 + 1 / 2.
    stroke = 4 * (float(ndimage.distance_transform_edt(inked)[inked].mean()) - 0.5)
    if stroke >= THINNEST * pixel:
        return box
    radius = (USUAL * pixel - stroke) / 2
    margin = int(np.ceil(radius))
    distance = ndimage.distance_transform_edt(~np.pad(box > 0.5, margin))
    return np.clip(radius + 0.5 - np.asarray(distance, dtype=np.float64), 0, 1)


def _as_mnist(ink: NDArray[np.float64]) -> NDArray[np.uint8]:
    from PIL import Image

    rows, columns = (np.flatnonzero((ink > FAINTEST_INK).any(axis=axis)) for axis in (1, 0))
    box = _thickened(ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    height, width = (max(1, round(side * BOX / max(box.shape))) for side in box.shape)
    if box.shape != (height, width):
        resized = Image.fromarray(box.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
        box = np.asarray(resized, dtype=np.float64)
        box = box / box.max()
    total = box.sum()
    centre_row = float((box.sum(axis=1) * np.arange(height)).sum() / total)
    centre_column = float((box.sum(axis=0) * np.arange(width)).sum() / total)
    top, left = (
        int(np.clip(round(FIELD / 2 - centre), 0, FIELD - side))
        for centre, side in ((centre_row, height), (centre_column, width))
    )
    field = np.zeros((FIELD, FIELD))
    field[top : top + height, left : left + width] = box
    return np.rint(field * 255).astype(np.uint8)
