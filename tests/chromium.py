"""Pages in headless Chromium, watched: what they say on the console, and what they load."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from axe_playwright_python.sync_playwright import Axe

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")
PATIENCE = 60_000  # milliseconds


@contextmanager
def opened(
    browser: "Browser", address: str, width: int = 1280, scheme: str = "light", *, touch: bool = False
) -> Iterator["Page"]:
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


def barriers(page: "Page", *looked_for: str) -> list[str]:
    """Return what keeps people from using the page; check that axe has looked for these rules."""
    found = Axe().run(page).response
    assert {*looked_for} <= {rule["id"] for rule in found["passes"]}
    serious = [problem for problem in found["violations"] if problem["impact"] in ("serious", "critical")]
    return [f"{problem['id']}: {node['html'][:200]}" for problem in serious for node in problem["nodes"]]
