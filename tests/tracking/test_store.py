"""Which store is meant, whether it can be read, files that are replaced, and a store that was moved or copied."""

import os
import shutil
import sqlite3
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow import MlflowClient
from mlflow.tracking._tracking_service import utils
from torch import nn

from helpers import ROOT, copy_store, largest_file
from mnist_lab import results
from mnist_lab.errors import LabError, without_password
from mnist_lab.paths import tracking_uri
from mnist_lab.running import checkpoint
from mnist_lab.tracking.connection import environment_variables
from mnist_lab.tracking.run import track
from mnist_lab.tracking.sqlite import follow_move
from mnist_lab.tracking.store import open_store, replace_files
from networks import example

DEFAULT = f"sqlite:///{ROOT}/mlruns/mlflow.db"


# ---- which store


@pytest.mark.parametrize(
    ("given", "environment", "uri"),
    [
        ("sqlite:////a/given.db", "sqlite:////b/environment.db", "sqlite:////a/given.db"),
        (None, "sqlite:////b/environment.db", "sqlite:////b/environment.db"),
        (None, None, DEFAULT),
        (None, "", DEFAULT),
        ("", None, DEFAULT),
        ("http://127.0.0.1:5000", None, "http://127.0.0.1:5000"),
        (None, "https://runs.example", "https://runs.example"),
        ("sqlite:///a/runs.db", None, "sqlite:///{here}/a/runs.db"),  # absolute at once
    ],
)
def test_the_argument_comes_before_the_environment_and_that_before_the_project(
    given: str | None, environment: str | None, uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    if environment is not None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", environment)

    assert tracking_uri(given) == uri.format(here=tmp_path)


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///", "sqlite:runs.db", "/a/100%25/runs.db", "/a/what?/runs.db"])
def test_a_uri_without_a_file_or_that_mlflow_would_read_as_another_is_refused(uri: str) -> None:
    with pytest.raises(LabError, match=r"^tracking store"):
        tracking_uri(uri if uri.startswith("sqlite") else f"sqlite:///{uri}")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://bob:se-cret@host/runs", "postgresql://bob:***@host/runs"),
        ("postgresql://host/runs?user=bob&password=se-cret", "postgresql://host/runs?user=bob&password=***"),
        ("mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BPWD%3Dse-cret", "mssql+pyodbc:///?odbc_connect=***"),
        ("http://bob:se-cret@127.0.0.1:5000", "http://bob:***@127.0.0.1:5000"),
        ("https://se-cret@runs.example", "https://***@runs.example"),
        ("HTTP://bob:se-cret@host", "HTTP://bob:***@host"),
        ("postgresql://bob@host/runs", "postgresql://bob@host/runs"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("sqlite:////home/a@b:c/mlflow.db", "sqlite:////home/a@b:c/mlflow.db"),
        ("not 'postgresql://b:se-cret@a' nor http://c:se-cret@d", "not 'postgresql://b:***@a' nor http://c:***@d"),
    ],
)
def test_a_password_is_not_shown(text: str, shown: str) -> None:
    assert without_password(text) == shown


@pytest.mark.parametrize(
    "uri", ["postgresql://bob:se@cret@h/x", "http://bob:se/cret@h", "mysql://bob:se cret@h/x", 'http://b:s"e@h']
)
def test_a_password_that_a_uri_cannot_hold_is_refused_and_not_shown(uri: str) -> None:
    with pytest.raises(LabError, match=r"^tracking store \w+://\.\.\.: write .* as %XX, e.g. %40 for @") as refusal:
        tracking_uri(uri)

    assert "cret" not in str(refusal.value)


# ---- files that are replaced

ASCII_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_files_are_written_with_their_folders(tmp_path: Path) -> None:
    old, new = tmp_path / "old.md", tmp_path / "a" / "b" / "new.png"
    old.write_text("old")
    old.chmod(0o604)
    (tmp_path / "link").symlink_to("old.md")
    replace_files({tmp_path / "link": "Ärger – 99,4 %\n", new: b"\x89PNG"})
    assert (tmp_path / "link").is_symlink()
    assert old.read_bytes() == "Ärger – 99,4 %\n".encode()
    assert new.read_bytes() == b"\x89PNG"
    assert stat.S_IMODE(old.stat().st_mode) == 0o604
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "link", "new.png", "old.md"]


def test_where_one_of_the_files_has_no_room_all_are_as_they_were(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for file in (first, second):
        file.write_text("old")
    with largest_file(1000), pytest.raises(LabError, match=f"{second} can't be written: File too large"):
        replace_files({first: "new", second: "new" * 1000})
    with pytest.raises(LabError, match="can't be written: File name too long"):
        replace_files({first: "new", tmp_path / ("a" * 255): "new"})
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == ["old", "old"]


def test_text_is_utf_8_in_an_ascii_locale(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from mnist_lab.tracking.store import replace_files
replace_files({Path(sys.argv[1], "a"): "\\u2013 \\u00b1"})
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=os.environ | ASCII_LOCALE, check=True)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ["– ±".encode()]


# ---- a store that was moved

NAMES = ["renamed", "mit Leerzeichen und ünïcödé #1"]


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


def test_an_interrupted_run_finds_the_script_of_its_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri, step = f"sqlite:///{tmp_path}/mlruns/mlflow.db", Path("experiments", "step1_baseline.py")
    checkpoint.save(example(script=str(ROOT / step)), uri)
    assert checkpoint.find(uri).script == str(ROOT / step)

    monkeypatch.setattr(checkpoint, "PROJECT_ROOT", tmp_path / "moved")

    assert checkpoint.find(uri).script == str(tmp_path / "moved" / step)
    checkpoint.save(example(script="/elsewhere/idea.py"), uri)
    assert checkpoint.find(uri).script == "/elsewhere/idea.py"


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
