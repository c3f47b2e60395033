"""The report and the MLflow UI in headless Chromium, as a user sees them."""

import io
import re
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from chromium import PATIENCE, barriers, needs_chromium, opened
from forkserver import Program
from helpers import ROOT, free_port, wait_until
from mnist_lab import results
from mnist_lab.data import Mnist
from mnist_lab.figures import plot_samples
from mnist_lab.results.report import write_report
from mnist_lab.tracking.store import Store
from report_store import RUNS, write_sample_store

pytestmark = [pytest.mark.browser, needs_chromium]


expect.set_options(timeout=PATIENCE)


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
def test_the_report_fits_and_is_accessible(browser: Browser, report: str, width: int, scheme: str) -> None:
    with opened(browser, report, width, scheme) as page:
        assert page.evaluate("document.scrollingElement.scrollWidth") <= width
        drawn = page.evaluate("[...document.images].map(image => image.complete && image.naturalWidth > 400)")
        assert drawn == [True] * 7
        assert barriers(page, "color-contrast", "image-alt") == []


def test_dark_is_dark_and_so_are_its_figures(browser: Browser, report: str) -> None:
    background = "element => getComputedStyle(element).backgroundColor.match(/\\d+/g).map(Number)"
    for scheme, dark in (("light", False), ("dark", True)):
        with opened(browser, report, 1280, scheme) as page:
            assert (max(page.eval_on_selector("body", background)) < 60) is dark
            for figure in page.locator(".card").all():
                pixels = np.asarray(Image.open(io.BytesIO(figure.screenshot())).convert("L"))
                assert (np.median(pixels) < 60) is np.bool_(dark)
                assert np.ptp(pixels) > 150  # and what is drawn can be told from its ground


def test_on_a_phone_accuracy_and_verdict_are_seen_without_scrolling(browser: Browser, report: str) -> None:
    with opened(browser, report, 390, "light") as page:
        cell = page.locator("tbody td").first
        assert "99." in cell.inner_text() or "98." in cell.inner_text()
        box = cell.locator(".verdict").bounding_box()
        assert box is not None
        assert box["x"] + box["width"] <= 390
        assert box["y"] + box["height"] <= 800
        wide = "[...document.querySelectorAll('.scroll, .card')].map(box => box.scrollWidth > box.clientWidth)"
        assert not any(page.evaluate(wide))


def test_a_table_scrolls_by_itself_with_the_keyboard_on_a_tablet(browser: Browser, report: str) -> None:
    with opened(browser, report, 720, "light") as page:
        table = page.get_by_role("region", name=re.compile("Measured here and reported elsewhere"))
        assert table.evaluate("box => box.scrollWidth > box.clientWidth")
        table.focus()
        page.keyboard.press("ArrowRight")
        frames = "for (let i = 0; i < 200 && !box.scrollLeft; i++) await new Promise(requestAnimationFrame)"
        assert table.evaluate(f"async box => {{ {frames}; return box.scrollLeft }}") > 0
        assert page.evaluate("scrollX") == 0


def test_no_figure_is_cut_in_print(browser: Browser, report: str) -> None:
    with opened(browser, report, 680, "light") as page:  # an A4 page without its margins, in CSS pixels
        page.emulate_media(media="print")
        sizes = page.evaluate(
            "[...document.images].map(image => image.getBoundingClientRect()).map(box => [box.right, box.height])"
        )
        assert all(right <= 680 and height <= 900 for right, height in sizes)
        assert page.evaluate("[...document.querySelectorAll('table')].every(table => table.offsetWidth <= 680)")


# ---- the MLflow UI


@pytest.fixture(scope="module")
def runs_address(store: Store) -> Iterator[str]:
    process = Program("-m", "mnist_lab", "ui", "--port", str(free_port()), "--tracking-uri", store.uri, cwd=ROOT)
    try:
        wait_until(lambda: "\n" in process.stdout, process)
        printed = process.stdout.splitlines()[0]
        assert printed.startswith("The runs: http"), printed
        yield printed.removeprefix("The runs: ")
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def ui(browser: Browser) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1600, "height": 900})
    page.set_default_timeout(PATIENCE)
    yield page
    page.close()


def test_the_mlflow_ui_shows_the_runs_with_their_accuracies(ui: Page, runs_address: str, store: Store) -> None:
    ui.goto(runs_address)
    table = results.run_table(tracking_uri=store.uri)
    assert len(table) == len(RUNS)
    for run in table.to_dict("records"):
        row = ui.locator(f"[role=row][row-id='{run['run_id']}']")  # in two halves: the one with the name stays in sight
        expect(row.get_by_text(f"{run['step']} seed {run['seed']}")).to_be_visible(timeout=PATIENCE)
        cell = row.locator("[col-id='metrics.`last`']")
        expect(cell).to_have_text(f"{run['final_test_accuracy']:g}")


def test_the_learning_curves_are_the_first_of_the_charts(ui: Page, runs_address: str) -> None:
    ui.goto(runs_address)
    ui.get_by_role("link", name="step2_better seed 1").wait_for()
    ui.goto(f"{ui.url}&compareRunsMode=CHART")
    expect(ui.get_by_text(re.compile(r"Learning curves|Model metrics \(")).first).to_contain_text("Learning curves")
    expect(ui.get_by_text("test_accuracy", exact=True).first).to_be_visible(timeout=PATIENCE)


def test_a_run_is_shown_with_its_figures_and_model_training_stays(ui: Page, runs_address: str) -> None:
    """Else a click on a run leads to pages for language models, and an assistant takes a quarter of the window."""
    ui.goto(runs_address)
    ui.get_by_role("link", name="step2_better seed 1").click()
    expect(ui.get_by_role("tab", name="Model metrics")).to_be_visible(timeout=PATIENCE)
    expect(ui.get_by_placeholder("Ask a question")).not_to_be_visible()
    ui.get_by_role("tab", name="Artifacts").click()
    expect(ui.get_by_text("predictions.npz")).to_be_visible(timeout=PATIENCE)
    ui.get_by_text("figures", exact=True).click()
    ui.get_by_text("samples.png").first.click()
    ui.wait_for_function("[...document.images].some(i => i.alt.includes('samples.png') && i.naturalWidth > 300)")
    ui.goto(runs_address.removesuffix("lab"))
    expect(ui.get_by_role("link", name="Model registry")).to_be_visible(timeout=PATIENCE)
