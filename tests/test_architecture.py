"""What import-linter can't hold: the scripts, which are not a package, and the layout of the project."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from mnist_lab.__main__ import JOBS

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "experiments").glob("*.py"))
MODULES = sorted((ROOT / "mnist_lab").rglob("*.py"))


def imported_modules(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_step_imports_no_other_script_and_an_ablation_only_its_step(script: Path) -> None:
    imported = imported_modules(script) & ({other.stem for other in SCRIPTS} | {"experiments"})
    if re.match(r"step\d", script.stem):
        assert not imported
    else:
        assert len(imported) <= 1
        assert all(re.match(r"step\d", name) for name in imported)


def test_the_lab_imports_no_script() -> None:
    scripts = {script.stem for script in SCRIPTS} | {"experiments"}
    assert [module for module in MODULES if imported_modules(module) & scripts] == []


def test_no_address_stands_in_the_lock() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    assert "--hash=sha256:" in lock
    assert "://" not in lock
    assert not re.search(r"^--", lock, flags=re.MULTILINE)  # pip's options, those that name an index among them


def test_the_design_explains_every_wing_and_module() -> None:
    design = (ROOT / "docs" / "design.md").read_text()
    rooms = [module.stem for module in MODULES if module.name != "__init__.py"]
    wings = [folder.name for folder in (ROOT / "mnist_lab").iterdir() if (folder / "__init__.py").exists()]
    assert [name for name in [*wings, *rooms] if not re.search(rf"^ *{name}\b", design, flags=re.MULTILINE)] == []


def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^\.PHONY: ([a-z-]+)$", makefile, flags=re.MULTILINE)
    help_text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    steps = [script.stem for script in SCRIPTS if not script.stem.startswith("step")]
    assert {*JOBS.choices, "setup", "steps", "test", "lint", "clean"} <= set(targets)
    for name in [*targets, "step1", "step2", "step3", "step4", *steps]:
        assert re.search(rf"^  {name} +\S", help_text, flags=re.MULTILINE), name


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("step99", "make: there is no experiments/step99.py and no experiments/step99_*.py: see make help"),
        ("step", "make: step needs its number, e.g. make step1; make help lists them"),
        ("a.b", "make: there is no experiments/a.b.py, and no target a.b: make help lists both"),
        ("N_SEEDS=3", "*** N_SEEDS: there are ARGS, SEEDS, STEP and IMAGE"),
        ("docs", "*** docs: it is a folder"),
    ],
)
def test_make_names_what_is_not_there(target: str, said: str) -> None:
    done = subprocess.run(["make", target, "INSTALLED="], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[0]


def test_each_promise_of_reliability_names_tests_that_are_there() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text()
    promises = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| promise |")]
    files = {file.name: file.read_text() for file in (ROOT / "tests").rglob("test_*.py")}
    assert len(promises) > 40
    for promise in promises:
        named = re.findall(r"`(test_\w+\.py)(?:::(\w+?)(_\.\.\.)?)?`", promise)
        assert named, promise
        for file, test, shortened in named:
            ending = r"_\w+" if shortened else ""
            assert re.search(rf"^def {test}{ending}\(" if test else "", files[file], re.MULTILINE), (file, test)
