"""What a user types and sees: flags, refusals, signals, the terminal and its absence."""

import io
import re
import runpy
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import pytest
from ptyprocess import PtyProcess

import tiny
from conftest import FullRun
from forkserver import Program, run_program
from helpers import ROOT, TINY, TrackedRun, read_runs, wait_until
from mnist_lab.cli import _parse, main
from mnist_lab.errors import LabError, sentence_about

STEP1 = ROOT / "experiments" / "step1_baseline.py"
STEP4 = ROOT / "experiments" / "step4_augment_steplr.py"


# ---- not on a terminal


def test_a_run_prints_plain_lines_and_a_verdict_beside_targets_and_reported_figures(full_run: FullRun) -> None:
    output = full_run.stdout
    assert not [shown for shown in ("\r", "\x1b", "images/s", "Conv2d") if shown in output]  # there is no terminal
    accuracy = full_run.tracked.metrics["final_test_accuracy"][0][1]

    for line in (
        r"step1_baseline seed 3 \[epochs=1 limit=5000\]: 10,970 parameters, 5,000 training images, on \w+",
        rf"epoch 1/1  train .*  test loss 0\.\d{{4}}, accuracy {accuracy:.2f} %  lr 0\.01  \d+\.\d s",
        rf"accuracy +at least 99\.4 % +{accuracy:.2f} % +missed",
        r"params +fewer than 10,000 +10,970 +missed",
        r"epochs +fewer than 15 +1 +met",
        rf"best test accuracy +{accuracy:.2f} % +99\.29 %",
        r"Overridden \(epochs=1 limit=5000\).*",
        rf"MLflow run {full_run.tracked.run_id}.*",
    ):
        assert len(re.findall(f"^{line}$", output, re.MULTILINE)) == 1, line
    assert "targets.params: " in full_run.stderr  # before the training: it has too many
    folder = full_run.database.parent
    assert [path.name for path in folder.parent.iterdir()] == ["store"]  # nothing is left in the current folder
    names = {path.name for path in folder.iterdir()} - {"locks", "mlflow.db.lock", "mlflow.db-wal", "mlflow.db-shm"}
    assert names == {"mlflow.db", "artifacts", "checkpoints"}
    assert list((folder / "checkpoints").iterdir()) == []  # the run has finished


# ---- what is refused, quickly and in one sentence


def test_a_wrong_value_is_refused_by_its_name(
    uri: str, database: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*flags: str, declared: Any = tiny.EXPERIMENT) -> str:
        monkeypatch.setattr(sys, "argv", [str(TINY), *flags])
        with pytest.raises(SystemExit) as refusal:
            main(declared)
        captured = capsys.readouterr()
        assert (refusal.value.code, captured.out) == (1, "")
        return captured.err.splitlines()[-1]

    for flags, field, named in [
        ("--set lr", "--set", "'lr'"),
        ("--epochs -1", "epochs", "-1"),
        ("--seeds 2 --set lr=-1", "optimizer", "-1"),
        ("--holdout 10000 --limit 50001", "limit", "50,000"),
        ("--search 2", "search", "tiny.py declares no space"),
        ("--set lr=0.1 --set lr=0.2", "--set", "'lr' is given twice"),
    ]:
        sentence = refused(*flags.split(), "--tracking-uri", uri)
        assert sentence.startswith(f"error: {field}: "), flags
        assert named in sentence
    assert refused(declared=tiny.Net) == "error: main: <class 'tiny.Net'> is no Experiment(net=..., ...)"
    assert read_runs(database) == []
    for words in ("host=db password=SECRET", "postgresql:bob:SECRET@db/x", "SECRET"):
        sentence = refused("--tracking-uri", words)
        assert sentence.startswith("error: tracking store: ")
        assert "SECRET" not in sentence


WRONG_FLAGS = {
    "--epochs": ["x", ""],
    "--batch-size": ["1.5"],
    "--seed": ["-1", "one", "4294967296", "0 --seeds 3"],
    "--limit": ["0", "1e3"],
    "--holdout": ["0", "-1"],
    "--seeds": [
        *("0", "-3", "many", "10001", "9223372036854775808", "0-9223372036854775808", "3,3", "3,-1", "3,x", "3,"),
        *("5-2", "0-10000", "0-4,3", "2-", "1-2-3", "4294967296,1"),
    ],
    "--folds": ["1", "3 --holdout 500"],
    "--workers": ["2", "0 --seeds 3"],
    "--again": [""],
    "--cluster": ["auto"],
    "--threads": ["0"],
    "--resume": ["abc --seeds 3", "abc --search 3"],
    "--learning-rate": ["0.1"],
    "--data-dir": ["a\0b"],
}


def test_a_command_line_that_makes_no_sense_is_refused_by_its_flag(capsys: pytest.CaptureFixture[str]) -> None:
    for flag, values in WRONG_FLAGS.items():
        for rest in values:
            with pytest.raises(SystemExit):
                _parse(TINY, tiny.EXPERIMENT, [flag, *rest.split()])
            assert flag in capsys.readouterr().err.splitlines()[-1], rest


def test_flags_are_combined_as_people_do() -> None:
    for line, seeds in [
        ("--seeds 3", [0, 1, 2]),
        ("--seeds 7,3", [7, 3]),
        ("--seeds 0-2,9 --threads 2", [0, 1, 2, 9]),
        ("--seeds 2 --resume", [0, 1]),
    ]:
        assert _parse(TINY, tiny.EXPERIMENT, line.split()).seeds == seeds, line


def test_help_is_given_before_anything_slow_is_imported(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", str(STEP4), "--help"]

    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE))
    assert "mnist_lab.console" in imported
    assert not imported & {"mlflow", "pandas", "matplotlib", "torchvision"}
    assert list(tmp_path.iterdir()) == []
    for shown in ("--seeds", "--holdout", "--set NAME=VALUE", "lr=0.1", "momentum=0.9", "degrees=7.0"):
        assert shown in done.stdout


# ---- a mistake in a script


# What stands in step 1, what stands there by mistake, and the field and text that the one sentence names.
REFUSED_CALLS = [
    ("epochs=14", "epoch=14", "epoch", "epoch=14 is no argument of Experiment (did you mean 'epochs'?)"),
    ("accuracy=99.4", "acuracy=99.4", "acuracy", "'accuracy'"),
    ("net=Net,", "", "Experiment", "net"),
    ("partial(torch.optim.SGD, lr=", "torch.optim.SGD(lr=", "optimizer", "partial(torch.optim.SGD, lr=0.01"),
    ("epochs=14", "loss=torch.nn.CrossEntropyLoss(smoothing=0.1)", "loss", "'label_smoothing'"),
    ("epochs=14", "scheduler=StepLR(2, gamma=0.1), epochs=14", "scheduler", "partial(StepLR, step_size=2, gamma=0.1)"),
]


def write_with_mistake(script: Path, right: str, wrong: str) -> None:
    source = STEP1.read_text()
    assert source.count(right) == 1
    imported = "from torch.optim.lr_scheduler import StepLR\nfrom mnist_lab import"
    script.write_text(source.replace(right, wrong).replace("from mnist_lab import", imported, 1))


def test_a_call_that_python_refuses_is_one_sentence_and_other_errors_keep_their_traceback(tmp_path: Path) -> None:
    script = tmp_path / "my_idea.py"
    for right, wrong, field, named in [*REFUSED_CALLS, ("epochs=14", "epochs=len(14)", "", "")]:
        write_with_mistake(script, right, wrong)
        with pytest.raises(TypeError) as error:
            runpy.run_path(str(script))
        sentence = sentence_about(error.value)
        if not field:
            assert sentence is None
            continue
        assert sentence is not None
        assert sentence.startswith(f"{field}: "), wrong
        assert named in sentence
        assert "my_idea.py, line " in sentence


def test_a_mistake_in_a_script_ends_with_one_sentence(uri: str, database: Path, tmp_path: Path) -> None:
    write_with_mistake(tmp_path / "my_idea.py", "epochs=14", "epoch=14")

    done = run_program(tmp_path / "my_idea.py", "--tracking-uri", uri, cwd=tmp_path)

    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch("error: epoch: .*did you mean 'epochs'.*\n", done.stderr)
    assert read_runs(database) == []


def test_a_second_call_of_main_is_refused_and_one_of_a_module_that_is_imported(
    uri: str, database: Path, tmp_path: Path
) -> None:
    calls = TINY.read_text().replace('if __name__ == "__main__":\n    ', "")
    (tmp_path / "two.py").write_text(f"{calls}main(EXPERIMENT)\n")
    (tmp_path / "other.py").write_text(calls)
    (tmp_path / "saved.py").write_text(f"open(__file__, 'a').write('Net.width = 8')\n{calls}")
    (tmp_path / "mine.py").write_text("import os\nos.chdir('/')\nfrom other import Net\n")
    cases = [("two.py", "script: two.py "), ("mine.py", "main: mine.py imports other.py, which calls")]
    for script, sentence in [*cases, ("saved.py", "script: saved.py was changed")]:
        done = run_program(script, "--tracking-uri", uri, "--epochs", "1", "--limit", "128", cwd=tmp_path)

        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith(f"error: {sentence}")
        assert [run.status for run in read_runs(database)] == ["FINISHED"]


def test_main_is_refused_where_no_script_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell's code can't be found again: two networks would be one step with one digest."""
    kernel = metadata.distribution("ipykernel").locate_file("ipykernel_launcher.py")
    for started in ("-c", str(kernel)):
        monkeypatch.setattr(sys, "argv", [started, "--seed", "1"])
        with pytest.raises(LabError, match="^main: .*%%writefile experiments/NAME.py"):
            main(tiny.EXPERIMENT)


# ---- output that nobody reads


class Unwritable(io.StringIO):
    """What stdout is on a full disk, or where its reader has ended."""

    def __init__(self, error: OSError, file: TextIO) -> None:
        super().__init__()
        self.error, self.fileno = error, file.fileno  # type: ignore[method-assign]  # which is sent elsewhere

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (BrokenPipeError(32, "Broken pipe"), set()),
        (OSError(28, "No space left"), {"The output can't be written: No space left. The run goes on without it."}),
    ],
)
def test_a_run_does_not_depend_on_who_reads_its_output(
    error: OSError, said: set[str], uri: str, database: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    flags = ["--tracking-uri", uri, "--epochs", "1", "--limit", "128", "--device", "cpu", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", [str(TINY), *flags])
    with (tmp_path / "file").open("w") as file:
        monkeypatch.setattr(sys, "stdout", Unwritable(error, file))
        main(tiny.EXPERIMENT)

    assert [run.status for run in read_runs(database)] == ["FINISHED"]
    assert set(capsys.readouterr().err.splitlines()) == said


# ---- copied scripts that train: on a terminal, and until a signal comes

FLAGS = ("--epochs", "100000", "--tracking-uri", "sqlite:///mlflow.db")


class Training:
    def __init__(self, database: Path, ignored: tuple[signal.Signals, ...]) -> None:
        self.database = database
        shutil.copy(TINY, database.parent / "my_idea.py")
        self.process = Program("my_idea.py", "--limit", "200", *FLAGS, cwd=database.parent, ignored=ignored)

    def epochs(self) -> int:
        runs = read_runs(self.database)
        return len(runs[0].metrics.get("test_loss", [])) if runs else 0

    def ended(self) -> TrackedRun:
        self.process.wait()
        (run,) = read_runs(self.database)
        return run


@pytest.fixture
def train(database: Path) -> Iterator[Callable[..., Training]]:
    started: list[Training] = []

    def start(ignored: tuple[signal.Signals, ...] = ()) -> Training:
        started.append(Training(database, ignored))
        wait_until(lambda: started[-1].epochs() >= 1, started[-1].process)
        return started[-1]

    yield start
    for training in started:
        training.process.kill()
        training.process.wait()


def test_a_terminal_shows_summary_bar_and_epochs_and_its_end_is_that_of_the_training(database: Path) -> None:
    shutil.copy(STEP1, database.parent / "my_idea.py")
    command = [sys.executable, "my_idea.py", "--limit", "3000", *FLAGS]
    terminal, shown = PtyProcess.spawn(command, cwd=str(database.parent), dimensions=(40, 120)), ""
    while "\repoch      2/100000  " not in shown:  # when it has ended, reading raises EOFError
        shown += terminal.read(65536).decode(errors="replace")
    terminal.fileobj.close()  # as a lost connection does
    code = terminal.wait()

    (run,) = read_runs(database)
    assert (run.status, code != 0) == ("KILLED", True)
    assert (run.name, run.tags["step"]) == ("my_idea seed 0 [epochs=100000 limit=3000]", "my_idea")
    assert run.tags["git_commit"] == "none"  # it lies in no repository
    assert re.search(r"Layer \(type\) +Output shape +Param # +Receptive field\r\n", shown)
    assert re.search(r"Conv2d-23 +\[10, 1, 1\] +4,900 +28x28\r\n", shown)
    assert (run.artifacts / "model_summary.txt").read_text().replace("\n", "\r\n") in shown
    assert re.search(
        r"\repoch 1/100000 +\d+%\|[^|]*\| \d+/3000 "
        r"\[\S+ left, +\d+\.\d\d images/s, loss \d\.\d{4}, accuracy \d+\.\d\d %\]",
        shown,
    )
    accuracy = run.metrics["test_accuracy"][0][1]  # on the line of the bar, which was blanked before
    assert re.search(rf"\r +\repoch      1/100000  train loss .* {accuracy:.2f} %  lr 0\.01  \d+\.\d s\r\n", shown)


@pytest.mark.long
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_training_in_order(number: signal.Signals, train: Callable[..., Training]) -> None:
    training = train((signal.SIGHUP,))
    training.process.send_signal(signal.SIGHUP)
    epochs = training.epochs()
    wait_until(lambda: training.epochs() >= epochs + 2, training.process)

    training.process.send_signal(number)

    run = training.ended()
    assert run.status == "KILLED"
    assert len(run.metrics["test_accuracy"]) >= 1  # what was trained by then is kept
    assert training.process.returncode == 130
    assert "Interrupted" in training.process.stderr
    assert "--resume" in training.process.stderr
    assert "Traceback" not in training.process.stderr
