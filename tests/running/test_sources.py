"""Which code a run was computed by: the script, what it imports, and the lab's recipe, in one digest."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mnist_lab.running import sources
from mnist_lab.running.sources import code_sha256, find_sources

# Puts the lab's recipe in the place of its training, which needs torch, and prints the digest of the script.
ON_ANOTHER_PYTHON = """
import sys, types
from pathlib import Path
lab, training = types.ModuleType("mnist_lab"), types.ModuleType("mnist_lab.training")
lab.__path__, training.RECIPE = [{lab!r}], {recipe}
running = types.ModuleType("mnist_lab.running")
running.__path__ = [{lab!r} + "/running"]
sys.modules.update({{"mnist_lab": lab, "mnist_lab.training": training, "mnist_lab.running": running}})
from mnist_lab.running.sources import code_sha256, find_sources
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
    """Return a script whose network lies in a package and a module beside it."""
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
        "script": "idea.py",
        "nets": "nets/__init__.py",
        "nets.deep": "nets/deep.py",
        "nets.blocks": "nets/blocks.py",
        "nets.sizes": "nets/sizes.py",
        "tricks": "tricks.py",
        "late": "late.py",
    }


def test_a_change_in_any_source_is_another_digest_and_one_elsewhere_is_not(script: Path, tmp_path: Path) -> None:
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


def test_a_package_without_init_and_a_module_outside_the_folder_count(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (script.parent / "nets" / "__init__.py").unlink()
    (tmp_path / "far").mkdir()
    (script.parent / "tricks.py").rename(tmp_path / "far" / "tricks.py")
    monkeypatch.syspath_prepend(str(tmp_path / "far"))

    found = find_sources(script)

    assert {"nets.deep", "nets.sizes", "tricks"} < found.keys()
    assert "nets" not in found


def test_comments_docstrings_and_layout_do_not_count(tmp_path: Path) -> None:
    def of(text: str) -> str:
        script = tmp_path / "step.py"
        script.write_text(text)
        return digest(script)

    declared = of('"""Result: not known."""\n\n\nclass Net:\n    lr = 0.1\n')

    assert of('"""Result: 99.4 %."""\n\nclass Net:\n    """A network."""\n    lr = (0.1)  # high\n') == declared
    assert of('"""Result: not known."""\n\n\nclass Net:\n    lr = 0.2\n') != declared
    assert len(declared) == 64


def test_the_recipe_counts(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(script)
    monkeypatch.setattr(sources, "RECIPE", sources.RECIPE + 1)

    assert digest(script) != before


def test_what_the_running_script_loads_by_other_means_counts_too(script: Path) -> None:
    program = "\n".join(
        [
            "import importlib, sys",
            "from pathlib import Path",
            "sys.path.insert(0, str(Path(__file__).parent / 'far'))",
            "net = importlib.import_module('far' + '_net')  # a name that no reader of the text can know",
            "from mnist_lab.running.sources import find_sources",
            "print(sorted(find_sources(Path(__file__))))",
        ]
    )
    script.write_text(program)
    (script.parent / "far").mkdir()
    (script.parent / "far" / "far_net.py").write_text("WIDTH = 1\n")

    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)

    assert done.stdout.splitlines() == ["['far_net', 'script']"]


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_the_digest_is_the_same_on_every_supported_python(version: str, script: Path) -> None:
    script.write_text(script.read_text() + ODD_SCRIPT)
    program = ON_ANOTHER_PYTHON.format(recipe=sources.RECIPE, lab=str(sources.LAB), script=str(script))
    python = _find_python(version)
    if python is None:
        pytest.skip(f"there is no Python {version} on this machine")

    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == digest(script)


def _find_python(version: str) -> str | None:
    """Return a Python of that version that works: this one, one on PATH, or one that pyenv keeps."""
    if version == "{}.{}".format(*sys.version_info[:2]):
        return sys.executable
    kept = sorted(Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(f"versions/{version}*/bin/python"))
    for python in [shutil.which(f"python{version}"), *map(str, kept)]:
        if python and subprocess.run([python, "-c", ""], capture_output=True).returncode == 0:
            return python
    return None


def test_a_space_to_search_in_does_not_count(tmp_path: Path) -> None:
    plain, searched = tmp_path / "plain.py", tmp_path / "searched.py"
    plain.write_text("from mnist_lab import main\n\nLR = 0.1\nmain(LR)\n")
    searched.write_text(
        "import optuna\nfrom mnist_lab import main\nfrom optuna.distributions import FloatDistribution\n\n"
        'LR = 0.1\nSPACE = {"lr": FloatDistribution(0.1, 0.2)}\nmain(LR, search=SPACE)\n'
    )
    assert digest(plain) == digest(searched)
    searched.write_text(searched.read_text().replace("LR = 0.1", "LR = 0.2"))
    assert digest(plain) != digest(searched)
