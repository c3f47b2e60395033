"""What the pages show: README's and the recipes' programs and the notebooks run as they are written."""

import csv
import os
import re
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from conftest import FullRun
from forkserver import PATIENCE, run_program
from helpers import ROOT, TrackedRun, read_runs
from mnist_lab.data import Mnist
from mnist_lab.experiment import Targets
from mnist_lab.running.job import read_declaration
from mnist_lab.verdicts.targets import judge, verdict_table

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
PROGRAMS = [text for language, text in BLOCKS if language == "python"]
PLAIN = [text for language, text in BLOCKS if not language]
STEP8 = list(csv.DictReader((ROOT / "docs" / "results" / "step8_averaging.csv").read_text().splitlines()))


def test_the_declaration_is_that_of_step_8() -> None:
    assert PROGRAMS[0] in (ROOT / "experiments" / "step8_averaging.py").read_text()


def test_the_first_command_ends_as_the_committed_run_of_seed_0_did() -> None:
    (seed_0,) = (row for row in STEP8 if row["seed"] == "0")
    targets = Targets(accuracy=99.4, params=10_000, epochs=15)
    counts = {name: int(seed_0[name]) for name in ("num_params", "epochs")}
    verdicts = judge(targets, accuracies=[float(seed_0["last"])], **counts)
    assert PLAIN[1].strip() == verdict_table(verdicts)


def test_the_first_command_takes_as_long_as_is_said() -> None:
    minutes = statistics.median(float(row["minutes"]) for row in STEP8)
    (said,) = re.findall(r"meets all targets: about (\d+) minutes on two idle cores", README)
    assert int(said) == pytest.approx(minutes + 1, abs=1)  # the set-up takes one


def test_the_experiment_of_ones_own_runs_as_it_is_written(tmp_path: Path) -> None:
    script, database = tmp_path / "my_idea.py", tmp_path / "store" / "mlflow.db"
    script.write_text(PROGRAMS[1])
    flags = ["--limit", "4000", "--epochs", "1", "--tracking-uri", f"sqlite:///{database}"]
    done = run_program(script, *flags, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    (run,) = read_runs(database)
    assert (run.status, run.tags["step"]) == ("FINISHED", "my_idea")
    assert run.metrics["num_params"][-1][1] < 10_000


def test_every_command_is_there() -> None:
    targets = set(re.findall(r"make ([a-z_]+\d?)", "\n".join(PLAIN))) - {"my_idea"}
    assert {"step8", "draw", "steps", "compare", "report", "predict", "test", "help"} <= targets
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [name for name in sorted(targets) if not re.search(rf"^  {name} ", shown, flags=re.MULTILINE)] == []
    flags = set(re.findall(r"--[a-z-]+", "\n".join(PLAIN)))
    assert {"--limit", "--holdout", "--folds", "--search"} <= flags
    assert "SEEDS=10" in README


def test_every_file_that_is_linked_is_there() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(links) > 8
    assert [link for link in links if not (ROOT / link).exists()] == []


RECIPES = {
    section.partition("\n")[0]: code.group(1)
    for section in (ROOT / "docs" / "recipes.md").read_text().split("\n## ")[1:]
    if (code := re.search(r"```python\n(.*?)```", section, re.DOTALL))
}
KAGGLE = "A submission to Kaggle"
Train = Callable[..., TrackedRun]


@pytest.fixture
def train(train_run: Callable[..., TrackedRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    monkeypatch.syspath_prepend(ROOT / "experiments")

    def train(text: str, name: str = "recipe") -> TrackedRun:
        script = tmp_path / f"{name}.py"
        script.write_text(text)
        return train_run(read_declaration(script).override({"epochs": 1})[0], name)

    return train


def test_a_network_is_loaded_as_said(train: Train, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "metrics.md").read_text(), re.DOTALL)
    run = train(RECIPES["Images scaled otherwise"])
    script = tmp_path / "notebook.py"
    script.write_text(snippet.replace("<id>", run.run_id).replace("<step>", "recipe") + "print(mean, deviation)\n")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    done = run_program(script, cwd=tmp_path)
    assert done.stdout == "0.5 0.5\n", done.stderr


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in ("Distillation", KAGGLE)])
def test_a_recipe_trains_as_written(name: str, train: Train) -> None:
    run = train(RECIPES[name])

    assert run.status == "FINISHED"
    assert 0 < run.metrics["train_loss"][0][1] < 10


def test_the_recipe_for_distillation_finds_its_teacher(train: Train) -> None:
    teacher = train((ROOT / "experiments" / "step1_baseline.py").read_text(), "step1_baseline")

    student = train(RECIPES["Distillation"])
    assert (student.tags["teacher_run_id"], student.params["teacher"]) == (teacher.run_id, "step1_baseline")


def test_a_submission_to_kaggle_is_in_order(mnist: Mnist, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = mnist.test_images[:20].reshape(20, 784)
    names = ",".join(f"pixel{number}" for number in range(784))
    (tmp_path / "test.csv").write_text("\n".join([names, *(",".join(map(str, row)) for row in pixels.tolist())]))
    monkeypatch.chdir(tmp_path)

    exec(RECIPES[KAGGLE], {})  # noqa: S102

    head, *rows = (tmp_path / "submission.csv").read_text().splitlines()
    assert head == "ImageId,Label"
    assert rows == [f"{number},{label}" for number, label in enumerate(mnist.test_labels[:20].tolist(), 1)]


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
