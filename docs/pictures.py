"""Execute the notebooks and take the README's picture of MLflow's UI, docs/images/mlflow.png, of the committed runs.

The runs are restored into a store that is gone afterwards, so whatever else was trained here is not in them. Needs
Chromium.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile

from playwright.sync_api import sync_playwright

from mnist_lab.paths import PROJECT_ROOT

PICTURE = PROJECT_ROOT / "docs" / "images" / "mlflow.png"
NOTEBOOKS = sorted((PROJECT_ROOT / "notebooks").glob("*.ipynb"))


def main() -> None:
    lab = [sys.executable, "-m", "mnist_lab"]
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{temporary}/mlflow.db"
        subprocess.run([*lab, "restore"], check=True)
        for notebook in NOTEBOOKS:
            print(f"Executing {notebook.name} ...", flush=True)
            subprocess.run([sys.executable, "-m", "jupyter", "execute", "--inplace", str(notebook)], check=True)
        ui = subprocess.Popen([*lab, "ui"], stdout=subprocess.PIPE, text=True, start_new_session=True)
        try:
            address = next((line for line in ui.stdout if line.startswith("The runs: ")), "")
            with sync_playwright() as playwright:
                flags = ["--no-sandbox"] if os.geteuid() == 0 else []
                browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
                page = browser.new_page(viewport={"width": 1400, "height": 600})
                page.goto(address.removeprefix("The runs: ").strip())
                page.get_by_text("10 seeds").first.wait_for()
                page.wait_for_timeout(1000)
                page.screenshot(path=PICTURE)
                browser.close()
        finally:
            os.killpg(ui.pid, signal.SIGTERM)
            ui.wait()


if __name__ == "__main__":
    main()
