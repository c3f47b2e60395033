"""What comes from elsewhere, files and names, runs no code and stays in its folder."""

import os
import re
from pathlib import Path

import pytest

from helpers import ROOT
from mnist_lab import __main__ as jobs
from mnist_lab.errors import LabError
from mnist_lab.results import publish as files
from mnist_lab.running import checkpoint
from mnist_lab.running.identity import code_sha256, find_sources
from mnist_lab.tracking.store import open_store
from networks import example
from run_writer import PAGE, T0, write_run

# What may run what it loads; `eval`, `exec` and pickle's own functions are the linter's to find (S102, S301, S307).
UNSAFE = re.compile(
    r"torch\.load\((?!.*weights_only=True)|allow_pickle=True|\bload_model\(|\bunsafe_load\(|\bread_pickle\(|"
    r"\b(dill|joblib|shelve|cloudpickle)\.(load|open|Unpickler)"
)


def test_every_file_is_loaded_without_running_what_is_in_it() -> None:
    folders = ("mnist_lab", "experiments", "docs", "benchmarks", "notebooks")
    files = [file for folder in folders for end in ("py", "ipynb") for file in (ROOT / folder).rglob(f"*.{end}")]

    assert {str(file): found[0] for file in files if (found := UNSAFE.search(file.read_text()))} == {}
    assert UNSAFE.search("torch.load(file)")  # else it would find nothing


# ---- files from elsewhere


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Return the programs that `resume` becomes, which it only names here."""
    started: list[list[str]] = []
    monkeypatch.setattr(jobs.os, "execv", lambda program, arguments: started.append(arguments))
    return started


@pytest.mark.parametrize("place", ["..", "mlruns", "experiments/theirs", "experiments/link.py", "experiments/idea.sh"])
def test_resume_starts_nothing_but_the_experiments(
    place: str, tmp_path: Path, started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "project"
    monkeypatch.setattr(jobs, "PROJECT_ROOT", project)
    script = project / place if Path(place).suffix else project / place / "idea.py"
    script.parent.mkdir(parents=True, exist_ok=True)
    if place == "experiments/link.py":
        script.symlink_to(tmp_path / "outside.py")
    script.touch()
    uri = f"sqlite:///{script.parent}/mlflow.db"
    checkpoint.save(example(script=str(script)), uri)

    with pytest.raises(LabError) as refusal:
        jobs.resume(tracking_uri=uri, run_id=None)

    assert refusal.value.field == "resume"
    assert started == []


def test_resume_hides_the_password(tmp_path: Path, started: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mnist_lab.paths.PROJECT_ROOT", tmp_path)
    monkeypatch.setattr("mnist_lab.tracking.store.is_deleted", lambda *_: False)
    uri, script = "http://bob:pass-word@127.0.0.1:9", ROOT / "experiments" / "step1_baseline.py"
    step, code = str(script), {"code_sha256": code_sha256(find_sources(script))}
    checkpoint.save(example(script=step, identity=code), uri)

    jobs.resume(tracking_uri=uri, run_id="abc")

    assert [arguments[1:4] for arguments in started] == [[step, "--resume", "abc"]]
    assert "pass-word" not in " ".join(started[0])
    assert os.environ["MLFLOW_TRACKING_URI"] == uri


def test_resume_passes_over_a_run_whose_script_has_changed_and_names_the_others(
    uri: str, started: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr("mnist_lab.tracking.store.is_deleted", lambda *_: False)
    script = ROOT / "experiments" / "step1_baseline.py"
    known, gone = code_sha256(find_sources(script)), script.with_stem("gone")
    runs = [("a", script, known), ("b", script, known), ("c", script, "another"), ("d", gone, known)]
    for seed, (run_id, file, code) in enumerate(runs):
        one = example(run_id, script=str(file), seed=seed, changes={}, limit=2_000, identity={"code_sha256": code})
        checkpoint.save(one, uri)
        os.utime(checkpoint.file_of(uri, run_id), (seed, seed))

    jobs.resume(tracking_uri=uri, run_id=None)

    assert [arguments[2:4] for arguments in started] == [["--resume", "b"]]
    printed = capsys.readouterr().out
    assert "Interrupted too: a (step1_baseline seed 0 limit=2000)" in printed
    assert "Left out: c (step1_baseline seed 2 limit=2000) can't go on: step1_baseline.py " in printed
    assert f"Left out: d (gone seed 3 limit=2000) can't go on: {gone} is not there" in printed


def test_a_checkpoint_that_names_another_file_is_left_out(uri: str, tmp_path: Path) -> None:
    checkpoint.save(example(), uri)
    valuable = checkpoint.file_of(uri, "../valuable")
    checkpoint.file_of(uri, "../valuable").touch()
    poisoned = checkpoint.file_of(uri, "abc")
    checkpoint.save(example("../poisoned"), uri)
    checkpoint.file_of(uri, "../poisoned").replace(poisoned)

    with pytest.raises(LabError, match="can't be read: it is named after another run than its own, '../poisoned'"):
        checkpoint.load(poisoned)
    checkpoint.remove_alike(uri, {"lr": "0.1"}, 3)

    assert valuable.exists()
    assert poisoned.exists()


# ---- names from a store


@pytest.mark.parametrize("step", ["../outside", "/outside", "<script>alert(1)</script>", "epochs"])
def test_a_step_that_is_no_file_name_is_not_exported(step: str, uri: str, tmp_path: Path) -> None:
    write_run(open_store(uri), step, 0, [99.0], start_time=T0)
    (tmp_path / "README.md").write_text(PAGE)

    with pytest.raises(LabError, match="^step: .* can't name a file of figures"):
        files.export_runs(tmp_path / "results", tracking_uri=uri)

    assert not (tmp_path / "results").exists()
    assert (tmp_path / "README.md").read_text() == PAGE


def test_what_a_store_says_of_a_run_is_text_in_the_tables(uri: str, tmp_path: Path) -> None:
    hostile = {name: f"<img src=x onerror={name}> | b" for name in ("hardware", "torch", "code_sha256", "git_commit")}
    write_run(open_store(uri), "step1", 0, [99.0], start_time=T0, tags=hostile)
    folder = tmp_path / "results"
    folder.mkdir()
    for page in (tmp_path / "README.md", folder / "README.md"):
        page.write_text(f"{PAGE}<!-- runs -->\n<!-- /runs -->\n")

    files.publish(folder, tmp_path / "README.md", tracking_uri=uri)

    page = (folder / "README.md").read_text()
    assert "&lt;img src=x onerror=hardware&gt; \\| b" in page
    assert "<img" not in page
