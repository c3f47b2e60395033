"""What a run is of: the code in one digest, the state of a real repository, and this machine."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import torch

from mnist_lab.running import identity
from mnist_lab.running.identity import code_sha256, commit_tags, environment, find_sources

# Puts empty modules in the place of the lab's training and of libraries, and prints the digest of the script.
ON_ANOTHER_PYTHON = """
import sys, types
from pathlib import Path
names = ["mnist_lab", "mnist_lab.training", "mnist_lab.running", "torch", "git"]
modules = {{name: types.ModuleType(name) for name in names}}
modules["mnist_lab"].__path__, modules["mnist_lab.running"].__path__ = [{lab!r}], [{lab!r} + "/running"]
modules["mnist_lab.training"].RECIPE = {recipe}
modules["git"].GitError = modules["git"].InvalidGitRepositoryError = modules["git"].Repo = Exception
sys.modules.update(modules)
from mnist_lab.running.identity import code_sha256, find_sources
print(code_sha256(find_sources(Path({script!r}))))
"""
# What the syntax trees of Python 3.11 to 3.13 differ in, among others: f-strings, empty lists, type parameters.
ODD_SCRIPT = '''
"""A script."""
import torch
width, text = 3, "abc"
shown = f"{text!r:>{width}}" f"a{text}" "b" f"{text:}" f"{width=}" rf"\\d{text}"
def f(a, /, b: int = 3, *c, d=4, **e):
    """Return None."""
class Net:
    "A network."
    async def g(self):
        async with self as b, self as c:
            pass
        match self:
            case {"a": 1, **rest}:
                return -1 + 1e999 + 2j
            case [1, *_] | None:
                return lambda *a, k=1: (yield)
'''


def digest(script: Path) -> str:
    return code_sha256(find_sources(script))


@pytest.fixture
def script(tmp_path: Path) -> Path:
    files = {
        "idea.py": "import math\nimport torch\nfrom nets.deep import Net\nimport tricks\n\nLR = 0.1\n",
        "nets/__init__.py": "",
        "nets/deep.py": "from . import blocks\nfrom .sizes import WIDTH\n\nclass Net:\n    width = WIDTH\n",
        "nets/blocks.py": "BLOCKS = 3\n",
        "nets/sizes.py": "WIDTH = 8\n",
        "nets/unused.py": "WIDTH = 9\n",
        "tricks.py": "def warm_up(epoch):\n    import late\n    return late.FACTOR\n",
        "late.py": "FACTOR = 0.5\n",
        "other.py": "LR = 0.2\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path / "idea.py"


def test_the_sources_are_what_the_script_imports_wherever_the_import_stands(script: Path) -> None:
    found = {name: file.relative_to(script.parent).as_posix() for name, file in find_sources(script).items()}
    assert found == {
        **{"script": "idea.py", "tricks": "tricks.py", "late": "late.py", "nets": "nets/__init__.py"},
        **{f"nets.{name}": f"nets/{name}.py" for name in ("deep", "blocks", "sizes")},
    }


def test_a_change_of_any_source_changes_it(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(script)
    for name in ("idea.py", "nets/__init__.py", "nets/blocks.py", "nets/sizes.py", "late.py", "other.py"):
        file = script.parent / name
        text = file.read_text()
        file.write_text(text + "CHANGED = True\n")
        assert (digest(script) == before) == (name == "other.py"), name
        file.write_text(text)

    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(script.parent, elsewhere, ignore=shutil.ignore_patterns("elsewhere"))
    assert digest(elsewhere / "idea.py") == before
    monkeypatch.setattr(identity, "RECIPE", identity.RECIPE + 1)
    assert digest(script) != before


def test_modules_outside_the_folder_count(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (script.parent / "nets" / "__init__.py").unlink()
    (tmp_path / "far").mkdir()
    (script.parent / "tricks.py").rename(tmp_path / "far" / "tricks.py")
    monkeypatch.syspath_prepend(str(tmp_path / "far"))

    assert find_sources(script).keys() == {"script", "nets.deep", "nets.blocks", "nets.sizes", "tricks", "late"}


def test_comments_docstrings_layout_and_a_space_to_search_in_do_not_count(tmp_path: Path) -> None:
    def of(text: str) -> str:
        (tmp_path / "step.py").write_text(text)
        return digest(tmp_path / "step.py")

    declared = of('"""Result: not known."""\n\n\nclass Net:\n    lr = 0.1\n')
    assert of('"""Result: 99.4 %."""\n\nclass Net:\n    """A network."""\n    lr = (0.1)  # high\n') == declared
    assert of('"""Result: not known."""\n\n\nclass Net:\n    lr = 0.2\n') != declared
    assert len(declared) == 64

    plain = "from mnist_lab import main\n\nLR = 0.1\nmain(LR)\n"
    searched = (
        "import optuna\nfrom mnist_lab import main\nfrom optuna.distributions import FloatDistribution\n\n"
        'LR = 0.1\nSPACE = {"lr": FloatDistribution(0.1, 0.2)}\nmain(LR, search=SPACE)\n'
    )
    assert of(plain) == of(searched) != of(searched.replace("LR = 0.1", "LR = 0.2"))


def test_what_the_running_script_loads_by_other_means_counts_too(script: Path) -> None:
    script.write_text("""
import importlib, sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent / "far"))
net = importlib.import_module("far" + "_net")  # a name that no reader of the text can know
from mnist_lab.running.identity import find_sources
print(sorted(find_sources(Path(__file__))))
""")
    (script.parent / "far").mkdir()
    (script.parent / "far" / "far_net.py").write_text("WIDTH = 1\n")

    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)

    assert done.stdout.splitlines() == ["['far_net', 'script']"]


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_the_digest_is_that_of_every_python(version: str, script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script.write_text(script.read_text() + ODD_SCRIPT)
    program = ON_ANOTHER_PYTHON.format(recipe=identity.RECIPE, lab=str(identity.LAB), script=str(script))
    monkeypatch.setenv("PYENV_VERSION", version)  # pyenv's programs refuse to start another
    if subprocess.run(f"python{version} -c ''", shell=True, capture_output=True).returncode != 0:  # noqa: S602
        pytest.skip(f"there is no Python {version} on this machine")

    done = subprocess.run([f"python{version}", "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == digest(script)


# ---- where it comes from


def git(folder: Path, *arguments: str) -> str:
    return subprocess.check_output(["git", "-C", str(folder), *arguments], text=True).rstrip("\n")


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return a repository with one commit: experiments/idea.py, notes.txt, and an ignored folder."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:  # set where a git hook runs the tests
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
    (tmp_path / "gitconfig").write_text("[user]\n\tname = A\n\temail = a@example.org\n")
    root = tmp_path / "repository"
    for name, text in {"experiments/idea.py": "EPOCHS = 14\n", "notes.txt": "one\n", ".gitignore": "runs/\n"}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    git(root, "init", "--quiet")
    git(root, "add", "--all", "--force")
    git(root, "commit", "--quiet", "--message", "First")
    (root / "runs").mkdir()
    (root / "runs" / "mlflow.db").write_text("ignored")
    return root


def tags(commit: str, dirty: str) -> dict[str, str]:
    return {"git_commit": commit, "git_dirty": dirty}


def test_the_commit_and_whether_any_file_differs_from_it(repository: Path, tmp_path: Path) -> None:
    script, commit = repository / "experiments" / "idea.py", git(repository, "rev-parse", "HEAD")
    assert commit_tags(script) == tags(commit, "false")
    (repository / "new.py").touch()
    assert commit_tags(script) == tags(commit, "true")
    (repository / "new.py").unlink()
    (repository / "notes.txt").write_text("other\n")
    assert commit_tags(script) == tags(commit, "true")

    assert commit_tags(tmp_path / "idea.py") == tags("none", "false")
    git(tmp_path, "init", "--quiet")
    assert commit_tags(tmp_path / "idea.py") == tags("none", "true")  # before the first commit


@pytest.mark.parametrize("fault", ["another user's", "no git"])
def test_where_git_refuses_the_state_is_unknown_and_that_is_said(
    fault: str, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if fault == "another user's":
        monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    else:
        monkeypatch.setenv("PATH", str(tmp_path))

    assert commit_tags(repository / "experiments" / "idea.py") == tags("unknown", "unknown")
    assert "recorded as unknown" in caplog.text


def test_what_the_lab_writes_and_fetches_is_no_change(repository: Path) -> None:
    script, store = repository / "experiments" / "idea.py", repository / "experiments" / "store"
    (store / "artifacts").mkdir(parents=True)
    (store / "mlflow.db").write_text("runs")
    written = [store / "mlflow.db", store / "artifacts"]
    commit = git(repository, "rev-parse", "HEAD")
    assert commit_tags(script, written) == tags(commit, "false")
    (repository / "notes.txt").write_text("other\n")
    # A folder around the script hides no change.
    assert commit_tags(script, [*written, repository, repository.parent]) == tags(commit, "true")


def test_versions_and_hardware_are_those_in_use() -> None:
    versions = environment(torch.device("cpu"))
    assert (versions["python"], versions["mlflow"]) == (platform.python_version(), mlflow.__version__)
    name, cores, instructions = versions["hardware"].rsplit(", ", 2)
    assert cores == f"{os.cpu_count()} cores"
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        cpuinfo = Path("/proc/cpuinfo").read_text()
        assert f": {name}\n" in cpuinfo
        assert instructions == ("AVX512" if "avx512f" in cpuinfo else "AVX2" if "avx2" in cpuinfo else "DEFAULT")
