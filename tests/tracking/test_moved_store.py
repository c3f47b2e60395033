"""Stores whose folder was renamed, moved or copied: what is in them is found where it is now."""

import shutil
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow import MlflowClient
from mlflow.tracking._tracking_service import utils
from torch import nn

from helpers import ROOT, copy_store
from mnist_lab import results
from mnist_lab.running import checkpoint
from mnist_lab.running.checkpoint import Checkpoint
from mnist_lab.tracking.connection import environment_variables
from mnist_lab.tracking.run import track
from mnist_lab.tracking.sqlite import follow_move
from mnist_lab.tracking.store import open_store
from mnist_lab.training.loop import EpochMetrics

NAMES = ["renamed", "mit Leerzeichen und ünïcödé #1"]


# ---- a real run


def check_found(project: Path, run_id: str) -> None:
    utils._artifact_repos_cache.clear()  # each move is followed by a program of its own
    uri = f"sqlite:///{project}/mlruns/mlflow.db"
    assert results.predictions(run_id, tracking_uri=uri)["prediction"].tolist() == list(range(10))
    client = MlflowClient(uri)
    assert {"figures", "predictions.npz"} <= {artifact.path for artifact in client.list_artifacts(run_id)}
    here = (project / "mlruns" / "artifacts").as_uri()
    run = client.get_run(run_id)
    assert run.info.artifact_uri == f"{here}/{run_id}/artifacts"
    (model,) = client.search_logged_models([run.info.experiment_id])
    assert model.artifact_location == f"{here}/models/{model.model_id}/artifacts"
    assert client.get_experiment(run.info.experiment_id).artifact_location == here
    with environment_variables({"MLFLOW_TRACKING_URI": uri}):
        net = mlflow.pytorch.load_model(f"runs:/{run_id}/{run.data.tags['step']}")
    assert net(torch.zeros(3, 1, 28, 28)).shape == (3, 10)


def test_a_project_that_was_moved_and_copied_shows_every_runs_artifacts(empty_store: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    store = open_store(f"sqlite:///{copy_store(empty_store, project / 'mlruns' / 'mlflow.db')}")
    with track(store, "step9 seed 0", params={"seed": 0}, tags={"step": "step9"}) as run:
        run.log_text("hello", "figures/hello.txt")
        run.log_predictions(torch.arange(10), torch.eye(10))
        net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
        assert run.log_model("step9", net, torch.zeros(2, 1, 28, 28), (0, 1)) is None
        run_id = run.run_id
    for name in NAMES:
        project = project.rename(project.with_name(name))
        check_found(project, run_id)
    project = project.rename(project.with_name("on the way")).rename(project.with_name("twice"))  # unseen between
    copy = project.with_name("copy")
    shutil.copytree(project, copy)
    check_found(copy, run_id)  # though the paths in it lead to the other one, which is there
    check_found(project, run_id)


# ---- what is changed, and what is not


TABLES = """
    CREATE TABLE experiments (name TEXT, artifact_location TEXT);
    CREATE TABLE runs (artifact_uri TEXT);
    CREATE TABLE logged_models (artifact_location TEXT);
    CREATE TABLE model_versions (source TEXT, storage_location TEXT);
"""


def places(folder: Path, location: str, runs: list[str]) -> list[str]:
    """Return where `mnist` and its runs are in a database with these places, once it is asked whether it was moved."""
    folder.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(folder / "mlflow.db")) as connection, connection:
        connection.executescript(TABLES)
        connection.execute("INSERT INTO experiments VALUES ('mnist', ?), ('of others', 'file:///x')", (location,))
        for table in ("runs VALUES (?)", "logged_models VALUES (?)", "model_versions VALUES (?, NULL)"):
            connection.executemany(f"INSERT INTO {table}", [(one,) for one in runs])
        connection.commit()
        for _ in range(2):  # the second time changes nothing
            follow_move(f"sqlite:///{folder}/mlflow.db")
        kept = connection.execute("SELECT artifact_uri FROM runs").fetchall()
        assert connection.execute("SELECT artifact_location FROM logged_models").fetchall() == kept
        assert connection.execute("SELECT source FROM model_versions").fetchall() == kept
        (mnist,), other = connection.execute("SELECT artifact_location FROM experiments").fetchall()
        assert other == ("file:///x",)
    return [mnist, *(one for (one,) in kept)]


def test_paths_inside_the_folder_are_corrected_and_no_others(tmp_path: Path) -> None:
    old, new = tmp_path / "alt #1 ü" / "artifacts", tmp_path / "new #2 é" / "artifacts"
    beside = [old.with_name("artifacts2").as_uri() + "/r3", "mlflow-artifacts:/r4", "s3://bucket/artifacts", "./rel"]
    (new / "r2").mkdir(parents=True)

    found = places(new.parent, old.as_uri(), [f"{old.as_uri()}/r1", f"{old.as_uri()}/r2", *beside])

    assert found == [new.as_uri(), f"{new.as_uri()}/r1", f"{new.as_uri()}/r2", *beside]


@pytest.mark.parametrize(
    "case", ["nothing beside it", "others' artifacts beside it", "a server's", "a folder of the user's", "no runs"]
)
def test_what_was_not_moved_with_its_artifacts_is_left_alone(case: str, tmp_path: Path) -> None:
    old, new = (tmp_path / name / "artifacts" for name in ("old", "new"))
    location = {"a server's": "mlflow-artifacts:/1", "a folder of the user's": str(tmp_path / "big disk")}
    runs = [f"{old.as_uri()}/r1"] * (case != "no runs")  # without any, it keeps its artifacts beside it
    if case != "nothing beside it":
        (new / "something").mkdir(parents=True)
    if case in ("others' artifacts beside it", "no runs"):
        (old / "r1").mkdir(parents=True)

    stays = location.get(case, old.as_uri())
    assert places(new.parent, stays, runs) == ([new.as_uri()] if case == "no runs" else [stays, *runs])


# ---- an interrupted run


def test_an_interrupted_run_finds_the_script_of_its_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri, step = f"sqlite:///{tmp_path}/mlruns/mlflow.db", Path("experiments", "step1_baseline.py")
    epoch = EpochMetrics(1, 0.5, 1, 1, 0.5, 1, 1, lr=0.1, epoch_seconds=1.0)
    kept = Checkpoint("abc", str(ROOT / step), 0, {}, None, 0, {}, 1, [epoch], {})
    checkpoint.save(kept, uri)
    assert checkpoint.find(uri).script == str(ROOT / step)

    monkeypatch.setattr(checkpoint, "PROJECT_ROOT", tmp_path / "moved")

    assert checkpoint.find(uri).script == str(tmp_path / "moved" / step)
    checkpoint.save(Checkpoint(**{**vars(kept), "script": "/elsewhere/idea.py"}), uri)
    assert checkpoint.find(uri).script == "/elsewhere/idea.py"


# ---- its environment


@pytest.mark.parametrize(("made_in", "kept"), [("{here}", True), ("/elsewhere", False), ("", True)])
def test_an_environment_that_was_moved_is_made_anew(made_in: str, kept: bool, tmp_path: Path) -> None:
    project = tmp_path / "a project"
    (project / ".venv").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, project)
    (project / ".venv" / "python").touch()
    (project / ".venv" / ".installed").write_text(made_in.format(here=project) + "\n" * bool(made_in))
    uv = tmp_path / "uv"
    uv.write_text("#!/bin/sh\nmkdir -p .venv\n")
    uv.chmod(0o755)

    for _ in range(2):
        subprocess.run(["make", "--silent", "setup", f"UV={uv}"], cwd=project, check=True)

    assert (project / ".venv" / "python").exists() == kept
    assert (project / ".venv" / ".installed").read_text().strip() in (str(project), made_in)
