"""The page to draw on: as other programs meet its server, and in headless Chromium as who draws meets it."""

import base64
import io
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image
from playwright.sync_api import Browser, Page, expect

import mnist_lab
from chromium import PATIENCE, barriers, needs_chromium, opened
from forkserver import Program
from helpers import ROOT, copy_store, free_port, wait_until
from mnist_lab.data import Mnist
from mnist_lab.reading.page import MOST_BYTES

expect.set_options(timeout=PATIENCE)
# How a hand draws each digit: its strokes, as points in a square from 00,00 at the top left to 99,99.
DRAWN = [
    "50,15 33,25 27,50 33,75 50,85 67,75 73,50 67,25 50,15",
    "50,15 50,85",
    "30,30 37,19 50,15 63,20 68,32 60,48 45,65 30,83 50,82 72,82",
    "32,22 45,15 60,18 66,30 60,42 47,48 62,54 69,67 62,80 47,86 32,80",
    "36,15 32,35 30,52 50,52 70,50 / 66,18 64,50 62,86",
    "68,16 38,17 35,45 50,42 64,50 68,64 60,79 45,85 31,80",
    "60,14 45,28 36,47 34,66 40,81 52,86 64,79 66,66 58,56 46,57 37,68",
    "28,18 50,18 72,17 60,42 50,64 43,86",
    "64,25 52,15 38,22 38,35 50,47 64,60 66,75 52,86 36,77 37,62 50,48 62,37 64,25",
    "65,30 56,17 42,18 34,31 40,45 54,46 65,33 64,55 60,86",
]
STROKES = [
    [[(int(point[:2]) / 100, int(point[3:]) / 100) for point in stroke.split()] for stroke in digit.split("/")]
    for digit in DRAWN
]


@pytest.fixture(scope="module")
def served(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    store = copy_store(empty_store, tmp_path_factory.mktemp("draw") / "mlflow.db")
    flags = ["--port", str(free_port()), "--tracking-uri", f"sqlite:///{store}"]
    process = Program("-m", "mnist_lab", "draw", *flags, cwd=ROOT)
    try:
        wait_until(lambda: "Ctrl-C" in process.stdout, process)
        (address,) = re.findall(r"^Draw a digit: (http://127\.0\.0\.1:\d+/)$", process.stdout, flags=re.MULTILINE)
        yield address
    finally:
        process.terminate()
        assert process.wait() == 0
    assert process.stderr == "\n"


def png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG")
    return file.getvalue()


# ---- the server


def test_a_picture_is_read_as_predict_reads_it_and_one_without_a_digit_is_an_answer(served: str, mnist: Mnist) -> None:
    digit = mnist.test_images[0, 0].numpy()  # a 7
    answer = requests.post(f"{served}read", data=png(255 - digit), timeout=PATIENCE).json()
    assert base64.b64decode(answer["image"]) == digit.tobytes()
    told = mnist_lab.predict(digit).probabilities[0]
    assert answer["probabilities"] == pytest.approx(told.tolist(), abs=1e-5)
    assert max(answer["probabilities"]) == answer["probabilities"][7]
    blank = requests.post(f"{served}read", data=png(np.zeros_like(digit)), timeout=PATIENCE)
    assert (blank.status_code, blank.json()) == (200, {"probabilities": None, "image": None})


@pytest.mark.parametrize(
    ("path", "picture", "status", "sentence"),
    [
        ("read", b"hello", 422, "picture: it is not a picture that can be read"),
        ("read", bytes(MOST_BYTES + 1), 413, "a drawing has at most 1,048,576 bytes"),
        ("read?network=models:/other", png(np.eye(28, dtype=np.uint8) * 255), 422, "network: 'models:/other' is none"),
    ],
    ids=["text", "too large", "another network"],
)
def test_what_cant_be_read_is_said(served: str, path: str, picture: bytes, status: int, sentence: str) -> None:
    answer = requests.post(f"{served}{path}", data=picture, timeout=PATIENCE)
    assert answer.status_code == status
    assert answer.json()["sentence"].startswith(sentence)


def test_the_server_listens_on_loopback_and_answers_to_no_other_name(served: str) -> None:
    assert requests.get(served, timeout=PATIENCE).status_code == 200
    # By another name a page from elsewhere could ask this server, through the browser of who runs it.
    elsewhere = requests.get(served, headers={"Host": "example.org"}, timeout=PATIENCE)
    assert elsewhere.status_code == 400
    port = int(served.rstrip("/").rpartition(":")[2])
    with socket.socket() as probe:
        probe.bind(("127.0.0.2", port))  # so it is not taken on every address


# ---- the page


@pytest.fixture(params=[(1280, "light", False), (390, "dark", True)], ids=["desktop", "telephone"])
def page(request: pytest.FixtureRequest, browser: Browser, served: str) -> Iterator[Page]:
    width, scheme, touch = request.param
    with opened(browser, served, width, scheme, touch=touch) as page:
        yield page


class Hand:
    """A mouse, or a finger where the page is touched."""

    def __init__(self, page: Page) -> None:
        self.page, self.box = page, page.locator("#pad").bounding_box()
        touched = page.evaluate("navigator.maxTouchPoints > 0")
        self.finger = page.context.new_cdp_session(page) if touched else None

    def draw(self, points: list[tuple[float, float]], *, lift: bool = True) -> None:
        assert self.box is not None
        places = [(self.box["x"] + x * self.box["width"], self.box["y"] + y * self.box["height"]) for x, y in points]
        for number, (x, y) in enumerate(places):
            if self.finger is not None:
                touch = {"type": "touchMove" if number else "touchStart", "touchPoints": [{"x": x, "y": y}]}
                self.finger.send("Input.dispatchTouchEvent", touch)
            else:
                self.page.mouse.move(x, y, steps=5 if number else 1)
                if not number:
                    self.page.mouse.down()
        if lift:
            self.lift()

    def lift(self) -> None:
        if self.finger is not None:
            self.finger.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        else:
            self.page.mouse.up()


def shares(page: Page) -> list[float]:
    lengths = "bars => bars.map(bar => parseFloat(bar.style.width) || 0)"
    found: list[float] = page.locator("#bars i").evaluate_all(lengths)
    return found


def wait_for_the_answer(page: Page) -> None:
    expect(page.locator("#said")).to_have_text(re.compile(r"\d"))
    expect(page.locator("main")).to_have_attribute("aria-busy", "false")


def image(page: Page) -> Any:
    script = "canvas => [...canvas.getContext('2d').getImageData(0, 0, 28, 28).data]"
    return np.array(page.locator("#seen").evaluate(script)).reshape(28, 28, 4)[..., 0]


@pytest.mark.browser
@needs_chromium
def test_each_digit_that_is_drawn_is_read(page: Page) -> None:
    hand = Hand(page)
    read = {}
    for digit, strokes in enumerate(STROKES):
        page.get_by_role("button", name="Clear").click()
        expect(page.locator("#said")).to_have_text("–")
        for stroke in strokes:
            hand.draw(stroke)
        with page.expect_response(re.compile("/read")):
            hand.draw([strokes[-1][-1]])  # a dot where the pen is: the last question is about the whole digit
        wait_for_the_answer(page)
        read[digit] = int(page.locator("#said").inner_text())
        assert sum(shares(page)) == pytest.approx(100, abs=0.1)
        assert shares(page).index(max(shares(page))) == read[digit]
        assert image(page).max() == 255
    assert read == {digit: digit for digit in range(10)}


@pytest.mark.browser
@needs_chromium
def test_a_dot_is_not_read_the_bars_move_while_the_pen_is_down_and_clear_empties_all(page: Page) -> None:
    hand = Hand(page)
    hand.draw([(0.5, 0.5)])
    ink = "pad => pad.getContext('2d').getImageData(200, 200, 1, 1).data[3]"
    assert page.locator("#pad").evaluate(ink) == 255
    page.wait_for_function("document.querySelector('main').ariaBusy === 'false'")
    expect(page.locator("#said")).to_have_text("–")
    page.keyboard.press("Escape")
    (zero,) = STROKES[0]
    hand.draw(zero[:5], lift=False)
    wait_for_the_answer(page)
    half = shares(page)
    assert sum(half) == pytest.approx(100, abs=0.1)
    hand.lift()
    hand.draw(zero[4:])
    wait_for_the_answer(page)
    assert shares(page) != half
    page.keyboard.press("Escape")
    expect(page.locator("#said")).to_have_text("–")
    assert shares(page) == [0] * 10
    assert image(page).max() == 0
    expect(page.get_by_text("Draw here")).to_be_visible()


@pytest.mark.browser
@needs_chromium
def test_the_page_fits_and_is_accessible(page: Page) -> None:
    viewport = page.viewport_size
    assert viewport is not None
    assert page.evaluate("document.scrollingElement.scrollWidth") <= viewport["width"]
    assert page.evaluate("document.scrollingElement.scrollHeight") <= viewport["height"]  # no scrolling while drawing
    expect(page.get_by_role("combobox", name="Network")).to_have_text(re.compile("step8_averaging seed"))
    assert barriers(page, "color-contrast", "button-name") == []
