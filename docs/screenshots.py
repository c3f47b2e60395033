"""Take the README's pictures, docs/images/report.png and docs/images/mlflow.png, of the project's own runs.

Needs Chromium. `make report` and `make ui` are what it looks at.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from mnist_lab.results.report import write_report
from mnist_lab.tracking.sqlite import PROJECT_ROOT

IMAGES = PROJECT_ROOT / "docs" / "images"
LIMIT = 300 * 1024  # bytes


def take(browser: Browser, address: str, wait_for: str, picture: Path, height: int, *close: str) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": height})
    page.goto(address)
    page.get_by_text(wait_for).first.wait_for()
    for name in close:  # what MLflow puts beside and above its table
        page.get_by_role("button", name=name, exact=True).click()
    page.wait_for_timeout(1000)
    page.screenshot(path=picture)
    if picture.stat().st_size > LIMIT:
        sys.exit(f"{picture} is larger than 300 KiB")


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    report, _ = write_report(PROJECT_ROOT / "reports")
    job = [sys.executable, "-m", "mnist_lab", "ui"]
    ui = subprocess.Popen(job, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        runs = ui.stdout.readline().removeprefix("The runs: ").strip()
        with sync_playwright() as playwright:
            flags = ["--no-sandbox"] if os.geteuid() == 0 else []
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
            take(browser, report.as_uri(), "MNIST, step by step", IMAGES / "report.png", 1500)
            take(browser, runs, "final_test_accuracy", IMAGES / "mlflow.png", 600, "Close", "Hide banner")
            browser.close()
    finally:
        os.killpg(ui.pid, signal.SIGTERM)
        ui.wait()


if __name__ == "__main__":
    main()
