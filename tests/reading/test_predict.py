"""A picture is prepared as MNIST's digits were, and read by the network that was asked for."""

import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps

import mnist_lab
import tiny
from helpers import TrackedRun
from mnist_lab.__main__ import main
from mnist_lab.data import Mnist
from mnist_lab.errors import LabError
from mnist_lab.reading.page import Networks
from mnist_lab.reading.pictures import find_pictures, find_reader, read_digit
from mnist_lab.tracking.models import load_committed, register
from mnist_lab.tracking.store import Store

Pixels = NDArray[np.uint8]
COUNT = 200


def coloured(digit: Pixels, ink: tuple[int, int, int], paper: tuple[int, int, int]) -> Image.Image:
    return ImageOps.colorize(Image.fromarray(digit), paper, ink)


def enlarged(digit: Pixels, size: int) -> Image.Image:
    return Image.fromarray(digit).resize((size, size), Image.Resampling.BICUBIC)


def placed(picture: Image.Image, size: tuple[int, int], at: tuple[int, int], paper: int) -> Image.Image:
    canvas = Image.new("L", size, paper)
    canvas.paste(picture, at)
    return canvas


def transparent(digit: Pixels, ink: str) -> Image.Image:
    picture = Image.new("RGBA", (28, 28), ink)
    picture.putalpha(Image.fromarray(digit))
    return picture


STYLES: dict[str, Callable[[Pixels], Image.Image]] = {
    "inverted": lambda digit: Image.fromarray(255 - digit),
    "blue on yellow": lambda digit: coloured(digit, (20, 40, 160), (250, 240, 120)),
    "pale": lambda digit: coloured(digit, (150, 150, 150), (110, 110, 110)),
    "transparent, dark": lambda digit: transparent(digit, "black"),
    "transparent, light": lambda digit: transparent(digit, "white"),
    "16 bits": lambda digit: Image.fromarray(digit.astype(np.uint16) * 200),
    "red on green": lambda digit: coloured(digit, (200, 40, 40), (40, 130, 40)),
    "black and white": lambda digit: Image.fromarray(digit).convert("1", dither=Image.Dither.NONE),
    "200x300": lambda digit: placed(ImageOps.invert(enlarged(digit, 200)), (200, 300), (0, 60), 255),
    "off centre": lambda digit: placed(enlarged(255 - digit, 112), (400, 300), (7, 170), 255),
    "thick": lambda digit: enlarged(digit, 280).filter(ImageFilter.MaxFilter(13)),
    "framed": lambda digit: ImageOps.expand(enlarged(255 - digit, 96), 2, fill=0),
    "thin": lambda digit: enlarged(255 - digit, 280).filter(ImageFilter.MaxFilter(11)),
}


@pytest.fixture(scope="session")
def digits(mnist: Mnist) -> Pixels:
    return mnist.test_images[:COUNT, 0].numpy()


def read(picture: Image.Image) -> Pixels:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return read_digit(file)


# ---- the preparation


def test_images_of_mnist_come_out_as_they_are(digits: Pixels) -> None:
    prepared = np.stack([read(Image.fromarray(digit)) for digit in digits])
    assert (prepared == digits).all(axis=(1, 2)).mean() > 0.7
    assert np.abs(prepared.astype(int) - digits).mean() < 0.1


def test_colour_and_place_make_no_difference(digits: Pixels) -> None:
    clean = read(Image.fromarray(digits[0]))
    for name in list(STYLES)[:6]:
        assert np.abs(read(STYLES[name](digits[0])).astype(int) - clean).max() <= 8, name
    assert np.array_equal(read(placed(Image.fromarray(digits[0]), (90, 50), (55, 3), 0)), clean)


def test_pictures_in_all_styles_are_read(digits: Pixels, mnist: Mnist) -> None:
    read = mnist_lab.predict([style(digit) for style in STYLES.values() for digit in digits[:20]]).digits
    for name, one in zip(STYLES, np.split(read, len(STYLES)), strict=True):
        assert (one == mnist.test_labels[:20].numpy()).sum() >= 19, name


def test_a_picture_is_turned_as_its_exif_says(digits: Pixels, tmp_path: Path) -> None:
    upright, turned = tmp_path / "upright.png", tmp_path / "turned.png"
    Image.fromarray(digits[0]).save(upright)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    Image.fromarray(digits[0]).transpose(Image.Transpose.ROTATE_90).save(turned, exif=exif)
    assert np.array_equal(read_digit(turned), read_digit(upright))


# ---- photos: a digit on a sheet of 450x350, as a telephone sees it


def sheet(digit: Pixels, rng: np.random.Generator, *, ink: float = 0.2, paper: float = 0.88) -> NDArray[np.float64]:
    """Return a sheet with the digit at some place on it, (350, 450), in light from 0 to 1."""
    size = int(rng.integers(80, 165))
    top, left = int(rng.integers(70, 280 - size)), int(rng.integers(60, 390 - size))
    light = np.full((350, 450), paper)
    share = np.clip(np.asarray(enlarged(digit, size), float) / 200, 0, 1)
    light[top : top + size, left : left + size] += share * (ink - paper)
    return light


def on_a_desk(light: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    paper = Image.fromarray(light.astype(np.float32)).resize((290, 226))
    turned = paper.rotate(rng.uniform(-6, 6), expand=True, fillcolor=0.3)
    desk = Image.new("F", (450, 350), 0.3)
    desk.paste(turned, (int(rng.integers(10, 120)), int(rng.integers(10, 90))))
    return np.asarray(desk, float)


def ruled(light: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    lines, apart = np.ones_like(light), int(rng.integers(18, 30))
    lines[apart // 2 :: apart] = lines[:, apart // 2 :: apart] = 0.75
    return light * lines


def with_specks(light: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    for row, column, size in rng.integers(1, (350, 450, 6), size=(25, 3)):
        light[row : row + size, column : column + size] = 0.15
    return light


ACROSS = np.linspace(0, 1, 450)
FROM_THE_CENTRE = np.hypot(*np.meshgrid(np.linspace(-1, 1, 350), np.linspace(-1, 1, 450), indexing="ij"))
PHOTOS: dict[str, Callable[[NDArray[np.float64], np.random.Generator], NDArray[np.float64]]] = {
    "on a darker desk": on_a_desk,
    "dark corners": lambda light, rng: light * (1 - 0.4 * np.clip(FROM_THE_CENTRE - 0.4, 0, 1)),
    "squared paper": ruled,
    "specks": with_specks,
    "light from one side": lambda light, rng: light * (0.45 + 0.6 * ACROSS),
    "half in shadow": lambda light, rng: light * np.clip(20 * (rng.uniform(0.4, 0.6) - ACROSS) + 0.75, 0.5, 1),
    "a hard shadow across": lambda light, rng: light * np.where(rng.uniform(0.4, 0.6) < ACROSS, 0.5, 1),
    "in the dark": lambda light, rng: light * (0.25 + 0.1 * ACROSS),
    "chalk on a board": lambda light, rng: (1.1 - light) * (0.6 + 0.5 * ACROSS),
}


def photo(light: NDArray[np.float64], rng: np.random.Generator) -> Image.Image:
    noisy = light + rng.normal(0, 0.015, light.shape)
    return Image.fromarray((255 * np.clip(noisy, 0, 1)).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.7))


def test_digits_in_photos_are_read(digits: Pixels, mnist: Mnist) -> None:
    taken = []
    for change in PHOTOS.values():
        for n in range(5):
            rng = np.random.default_rng(n)
            taken.append(photo(change(sheet(digits[n], rng), rng), rng))
    read = mnist_lab.predict(taken).digits
    for name, one in zip(PHOTOS, np.split(read, len(PHOTOS)), strict=True):
        assert (one == mnist.test_labels[:5].numpy()).sum() == 5, name


def test_two_digits_in_one_picture_are_refused(digits: Pixels) -> None:
    light = np.full((200, 300), 0.9)
    for digit, left in ((digits[0], 20), (digits[2], 160)):  # a 7 and a 1
        light[40:160, left : left + 120] -= 0.7 * np.asarray(enlarged(digit, 120), float) / 255
    drawn = Image.fromarray((255 * light).astype(np.uint8))
    for picture in (drawn, photo(light, np.random.default_rng(0))):
        with pytest.raises(LabError, match="more than one digit"):
            mnist_lab.predict(picture)


# ---- what is refused


def half_a_picture(file: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60), dtype=np.uint8)).save(file)
    file.write_bytes(file.read_bytes()[:1500])


def animation(file: Path) -> None:
    frames = [Image.new("L", (9, 9), shade) for shade in (0, 90, 200)]
    frames[0].save(file, format="GIF", save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda file: file.write_text("hello"), "not a picture"),
        (half_a_picture, "can't be read: "),
        (animation, "3 pictures"),
        (lambda file: Image.new("1", (20_000, 20_000)).save(file), "pixels"),
        (lambda file: Image.new("1", (10_000, 9_900)).save(file), "pixels"),
        (lambda file: Image.linear_gradient("L").point(lambda v: 90 + v // 2).save(file), "no digit"),
        (lambda file: Image.new("RGBA", (90, 90), (9, 9, 9, 0)).save(file), "no digit"),
        (Path.mkdir, "nor a folder with a picture"),
        (lambda file: None, "no file of this name"),
        (os.mkfifo, "no file of this name"),
    ],
)
def test_what_is_no_picture_of_a_digit_is_refused(
    make: Callable[[Path], None], sentence: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    make(tmp_path / "photo.png")
    with pytest.raises(LabError) as refusal:
        [read_digit(file) for file in find_pictures([tmp_path / "photo.png"])]
    assert str(refusal.value).startswith(f"{tmp_path / 'photo.png'}: ")
    assert sentence in str(refusal.value)
    assert [str(one.message) for one in recwarn if "image" in str(one.message).lower()] == []


# ---- the network


def test_the_champion_reads_unless_another_is_named(train_run: Callable[..., TrackedRun], store: Store) -> None:
    def train(**overrides: float) -> str:
        experiment, _ = tiny.EXPERIMENT.override({"epochs": 1, **overrides})
        return train_run(experiment, "good", overrides=overrides).run_id

    committed = load_committed()[1].run_id
    assert find_reader(tracking_uri=store.uri).run_id == committed  # in a store without a champion
    good, overridden = train(), train(lr=0.05)
    assert (register(store, good), register(store, overridden), register(store, good)) == ("1", "2", "1")
    named = {None: good, "good": good, f"runs:/{overridden}": overridden, "models:/mnist/2": overridden}
    for name, run_id in {**named, "models:/mnist@champion": good, "docs/results": committed}.items():
        assert find_reader(name, tracking_uri=store.uri).run_id == run_id
    assert [one["name"] for one in Networks(store=store.uri).names][:2] == ["", "docs/results"]
    with pytest.raises(LabError, match="^model 'step4_augment_steplr': .* has no finished run of that script"):
        find_reader("step4", tracking_uri=store.uri)


def test_without_a_store_the_committed_champion_reads_and_none_is_made(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    reader = find_reader(tracking_uri=f"sqlite:///{database}")
    origin = load_committed()[1]
    assert reader.run_name == f"{origin.step} seed {origin.seed}, the champion of docs/results"
    assert not database.exists()
    with pytest.raises(LabError, match="no runs yet"):
        find_reader("step4", tracking_uri=f"sqlite:///{database}")


def test_a_bad_picture_among_others_loses_none_of_them(
    uri: str, digits: Pixels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for n in (0, 2):
        Image.fromarray(digits[n]).save(tmp_path / f"{n}.png")
    Image.fromarray(np.maximum(digits[0], digits[2])).save(tmp_path / "3.png")  # of which no network is sure
    (tmp_path / "1.png").write_text("hello")
    (tmp_path / "notes.txt").write_text("hello")
    champion = load_committed()[1]
    monkeypatch.setattr(sys, "argv", ["mnist_lab", "predict", str(tmp_path), "--tracking-uri", uri, "--show"])
    with pytest.raises(SystemExit, match="1"):
        main()
    shown, said = capsys.readouterr()
    (refusal,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert refusal.startswith(f"error: {tmp_path / '1.png'}: ")
    assert "notes.txt" not in refusal
    rows = re.findall(r"^(\S+\.png) +(\d) +([\d.]+) % +(\d) \(([\d.]+) %\)$", shown, re.MULTILINE)
    prepared = np.stack([read_digit(tmp_path / f"{n}.png") for n in (0, 2, 3)])
    read = mnist_lab.predict(prepared, tracking_uri=uri).probabilities
    assert [row[:2] for row in rows[:2]] == [(str(tmp_path / f"{n}.png"), one) for n, one in ((0, "7"), (2, "1"))]
    for (_, digit, first, runner_up, second), shares in zip(rows, 100 * read, strict=True):
        assert [float(first), float(second)] == pytest.approx(sorted(shares)[:-3:-1], abs=0.0051)
        assert [float(first), float(second)] == pytest.approx(shares[[int(digit), int(runner_up)]], abs=0.0051)
    assert {"picture", "runner-up"} <= set(shown.splitlines()[0].split())
    assert f"{champion.step} seed {champion.seed}, the champion of docs/results, run {champion.run_id}." in shown
    assert shown.count("as the network sees it:") == 3
    assert all(len(line) == 56 for line in shown.splitlines() if "@@" in line)
    assert "@@" in shown


# ---- from Python


def test_images_are_read_as_arrays_tensors_and_pictures(digits: Pixels, mnist: Mnist) -> None:
    tensor = mnist.test_images[:COUNT]
    said = mnist_lab.predict(tensor)
    assert (said.digits == said.probabilities.argmax(axis=1)).all()
    assert (said.digits == mnist.test_labels[:COUNT].numpy()).mean() > 0.97
    assert np.allclose(said.probabilities.sum(axis=1), 1, atol=1e-5)
    for alike in (digits, (digits / 255).tolist(), tensor[:, 0].float() / 255):
        assert np.allclose(mnist_lab.predict(alike).probabilities, said.probabilities, atol=1e-5)
    assert np.allclose(mnist_lab.predict(digits[0]).probabilities, said.probabilities[:1], atol=1e-5)
    assert mnist_lab.predict(STYLES["200x300"](digits[0])).digits.tolist() == [7]
    assert mnist_lab.predict(np.tri(28)).digits.shape == (1,)  # ink on two edges is no light paper


def test_what_are_no_images_is_refused() -> None:
    cases: list[tuple[object, str]] = [
        (np.zeros((30, 30)), r"float64 \(30, 30\) is not \(28, 28\)"),
        (np.zeros((2, 3, 28, 28)), r"float64 \(2, 3, 28, 28\) is not"),
        ("photo.png", "is not"),
        (np.full((28, 28), 7.0), "float64 values"),
        (np.full((28, 28), np.nan), "float64 values"),
        (np.full((28, 28), 300), "int64 values"),
        (np.eye(28, dtype=np.uint8), "uint8 values go to 255"),
        (np.full((28, 28), 255), "one is dark on light"),
        ([[1, 2], [3]], "can't be read as an array"),
        (Image.new("L", (40, 40), 200), "number 0: there is no digit"),
    ]
    for images, sentence in cases:
        with pytest.raises(LabError, match=f"^images: .*{sentence}"):
            mnist_lab.predict(images)
    for paths, named in (([], "image: "), ([Path("a" * 300)], "File name too long")):
        with pytest.raises(LabError, match=named):
            find_pictures(paths)
