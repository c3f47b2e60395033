"""The report, the MLflow UI and the page to draw on, in headless Chromium as a user sees them."""

import base64
import io
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

import mnist_lab
from helpers import ROOT, copy_store, free_port, serving
from mnist_lab import results
from mnist_lab.data import Mnist
from mnist_lab.figures import plot_samples
from mnist_lab.reading.page import MOST_BYTES
from mnist_lab.results.report import write_report
from mnist_lab.tracking.store import Store
from run_writer import RUNS, write_sample_store

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 60_000  # milliseconds
expect.set_options(timeout=PATIENCE)


def in_chromium(test: Callable[..., None]) -> Callable[..., None]:
    missing = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")
    return pytest.mark.browser(missing(test))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []  # its sandbox refuses to work for root
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=flags)


@contextmanager
def opened(
    browser: Browser, address: str, width: int = 1280, scheme: str = "light", *, touch: bool = False
) -> Iterator[Page]:
    """Open a page that may load nothing from elsewhere and may say nothing on the console."""
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, has_touch=touch)
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    yield page
    context.close()
    assert said == []
    assert [url for url in asked if not url.startswith((address, "data:"))] == []


def barriers(page: Page, *looked_for: str) -> list[str]:
    """Return what keeps people from using the page; check that axe has looked for these rules."""
    found = Axe().run(page).response
    assert {*looked_for} <= {rule["id"] for rule in found["passes"]}
    serious = [problem for problem in found["violations"] if problem["impact"] in ("serious", "critical")]
    return [f"{problem['id']}: {node['html'][:200]}" for problem in serious for node in problem["nodes"]]


@pytest.fixture(scope="module")
def store(new_store: Callable[[], Store], mnist: Mnist) -> Store:
    store = write_sample_store(new_store(), mnist)
    samples = plot_samples(mnist.test_images[:10, 0], mnist.test_labels[:10])
    for run in store.client.search_runs([store.experiment_id]):
        store.client.log_figure(run.info.run_id, samples, "figures/samples.png")
    return store


# ---- the report


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, store: Store) -> str:
    folder = tmp_path_factory.mktemp("report")
    story = '"""Step {0}: a title.\n\nTarget: t\n\nChange: c\n\nResult:\n\n- a list\n\nAnalysis: a"""'
    for number, name in enumerate(("step1_plain", "step2_better", "step3_next"), start=1):
        (folder / f"{name}.py").write_text(story.format(number))
    (folder / "idea.py").write_text('"""An idea."""')
    page, _ = write_report(folder / "reports", tracking_uri=store.uri, scripts=folder)
    return page.as_uri()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@in_chromium
def test_the_report_fits_and_is_accessible(browser: Browser, report: str, width: int, scheme: str) -> None:
    with opened(browser, report, width, scheme) as page:
        assert page.evaluate("document.scrollingElement.scrollWidth") <= width
        drawn = page.evaluate("[...document.images].map(image => image.complete && image.naturalWidth > 400)")
        assert drawn == [True] * 7
        assert barriers(page, "color-contrast", "image-alt") == []


@in_chromium
def test_dark_is_dark_and_so_are_its_figures(browser: Browser, report: str) -> None:
    background = "element => getComputedStyle(element).backgroundColor.match(/\\d+/g).map(Number)"
    for scheme, dark in (("light", False), ("dark", True)):
        with opened(browser, report, 1280, scheme) as page:
            assert (max(page.eval_on_selector("body", background)) < 60) is dark
            for figure in page.locator(".card").all():
                pixels = np.asarray(Image.open(io.BytesIO(figure.screenshot())).convert("L"))
                assert (np.median(pixels) < 60) is np.bool_(dark)
                assert np.ptp(pixels) > 150  # and what is drawn can be told from its ground


# ---- the MLflow UI


@pytest.fixture(scope="module")
def runs_address(store: Store) -> Iterator[str]:
    with serving("ui", "--port", str(free_port()), "--tracking-uri", store.uri, cwd=ROOT) as process:
        yield process.stdout.splitlines()[0].removeprefix("The runs: ")
    assert process.returncode == 0
    assert "Traceback" not in process.stderr


@pytest.fixture
def ui(browser: Browser) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1600, "height": 900})
    page.set_default_timeout(PATIENCE)
    yield page
    page.close()


@in_chromium
def test_the_mlflow_ui_shows_the_runs_with_their_accuracies(ui: Page, runs_address: str, store: Store) -> None:
    ui.goto(runs_address)
    table = results.run_table(tracking_uri=store.uri)
    assert len(table) == len(RUNS)
    for run in table.to_dict("records"):
        row = ui.locator(f"[role=row][row-id='{run['run_id']}']")  # in two halves: the one with the name stays in sight
        expect(row.get_by_text(f"{run['step']} seed {run['seed']}")).to_be_visible()
        cell = row.locator("[col-id='metrics.`last`']")
        expect(cell).to_have_text(f"{run['final_test_accuracy']:g}")


@in_chromium
def test_the_learning_curves_are_the_first_of_the_charts(ui: Page, runs_address: str) -> None:
    ui.goto(runs_address)
    ui.get_by_role("link", name="step2_better seed 1").wait_for()
    ui.goto(f"{ui.url}&compareRunsMode=CHART")
    expect(ui.get_by_text(re.compile(r"Learning curves|Model metrics \(")).first).to_contain_text("Learning curves")
    expect(ui.get_by_text("test_accuracy", exact=True).first).to_be_visible()


@in_chromium
def test_a_run_is_shown_with_its_figures_and_model_training_stays(ui: Page, runs_address: str) -> None:
    """Else a click on a run leads to pages for language models, and an assistant takes a quarter of the window."""
    ui.goto(runs_address)
    ui.get_by_role("link", name="step2_better seed 1").click()
    expect(ui.get_by_role("tab", name="Model metrics")).to_be_visible()
    expect(ui.get_by_placeholder("Ask a question")).not_to_be_visible()
    ui.get_by_role("tab", name="Artifacts").click()
    expect(ui.get_by_text("predictions.npz")).to_be_visible()
    ui.get_by_text("figures", exact=True).click()
    ui.get_by_text("samples.png").first.click()
    ui.wait_for_function("[...document.images].some(i => i.alt.includes('samples.png') && i.naturalWidth > 300)")
    ui.goto(runs_address.removesuffix("lab"))
    expect(ui.get_by_role("link", name="Model registry")).to_be_visible()


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
    with serving("draw", *flags, cwd=ROOT) as process:
        (address,) = re.findall(r"^Draw a digit: (http://127\.0\.0\.1:\d+/)$", process.stdout, flags=re.MULTILINE)
        yield address
    assert (process.returncode, process.stderr) == (0, "\n")


def png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG")
    return file.getvalue()


# ---- the server of the page to draw on


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


# ---- the page to draw on


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


@in_chromium
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


@in_chromium
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


@in_chromium
def test_the_page_fits_and_is_accessible(page: Page) -> None:
    viewport = page.viewport_size
    assert viewport is not None
    assert page.evaluate("document.scrollingElement.scrollWidth") <= viewport["width"]
    assert page.evaluate("document.scrollingElement.scrollHeight") <= viewport["height"]  # no scrolling while drawing
    expect(page.get_by_role("combobox", name="Network")).to_have_text(re.compile("step8_averaging seed"))
    assert barriers(page, "color-contrast", "button-name") == []
