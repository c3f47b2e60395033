"""What a user types and sees: flags, refusals, signals, the terminal and its absence."""

import dataclasses
import io
import os
import re
import runpy
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
import torch

import tiny
from conftest import FullRun
from forkserver import SIGNALS, Program, run_program
from helpers import ROOT, TINY, Terminal, TrackedRun, copy_store, read_runs, wait_until
from mnist_lab.cli import main
from mnist_lab.commandline import interrupt_on_signals
from mnist_lab.console import StudyConsole, epoch_line, print_result
from mnist_lab.experiment import SUMMARY_METRICS
from mnist_lab.running.job import Job
from mnist_lab.training.loop import EpochMetrics
from mnist_lab.verdicts.measures import HELD_OUT

Load = Callable[[str], ModuleType]
STEP1 = ROOT / "experiments" / "step1_baseline.py"
BESIDE_THE_DATABASE = ("locks", "mlflow.db.lock", "mlflow.db-wal", "mlflow.db-shm")
STEP4 = ROOT / "experiments" / "step4_augment_steplr.py"


@pytest.fixture(autouse=True)
def _signal_handlers_are_put_back() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


# ---- not on a terminal


def test_the_epoch_is_one_plain_line(full_run: FullRun) -> None:
    (line,) = [line for line in full_run.stdout.splitlines() if line.startswith("epoch ")]

    assert re.fullmatch(
        r"epoch 1/1  train loss 0\.\d{4}, accuracy \d{5}/60000 \(\d\d\.\d\d%\)  "
        r"test loss 0\.\d{4}, accuracy 9\d{3}/10000 \(9\d\.\d\d%\)  lr 0\.01  \d+\.\d s",
        line,
    )
    correct, percent = re.findall(r"(\d+)/10000 \((\d\d\.\d\d)%\)", line)[0]
    assert int(correct) / 100 == float(percent)


def test_the_verdict_stands_beside_the_targets_and_the_reported_figures(full_run: FullRun) -> None:
    output = full_run.stdout
    accuracy = full_run.tracked.metrics["final_test_accuracy"][0][1]

    assert f"accuracy  at least 99.4 %    {accuracy:.2f} %     missed\n" in output
    assert "params    fewer than 10,000  10,970      missed\n" in output
    assert "epochs    fewer than 15      1           met\n" in output
    assert re.search(r"^best train accuracy +\d\d\.\d\d % +99\.75 %$", output, re.MULTILINE)
    assert re.search(rf"^best test accuracy +{accuracy:.2f} % +99\.29 %$", output, re.MULTILINE)
    assert re.search(rf"^final test accuracy +{accuracy:.2f} % +-$", output, re.MULTILINE)
    assert "Overridden (epochs=1): tagged so, and left out of the tables of results." in output
    assert f"MLflow run {full_run.tracked.run_id}" in output


def test_without_a_terminal_there_is_neither_bar_nor_summary(full_run: FullRun) -> None:
    output = full_run.stdout

    assert "\r" not in output
    assert "\x1b" not in output
    assert "images/s" not in output
    assert "Conv2d" not in output
    assert "Receptive field" not in output
    assert output.startswith("step1_baseline seed 3 [epochs=1]: 10,970 parameters, 60,000 training images, on ")
    assert full_run.stderr == ""


def test_nothing_is_left_in_the_current_folder(full_run: FullRun) -> None:
    folder = full_run.database.parent.parent

    assert [path.name for path in folder.iterdir()] == ["store"]
    names = {path.name for path in (folder / "store").iterdir()}
    assert {"mlflow.db", "artifacts"} < names <= {"mlflow.db", "artifacts", "checkpoints", *BESIDE_THE_DATABASE}
    assert list((folder / "store" / "checkpoints").iterdir()) == []  # the run has finished


def declared_by(script: Path, load_script: Load) -> Job:
    return Job(script=script, experiment=load_script(script.stem).EXPERIMENT, tracking_uri="sqlite:///none.db")


def test_without_targets_there_is_no_verdict(load_script: Load, capsys: pytest.CaptureFixture[str]) -> None:
    from mnist_lab.running.run import RunResult

    measured = dict.fromkeys(SUMMARY_METRICS, 99.0)
    print_result(RunResult("abc", [], measured, []), declared_by(STEP1, load_script))

    shown = capsys.readouterr().out
    assert "verdict" not in shown
    assert "Overridden" not in shown
    assert "best test accuracy    99.00 %     99.29 %" in shown
    assert "MLflow run abc;" in shown


def metrics(evaluated_on: Literal["test", "validation"]) -> EpochMetrics:
    return EpochMetrics(
        epoch=2,
        train_loss=0.5,
        train_correct=900,
        train_images=1000,
        eval_loss=0.25,
        eval_correct=470,
        eval_images=500,
        lr=0.1,
        epoch_seconds=1.5,
        evaluated_on=evaluated_on,
    )


@pytest.mark.parametrize("part", ["test", "validation"])
def test_an_epochs_line_says_what_it_was_evaluated_on(part: Literal["test", "validation"]) -> None:
    assert epoch_line(metrics(part), 14) == (
        "epoch  2/14  train loss 0.5000, accuracy 900/1000 (90.00%)  "
        f"{part} loss 0.2500, accuracy 470/500 (94.00%)  lr 0.1  1.5 s"
    )


def test_the_result_of_a_hold_out_says_validation(load_script: Load, capsys: pytest.CaptureFixture[str]) -> None:
    from mnist_lab.running.run import RunResult

    measured = dict.fromkeys((*SUMMARY_METRICS, "final_validation_accuracy", "best_validation_accuracy"), 99.0)
    print_result(RunResult("abc", [], measured, []), declared_by(STEP1, load_script))

    shown = capsys.readouterr().out
    assert "best validation accuracy" in shown
    assert "best test accuracy" not in shown
    assert "the test images were read once, at the end." in shown


# ---- the display of a study


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("missing", "workers", "device", "said"),
    [
        ([0, 1, 2], 2, "cpu", "training seeds 0, 1, 2, two at a time, on cpu"),
        ([7], 1, "cpu", "training seed 7, one at a time, on cpu"),
        ([*range(20)], 16, "cpu", "18, 19, up to 16 at a time, on cpu"),
        ([0, 1], 1, "cuda", "training seeds 0, 1, one after another, on cuda"),
    ],
)
def test_a_study_says_which_seeds_it_trains(
    missing: list[int], workers: int, device: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    StudyConsole(epochs=2).on_start("idea", missing, missing, workers, torch.device(device))
    assert capsys.readouterr().out.endswith(said + "\n")


@pytest.mark.parametrize(
    ("given", "command"),
    [
        ({}, "`make compare`"),
        ({"overrides": {"lr": 0.2}}, '`make compare ARGS="--include-overrides"`'),
        ({"limit": 100, "holdout": 500}, '`make compare ARGS="--include-overrides --holdout 500"`'),
        ({"holdout": 500}, '`make compare ARGS="--holdout 500"`'),
    ],
)
def test_the_end_of_a_run_names_the_comparison_that_has_it(
    given: dict[str, Any], command: str, load_script: Load, capsys: pytest.CaptureFixture[str]
) -> None:
    from mnist_lab.running.run import RunResult

    names = HELD_OUT.summary if "holdout" in given else SUMMARY_METRICS
    measured = dict.fromkeys(names, 1.0)
    print_result(RunResult("abc", [], measured, []), dataclasses.replace(declared_by(STEP1, load_script), **given))
    assert f"{command} sets it beside the others." in capsys.readouterr().out


def test_a_terminal_shows_one_bar_for_all_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "100")
    console = StudyConsole(epochs=2)
    done = {"final_test_accuracy": 99.1, "best_test_accuracy": 99.2, "best_epoch": 1.0}

    console.on_start("idea 3 seeds", [0, 1, 2], [1, 2], 2, torch.device("cpu"))
    first = dataclasses.replace(metrics("test"), epoch=1)
    console.on_epoch(1, first)
    console.on_epoch(1, first)  # a node was lost, and the seed began again elsewhere: not an epoch more
    console.on_epoch(1, metrics("test"))
    console.on_seed(1, done)
    console.on_time()
    console.on_failure(2, "bad luck")
    console.on_time()
    console.close()

    shown = screen.getvalue()
    assert "idea 3 seeds: finished already, and not trained again: 0\n" in shown
    assert "1/3 seeds   0%|" in shown
    assert re.search(r"2/3 seeds  50%\|[^|]*\| 2/4 epochs \[\d\d:\d\d, \d\d:\d\d left\]", shown)
    assert "seed 1  done: test accuracy 99.10 % in the last epoch; best test accuracy 99.20 % in epoch 1" in shown
    assert "seed 2  failed: bad luck" in shown
    assert "| 2/2 epochs" in shown  # those of the failed seed will not come
    assert "train loss" not in shown


# ---- what is refused, quickly and in one sentence


@pytest.fixture
def refused(
    load_script: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[Path, list[str]], str]:
    """Return what says how a command line is refused; it is given in this process, to save the imports."""

    def refused(script: Path, flags: list[str]) -> str:
        monkeypatch.setattr(sys, "argv", [str(script), *flags])
        with pytest.raises(SystemExit) as refusal:
            main(load_script(script.stem).EXPERIMENT)
        captured = capsys.readouterr()
        assert (refusal.value.code, captured.out) == (2 if "usage:" in captured.err else 1, "")
        return captured.err.splitlines()[-1]

    return refused


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            ["--set", "lrr=0.1"],
            r"lrr: not a hyperparameter of this experiment \(did you mean 'lr'\?\); declared are .*",
        ),
        (["--set", "lr=fast"], r"lr: 'fast' is not a finite number \(the declared value is 0\.1\)"),
        (["--set", "step_size=0.5"], r"step_size: '0\.5' is not a whole number \(the declared value is 2\)"),
        (["--set", "lr"], r"--set: 'lr' is not NAME=VALUE, e\.g\. lr=0\.05"),
        (["--set", "=0.1"], r"--set: '=0\.1' is not NAME=VALUE.*"),
        (["--set", "lr="], r"--set: 'lr=' is not NAME=VALUE.*"),
        (["--set", "optimizer=Adam"], r"optimizer: can't be set from the command line; copy the script .*"),
        (["--set", "lr=-1"], r"optimizer: .*-1.*"),
        (["--set", "dropout=2"], r"net: .*dropout probability.*"),
        (["--epochs", "-1"], r"epochs: -1 is not a whole number of at least 1"),
        (["--epochs", "0"], r"epochs: 0 is not a whole number of at least 1"),
        (["--batch-size", "0"], r"batch_size: 0 is not a whole number of at least 1"),
        (["--seed", str(2**32)], r"seed: 4294967296 is not between 0 and 4294967295"),
        (["--device", "tpu"], r"device: 'tpu' is not available here; available are .*cpu"),
        (["--limit", "70000"], r"limit: 70000 is not between 1 and 60,000, the number of training images"),
        (
            ["--holdout", "10000", "--limit", "50001"],
            r"limit: 50001 is not between 1 and 50,000, the number of training images",
        ),
        (["--holdout", "60000"], r"holdout: 60,000 is not between 1 and 59,999: it is taken from 60,000 images"),
        (["--holdout", "4"], r"holdout: 4 leaves no image of the digit \d in the held-out part"),
        (["--seeds", "4294967296,1"], r"seed: 4294967296 is not between 0 and 4294967295"),
        (["--seeds", "2", "--set", "lr=-1"], r"optimizer: .*-1.*"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_value_is_refused_by_its_name(
    flags: list[str], sentence: str, refused: Callable[[Path, list[str]], str], uri: str, database: Path
) -> None:
    said = refused(STEP4, [*flags, "--tracking-uri", uri])

    assert re.fullmatch(f"error: {sentence}", said)
    assert read_runs(database) == []


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--epochs", "x"], "argument --epochs: 'x' is not a whole number"),
        (["--batch-size", "1.5"], "argument --batch-size: '1.5' is not a whole number"),
        (["--seed", "-1"], "argument --seed: '-1' is not a whole number of at least 0"),
        (["--seed", "one"], "argument --seed: 'one' is not a whole number of at least 0"),
        (["--limit", "0"], "argument --limit: '0' is not a whole number of at least 1"),
        (["--limit", "1e3"], "argument --limit: '1e3' is not a whole number of at least 1"),
        (["--seeds", "0"], "argument --seeds: '0' is not a whole number of at least 1"),
        (["--seeds", "-3"], "argument --seeds: '-3' is not a whole number of at least 1"),
        (["--seeds", "many"], "argument --seeds: 'many' is not a whole number of at least 1"),
        (["--seeds", "10001"], "argument --seeds: 10,001 seeds are more than 10,000"),
        (["--seeds", "3,3"], "argument --seeds: the seed 3 is there twice in '3,3'"),
        (["--seeds", "3,-1"], "argument --seeds: '-1' is not a whole number of at least 0"),
        (["--seeds", "3,x"], "argument --seeds: 'x' is not a whole number of at least 0"),
        (["--seeds", "3,"], "argument --seeds: '' is not a whole number of at least 0"),
        (["--seeds", "3", "--seed", "1"], "argument --seed: not allowed with argument --seeds"),
        (["--seed", "0", "--seeds", "3"], "argument --seeds: not allowed with argument --seed"),
        (["--seeds", "3", "--workers", "0"], "argument --workers: '0' is not a whole number of at least 1"),
        (["--workers", "2"], "argument --workers: only allowed with --seeds or --search"),
        (["--again"], "argument --again: only allowed with --seeds or --search"),
        (["--holdout", "0"], "argument --holdout: '0' is not a whole number of at least 1"),
        (["--holdout", "-1"], "argument --holdout: '-1' is not a whole number of at least 1"),
        (["--learning-rate", "0.1"], "unrecognized arguments: --learning-rate 0.1"),
        (["--epochs"], "argument --epochs: expected one argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_line_that_makes_no_sense_is_refused_by_its_flag(
    flags: list[str], sentence: str, refused: Callable[[Path, list[str]], str], uri: str, database: Path
) -> None:
    said = refused(STEP4, ["--tracking-uri", uri, *flags])

    assert said == f"step4_augment_steplr.py: error: {sentence}"
    assert read_runs(database) == []


@pytest.mark.parametrize("place", ["a foreign database", "a text file", "a folder", "nowhere to write", "foo://x"])
def test_a_store_that_is_none_is_refused(place: str, refused: Callable[[Path, list[str]], str], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("my notes\n")
    with closing(sqlite3.connect(tmp_path / "photos.db")) as connection, connection:
        connection.execute("CREATE TABLE photos (name TEXT)")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    uri = {
        "a foreign database": f"sqlite:///{tmp_path}/photos.db",
        "a text file": f"sqlite:///{tmp_path}/notes.txt",
        "a folder": f"sqlite:///{tmp_path}",
        "nowhere to write": f"sqlite:///{tmp_path}/notes.txt/mlflow.db",
    }.get(place, place)

    said = refused(STEP1, ["--tracking-uri", uri])

    assert said.startswith("error: tracking store ")
    assert uri.removeprefix("sqlite:///") in said
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_argparse_can_judge_is_refused_before_anything_slow_is_imported(tmp_path: Path) -> None:
    flags = ["--seeds", "3,3", "--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db"]
    command = [sys.executable, "-X", "importtime", str(STEP1), *flags]

    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE))
    assert done.returncode == 2
    assert "argument --seeds: the seed 3 is there twice in '3,3'" in done.stderr
    assert "mnist_lab.console" in imported
    assert not imported & {"mlflow", "pandas", "matplotlib", "torchvision"}
    assert list(tmp_path.iterdir()) == []


def test_help_names_the_flags_and_the_declaration() -> None:
    done = subprocess.run([sys.executable, "-X", "importtime", STEP4, "--help"], capture_output=True, text=True)

    assert done.returncode == 0
    for shown in ("--seeds", "--holdout", "--set NAME=VALUE", "lr=0.1, momentum=0.9", "degrees=7.0"):
        assert shown in done.stdout
    assert "mnist_lab.console" in done.stderr
    assert not re.search(r"\| +(mlflow|pandas|matplotlib)$", done.stderr, re.MULTILINE)


def test_a_program_that_is_no_script_of_the_lab_keeps_its_flags(tmp_path: Path) -> None:
    program = tmp_path / "analysis.py"
    program.write_text("import mnist_lab, sys\nprint(sys.argv[1:])\n")

    done = subprocess.run([sys.executable, program, "--help", "-x"], capture_output=True, text=True)

    assert (done.returncode, done.stdout) == (0, "['--help', '-x']\n")


# ---- a wrong declaration in a script


NINE_LOGITS = "net: gives an output of shape (128, 9) for 128 images, not (128, 10): one logit per digit"
WRONG = {
    "epochs=14": {
        "epochs=-3": "epochs: -3 is not a whole number of at least 1",
    },
    "nn.Conv2d(10, 10, 7": {
        "nn.Conv2d(10, 9, 7": NINE_LOGITS,
    },
    "accuracy=99.4": {
        "accuracy=120": "targets.accuracy: 120 is not a percentage above 0 and up to 100",
    },
    "lr=0.01": {"learning_rate=0.01": "optimizer: .*unexpected keyword argument 'learning_rate'.*"},
}


def wrong_script(folder: Path, right: str, wrong: str) -> Path:
    source = STEP1.read_text()
    assert source.count(right) == 1
    script = folder / "my_idea.py"
    script.write_text(source.replace(right, wrong))
    return script


@pytest.mark.parametrize(
    ("right", "wrong", "sentence"),
    [(right, wrong, sentence) for right, wrongs in WRONG.items() for wrong, sentence in wrongs.items()],
)
def test_a_wrong_declaration_is_refused_before_any_training(
    right: str,
    wrong: str,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    uri: str,
    database: Path,
    tmp_path: Path,
) -> None:
    script = wrong_script(tmp_path, right, wrong)
    monkeypatch.setattr(sys, "argv", [str(script), "--tracking-uri", uri])

    with pytest.raises(SystemExit) as refusal:
        runpy.run_path(str(script), run_name="__main__")

    said = capsys.readouterr().err.removeprefix("error: ").removesuffix("\n")
    assert refusal.value.code == 1
    assert said == sentence or re.fullmatch(sentence, said)
    assert "\n" not in said
    assert read_runs(database) == []


def test_a_program_prints_one_sentence_and_no_traceback(uri: str, database: Path, tmp_path: Path) -> None:
    script = wrong_script(tmp_path, "nn.Conv2d(10, 10, 7", "nn.Conv2d(10, 9, 7")

    done = run_program(script, "--tracking-uri", uri, cwd=tmp_path)

    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: {NINE_LOGITS}\n")
    assert read_runs(database) == []


def test_a_misspelt_field_is_pythons_own_error_in_the_scripts_line(tmp_path: Path) -> None:
    script = wrong_script(tmp_path, "epochs=14", "epoch=14")

    with pytest.raises(TypeError, match="unexpected keyword argument 'epoch'") as error:
        runpy.run_path(str(script), run_name="__main__")

    assert any(entry.path == script for entry in error.traceback)


TWO_EXPERIMENTS = """
from dataclasses import replace

import step1_baseline
from step1_baseline import EXPERIMENT

from mnist_lab import main

main(EXPERIMENT)
main(replace(EXPERIMENT, batch_size=64))
"""


def test_a_script_that_calls_main_twice_is_refused_at_the_second_call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], uri: str, database: Path, tmp_path: Path
) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO_EXPERIMENTS)
    flags = ["--tracking-uri", uri, "--epochs", "1", "--limit", "128", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [str(script), *flags])
    monkeypatch.syspath_prepend(str(STEP1.parent))

    with pytest.raises(SystemExit) as refusal:
        runpy.run_path(str(script), run_name="__main__")

    assert refusal.value.code == 1
    assert capsys.readouterr().err.startswith("error: script: two.py calls main a second time; ")
    assert [run.status for run in read_runs(database)] == ["FINISHED"]


# ---- output that nobody reads


class Unwritable(io.StringIO):
    """What stdout is on a full disk, or where its reader has ended."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error
        self.file = tempfile.TemporaryFile("w")  # noqa: SIM115 - has the descriptor that is sent elsewhere

    def fileno(self) -> int:
        return self.file.fileno()

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (BrokenPipeError(32, "Broken pipe"), ""),
        (OSError(28, "No space left"), "The output can't be written: No space left. The run goes on without it.\n"),
    ],
)
def test_a_run_does_not_depend_on_who_reads_its_output(
    error: OSError,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    uri: str,
    database: Path,
) -> None:
    flags = ["--tracking-uri", uri, "--epochs", "1", "--limit", "128", "--device", "cpu", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", [str(TINY), *flags])
    monkeypatch.setattr(sys, "stdout", Unwritable(error))

    main(tiny.EXPERIMENT)

    assert [run.status for run in read_runs(database)] == ["FINISHED"]
    assert set(capsys.readouterr().err.splitlines(keepends=True)) == {said} - {""}


# ---- copied scripts that train: on a terminal, and until a signal comes


class Training:
    """A training of a user's own script that would go on for hours."""

    script = TINY

    def __init__(self, database: Path, ignored: tuple[signal.Signals, ...] = (), limit: int = 200) -> None:
        self.folder, self.database = database.parent, database
        shutil.copy(self.script, self.folder / "my_idea.py")
        flags = ["--epochs", "100000", "--limit", str(limit), "--tracking-uri", f"sqlite:///{database.name}"]
        self.process = self.start("my_idea.py", *flags, ignored=ignored)

    def start(self, *command: str, ignored: tuple[signal.Signals, ...]) -> Program:
        return Program(*command, cwd=self.folder, ignored=ignored)

    def epochs(self) -> int:
        runs = read_runs(self.database)
        return len(runs[0].metrics.get("test_loss", [])) if runs else 0

    def ended(self) -> TrackedRun:
        """Return the run as it stands after the process has ended."""
        self.process.wait()
        (run,) = read_runs(self.database)
        return run


class TrainingOnTerminal(Training):
    """One of a network of many layers, on a real terminal."""

    script = STEP1

    def start(self, *command: str, ignored: tuple[signal.Signals, ...]) -> Program:
        self.terminal = Terminal(*command, cwd=self.folder)
        return self.terminal.process


@pytest.fixture
def train(database: Path) -> Iterator[Callable[..., Training]]:
    """Return what starts a training in this test's own store and returns it after its first epoch."""
    started: list[Training] = []

    def start(ignored: tuple[signal.Signals, ...] = ()) -> Training:
        started.append(Training(database, ignored))
        wait_until(lambda: started[-1].epochs() >= 1, started[-1].process)
        return started[-1]

    yield start
    for training in started:
        training.process.kill()
        training.process.wait()


@pytest.fixture(scope="module")
def on_terminal(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingOnTerminal]:
    database = copy_store(empty_store, tmp_path_factory.mktemp("on_terminal") / "runs.db")
    training = TrainingOnTerminal(database, limit=3000)
    yield training
    training.terminal.hang_up()
    training.process.kill()
    training.process.wait()


@pytest.fixture(scope="module")
def shown(on_terminal: TrainingOnTerminal) -> str:
    """Return what a terminal shows until the second epoch is through."""
    wait_until(lambda: "\repoch      2/100000  " in on_terminal.terminal.text(), on_terminal.process)
    return on_terminal.terminal.text()


def test_a_terminal_shows_the_summary_with_receptive_fields(shown: str, on_terminal: TrainingOnTerminal) -> None:
    (run,) = read_runs(on_terminal.database)

    assert "Layer (type)               Output Shape         Param #   Receptive field\r\n" in shown
    assert re.search(r"Conv2d-23 +\[-1, 10, 1, 1\] +4,900 +28x28\r\n", shown)
    assert (run.artifacts / "model_summary.txt").read_text().replace("\n", "\r\n") in shown
    assert "my_idea seed 0 [epochs=100000 limit=3000]: 10,970 parameters, 3,000 training images, on " in shown


def test_a_terminal_shows_a_bar_and_then_the_epochs_line(shown: str, on_terminal: TrainingOnTerminal) -> None:
    (run,) = read_runs(on_terminal.database)
    first = shown[: shown.index("epoch 2/100000")]

    drawn = re.findall(
        r"\repoch 1/100000 +(\d+)%\|[^|]*\| (\d+)/3000 "
        r"\[\S+ left, +\d+\.\d\d images/s, loss \d\.\d{4}, accuracy \d+\.\d\d %\]",
        first,
    )
    assert drawn
    assert all(0 < int(seen) <= 3000 and int(percent) == round(int(seen) / 30) for percent, seen in drawn)
    line = re.search(r"\r +\repoch      1/100000  train loss .*\((\d\d\.\d\d)%\)  lr 0\.01  \d+\.\d s\r\n", first)
    assert line is not None  # on the line of the bar, which was blanked before
    assert float(line[1]) == run.metrics["test_accuracy"][0][1]
    assert line.start() > first.rindex("images/s")


def test_a_copied_script_is_tracked_under_its_own_name(shown: str, on_terminal: TrainingOnTerminal) -> None:
    (run,) = read_runs(on_terminal.database)

    assert (run.name, run.tags["step"]) == ("my_idea seed 0 [epochs=100000 limit=3000]", "my_idea")
    assert (run.artifacts / "source" / "my_idea.py").read_bytes() == STEP1.read_bytes()
    assert run.tags["git_commit"] == "none"  # it lies in no repository
    assert set(run.tags["overrides"].split()) == {"epochs=100000", "limit=3000"}


def test_closing_the_terminal_ends_the_training_in_order(shown: str, on_terminal: TrainingOnTerminal) -> None:
    on_terminal.terminal.hang_up()

    assert on_terminal.ended().status == "KILLED"
    assert on_terminal.process.returncode != 0


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_a_signal_ends_the_training_in_order(name: str, train: Callable[..., Training]) -> None:
    check_that_it_ends_in_order(train(), signal.Signals[name])


def test_a_second_ctrl_c_ends_the_program_at_once(train: Callable[..., Training]) -> None:
    training = train()
    with closing(sqlite3.connect(training.database, isolation_level=None)) as blocker:
        blocker.execute("BEGIN IMMEDIATE")  # so that the run can't be closed
        training.process.send_signal(signal.SIGINT)
        time.sleep(0.7)
        assert training.process.poll() is None

        training.process.send_signal(signal.SIGINT)

        assert training.process.wait() == -signal.SIGINT  # one that had waited for the database would end with 130
        blocker.execute("ROLLBACK")
    assert training.ended().status == "RUNNING"  # the next run there marks it KILLED


def test_nohup_lets_the_training_outlive_its_terminal(train: Callable[..., Training]) -> None:
    training = train((signal.SIGHUP,))

    training.process.send_signal(signal.SIGHUP)

    epochs = training.epochs()
    wait_until(lambda: training.epochs() >= epochs + 2, training.process)
    check_that_it_ends_in_order(training, signal.SIGTERM)


def check_that_it_ends_in_order(training: Training, number: signal.Signals) -> None:
    training.process.send_signal(number)

    run = training.ended()
    assert run.status == "KILLED"
    assert len(run.metrics["test_accuracy"]) >= 1  # what was trained by then is kept
    assert training.process.returncode == 130
    assert training.process.stderr == (
        "\nInterrupted. A run that had begun is marked KILLED; its finished epochs are in MLflow. "
        "The same command with --resume goes on after the last of them.\n"
    )


def test_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    interrupt_on_signals(signal.SIGHUP, signal.SIGTERM)

    os.kill(os.getpid(), signal.SIGHUP)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
