"""The first page: its programs run as they are written, and its figures and commands are those of the project."""

import csv
import re
import statistics
import subprocess
from pathlib import Path

import pytest

from forkserver import run_program
from helpers import ROOT, read_runs
from mnist_lab.console import verdict_table
from mnist_lab.experiment import Targets
from mnist_lab.verdicts.targets import judge

PAGE = (ROOT / "README.md").read_text()
RESULTS = ROOT / "docs" / "results"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
PROGRAMS = [text for language, text in BLOCKS if language == "python"]
PLAIN = [text for language, text in BLOCKS if not language]


def rows_of(step: str) -> list[dict[str, str]]:
    with (RESULTS / f"{step}.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_it_is_short() -> None:
    without_table = re.sub(r"<!-- summary -->.*<!-- /summary -->", "", PAGE, flags=re.DOTALL)  # which grows
    assert len(without_table.split()) < 900


def test_the_declaration_is_that_of_step_8() -> None:
    assert PROGRAMS[0] in (ROOT / "experiments" / "step8_averaging.py").read_text()


def test_the_first_command_ends_as_the_committed_run_of_seed_0_did() -> None:
    (seed_0,) = (row for row in rows_of("step8_averaging") if row["seed"] == "0")
    verdicts = judge(
        Targets(accuracy=99.4, params=10_000, epochs=15),
        accuracies=[float(seed_0["last"])],
        num_params=int(seed_0["num_params"]),
        epochs=int(seed_0["epochs"]),
    )
    assert PLAIN[1].strip() == verdict_table(verdicts)


def test_the_first_command_takes_as_long_as_is_said() -> None:
    minutes = statistics.median(float(row["minutes"]) for row in rows_of("step8_averaging"))
    (said,) = re.findall(r"meets all targets: about (\d+) minutes on two cores", PAGE)
    assert int(said) == pytest.approx(minutes + 1, abs=1)  # the set-up takes one


def test_the_experiment_of_ones_own_runs_as_it_is_written(tmp_path: Path) -> None:
    script, database = tmp_path / "my_idea.py", tmp_path / "store" / "mlflow.db"
    script.write_text(PROGRAMS[1])
    flags = ["--limit", "4000", "--epochs", "1", "--tracking-uri", f"sqlite:///{database}"]
    done = run_program(script, *flags, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    (run,) = read_runs(database)
    assert (run.status, run.tags["step"]) == ("FINISHED", "my_idea")
    assert run.metrics["num_params"][-1][1] < 10_000


def test_every_command_is_there() -> None:
    targets = set(re.findall(r"make ([a-z_]+\d?)", "\n".join(PLAIN))) - {"my_idea"}
    assert {"step8", "draw", "steps", "compare", "report", "predict", "test", "help"} <= targets
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [name for name in sorted(targets) if not re.search(rf"^  {name} ", shown, flags=re.MULTILINE)] == []
    flags = set(re.findall(r"--[a-z-]+", "\n".join(PLAIN)))
    assert {"--limit", "--holdout", "--folds", "--search"} <= flags
    assert "SEEDS=10" in PAGE


def test_every_file_that_is_linked_is_there() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", PAGE)
    assert len(links) > 8
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_prose_has_no_figure_that_no_table_holds() -> None:
    """Measured figures stand in the table, which is made of the CSVs, or in the verdict, which is compared above."""
    without_table = re.sub(r"<!-- summary -->.*<!-- /summary -->", "", PAGE, flags=re.DOTALL)
    prose = re.sub(r"^```.*?^```$", "", without_table, flags=re.DOTALL | re.MULTILINE)
    assert set(re.findall(r"\d+\.\d+", prose)) <= {"99.4", "3.11", "3.13", "0.01"}
