"""What import-linter can't hold: the scripts, which are not a package, and the layout of the project."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "experiments").glob("*.py"))
MODULES = sorted((ROOT / "mnist_lab").glob("*.py"))


def imported_modules(file: Path) -> set[str]:
    """Return the top-level names of all modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_imports_no_other_script(script: Path) -> None:
    others = {other.stem for other in SCRIPTS} | {"experiments"}
    assert not imported_modules(script) & others


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.stem)
def test_the_lab_imports_no_script(module: Path) -> None:
    assert not imported_modules(module) & ({script.stem for script in SCRIPTS} | {"experiments"})


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.splitlines()]


def test_no_address_stands_in_the_lock() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    assert "--hash=sha256:" in lock
    assert "://" not in lock
    assert not re.search(r"^--", lock, flags=re.MULTILINE)  # pip's options, those that name an index among them


def test_the_readme_lists_every_file_of_the_lab() -> None:
    readme = (ROOT / "README.md").read_text()
    shown = {"mnist_lab", "experiments", "docs", "notebooks", "benchmarks"}
    files = [file for file in tracked_files() if file.relative_to(ROOT).parts[0] in shown and file.suffix != ".png"]
    assert [str(file.relative_to(ROOT)) for file in files if file.name not in readme] == []


def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^\.PHONY: ([a-z-]+)$", makefile, flags=re.MULTILINE)
    help_text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    steps = [script.stem for script in SCRIPTS if not script.stem.startswith("step")]
    wanted = "setup data steps resume sync compare export report notebooks lab ui test test-long lint format clean"
    assert set(wanted.split()) <= set(targets)
    for name in [*targets, "step1", "step2", "step3", "step4", *steps]:
        assert re.search(rf"^  {name} +\S", help_text, flags=re.MULTILINE), name


def test_make_names_a_step_that_is_not_there() -> None:
    done = subprocess.run(["make", "step99", "INSTALLED="], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "experiments/step99" in done.stderr
