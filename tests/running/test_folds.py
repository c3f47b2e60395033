"""Cross-validation: a study whose runs are folds, each judged on the training images that it has not seen."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from helpers import TrackedRun, copy_store, first, read_runs
from mnist_lab import results
from mnist_lab.data import Mnist, hold_out_fold, images_of_fold
from mnist_lab.errors import LabError
from mnist_lab.results import publish as files
from mnist_lab.results.records import read_records
from mnist_lab.running import run
from mnist_lab.running.job import Job, read_declaration
from mnist_lab.running.progress import Progress, StudyResult
from mnist_lab.running.study import study
from mnist_lab.running.workers import Trainers
from mnist_lab.training.loop import EpochMetrics

RENAMED = {"one": "step7_depth", "other": "step8_averaging"}
TINY = Path(__file__).parents[1] / "tiny.py"


@pytest.mark.parametrize("folds", [2, 6, 7])
def test_folds_share_the_training_images_out_by_digit(folds: int, mnist: Mnist) -> None:
    parts = [images_of_fold(mnist.train_labels, fold, folds) for fold in range(folds)]

    assert torch.equal(torch.cat(parts).sort().values, torch.arange(60_000))
    counts = torch.stack([mnist.train_labels[part].bincount(minlength=10) for part in parts])
    for of_parts in (counts, counts.sum(dim=1, keepdim=True)):
        assert (of_parts.max(dim=0).values - of_parts.min(dim=0).values).max() <= 1


def test_a_fold_is_not_trained_on_and_nothing_is_tested(mnist: Mnist) -> None:
    images = images_of_fold(mnist.train_labels, 1, 6)
    others = torch.ones(60_000, dtype=torch.bool)
    others[images] = False

    data = hold_out_fold(mnist, 1, 6)

    for part, chosen in (("validation", images), ("train", others)):
        assert torch.equal(getattr(data, f"{part}_images"), mnist.train_images[chosen])
        assert torch.equal(getattr(data, f"{part}_labels"), mnist.train_labels[chosen])
    assert len(data.test_images) == len(data.test_labels) == 0


@pytest.fixture(scope="module")
def few(mnist: Mnist) -> Mnist:
    return first(mnist, 1200, 300)


class Folds:
    def __init__(self, folder: Path, empty_store: Path) -> None:
        self.database = copy_store(empty_store, folder / "runs.db")
        self.uri = f"sqlite:///{self.database}"
        self.studies = {step: self.study(Path(shutil.copy(TINY, folder / f"{step}.py"))) for step in ("one", "other")}

    def job(self, script: Path) -> Job:
        experiment = replace(read_declaration(script), epochs=2 if script.stem == "other" else 1)
        return Job(script=script, experiment=experiment, tracking_uri=self.uri, threads=1, folds=3)

    def study(self, script: Path) -> StudyResult:
        return study(self.job(script), range(3), Progress(), Trainers())

    def runs(self) -> list[TrackedRun]:
        return read_runs(self.database)


@pytest.fixture(scope="module")
def folds(tmp_path_factory: pytest.TempPathFactory, empty_store: Path, few: Mnist) -> Iterator[Folds]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_mnist", lambda *_: few)
        yield Folds(tmp_path_factory.mktemp("folds"), empty_store)


def right(folds: Folds, step: str) -> "pd.Series[bool]":
    """Return whether each of the 1,200 images was read rightly by the network that had not seen it."""
    tables = [results.predictions(run.run_id, tracking_uri=folds.uri) for run in folds.studies[step].runs]
    table = pd.concat(tables).sort_index()
    assert table.index.tolist() == list(range(1200))
    return table["truth"] == table["prediction"]


def test_each_training_image_is_judged_once_by_a_network_that_has_not_seen_it(folds: Folds, few: Mnist) -> None:
    table = results.run_table("one", columns="all", folds=3, tracking_uri=folds.uri)

    told = [results.predictions(run, tracking_uri=folds.uri) for run in table["run_id"]]
    assert table["seed"].tolist() == [0, 1, 2]
    for fold, (accuracy, of_fold) in enumerate(zip(table["final_validation_accuracy"], told, strict=True)):
        images = images_of_fold(few.train_labels, fold, 3)
        assert of_fold.index.tolist() == images.tolist()
        assert of_fold["truth"].tolist() == few.train_labels[images].tolist()
        assert accuracy == pytest.approx(100 * (of_fold["truth"] == of_fold["prediction"]).mean())
    mean = results.compare_table("one", folds=3, tracking_uri=folds.uri)["last"].item()
    assert mean == pytest.approx(100 * right(folds, "one").mean())


def test_a_fold_has_no_figures_of_the_test_images_and_is_in_no_other_table(folds: Folds) -> None:
    assert all("test" not in metric for run in folds.runs() for metric in run.metrics)
    assert not [tag for run in folds.runs() for tag in run.tags if tag.startswith(("target_", "verdict_"))]
    with pytest.raises(LabError, match="folds 3"):
        results.run_table(tracking_uri=folds.uri)
    with pytest.raises(LabError, match="folds 2"):
        results.run_table(folds=2, tracking_uri=folds.uri)


def test_experiments_are_compared_image_by_image_with_the_folds_as_clusters(folds: Folds) -> None:
    """By Obuchowski (1998), with the t-distribution, as there are few clusters."""
    better = right(folds, "other").astype(int) - right(folds, "one").astype(int)
    parts = [results.predictions(run.run_id, tracking_uri=folds.uri) for run in folds.studies["one"].runs]
    sums = np.array([better[part.index].sum() for part in parts])
    effect = sums.sum() / 1200
    deviation = np.sqrt(3 / 2 * ((sums - 400 * effect) ** 2).sum()) / 1200

    found = results.compare("one", "other", folds=3, tracking_uri=folds.uri)

    assert found.effect == pytest.approx(100 * effect)
    assert (found.high - found.effect) / 4.302653 == pytest.approx(100 * deviation, rel=1e-6)  # t of 2 degrees, 97.5 %


def test_whole_cross_validations_are_published_and_read_back(folds: Folds, tmp_path: Path) -> None:
    readme, said = tmp_path / "page.md", list[str]()
    for page in (readme, tmp_path / "README.md"):
        page.write_text("<!-- folds -->\n<!-- /folds -->\n")

    for _ in range(2):
        files.publish(tmp_path, readme, tracking_uri=folds.uri, progress=said.append)

    assert len(said) == 6 + 1
    assert said[-1] == "The published rows are those of the store already."
    table = results.run_table(columns="all", folds=3, tracking_uri=folds.uri)
    rows = read_records(tmp_path).folds
    assert rows[["step", "fold"]].to_numpy().tolist() == table[["step", "seed"]].astype("str").to_numpy().tolist()
    accuracies = table["final_validation_accuracy"]
    assert rows["accuracy"].astype("float64").tolist() == pytest.approx(accuracies.tolist(), abs=5e-4)
    assert f"| `one` | 3 | **{accuracies[:3].mean():.2f}** ±" in readme.read_text()
    effect = results.compare("one", "other", folds=3, tracking_uri=folds.uri).effect
    assert files.compare_folds(rows) == []  # no script declares them
    renamed = files.compare_folds(rows.assign(step=rows["step"].map(RENAMED)))
    assert renamed[0].effect == pytest.approx(effect, abs=1e-3)


def test_a_teacher_that_has_seen_all_images_is_refused(folds: Folds) -> None:
    script = TINY.parents[1] / "experiments" / "step9_distillation.py"
    job = Job(script=script, experiment=read_declaration(script), tracking_uri=folds.uri, folds=3)

    with pytest.raises(LabError, match="folds: the teacher"):
        study(job, range(3), Progress(), Trainers())


class Interrupting(Progress):
    def on_epoch(self, seed: int, metrics: EpochMetrics) -> None:
        raise KeyboardInterrupt


def test_a_fold_that_is_interrupted_after_its_last_epoch_is_finished_and_then_not_trained_again(folds: Folds) -> None:
    script = Path(shutil.copy(TINY, folds.database.parent / "third.py"))
    with pytest.raises(KeyboardInterrupt):
        run.run(folds.job(script), 0, Interrupting())

    finished, again = folds.study(script), folds.study(script)

    killed = [run.run_id for run in folds.runs() if run.name == "third fold 0"]
    assert killed == [finished.runs[0].run_id]
    assert len(results.predictions(killed[0], tracking_uri=folds.uri)) == 400
    assert again.reused == [0, 1, 2]
    assert [run.run_id for run in again.runs] == [run.run_id for run in finished.runs]
