"""The committed runs come back into a store: whole, once, and beside one's own."""

import csv
import io
import shutil
import sqlite3
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlflow
import numpy as np
import pytest
from filelock import FileLock

from forkserver import run_program
from helpers import ROOT, copy_store, read_runs
from helpers import TrackedRun as StoredRun
from mnist_lab import results
from mnist_lab.__main__ import main
from mnist_lab.data import Mnist
from mnist_lab.errors import LabError
from mnist_lab.results import publish as files
from mnist_lab.results.report import write_report
from mnist_lab.results.restore import Restored, restore
from mnist_lab.tracking.run import TrackedRun
from mnist_lab.tracking.store import Store, finished_runs, open_store
from pages import PAGE, T0
from report_store import predict
from run_writer import STEP4, TARGETS, write_run

RESULTS = ROOT / "docs" / "results"
COMMITTED = files.read_records(RESULTS)
CODE = {"step1_plain": "0123456789abcdef", "step2_better": "fedcba9876543210"}
PARENT = "mlflow.parentRunId"
quietly = partial(restore, commit="c0ffee0123", progress=lambda _: None)


@pytest.fixture
def other(empty_store: Path, tmp_path: Path) -> str:
    """Return the URI of a second store without runs."""
    return f"sqlite:///{copy_store(empty_store, tmp_path / 'other' / 'mlflow.db')}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder to publish into."""
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "README.md").write_text(PAGE)
    (tmp_path / "README.md").write_text(PAGE)
    return folder


def publish(folder: Path, uri: str) -> list[str]:
    changes: list[str] = []
    files.publish(folder, folder.parent / "README.md", tracking_uri=uri, progress=changes.append)
    return changes


@pytest.fixture
def published(uri: str, folder: Path, mnist: Mnist, tmp_path: Path) -> Store:
    """Return a store whose runs, two steps of three seeds and one of one, stand in the folder too."""
    store = open_store(uri)
    write_published(store, mnist, tmp_path)
    publish(folder, uri)
    return store


def write_published(store: Store, mnist: Mnist, folder: Path) -> None:
    truth = mnist.test_labels.numpy()
    runs = [(step, seed) for step in CODE for seed in range(3)] + [("idea", 5)]
    for number, (step, seed) in enumerate(runs):
        accuracies = [98.0 + seed / 10, 99.3 + number / 100]
        tags = TARGETS | {
            "code_sha256": CODE.get(step, "00"),
            **{"threads": "1", "hardware": "a CPU, 2 cores, AVX2", "torch": "2.15.0"},
            "reported_best_test_accuracy": "99.46",
        }
        run = write_run(store, step, seed, accuracies, start_time=T0 + 60_000 * number, tags=tags)
        file = folder / "predictions.npz"
        np.savez_compressed(file, truth=truth, **predict(truth, accuracies[-1]))
        store.client.log_artifact(run.info.run_id, str(file))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, empty_store: Path, mnist: Mnist) -> Path:
    """Return a folder of sound CSVs."""
    place = tmp_path_factory.mktemp("sound")
    uri = f"sqlite:///{copy_store(empty_store, place / 'store' / 'mlflow.db')}"
    write_published(open_store(uri), mnist, place)
    return files.export_runs(place / "results", tracking_uri=uri)[0].parent


def csvs(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.glob("*.csv")}


def by_name(database: Path) -> dict[str, StoredRun]:
    runs = read_runs(database)
    assert len({run.name for run in runs}) == len(runs)
    return {run.name: run for run in runs}


def database_of(uri: str) -> Path:
    return Path(uri.removeprefix("sqlite:///"))


def content(database: Path) -> list[list[tuple[object, ...]]]:
    """Return all that the store says of runs."""
    with closing(sqlite3.connect(database)) as connection:
        return [
            sorted(connection.execute(f"SELECT * FROM {table}"), key=repr)  # noqa: S608
            for table in ("runs", "params", "tags", "metrics")
        ]


# ---- what comes back


def test_a_restored_run_is_what_was_published(published: Store, folder: Path, other: str, tmp_path: Path) -> None:
    assert quietly(folder, tracking_uri=other) == Restored(7, 2, there=0)

    was, now = by_name(database_of(published.uri)), by_name(database_of(other))
    assert set(now) == {*was, "step1_plain 3 seeds", "step2_better 3 seeds"}
    for name, run in was.items():
        back = now[name]
        assert (back.status, back.params) == ("FINISHED", run.params)
        assert {name: back.tags[name] for name in run.tags if name != "mlflow.user"}.items() >= {
            **{name: run.tags[name] for name in ("step", "overrides", "code_sha256", "threads", "hardware", "torch")},
            **{name: run.tags[name] for name in ("git_commit", "git_dirty", *TARGETS, "reported_best_test_accuracy")},
        }.items()
        assert {name: [step for step, _ in points] for name, points in back.metrics.items()} == {
            name: [step for step, _ in points] for name, points in run.metrics.items()
        }
        for metric, points in run.metrics.items():
            assert back.metrics[metric] == [(step, pytest.approx(value, rel=1e-3)) for step, value in points], metric
        assert (back.tags["restored"], back.tags["verdict_params"]) == ("c0ffee0123", "met")

    files.export_runs(tmp_path / "again", tracking_uri=other)
    assert csvs(tmp_path / "again") == csvs(folder)


def test_which_images_were_wrong_comes_back(published: Store, folder: Path, other: str) -> None:
    quietly(folder, tracking_uri=other)
    was, now = (
        results.run_table("step2_better", 2, columns="all", tracking_uri=uri).iloc[0] for uri in (published.uri, other)
    )
    said, back = (results.predictions(run["run_id"], tracking_uri=uri)
                  for run, uri in ((was, published.uri), (now, other)))  # fmt: skip
    wrong = said["truth"] != said["prediction"]
    assert wrong.sum() == 10_000 - round(100 * now["final_test_accuracy"]) == 65
    assert back[["truth", "prediction"]].equals(said[["truth", "prediction"]])
    assert np.allclose(back["confidence"][wrong], said["confidence"][wrong], atol=1e-4)
    assert back["confidence"][~wrong].isna().all()
    assert results.compare("idea", "idea", tracking_uri=other).effect == 0


def test_run_tables_mark_what_was_restored(published: Store, folder: Path, other: str) -> None:
    write_run(open_store(other), "mine", 0, [99.0], start_time=T0)
    quietly(folder, tracking_uri=other)
    table = results.run_table(tracking_uri=other).set_index("step")
    assert list(table)[-1] == "restored"
    marked = table["restored"]
    assert marked.drop("mine").eq("c0ffee0").all()
    assert marked.isna()["mine"]


def test_runs_stand_under_the_study_of_their_step(published: Store, folder: Path, other: str) -> None:
    quietly(folder, tracking_uri=other)
    runs = by_name(database_of(other))
    parent = runs["step2_better 3 seeds"]
    children = {name for name, run in runs.items() if run.tags.get(PARENT) == parent.run_id}
    assert children == {f"step2_better seed {seed}" for seed in range(3)}
    assert (parent.status, parent.tags["study"], parent.tags["seeds"]) == ("FINISHED", "step2_better", "0 1 2")
    assert parent.metrics["final_test_accuracy_mean"] == [(0, pytest.approx(99.34))]
    assert parent.tags["verdict_accuracy"] == "missed"
    assert "seed" not in parent.params
    assert "| 99.34 |" in " ".join(parent.tags["mlflow.note.content"].split())
    assert (parent.artifacts / "verdict.md").read_text() == parent.tags["mlflow.note.content"] + "\n"
    assert {file.name for file in (parent.artifacts / "figures").iterdir()} == {"training.png"}
    assert PARENT not in runs["idea seed 5"].tags


def test_the_committed_csvs_are_read_and_written_byte_for_byte() -> None:
    for file, text in COMMITTED.csvs(RESULTS, {row["step"] for row in COMMITTED.runs}).items():
        assert file.read_text() == text, file


@pytest.mark.long
def test_the_committed_runs_of_all_steps_are_restored(uri: str, database: Path, tmp_path: Path) -> None:
    done = quietly(RESULTS, tracking_uri=uri)
    seeds = {
        step: [row for row in COMMITTED.runs if row["step"] == step] for step in {r["step"] for r in COMMITTED.runs}
    }
    assert (done.runs, done.there) == (len(COMMITTED.runs), 0)
    assert done.studies == sum(len(rows) > 1 for rows in seeds.values())
    table = results.compare_table(tracking_uri=uri).set_index("step")
    assert table["seeds"].to_dict() == {step: len(rows) for step, rows in seeds.items()}
    files.export_runs(tmp_path / "again", tracking_uri=uri)
    assert csvs(tmp_path / "again") == csvs(RESULTS)
    page, _ = write_report(tmp_path / "reports", tracking_uri=uri)
    assert page.stat().st_size < 2_000_000


# ---- a second call


def test_a_second_call_adds_nothing(published: Store, folder: Path, other: str) -> None:
    quietly(folder, tracking_uri=other)
    before = content(database_of(other))
    assert quietly(folder, tracking_uri=other) == Restored(0, 0, there=7)
    assert content(database_of(other)) == before


def test_runs_of_ones_own_are_left_alone_and_not_doubled(published: Store, folder: Path, database: Path) -> None:
    write_run(published, "step1_plain", 9, [99.0], start_time=T0 + 999_999)
    before = content(database)
    assert quietly(folder, tracking_uri=published.uri) == Restored(0, 0, there=7)
    assert content(database) == before


def test_files_that_say_otherwise_replace_what_was_restored(published: Store, folder: Path, other: str) -> None:
    write_run(open_store(other), "mine", 0, [99.0], start_time=T0)
    quietly(folder, tracking_uri=other)
    file = folder / "step2_better.csv"
    file.write_text(file.read_text().replace("2.15.0", "2.16.0", 1))
    assert quietly(folder, tracking_uri=other) == Restored(7, 2, there=0)
    table = results.run_table(columns="all", tracking_uri=other)
    assert len(table) == 8
    assert table.set_index(["step", "seed"])["torch"]["step2_better"].to_dict() == {
        0: "2.16.0",
        1: "2.15.0",
        2: "2.15.0",
    }


def test_a_call_that_was_killed_is_completed_by_the_next(
    published: Store, folder: Path, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    log_once = TrackedRun.log_once

    def killed(run: TrackedRun, metrics: Mapping[str, float]) -> None:
        written.append(run.run_id)
        if len(written) == 3:
            raise KeyboardInterrupt
        log_once(run, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(TrackedRun, "log_once", killed)
        with pytest.raises(KeyboardInterrupt):
            quietly(folder, tracking_uri=other)
    mlflow.MlflowClient(other).update_run(written[2], status="RUNNING")  # as after kill -9

    assert quietly(folder, tracking_uri=other) == Restored(7, 2, there=0)

    there = [run for run in read_runs(database_of(other)) if run.run_id not in deleted(other)]
    whole = {run.name: run for run in there}
    assert len(whole) == len(there) == 9
    assert {run.status for run in there} == {"FINISHED"}
    for name, run in by_name(database_of(published.uri)).items():
        assert {metric: len(points) for metric, points in whole[name].metrics.items()} == {
            metric: len(points) for metric, points in run.metrics.items()
        }
    assert {whole[f"step1_plain seed {seed}"].tags[PARENT] for seed in range(3)} == {
        whole["step1_plain 3 seeds"].run_id
    }


def deleted(uri: str) -> set[str]:
    with closing(sqlite3.connect(database_of(uri))) as connection:
        query = "SELECT run_uuid FROM runs WHERE lifecycle_stage = 'deleted'"
        return {run_id for (run_id,) in connection.execute(query)}


def test_two_calls_at_once_are_not_mixed(published: Store, folder: Path, other: str) -> None:
    lock = database_of(other).parent / "locks" / "restore.lock"
    lock.parent.mkdir()
    with FileLock(lock), pytest.raises(LabError, match="^another process is restoring runs into .*; wait until"):
        quietly(folder, tracking_uri=other)
    assert read_runs(database_of(other)) == []


# ---- a study that goes on from restored seeds

QUICK = """
from functools import partial

import torch
from torch import nn

from mnist_lab import Experiment, Targets, main


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(784, 10))


EXPERIMENT = Experiment(
    net=Net, epochs=1, batch_size=1000, optimizer=partial(torch.optim.SGD, lr=0.1), targets=Targets(accuracy=80.0)
)
if __name__ == "__main__":
    main(EXPERIMENT)
"""


@dataclass(frozen=True)
class Seeds:
    """The script of a study, and the folder that its seeds 0 and 1 were published into."""

    script: Path
    folder: Path

    def train(self, seeds: int, uri: str) -> None:
        """Train a study from a shell."""
        flags = ["--seeds", str(seeds), "--workers", "1", "--device", "cpu", "--tracking-uri", uri]
        done = run_program(self.script, *flags, cwd=self.script.parent)
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def two_seeds(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Seeds:
    """Train and publish two seeds."""
    place = tmp_path_factory.mktemp("two_seeds")
    seeds = Seeds(place / "quick.py", place / "results")
    seeds.script.write_text(QUICK)
    seeds.folder.mkdir()
    for folder in (place, seeds.folder):
        (folder / "README.md").write_text(PAGE)
    uri = f"sqlite:///{copy_store(empty_store, place / 'store' / 'mlflow.db')}"
    seeds.train(2, uri)
    assert len(publish(seeds.folder, uri)) == 2
    return seeds


@pytest.fixture
def seeds(two_seeds: Seeds, tmp_path: Path) -> Seeds:
    """Return a copy of them."""
    shutil.copytree(two_seeds.folder, tmp_path / "results")
    for file in (two_seeds.script, two_seeds.folder.parent / "README.md"):
        shutil.copy(file, tmp_path)
    return Seeds(tmp_path / "quick.py", tmp_path / "results")


def test_a_study_goes_on_from_restored_seeds_and_their_rows_stay(seeds: Seeds, other: str) -> None:
    quietly(seeds.folder, tracking_uri=other)
    before = {name: text.splitlines() for name, text in csvs(seeds.folder).items()}

    seeds.train(3, other)

    runs = by_name(database_of(other))
    assert [name for name, run in runs.items() if "restored" not in run.tags] == ["quick 3 seeds", "quick seed 2"]
    parent = runs["quick 3 seeds"]
    assert parent.tags["seeds_reused"] == "0 1"
    assert {runs[f"quick seed {seed}"].tags[PARENT] for seed in range(3)} == {parent.run_id}
    assert quietly(seeds.folder, tracking_uri=other) == Restored(0, 0, there=2)
    assert {run.tags.get(PARENT) for run in by_name(database_of(other)).values()} == {None, parent.run_id}

    (change,) = publish(seeds.folder, other)
    assert change.startswith("quick seed 2: added, ")
    after = {name: text.splitlines() for name, text in csvs(seeds.folder).items()}
    for name in ("quick.csv", "epochs.csv", "mistakes.csv"):
        assert after[name][: len(before[name])] == before[name]
        assert len(after[name]) > len(before[name])
    assert after["settings.csv"] == [line.replace(",0-1,", ",0-2,") for line in before["settings.csv"]]


@pytest.mark.parametrize(
    ("hardware", "seeds"),
    [("another CPU, 8 cores, AVX2", [0, 1, 2]), ("a CPU, 2 cores, Z80", []), ("a CPU, 2 cores", [])],
)
def test_seeds_of_another_processor_are_trained_again(
    published: Store, folder: Path, other: str, hardware: str, seeds: list[int]
) -> None:
    quietly(folder, tracking_uri=other)
    store = open_store(other)
    tags = {"step": "step1_plain", "code_sha256": CODE["step1_plain"]}
    params = {**STEP4, "epochs": "2"}
    assert sorted(finished_runs(store, params, tags, hardware=hardware)) == seeds
    assert finished_runs(store, params, tags | {"code_sha256": "changed"}, hardware=hardware) == {}


# ---- what is refused


def replace(old: str, new: str) -> Callable[[str], str]:
    return lambda text: text.replace(old, new, 1)


def cell(column: str, value: str) -> Callable[[str], str]:
    """Return what writes a value into a column of the first row."""

    def spoil(text: str) -> str:
        header, first, *rest = text.splitlines()
        cells = next(csv.reader([first]))
        cells[header.split(",").index(column)] = value
        line = io.StringIO()
        csv.writer(line, lineterminator="").writerow(cells)
        return "\n".join([header, line.getvalue(), *rest, ""])

    return spoil


def twice(text: str) -> str:
    return text + text.splitlines()[-1] + "\n"


def cut(text: str) -> str:
    return text.rpartition(",")[0] + "\n"


def without_last_row(text: str) -> str:
    return "".join(text.splitlines(keepends=True)[:-1])


@pytest.mark.parametrize(
    ("name", "spoil", "where"),
    [
        ("idea", cell("last", "1000"), "row 2, last: '1000'"),
        ("idea", cell("epochs", "0"), "row 2, epochs: '0'"),
        ("idea", cell("num_params", "1.5"), "row 2, num_params"),
        ("idea", cell("minutes", "inf"), "row 2, minutes: 'inf'"),
        ("idea", cell("test_loss", "nan"), "row 2, test_loss: 'nan'"),
        ("idea", cell("num_params", "9" * 400), "row 2, num_params: '999"),
        ("idea", cell("date", "yesterday"), "row 2, date: 'yesterday'"),
        ("idea", cell("best", "99.00"), "last accuracy 99.36 is above"),
        ("idea", cell("best_epoch", "7"), "its best_epoch 7"),
        ("idea", replace("date", "day"), "row 1: the column 'date'"),
        ("idea", cut, "row 2: it has 18 cells, not 19"),
        ("idea", twice, "row 3, seed: 5 is there twice"),
        ("epochs", without_last_row, "idea seed 5: it has other epochs than 1 to 2"),
        ("settings", None, "step1_plain seed 0: it has no params"),
        ("settings", cell("seeds", "0-99999999999"), "row 2, seeds: .* 99999999999"),
        ("settings", cell("seeds", "all"), "row 2, seeds: 'all'"),
        ("settings", twice, "is there twice"),
        ("mistakes", cell("image", "10000"), "row 2, image: '10000'"),
        ("mistakes", without_last_row, "idea seed 5: it got 64 images wrong"),
        ("mistakes", lambda text: text + "\xff", "no CSV in UTF-8"),
    ],
)
def test_files_that_are_not_the_labs_are_refused_by_file_row_and_column(
    sound: Path, other: str, tmp_path: Path, name: str, spoil: Callable[[str], str] | None, where: str
) -> None:
    folder = shutil.copytree(sound, tmp_path / "spoiled")
    file = folder / f"{name}.csv"
    if spoil is None:
        file.unlink()
    else:
        file.write_bytes(spoil(file.read_text()).encode("latin-1"))
    with pytest.raises(LabError, match=rf"{name}\.csv[:,] .*{where}"):
        quietly(folder, tracking_uri=other)
    assert read_runs(database_of(other)) == []


def test_a_refusal_is_one_sentence_and_an_exit_code(
    tmp_path: Path, other: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mnist_lab", "restore", "--folder", str(tmp_path), "--tracking-uri", other])
    with pytest.raises(SystemExit, match="1"):
        main()
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith(f"error: folder: {tmp_path} has no CSVs")
