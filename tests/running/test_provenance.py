"""Where a run comes from: real repositories made by git, and this machine."""

import os
import platform
import subprocess
from pathlib import Path

import mlflow
import pytest
import torch

from mnist_lab.running import provenance
from mnist_lab.running.provenance import Commit, commit, environment, hardware

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_settings_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("GIT_")]:  # set where a git hook runs the tests
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
    (tmp_path / "gitconfig").write_text("[user]\n\tname = A\n\temail = a@example.org\n")


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True
    ).stdout.rstrip("\n")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Return a repository with one commit: experiments/idea.py, notes.txt and an ignored folder."""
    root = tmp_path / "repository"
    (root / "experiments").mkdir(parents=True)
    (root / "experiments" / "idea.py").write_text("EPOCHS = 14\n")
    (root / "notes.txt").write_text("one\ntwo\n")
    (root / ".gitignore").write_text("runs/\n")
    git(root, "init", "--quiet")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "First")
    (root / "runs").mkdir()
    (root / "runs" / "mlflow.db").write_text("ignored")
    return root


def files(root: Path) -> dict[str, str]:
    names = git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    return {name: (root / name).read_text() for name in names if name and (root / name).exists()}


def test_a_clean_repository(repository: Path) -> None:
    state = commit(repository / "experiments" / "idea.py")

    assert state == Commit(git(repository, "rev-parse", "HEAD"), False, "")
    assert state.tags == {"git_commit": state.sha, "git_dirty": "false"}


LIKED = "[color]\n\tui = always\n[diff]\n\texternal = echo\n\tnoprefix = true\n\trelative = true"


@pytest.mark.parametrize("setting", ["", LIKED], ids=["plain", "liked"])
def test_the_diff_makes_the_same_files_of_the_commit(setting: str, repository: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", str(repository), str(clone))
    (repository / "experiments" / "idea.py").write_text("EPOCHS = 7\n")
    (repository / "notes.txt").unlink()
    new = [f"experiments/{name}" for name in ("new.py", "with space.py", "ünïcödé.py", 'quote"d.py', "tab\there.py")]
    for name in new:
        (repository / name).write_text(f"NAME = {name!r}\n")
    (repository / "staged.py").write_text("STAGED = True\n")
    git(repository, "add", "staged.py")
    before = git(repository, "status", "--porcelain")
    with (tmp_path / "gitconfig").open("a") as config:
        config.write(setting)

    state = commit(repository / "experiments" / "idea.py")

    assert (state.sha, state.dirty) == (git(clone, "rev-parse", "HEAD"), True)
    subprocess.run(["git", "-C", str(clone), "apply"], input=state.diff, text=True, check=True)
    assert files(clone) == files(repository)
    assert set(new) < set(files(clone))
    (tmp_path / "gitconfig").unlink()
    assert git(repository, "status", "--porcelain") == before


def test_before_the_first_commit_all_is_a_change(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    (tmp_path / "idea.py").write_text("EPOCHS = 1\n")

    state = commit(tmp_path / "idea.py")

    assert (state.sha, state.dirty) == ("none", True)
    assert "+EPOCHS = 1" in state.diff


def test_no_repository(tmp_path: Path) -> None:
    assert commit(tmp_path / "idea.py") == Commit("none", False, "")


@pytest.mark.parametrize("fault", ["another user's", "no git", "a damaged index"])
def test_where_git_refuses_the_state_is_unknown_and_that_is_said_once(
    fault: str, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if fault == "another user's":
        monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    elif fault == "no git":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        (repository / ".git" / "index").write_bytes(b"damaged")

    for _ in range(2):
        state = commit(repository / "experiments" / "idea.py")

    assert state == Commit("unknown", None, "")
    assert state.tags == {"git_commit": "unknown", "git_dirty": "unknown"}
    assert len(caplog.records) == 1
    assert fault != "another user's" or "dubious ownership" in caplog.text
    assert commit(tmp_path / "idea.py") == Commit("none", False, "")


# ---- what is left out of the diff


def test_what_the_lab_writes_and_fetches_is_no_change(repository: Path) -> None:
    script, store = repository / "experiments" / "idea.py", repository / "experiments" / "store"
    (store / "artifacts" / "1").mkdir(parents=True)
    (store / "mlflow.db").write_text("runs")
    (store / "artifacts" / "1" / "uncommitted.diff").write_text("earlier")
    written = [store / "mlflow.db", store / "mlflow.db-wal", store / "artifacts"]
    assert commit(script, written) == Commit(git(repository, "rev-parse", "HEAD"), False, "")

    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "--message", "A store by mistake")
    (store / "artifacts" / "1" / "uncommitted.diff").write_text("changed")
    (repository / "notes.txt").write_text("other\n")
    state = commit(script, [*written, repository, repository.parent])  # a folder around the script hides no change

    assert state.dirty
    assert "b/notes.txt" in state.diff
    assert "uncommitted.diff" not in state.diff


def test_new_files_elsewhere_and_links_are_changes_but_only_named(repository: Path, tmp_path: Path) -> None:
    names = ["stray.py", "other/mlflow.db", "experiments/deep/er.py"]
    for name in names:
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text("hunter2\n")
    (tmp_path / "private").write_text("hunter2\n")
    (repository / "experiments" / "innocent.txt").symlink_to(tmp_path / "private")

    state = commit(repository / "experiments" / "idea.py")

    assert state.dirty
    assert "hunter2" not in state.diff
    assert all(f"{name!r}" in state.diff for name in [*names, "experiments/innocent.txt"])


@pytest.mark.parametrize("name", [".env", "server.pem", "ID_RSA.bak", "client_secret.txt", "Passwords/a.txt"])
@pytest.mark.parametrize("tracked", [True, False])
def test_keys_and_passwords_are_left_out_by_name(tracked: bool, name: str, repository: Path) -> None:
    file = repository / "experiments" / name
    file.parent.mkdir(exist_ok=True)
    if tracked:
        file.write_text("old\n")
        git(repository, "add", "--all", "--force")
        git(repository, "commit", "--quiet", "--message", "By mistake")
    file.write_text("hunter2\n")
    (repository / "notes.txt").write_text("other\n")

    state = commit(repository / "experiments" / "idea.py")

    assert state.dirty
    assert "hunter2" not in state.diff
    assert "+other" in state.diff
    assert f"'experiments/{name}'\n" in state.diff.splitlines(keepends=True)[0]


def test_a_large_diff_is_cut_by_files_and_still_applies(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", str(repository), str(clone))
    monkeypatch.setattr(provenance, "MAX_DIFF", 2_000)
    (repository / "notes.txt").write_text("a long line of a large file\n" * 100)
    (repository / "experiments" / "huge.txt").write_text("a long line of a large file\n" * 100)
    (repository / "experiments" / "idea.py").write_text("EPOCHS = 7\n")

    state = commit(repository / "experiments" / "idea.py")

    assert len(state.diff) < 2_300
    assert all(name in state.diff for name in ("experiments/huge.txt", "notes.txt"))
    subprocess.run(["git", "-C", str(clone), "apply"], input=state.diff, text=True, check=True)
    assert (clone / "experiments" / "idea.py").read_text() == "EPOCHS = 7\n"


# ---- versions and hardware


def test_the_versions_are_those_in_use() -> None:
    versions = environment(CPU)

    assert versions["python"] == platform.python_version()
    assert versions["torch"] == torch.__version__.partition("+")[0] or versions["torch"] == torch.__version__
    assert versions["mlflow"] == mlflow.__version__
    assert versions["threads"] == str(torch.get_num_threads())
    assert versions["cuda"] == "none"
    assert versions["hardware"] == hardware(CPU)
    assert {"torchvision", "numpy", "pandas", "matplotlib", "os"} < versions.keys()


def test_the_cpu_is_named_with_its_cores_and_the_vector_instructions_that_torch_uses() -> None:
    name, cores, instructions = hardware(CPU).rsplit(", ", 2)

    assert cores == f"{os.cpu_count()} cores"
    assert len(name) > 3
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        cpuinfo = Path("/proc/cpuinfo").read_text()
        assert f": {name}\n" in cpuinfo
        assert instructions == ("AVX512" if "avx512f" in cpuinfo else "AVX2" if "avx2" in cpuinfo else "DEFAULT")
