"""What comes from elsewhere, files and names, runs no code and stays in its folder."""

import argparse
import ast
import json
import os
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pytest

from helpers import ROOT
from mnist_lab import __main__ as jobs
from mnist_lab import results
from mnist_lab.errors import LabError
from mnist_lab.results import evidence
from mnist_lab.running import checkpoint
from mnist_lab.running.checkpoint import Checkpoint
from mnist_lab.tracking.store import open_store
from mnist_lab.training.loop import EpochMetrics
from pages import PAGE, T0
from run_writer import write_run

UNSAFE = {"eval", "exec", "read_pickle", "unsafe_load"}
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}


# ---- what the repository loads


def sources() -> Iterator[tuple[str, str]]:
    """Yield the name and the text of each program of the repository, cells of notebooks included."""
    for folder in ("mnist_lab", "experiments", "docs", "benchmarks"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            yield str(file.relative_to(ROOT)), file.read_text()
    for file in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for number, cell in enumerate(json.loads(file.read_text())["cells"]):
            if cell["cell_type"] == "code":
                lines = [line for line in cell["source"] if not line.startswith(("%", "!"))]
                yield f"{file.name}[{number}]", "".join(lines)


def unsafe_loads(text: str) -> list[str]:
    """Return the calls that may run what they load."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        given = {argument.arg: getattr(argument.value, "value", None) for argument in node.keywords}
        match ast.unparse(node.func).split("."):
            case ["torch", "load"] if given.get("weights_only") is not True:
                found.append(ast.unparse(node))
            case ["np" | "numpy", "load"] if given.get("allow_pickle", False) is not False:
                found.append(ast.unparse(node))
            case [module, *_, "load" | "loads" | "Unpickler"] if module in UNSAFE_MODULES:
                found.append(ast.unparse(node))
            case [*owner, name] if name in UNSAFE and (not owner or name not in ("eval", "exec")):
                found.append(ast.unparse(node))
            case [*_, "load_model"]:
                found.append(ast.unparse(node))
    return found


def test_every_file_is_loaded_without_running_what_is_in_it() -> None:
    assert {name: found for name, text in sources() if (found := unsafe_loads(text))} == {}


# ---- files from elsewhere


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.mark,)


def test_predictions_that_would_run_code_are_refused(uri: str, tmp_path: Path) -> None:
    store = open_store(uri)
    run = write_run(store, "step1", 0, [98.0], start_time=T0)
    mark, file = tmp_path / "code ran", tmp_path / "predictions.npz"
    np.savez(file, truth=np.arange(1), prediction=np.arange(1), logits=np.array([Evil(mark)], dtype=object))
    mlflow.MlflowClient(uri).log_artifact(run.info.run_id, str(file))

    with pytest.raises(LabError, match=f"^run {run.info.run_id}: its predictions.npz can't be read: .*allow_pickle"):
        results.predictions(run.info.run_id, tracking_uri=uri)

    assert not mark.exists()
    np.load(file, allow_pickle=True)["logits"]
    assert mark.exists()  # else the file would prove nothing


def save(uri: str, run_id: str, script: str) -> None:
    epoch = EpochMetrics(1, 0.5, 1, 1, 0.5, 1, 1, 0.1, 1.0)
    checkpoint.save(Checkpoint(run_id, script, 0, {}, None, None, {}, 1, [epoch], {}), uri)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Return the programs that `resume` becomes, which it only names here."""
    started: list[list[str]] = []
    monkeypatch.setattr(jobs.os, "execv", lambda program, arguments: started.append(arguments))
    return started


@pytest.mark.parametrize("place", ["elsewhere", "store in the project", "in experiments", "link", "shell"])
def test_resume_starts_nothing_but_the_experiments(
    place: str, tmp_path: Path, started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "project"
    monkeypatch.setattr(jobs, "PROJECT_ROOT", project)
    (project / "experiments").mkdir(parents=True)
    script = {
        "store in the project": project / "mlruns" / "idea.py",
        "in experiments": project / "experiments" / "theirs" / "idea.py",
        "link": project / "experiments" / "idea.py",
        "shell": project / "experiments" / "idea.sh",
    }.get(place, tmp_path / "idea.py")
    script.parent.mkdir(exist_ok=True)
    if place == "link":
        (tmp_path / "outside.py").touch()
        script.symlink_to(tmp_path / "outside.py")
    script.touch()
    uri = f"sqlite:///{script.parent}/mlflow.db"
    save(uri, "abc", str(script))

    with pytest.raises(LabError) as refusal:
        jobs.resume(argparse.Namespace(tracking_uri=uri, run_id=None))

    assert refusal.value.field == "resume"
    assert started == []


def test_resume_starts_an_experiment_of_the_project_without_its_password_in_the_command_line(
    tmp_path: Path, started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mnist_lab.paths.PROJECT_ROOT", tmp_path)
    uri, step = "http://bob:pass-word@127.0.0.1:9", str(ROOT / "experiments" / "step1_baseline.py")
    save(uri, "abc", step)

    jobs.resume(argparse.Namespace(tracking_uri=uri, run_id="abc"))

    assert [arguments[1:4] for arguments in started] == [[step, "--resume", "abc"]]
    assert "pass-word" not in " ".join(started[0])
    assert os.environ["MLFLOW_TRACKING_URI"] == uri


def test_a_checkpoint_that_names_another_file_is_left_out(uri: str, tmp_path: Path) -> None:
    save(uri, "abc", "/a.py")
    valuable = checkpoint.file_of(uri, "../valuable")
    checkpoint.file_of(uri, "../valuable").touch()
    poisoned = checkpoint.file_of(uri, "abc")
    save(uri, "../poisoned", "/a.py")
    checkpoint.file_of(uri, "../poisoned").replace(poisoned)

    with pytest.raises(LabError, match="can't be read: it is named after another run than its own, '../poisoned'"):
        checkpoint.load(poisoned)
    checkpoint.remove_alike(uri, {}, 0)

    assert valuable.exists()
    assert poisoned.exists()


# ---- names from a store


@pytest.mark.parametrize("step", ["../outside", "/outside", "<script>alert(1)</script>", "epochs"])
def test_a_step_that_is_no_file_name_is_not_exported(step: str, uri: str, tmp_path: Path) -> None:
    write_run(open_store(uri), step, 0, [99.0], start_time=T0)
    (tmp_path / "README.md").write_text(PAGE)

    with pytest.raises(LabError, match="^step: .* can't name a file of figures"):
        evidence.export_runs(tmp_path / "results", tracking_uri=uri)

    assert not (tmp_path / "results").exists()
    assert (tmp_path / "README.md").read_text() == PAGE


def test_what_a_store_says_of_a_run_is_text_in_the_tables(uri: str, tmp_path: Path) -> None:
    hostile = {name: f"<img src=x onerror={name}> | b" for name in ("hardware", "torch", "code_sha256", "git_commit")}
    write_run(open_store(uri), "step1", 0, [99.0], start_time=T0, tags=hostile)
    folder = tmp_path / "results"
    folder.mkdir()
    for page in (tmp_path / "README.md", folder / "README.md"):
        page.write_text(f"{PAGE}<!-- runs -->\n<!-- /runs -->\n")

    evidence.prepare_publication(folder, tmp_path / "README.md", tracking_uri=uri).write()

    page = (folder / "README.md").read_text()
    assert "&lt;img src=x onerror=hardware&gt; \\| b" in page
    assert "<img" not in page
