"""The committed runs come back into a store: whole, once, and beside one's own."""

import io
import shutil
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from filelock import FileLock

from helpers import ROOT, TINY, TrackedRun, first, read_runs
from mnist_lab import results
from mnist_lab.data import Mnist
from mnist_lab.errors import LabError
from mnist_lab.results import publish as files
from mnist_lab.results.records import read_records, to_csv
from mnist_lab.results.restore import Restored, restore
from mnist_lab.running import run as runner
from mnist_lab.running.job import Job, read_declaration
from mnist_lab.running.progress import Progress
from mnist_lab.running.study import study
from mnist_lab.running.workers import Trainers
from mnist_lab.tracking import run as tracking
from mnist_lab.tracking.store import Store, open_store
from run_writer import T0, TARGETS, Published, new_place, write_run

RESULTS = ROOT / "docs" / "results"
COMMITTED = read_records(RESULTS)
PARENT = "mlflow.parentRunId"
quietly = partial(restore, commit="c0ffee0123", progress=lambda _: None)


@pytest.fixture(scope="module")
def restored(published: Published, new_store: Callable[[], Store]) -> str:
    """Return a store with a run of its own that they were restored into, for tests that change nothing of it."""
    store = new_store()
    write_run(store, "mine", 0, [99.0], start_time=T0, tags={"overrides": "lr=1"})  # so no file has it
    assert quietly(published.folder, tracking_uri=store.uri) == Restored(7, 2, there=0)
    return store.uri


def csvs(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.glob("*.csv")}


def database_of(uri: str) -> Path:
    return Path(uri.removeprefix("sqlite:///"))


def by_name(uri: str) -> dict[str, TrackedRun]:
    runs = read_runs(database_of(uri))
    assert len({run.name for run in runs}) == len(runs)
    return {run.name: run for run in runs}


def content(uri: str) -> list[list[tuple[object, ...]]]:
    with closing(sqlite3.connect(database_of(uri))) as connection:
        return [
            sorted(connection.execute(f"SELECT * FROM {table}"), key=repr)  # noqa: S608
            for table in ("runs", "params", "tags", "metrics")
        ]


# ---- what comes back


def test_a_restored_run_is_what_was_published(published: Published, restored: str, tmp_path: Path) -> None:
    was, now = by_name(published.uri), by_name(restored)
    assert set(now) == {*was, "step1_baseline 3 seeds", "step2_dropout 3 seeds", "mine seed 0"}
    for name, run in was.items():
        back = now[name]
        assert (back.status, back.params) == ("FINISHED", run.params)
        assert {name: back.tags[name] for name in run.tags if name != "mlflow.user"}.items() >= {
            **{name: run.tags[name] for name in ("step", "overrides", "code_sha256", "threads", "hardware", "torch")},
            **{name: run.tags[name] for name in ("git_commit", "git_dirty", *TARGETS, "reported_best_test_accuracy")},
        }.items()
        assert back.metrics.keys() == run.metrics.keys()
        for metric, points in run.metrics.items():
            assert back.metrics[metric] == [(step, pytest.approx(value, rel=1e-3)) for step, value in points], metric
        assert (back.tags["restored"], back.tags["verdict_params"]) == ("c0ffee0123", "met")

    said, back_again = (
        results.predictions(results.run_table("step2_dropout", 2, tracking_uri=uri)["run_id"][0], tracking_uri=uri)
        for uri in (published.uri, restored)
    )
    wrong = said["truth"] != said["prediction"]
    assert wrong.sum() == 65
    assert back_again[["truth", "prediction"]].equals(said[["truth", "prediction"]])
    assert np.allclose(back_again["confidence"][wrong], said["confidence"][wrong], atol=1e-4)
    assert back_again["confidence"][~wrong].isna().all()

    files.export_runs(tmp_path / "again", tracking_uri=restored)
    assert csvs(tmp_path / "again") == csvs(published.folder)
    table = results.run_table(include_overrides=True, tracking_uri=restored).set_index("step")["restored"]
    assert table.drop("mine").eq("c0ffee0").all()
    assert table.isna()["mine"]


def test_runs_stand_under_the_study_of_their_step(restored: str) -> None:
    runs = by_name(restored)
    parent = runs["step2_dropout 3 seeds"]
    children = {name for name, run in runs.items() if run.tags.get(PARENT) == parent.run_id}
    assert children == {f"step2_dropout seed {seed}" for seed in range(3)}
    assert (parent.status, parent.tags["study"], parent.tags["seeds"]) == ("FINISHED", "step2_dropout", "0 1 2")
    assert parent.metrics["final_test_accuracy_mean"] == [(0, pytest.approx(99.34))]
    assert parent.tags["verdict_accuracy"] == "missed"
    assert "seed" not in parent.params
    assert "| 99.34 |" in " ".join(parent.tags["mlflow.note.content"].split())
    assert (parent.artifacts / "verdict.md").read_text() == parent.tags["mlflow.note.content"] + "\n"
    assert {file.name for file in (parent.artifacts / "figures").iterdir()} == {"training.png"}
    assert PARENT not in runs["idea seed 5"].tags


def test_the_committed_csvs_are_read_and_written_byte_for_byte() -> None:
    for file, text in files.files_of(COMMITTED, RESULTS, {*COMMITTED.runs["step"]}, {}).items():
        assert file.read_text() == text, file


@pytest.mark.long
def test_the_committed_runs_of_all_steps_are_restored(uri: str) -> None:
    done = quietly(RESULTS, tracking_uri=uri)
    seeds = COMMITTED.runs["step"].value_counts()
    assert done == Restored(len(COMMITTED.runs), (seeds > 1).sum(), there=0)
    assert results.compare_table(tracking_uri=uri).set_index("step")["seeds"].to_dict() == seeds.to_dict()


# ---- a second call


def test_a_second_call_adds_nothing(published: Published, restored: str, lab: Callable[..., str]) -> None:
    for uri in (restored, published.uri):
        before = content(uri)
        said = lab("restore", "--folder", published.folder, "--tracking-uri", uri)
        assert "Restored: 0 runs, 0 studies over them; there already: 7." in said
        assert content(uri) == before


def test_other_files_replace_what_was_restored(published: Published, restored: str, tmp_path: Path) -> None:
    shutil.copytree(database_of(restored).parent, tmp_path / "store")
    other = f"sqlite:///{tmp_path}/store/mlflow.db"
    folder = shutil.copytree(published.folder, tmp_path / "results")
    file = folder / "step2_dropout.csv"
    file.write_text(file.read_text().replace("2.15.0", "2.16.0", 1))
    assert quietly(folder, tracking_uri=other) == Restored(7, 2, there=0)
    table = results.run_table(columns="all", include_overrides=True, tracking_uri=other)
    assert len(table) == 8
    torch_of = table.set_index(["step", "seed"])["torch"]["step2_dropout"]
    assert torch_of.to_dict() == {0: "2.16.0", 1: "2.15.0", 2: "2.15.0"}


def test_a_killed_call_goes_on(published: Published, uri: str, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    log_once = tracking.TrackedRun.log_once

    def killed(run: tracking.TrackedRun, metrics: Mapping[str, float]) -> None:
        if metrics.get("final_test_accuracy") == 99.32:  # the third run, in a study
            begun.append(run.run_id)
            raise KeyboardInterrupt
        log_once(run, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(tracking.TrackedRun, "log_once", killed)
        with pytest.raises(KeyboardInterrupt):
            quietly(published.folder, tracking_uri=uri)
    mlflow.MlflowClient(uri).update_run(*begun, status="RUNNING")  # as after kill -9

    assert quietly(published.folder, tracking_uri=uri) == Restored(7, 2, there=0)

    store = open_store(uri)
    not_deleted = {run.info.run_id for run in store.client.search_runs([store.experiment_id])}
    there = [run for run in read_runs(database) if run.run_id in not_deleted]
    whole = {run.name: run for run in there}
    assert len(whole) == len(there) == 9
    assert {run.status for run in there} == {"FINISHED"}
    for name, run in by_name(published.uri).items():
        now, was = ({metric: len(points) for metric, points in one.metrics.items()} for one in (whole[name], run))
        assert now == was
    parents = {whole[f"step1_baseline seed {seed}"].tags[PARENT] for seed in range(3)}
    assert parents == {whole["step1_baseline 3 seeds"].run_id}


def test_two_calls_at_once_are_not_mixed(published: Published, uri: str, database: Path) -> None:
    lock = database.parent / "locks" / "restore.lock"
    lock.parent.mkdir()
    with FileLock(lock), pytest.raises(LabError, match="^another process is restoring runs into .*; wait until"):
        quietly(published.folder, tracking_uri=uri)
    with pytest.raises(LabError, match="^folder: .* has no CSVs of runs$"):
        quietly(database.parent, tracking_uri=uri)
    assert read_runs(database) == []


# ---- a study that goes on from restored seeds


def test_a_study_goes_on_from_restored_seeds_and_their_rows_stay(
    new_store: Callable[[], Store], uri: str, tmp_path: Path, mnist: Mnist, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, place = Path(shutil.copy(TINY, tmp_path / "quick.py")), new_place(new_store().uri, tmp_path / "first")
    monkeypatch.setattr(runner, "load_mnist", lambda *_: first(mnist, 1000, 10_000))
    for slow in ("log_model", "log_figures"):  # and not what is looked at here
        monkeypatch.setattr(tracking.TrackedRun, slow, lambda *_: None)

    def train(seeds: Sequence[int], uri: str) -> None:
        experiment = replace(read_declaration(script), epochs=1)
        job = Job(script=script, experiment=experiment, tracking_uri=uri, threads=1)
        study(job, seeds, Progress(), Trainers())

    train([0], place.uri)
    assert len(place.publish()) == 1
    for name in ("quick", "epochs", "mistakes"):  # seed 1 was as seed 0
        file = place.folder / f"{name}.csv"
        table = pd.read_csv(file, dtype="str", keep_default_na=False)
        file.write_text(to_csv(pd.concat([table, table.assign(seed="1")])))
    settings = place.folder / "settings.csv"
    settings.write_text(settings.read_text().replace("quick,0,", "quick,0-1,"))
    assert quietly(place.folder, tracking_uri=uri) == Restored(2, 1, there=0)
    before = {name: text.splitlines() for name, text in csvs(place.folder).items()}

    train([0, 1, 2], uri)

    runs = by_name(uri)
    assert [name for name, run in runs.items() if "restored" not in run.tags] == ["quick 3 seeds", "quick seed 2"]
    parent = runs["quick 3 seeds"]
    assert parent.tags["seeds_reused"] == "0 1"
    assert {runs[f"quick seed {seed}"].tags[PARENT] for seed in range(3)} == {parent.run_id}
    assert quietly(place.folder, tracking_uri=uri) == Restored(0, 0, there=2)
    assert {run.tags.get(PARENT) for run in by_name(uri).values()} == {None, parent.run_id}

    (change,) = replace(place, uri=uri).publish()
    assert change.startswith("quick seed 2: added, ")
    after = {name: text.splitlines() for name, text in csvs(place.folder).items()}
    for name in ("quick.csv", "epochs.csv", "mistakes.csv"):
        assert after[name][: len(before[name])] == before[name]
        assert len(after[name]) > len(before[name])
    assert after["settings.csv"] == [line.replace(",0-1,", ",0-2,") for line in before["settings.csv"]]


# ---- what is refused


def cell(column: str, value: str) -> Callable[[str], str]:
    def spoil(text: str) -> str:
        table = pd.read_csv(io.StringIO(text), dtype="str", keep_default_na=False)
        table.loc[0, column] = value
        return to_csv(table)

    return spoil


def twice(text: str) -> str:
    return text + text.splitlines()[-1] + "\n"


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
        *(("idea", cell("date", f"{year}-12-31 23:59"), f"row 2, date: '{year}") for year in (1900, 9999)),
        ("idea", lambda text: text.replace(",99.", ",0.99"), "its last accuracy, 0.99"),
        ("epochs", lambda text: text.replace(",99.", ",0.99"), "its last or best is not"),
        ("idea", cell("best", "99.00"), "last accuracy 99.36 is above"),
        ("idea", cell("best_epoch", "7"), "its best_epoch 7"),
        ("idea", lambda text: text.replace("date", "day"), "row 1: the column 'date'"),
        ("idea", lambda text: text.rpartition(",")[0] + "\n", "row 2: it has 18 cells, not 19"),
        ("idea", twice, "row 3, seed: 5 is there twice"),
        ("epochs", without_last_row, "idea seed 5: it has other epochs than 1 to 2"),
        ("settings", None, "step1_baseline seed 0: it has no params"),
        ("settings", lambda text: text.replace("param,epochs,", "param,epochs,1"), "seed 0: .*, those of another"),
        ("idea", cell("best_epoch", "1"), "its best_epoch 1 is not 2"),
        ("settings", cell("seeds", "0-99999999999"), "row 2, seeds: .* 99999999999"),
        ("settings", cell("seeds", "all"), "row 2, seeds: 'all'"),
        ("settings", lambda text: text.replace("code_sha256,", "code_sha256,f"), "seed 0: .* tags of other code"),
        ("settings", twice, "is there twice"),
        ("mistakes", cell("image", "10000"), "row 2, image: '10000'"),
        ("mistakes", without_last_row, "idea seed 5: it got 64 images wrong"),
        ("mistakes", lambda text: text + "\xff", "no CSV in UTF-8"),
    ],
)
def test_files_that_are_not_the_labs_are_refused_by_file_row_and_column(
    published: Published, uri: str, tmp_path: Path, name: str, spoil: Callable[[str], str] | None, where: str
) -> None:
    folder = shutil.copytree(published.folder, tmp_path / "spoiled")
    file = folder / f"{name}.csv"
    if spoil is None:
        file.unlink()
    else:
        file.write_bytes(spoil(file.read_text()).encode("latin-1"))
    with pytest.raises(LabError, match=rf"{name}\.csv[:,] .*{where}"):
        quietly(folder, tracking_uri=uri)
    assert read_runs(database_of(uri)) == []
