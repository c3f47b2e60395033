"""Every block of docs/recipes.md is a script that trains as it is written."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from forkserver import run_program
from helpers import ROOT, read_runs
from mnist_lab.data import Mnist
from mnist_lab.running import run as runner
from mnist_lab.running.job import Job, read_declaration
from mnist_lab.running.progress import Progress

PAGE = (ROOT / "docs" / "recipes.md").read_text()
RECIPES = {
    section.partition("\n")[0]: code.group(1)
    for section in PAGE.split("\n## ")[1:]
    if (code := re.search(r"```python\n(.*?)```", section, re.DOTALL))
}
KAGGLE = "A submission to Kaggle"


Train = Callable[..., SimpleNamespace]


@pytest.fixture
def train(small_mnist: Mnist, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    monkeypatch.setattr(runner, "load_mnist", lambda folder, device: small_mnist)
    monkeypatch.syspath_prepend(ROOT / "experiments")

    def train(text: str, name: str = "recipe") -> SimpleNamespace:
        script = tmp_path / f"{name}.py"
        script.write_text(text)
        experiment, _ = read_declaration(script).override({"epochs": 1})
        job = Job(script=script, experiment=experiment, tracking_uri=f"sqlite:///{database}", threads=1)
        runner.run(job, 0, Progress())
        return read_runs(database)[-1]

    return train


def test_a_network_is_loaded_as_it_is_said(
    train: Train, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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

    assert student.tags["teacher_run_id"] == teacher.run_id
    assert student.params["teacher"] == "step1_baseline"


def test_a_submission_to_kaggle_has_rows_in_order(
    mnist: Mnist, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = mnist.test_images[:20].reshape(20, 784)
    names = ",".join(f"pixel{number}" for number in range(784))
    (tmp_path / "test.csv").write_text("\n".join([names, *(",".join(map(str, row)) for row in pixels.tolist())]))
    monkeypatch.chdir(tmp_path)

    exec(RECIPES[KAGGLE], {})  # noqa: S102

    head, *rows = (tmp_path / "submission.csv").read_text().splitlines()
    assert head == "ImageId,Label"
    assert rows == [f"{number},{label}" for number, label in enumerate(mnist.test_labels[:20].tolist(), 1)]
