"""Execute the notebooks and take the README's pictures, docs/images/report.png and mlflow.png, of the committed runs.

The runs are restored into a store that is gone afterwards, so whatever else was trained here is not in them. Needs
Chromium. `make report` and `make ui` are what it looks at.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from mnist_lab.paths import PROJECT_ROOT

IMAGES = PROJECT_ROOT / "docs" / "images"
NOTEBOOKS = sorted((PROJECT_ROOT / "notebooks").glob("*.ipynb"))
LIMIT = 300 * 1024  # bytes


def take(browser: Browser, address: str, wait_for: str, picture: Path, height: int) -> None:
    page = browser.new_page(viewport={"width": 1400, "height": height})
    page.goto(address)
    page.get_by_text(wait_for).first.wait_for()
    page.wait_for_timeout(1000)
    page.screenshot(path=picture)
    if picture.stat().st_size > LIMIT:
        sys.exit(f"{picture} is larger than 300 KiB")


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    lab = [sys.executable, "-m", "mnist_lab"]
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{temporary}/mlflow.db"
        subprocess.run([*lab, "restore"], check=True)
        for notebook in NOTEBOOKS:
            print(f"Executing {notebook.name} ...", flush=True)
            subprocess.run([sys.executable, "-m", "jupyter", "execute", "--inplace", str(notebook)], check=True)
        subprocess.run([*lab, "report", "--folder", temporary], check=True)
        ui = subprocess.Popen([*lab, "ui"], stdout=subprocess.PIPE, text=True, start_new_session=True)
        try:
            address = next((line for line in ui.stdout if line.startswith("The runs: ")), "")
            with sync_playwright() as playwright:
                flags = ["--no-sandbox"] if os.geteuid() == 0 else []
                browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
                report, runs = Path(temporary, "steps.html").as_uri(), address.removeprefix("The runs: ").strip()
                take(browser, report, "MNIST, step by step", IMAGES / "report.png", 1500)
                take(browser, runs, "10 seeds", IMAGES / "mlflow.png", 600)
                browser.close()
        finally:
            os.killpg(ui.pid, signal.SIGTERM)
            ui.wait()


if __name__ == "__main__":
    main()
