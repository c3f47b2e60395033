"""The page to draw on: as other programs meet its server, and in headless Chromium as who draws meets it."""

import base64
import io
import os
import re
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import requests
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from conftest import FullRun
from forkserver import Program, run_program
from helpers import ROOT, wait_until
from mnist_lab.data import Mnist
from mnist_lab.reading.page import MOST_BYTES
from mnist_lab.reading.pictures import find_reader

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")
PATIENCE = 60_000  # milliseconds
# How a hand draws each digit: its strokes, as points in a square from (0, 0) at the top left to (1, 1).
STROKES: dict[int, list[list[tuple[float, float]]]] = {
    0: [[(0.5, 0.15), (0.33, 0.25), (0.27, 0.5), (0.33, 0.75), (0.5, 0.85), (0.67, 0.75), (0.73, 0.5), (0.67, 0.25),
         (0.5, 0.15)]],
    1: [[(0.5, 0.15), (0.5, 0.85)]],
    2: [[(0.3, 0.3), (0.37, 0.19), (0.5, 0.15), (0.63, 0.2), (0.68, 0.32), (0.6, 0.48), (0.45, 0.65), (0.3, 0.83),
         (0.5, 0.82), (0.72, 0.82)]],
    3: [[(0.32, 0.22), (0.45, 0.15), (0.6, 0.18), (0.66, 0.3), (0.6, 0.42), (0.47, 0.48), (0.62, 0.54), (0.69, 0.67),
         (0.62, 0.8), (0.47, 0.86), (0.32, 0.8)]],
    4: [[(0.36, 0.15), (0.32, 0.35), (0.3, 0.52), (0.5, 0.52), (0.7, 0.5)], [(0.66, 0.18), (0.64, 0.5), (0.62, 0.86)]],
    5: [[(0.68, 0.16), (0.38, 0.17), (0.35, 0.45), (0.5, 0.42), (0.64, 0.5), (0.68, 0.64), (0.6, 0.79), (0.45, 0.85),
         (0.31, 0.8)]],
    6: [[(0.6, 0.14), (0.45, 0.28), (0.36, 0.47), (0.34, 0.66), (0.4, 0.81), (0.52, 0.86), (0.64, 0.79), (0.66, 0.66),
         (0.58, 0.56), (0.46, 0.57), (0.37, 0.68)]],
    7: [[(0.28, 0.18), (0.5, 0.18), (0.72, 0.17), (0.6, 0.42), (0.5, 0.64), (0.43, 0.86)]],
    8: [[(0.64, 0.25), (0.52, 0.15), (0.38, 0.22), (0.38, 0.35), (0.5, 0.47), (0.64, 0.6), (0.66, 0.75), (0.52, 0.86),
         (0.36, 0.77), (0.37, 0.62), (0.5, 0.48), (0.62, 0.37), (0.64, 0.25)]],
    9: [[(0.65, 0.3), (0.56, 0.17), (0.42, 0.18), (0.34, 0.31), (0.4, 0.45), (0.54, 0.46), (0.65, 0.33), (0.64, 0.55),
         (0.6, 0.86)]],
}  # fmt: skip


@dataclass(frozen=True)
class Served:
    """A page that is served, with one network."""

    address: str
    run_id: str
    uri: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def served(full_run: FullRun) -> Iterator[Served]:
    run_id, uri = full_run.tracked.run_id, f"sqlite:///{full_run.database}"
    flags = ["--model", f"runs:/{run_id}", "--port", str(free_port()), "--tracking-uri", uri]
    process = Program("-m", "mnist_lab", "draw", *flags, cwd=ROOT)
    try:
        wait_until(lambda: "Ctrl-C" in process.stdout, process)
        (address,) = re.findall(r"^Draw a digit: (http://127\.0\.0\.1:\d+/)$", process.stdout, flags=re.MULTILINE)
        yield Served(address, run_id, uri)
    finally:
        process.terminate()
        assert process.wait() == 0
    assert process.stderr == "\n"


def png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG")
    return file.getvalue()


# ---- the server


def test_a_picture_is_read_as_predict_reads_it(served: Served, mnist: Mnist) -> None:
    digit = mnist.test_images[0, 0].numpy()  # a 7
    answer = requests.post(f"{served.address}read", data=png(255 - digit), timeout=PATIENCE).json()
    assert base64.b64decode(answer["image"]) == digit.tobytes()
    told = find_reader(f"runs:/{served.run_id}", tracking_uri=served.uri).probabilities(digit[None])[0]
    assert answer["probabilities"] == pytest.approx(told.tolist(), abs=1e-5)
    assert max(answer["probabilities"]) == answer["probabilities"][7]


@pytest.mark.parametrize(
    ("path", "picture", "status", "sentence"),
    [
        ("read", b"hello", 422, "picture: it is not a picture that can be read"),
        ("read", bytes(MOST_BYTES + 1), 413, "a drawing has at most 1,048,576 bytes"),
        ("read?network=models:/other", png(np.eye(28, dtype=np.uint8) * 255), 422, "network: 'models:/other' is none"),
    ],
    ids=["text", "too large", "another network"],
)
def test_what_cant_be_read_is_answered_by_a_sentence(
    served: Served, path: str, picture: bytes, status: int, sentence: str
) -> None:
    answer = requests.post(f"{served.address}{path}", data=picture, timeout=PATIENCE)
    assert answer.status_code == status
    assert answer.json()["sentence"].startswith(sentence)


def test_a_drawing_without_a_digit_is_an_answer(served: Served) -> None:
    blank = requests.post(f"{served.address}read", data=png(np.zeros((28, 28), dtype=np.uint8)), timeout=PATIENCE)
    assert (blank.status_code, blank.json()) == (200, {"probabilities": None, "image": None})


def test_the_server_listens_on_loopback_and_answers_to_no_other_name(served: Served) -> None:
    assert requests.get(served.address, timeout=PATIENCE).status_code == 200
    # By another name a page from elsewhere could ask this server, through the browser of who runs it.
    elsewhere = requests.get(served.address, headers={"Host": "example.org"}, timeout=PATIENCE)
    assert elsewhere.status_code == 400
    port = int(served.address.rstrip("/").rpartition(":")[2])
    with socket.socket() as probe:
        probe.bind(("127.0.0.2", port))  # so it is not taken on every address


def test_the_networks_are_those_that_have_a_model(served: Served) -> None:
    assert requests.get(f"{served.address}networks", timeout=PATIENCE).json() == [
        {"name": "", "shown": "step1_baseline seed 3 [epochs=1]"}
    ]


def test_without_a_network_it_is_said_what_to_do(uri: str) -> None:
    done = run_program("-m", "mnist_lab", "draw", "--model", "step4", "--tracking-uri", uri, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.startswith("error: model 'step4_augment_steplr'")
    assert len(done.stderr.splitlines()) == 1


# ---- the page


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox refuses to work for root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture(params=[(1280, "light", False), (390, "dark", True)], ids=["desktop", "telephone"])
def page(request: pytest.FixtureRequest, browser: Browser, served: Served) -> Iterator[Page]:
    """Open the page, which may load nothing from elsewhere and may say nothing on the console."""
    width, scheme, touch = request.param
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, has_touch=touch)
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda asking: asked.append(asking.url))
    page.goto(served.address)
    yield page
    context.close()
    assert said == []
    assert [url for url in asked if not url.startswith((served.address, "data:"))] == []


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
    """Return the ten bars' lengths, in percent of their place."""
    lengths = "bars => bars.map(bar => parseFloat(bar.style.width) || 0)"
    found: list[float] = page.locator("#bars i").evaluate_all(lengths)
    return found


def wait_for_the_answer(page: Page) -> None:
    expect(page.locator("#said")).to_have_text(re.compile(r"\d"), timeout=PATIENCE)
    expect(page.locator("main")).to_have_attribute("aria-busy", "false", timeout=PATIENCE)


def image(page: Page) -> Any:
    script = "canvas => [...canvas.getContext('2d').getImageData(0, 0, 28, 28).data]"
    return np.array(page.locator("#seen").evaluate(script)).reshape(28, 28, 4)[..., 0]


@pytest.mark.browser
@in_chromium
def test_each_digit_that_is_drawn_is_read(page: Page) -> None:
    hand = Hand(page)
    read = {}
    for digit, strokes in STROKES.items():
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
    assert read == {digit: digit for digit in STROKES}


@pytest.mark.browser
@in_chromium
def test_the_bars_move_while_the_pen_is_down_and_clear_empties_all(page: Page) -> None:
    hand = Hand(page)
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
@in_chromium
def test_a_dot_leaves_ink_and_is_not_read(page: Page) -> None:
    hand = Hand(page)
    hand.draw([(0.5, 0.5)])
    ink = "pad => pad.getContext('2d').getImageData(200, 200, 1, 1).data[3]"
    assert page.locator("#pad").evaluate(ink) == 255
    page.wait_for_function("document.querySelector('main').ariaBusy === 'false'")
    expect(page.locator("#said")).to_have_text("–")
    (one,) = STROKES[1]
    hand.draw(one)
    wait_for_the_answer(page)


@pytest.mark.browser
@in_chromium
def test_the_page_fits_and_is_accessible(page: Page) -> None:
    viewport = page.viewport_size
    assert viewport is not None
    assert page.evaluate("document.scrollingElement.scrollWidth") <= viewport["width"]
    assert page.evaluate("document.scrollingElement.scrollHeight") <= viewport["height"]  # no scrolling while drawing
    expect(page.get_by_role("combobox", name="Network")).to_have_text("step1_baseline seed 3 [epochs=1]")
    found = Axe().run(page).response
    assert {"color-contrast", "button-name"} <= {rule["id"] for rule in found["passes"]}  # axe has looked
    assert [
        f"{problem['id']}: {node['html'][:200]}"
        for problem in found["violations"]
        if problem["impact"] in ("serious", "critical")
        for node in problem["nodes"]
    ] == []
