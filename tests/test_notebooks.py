"""The notebooks, executed from another folder against a small store: one real run of step 1."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from conftest import FullRun
from forkserver import PATIENCE

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def execute(notebook: Path, folder: Path, tracking_uri: str) -> nbformat.NotebookNode:
    node = nbformat.read(notebook, as_version=4)
    client = NotebookClient(node, timeout=PATIENCE, resources={"metadata": {"path": str(folder)}})
    client.execute(env={**os.environ, "MLFLOW_TRACKING_URI": tracking_uri})
    return node


def pictures(node: nbformat.NotebookNode) -> int:
    return sum("image/png" in output.get("data", {}) for cell in node.cells for output in cell.get("outputs", []))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_a_notebook_runs_from_any_folder(notebook: Path, tmp_path: Path, full_run: FullRun) -> None:
    node = execute(notebook, tmp_path, f"sqlite:///{full_run.database}")
    assert pictures(node) == {"01_data": 3, "02_compare_steps": 3, "03_mistakes": 2}[notebook.stem]
    assert not any(output.output_type == "stream" for cell in node.cells for output in cell.get("outputs", []))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_a_notebook_is_committed_executed(notebook: Path) -> None:
    node = nbformat.read(notebook, as_version=4)
    code = [cell for cell in node.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert pictures(node) > 0
    assert notebook.stat().st_size < 2**20
    assert not {"error", "stream"} & {output.output_type for cell in code for output in cell.outputs}


def test_an_empty_store_says_what_to_run_without_a_traceback(tmp_path: Path) -> None:
    with pytest.raises(CellExecutionError) as caught:
        execute(ROOT / "notebooks" / "02_compare_steps.ipynb", tmp_path, f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert "no runs yet" in caught.value.traceback
    assert "make step1" in caught.value.traceback
    assert "results.py" not in caught.value.traceback
