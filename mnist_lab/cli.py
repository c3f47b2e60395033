"""The command line of every experiment script: `main(EXPERIMENT)`. Flags, console output, exit codes."""

from __future__ import annotations

import argparse
import ast
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, NoReturn

from mnist_lab import declaration
from mnist_lab.errors import LabError
from mnist_lab.experiment import SUMMARY_METRICS, Experiment, shown
from mnist_lab.store import tracking_uri

if TYPE_CHECKING:  # imported when a run starts: MLflow alone takes seconds, and `--help` needs none of it
    import torch
    from torch import Tensor, nn
    from tqdm import tqdm

    from mnist_lab.runner import RunResult
    from mnist_lab.statistics import StudyVerdict
    from mnist_lab.study import StudyResult
    from mnist_lab.training import EpochMetrics

INTERRUPTED = "Interrupted."
# What `--resume` takes from the run that it continues.
OF_THE_RUN = ("seed", "seeds", "epochs", "batch_size", "limit", "holdout", "threads", "set", "again", "workers")
MAX_SEEDS = 10_000  # of one study
MAX_THREADS = 1_024  # starting very many ends the process
SUMMARY_METRICS_WITH_HOLD_OUT = (
    "final_train_accuracy",
    "best_train_accuracy",
    "final_validation_accuracy",
    "best_validation_accuracy",
    "best_epoch",
    "final_test_accuracy",
    "final_test_loss",
)
REFRESH_SECONDS = 0.5  # reading the running figures waits for the device, so the bar does it this often only


def main(experiment: Experiment, argv: Sequence[str] | None = None) -> None:
    """Train one run, or with `--seeds` a study, as the command line says, print its verdict, and track it in MLflow.

    The name of the script that was started names the step.
    """
    if declaration.only_read(experiment):
        return
    script = Path(sys.argv[0]).resolve()
    flags = parser(script)
    arguments = flags.parse_args(argv)
    if arguments.seeds is not None and arguments.threads is not None:
        flags.error("argument --threads: not allowed with --seeds, whose processes have one thread each")
    if arguments.seeds is None and (arguments.workers is not None or arguments.again):
        flags.error(f"argument --{'again' if arguments.again else 'workers'}: only allowed with --seeds")
    given = [name for name in OF_THE_RUN if getattr(arguments, name) not in (None, False, [])]
    if arguments.resume is not None and given:
        flags.error(f"argument --{given[0].replace('_', '-')}: not allowed with --resume, which has that of the run")
    for name, value in vars(arguments).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str | Path) and not _can_be_written(str(text)):
                flags.error(f"argument --{name.replace('_', '-')}: {str(text)!r} is not text in UTF-8")
    experiment.check()
    if arguments.resume is None:
        changes: dict[str, object] = dict(assignment(text) for text in arguments.set)
        for flag in ("epochs", "batch_size"):
            if (value := getattr(arguments, flag)) is not None:
                changes[flag] = value
    else:
        from mnist_lab import checkpoint

        resume = checkpoint.find(tracking_uri(arguments.tracking_uri), script.stem, arguments.resume)
        changes = dict(resume.changes)
        arguments.seed, arguments.limit, arguments.holdout = resume.seed, resume.limit, resume.holdout
        arguments.resume = resume
    experiment, overrides = experiment.override(changes)
    experiment.check()
    interrupt_on_signals(signal.SIGTERM, signal.SIGHUP)
    (_run if arguments.seeds is None else _run_study)(experiment, script, overrides, arguments)


def _run(experiment: Experiment, script: Path, overrides: Mapping[str, object], arguments: argparse.Namespace) -> None:
    try:
        from mnist_lab import runner

        with closing(Console(experiment.epochs)) as console:
            result = runner.run(
                experiment,
                script,
                console,
                overrides=overrides,
                seed=arguments.seed or 0,
                device=arguments.device,
                threads=arguments.threads,
                data_dir=arguments.data_dir,
                tracking_uri=arguments.tracking_uri,
                limit=arguments.limit,
                holdout=arguments.holdout,
                resume=arguments.resume,
            )
    except KeyboardInterrupt:
        _exit_interrupted(
            "A run that had begun is marked KILLED; its finished epochs are in MLflow. "
            "The same script with --resume goes on after the last of them."
        )
    print_result(result, experiment)


def _run_study(
    experiment: Experiment, script: Path, overrides: Mapping[str, object], arguments: argparse.Namespace
) -> None:
    try:
        from mnist_lab import study

        with closing(StudyConsole(experiment.epochs)) as console:
            result = study.run_study(
                experiment,
                script,
                console,
                overrides=overrides,
                seeds=arguments.seeds,
                workers=arguments.workers,
                again=arguments.again,
                device=arguments.device,
                data_dir=arguments.data_dir,
                tracking_uri=arguments.tracking_uri,
                limit=arguments.limit,
                holdout=arguments.holdout,
            )
    except KeyboardInterrupt:
        _exit_interrupted(
            "Runs that had begun are marked KILLED; the same command trains only the seeds that are missing."
        )
    print_study(result, experiment)
    if result.failed:
        print(f"Failed: seed {', '.join(map(str, result.failed))}; the same command tries again.", file=sys.stderr)
        sys.exit(1)


def _exit_interrupted(consequence: str) -> NoReturn:
    print(f"\n{INTERRUPTED} {consequence}", file=sys.stderr)
    sys.exit(128 + signal.SIGINT)


def answer_early() -> None:
    """Answer `--help`, and refuse a wrong command line, as soon as a script imports the lab: torch takes seconds more.

    Does nothing in a program that is not a script which calls `main`.
    """
    if (script := _script_that_calls_main()) is not None:
        parser(script).parse_args()


def _script_that_calls_main() -> Path | None:
    main_file, script = getattr(sys.modules["__main__"], "__file__", None), Path(sys.argv[0]).resolve()
    if main_file and Path(main_file).resolve() == script and re.search(r"^ *main\(\w", _source(script), re.MULTILINE):
        return script
    return None


def parser(script: Path) -> argparse.ArgumentParser:
    """Return the flags that every experiment script takes; their help ends with what the script declares."""
    parser = argparse.ArgumentParser(
        prog=script.name,
        description=f"Train {script.stem} on MNIST and track the run in MLflow.",
        epilog=_declaration(_source(script)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--epochs", type=int, help="epochs to train (an override)")
    parser.add_argument("--batch-size", type=int, help="images per batch (an override)")
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=_from(0), help="of weights, order, dropout, augmentation (default 0)")
    seeds.add_argument(
        "--seeds",
        type=_seeds,
        metavar="N",
        help="a study: so many seeds, from 0 on, or these seeds (3,7,9); finished ones are not trained again",
    )
    parser.add_argument(
        "--workers", type=_from(1), metavar="N", help="processes of a study on a CPU (default: one per core)"
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN_ID",
        help="continue the newest interrupted run of this script, or this one, after its last finished epoch",
    )
    parser.add_argument("--again", action="store_true", help="train all seeds of a study, finished or not")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first of them that is there)")
    parser.add_argument(
        "--threads",
        type=_from(1, MAX_THREADS),
        metavar="N",
        help="of torch on a CPU (default: one per core that nobody else uses)",
    )
    parser.add_argument("--data-dir", type=Path, help="where MNIST is kept (default: MNIST_LAB_DATA, else data/)")
    parser.add_argument("--tracking-uri", help="MLflow store (default: MLFLOW_TRACKING_URI, else mlruns/mlflow.db)")
    parser.add_argument("--limit", type=_from(1), metavar="N", help="train on the first N images, for a quick look")
    parser.add_argument(
        "--holdout",
        type=_from(1),
        metavar="N",
        help="hold out N training images for validation; the test images are read once, at the end",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="override a declared hyperparameter, e.g. --set lr=0.05; may be repeated",
    )
    return parser


def _source(script: Path) -> str:
    try:
        return script.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _declaration(source: str) -> str:
    """Return the lines of a script that say `... = Experiment(...)`."""
    try:
        statements = ast.parse(source).body
    except (SyntaxError, ValueError):
        return ""
    for statement in statements:
        call = statement.value if isinstance(statement, ast.Assign) else None
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("Experiment"):
            return f"declared here:\n{ast.get_source_segment(source, statement)}"
    return ""


def _from(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return what reads a whole number for argparse and refuses another one, before anything slow is imported."""

    def number(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]+", text) or (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"{value} is more than {most:,}")
        return value

    return number


def _seeds(text: str) -> Sequence[int]:
    """Read "10" as the seeds 0 to 9, and "3,7,9" as these."""
    if "," not in text:
        count = _from(1)(text)
        if count > MAX_SEEDS:
            raise argparse.ArgumentTypeError(f"{count:,} seeds are more than {MAX_SEEDS:,}")
        return range(count)
    parts = text.split(",")
    if len(parts) > MAX_SEEDS:
        raise argparse.ArgumentTypeError(f"{len(parts):,} seeds are more than {MAX_SEEDS:,}")
    seeds: dict[int, None] = {}
    for part in parts:
        seed = _from(0)(part.strip())
        if seed in seeds:
            raise argparse.ArgumentTypeError(f"the seed {seed} is there twice in {text!r}")
        seeds[seed] = None
    return list(seeds)


def assignment(text: str) -> tuple[str, str]:
    """Split "lr=0.05" into its name and value.

    Raises:
        LabError: if it is no such pair.
    """
    name, _, value = (part.strip() for part in text.partition("="))
    if not (name and value):
        raise LabError(f"--set: {shown(text)} is not NAME=VALUE, e.g. lr=0.05")
    return name, value


def _can_be_written(text: str) -> bool:
    """Say whether text can stand in a file name and a database: bytes that are no UTF-8 come as lone surrogates."""
    return "\0" not in text and text == text.encode("utf-8", "ignore").decode("utf-8")


class Console:
    """Shows a run as it goes: a bar on a terminal, and a line per epoch everywhere."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs
        self.epoch = 1
        self.num_images = 0
        self.bar: tqdm[NoReturn] | None = None
        self.shown_at = 0.0
        self.on_terminal = sys.stdout.isatty()

    def on_start(self, run_name: str, device: torch.device, net: nn.Module, summary: str, num_images: int) -> None:
        from mnist_lab.training import num_params

        self.num_images = num_images
        if self.on_terminal:
            print(summary)
        print(f"{run_name}: {num_params(net):,} parameters, {num_images:,} training images, on {device.type}")

    def on_batch(self, seen: int, loss_sum: Tensor, correct: Tensor) -> None:
        if not self.on_terminal:
            return
        if self.bar is None:
            self.bar = self._new_bar()
        now = time.monotonic()
        if now - self.shown_at >= REFRESH_SECONDS:
            self.shown_at = now
            self.bar.set_postfix_str(
                f"loss {loss_sum.item() / seen:.4f}, accuracy {100 * correct.item() / seen:.2f} %", refresh=False
            )
            self.bar.update(seen - self.bar.n)

    def on_epoch(self, metrics: EpochMetrics) -> None:
        self.close()
        self.epoch = metrics.epoch + 1
        print(epoch_line(metrics, self.epochs), flush=True)

    def close(self) -> None:
        """Take the bar away, so that what is printed next starts on a line of its own."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _new_bar(self) -> tqdm[NoReturn]:
        from tqdm import tqdm

        return tqdm(
            total=self.num_images,
            desc=f"epoch {self.epoch}/{self.epochs}",
            file=sys.stdout,
            unit=" images",
            leave=False,
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{remaining} left, {rate_fmt}{postfix}]",
        )


def epoch_line(metrics: EpochMetrics, epochs: int) -> str:
    """Return the line that stands for a finished epoch."""
    return (
        f"epoch {metrics.epoch:>{len(str(epochs))}}/{epochs}  "
        f"train loss {metrics.train_loss:.4f}, "
        f"accuracy {_share(metrics.train_correct, metrics.train_images)}  "
        f"{metrics.evaluated_on} loss {metrics.eval_loss:.4f}, "
        f"accuracy {_share(metrics.eval_correct, metrics.eval_images)}  "
        f"lr {metrics.lr:.3g}  {metrics.epoch_seconds:.1f} s"
    )


class StudyConsole:
    """Shows a study as it goes: one bar for all seeds on a terminal, else a line per epoch; and a line per seed."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs
        self.trained: dict[int, int] = {}  # epochs by seed
        self.done = self.wanted = self.width = 0
        self.bar: tqdm[NoReturn] | None = None

    def on_start(
        self, name: str, seeds: Sequence[int], missing: Sequence[int], workers: int, device: torch.device
    ) -> None:
        self.wanted, self.done, self.width = len(seeds), len(seeds) - len(missing), len(str(max(seeds)))
        reused = ", ".join(str(seed) for seed in seeds if seed not in missing)
        if reused:
            print(f"{name}: finished already, and not trained again: {reused}")
        if not missing:
            return
        how = f"{workers} at a time" if device.type == "cpu" else "one after another"
        print(f"{name}: training {', '.join(map(str, missing))}, {how}, on {device.type}", flush=True)
        if sys.stdout.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                total=len(missing) * self.epochs,
                desc=self._seeds_done(),
                file=sys.stdout,
                leave=False,
                dynamic_ncols=True,
                smoothing=0,  # the seeds' epochs end in bursts: only the mean speed says when all is done
                bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} epochs [{elapsed}, {remaining} left]",
            )

    def on_epoch(self, seed: int, metrics: EpochMetrics) -> None:
        self.trained[seed] = metrics.epoch
        if self.bar is not None:
            self.bar.update()
        else:
            print(f"seed {seed:>{self.width}}  {epoch_line(metrics, self.epochs)}", flush=True)

    def on_seed(self, seed: int, metrics: Mapping[str, float]) -> None:
        self.done += 1
        part = "validation" if "best_validation_accuracy" in metrics else "test"
        self._write(
            f"seed {seed:>{self.width}}  done: test accuracy {metrics['final_test_accuracy']:.2f} % in the last epoch; "
            f"best {part} accuracy {metrics[f'best_{part}_accuracy']:.2f} % in epoch {metrics['best_epoch']:.0f}  "
            f"({self._seeds_done()})"
        )

    def on_failure(self, seed: int, reason: str) -> None:
        if self.bar is not None and self.bar.total is not None:
            self.bar.total -= self.epochs - self.trained.get(seed, 0)  # they will not be trained
        self._write(f"seed {seed:>{self.width}}  failed: {reason}")

    def on_time(self) -> None:
        if self.bar is not None:
            self.bar.refresh()

    def close(self) -> None:
        """Take the bar away, so that what is printed next starts on a line of its own."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _seeds_done(self) -> str:
        return f"{self.done}/{self.wanted} seeds"

    def _write(self, line: str) -> None:
        if self.bar is None:
            print(line, flush=True)
        else:
            self.bar.set_description_str(self._seeds_done(), refresh=False)
            self.bar.write(line, file=sys.stdout)


def print_study(result: StudyResult, experiment: Experiment) -> None:
    """Print what the seeds show together: the figures over the seeds, those of each seed, and the verdict."""
    from tabulate import tabulate

    from mnist_lab.study import tables

    for rows, headers in tables(result):
        print()
        print(tabulate(rows, headers=headers, disable_numparse=True))
    judged = [(v.name, v.wanted, _figure(v.name, v.measured), v.word) for v in result.verdicts]
    if result.accuracy is not None:
        of_mean = (f"mean at least {result.accuracy.target:g} %", f"{result.accuracy.mean:.2f} %", result.accuracy.word)
        judged.insert(0, ("accuracy", *of_mean))
    if judged:
        print()
        print(tabulate(judged, headers=("target", "wanted", "measured", "verdict"), disable_numparse=True))
    if result.accuracy is not None:
        print(f"\n{how_sure(result.accuracy)}")
    if result.overrides:
        print(f"Overridden ({', '.join(result.overrides)}): tagged so, and left out of the tables of results.")
    print(f"MLflow run {result.run_id}; `make ui` shows it, with the runs of the seeds below it.")


def how_sure(verdict: StudyVerdict) -> str:
    """Say how sure the verdict on a mean is, and how many seeds it takes where it is not shown."""
    if verdict.n == 1:
        return "One seed shows nothing about the mean: train more of them."
    side = "at least" if verdict.mean >= verdict.target else "below"
    text = f"That the mean is {side} {verdict.target:g} %: p = {verdict.p:.2g}"
    if verdict.word != "not shown":
        return f"{text}, from {verdict.n} seeds."
    if verdict.seeds_needed is None:
        return f"{text}, which does not show it; how many seeds would can't be said."
    return f"{text}, which does not show it; about {verdict.seeds_needed:,} seeds would, if the mean stays where it is."


def print_result(result: RunResult, experiment: Experiment) -> None:
    """Print each target with its measured value and verdict, and the reported figures beside the measured ones."""
    from tabulate import tabulate

    measured = result.measured
    print()
    if result.verdicts:
        judged = [(v.name, v.wanted, _figure(v.name, v.measured), v.word) for v in result.verdicts]
        print(tabulate(judged, headers=("target", "wanted", "measured", "verdict"), disable_numparse=True))
        print()
    held_out = "final_validation_accuracy" in measured
    rows = [
        (name.replace("_", " "), _figure(name, measured[name]), _figure(name, experiment.reported.get(name)))
        for name in (SUMMARY_METRICS_WITH_HOLD_OUT if held_out else SUMMARY_METRICS)
    ]
    print(tabulate(rows, headers=("", "measured", "reported"), disable_numparse=True))
    if held_out:
        print("\nThe accuracy that counts is the final test accuracy: the test images were read once, at the end.")
    else:
        print("\nThe accuracy that counts is the last epoch's. The best epoch was picked on the test images.")
    if result.overrides:
        print(f"Overridden ({', '.join(result.overrides)}): tagged so, and left out of the tables of results.")
    print(f"MLflow run {result.run_id}; `make ui` shows it, `make compare` sets it beside the others.")


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    if "accuracy" in name:
        return f"{value:.2f} %"
    return f"{value:.4f}" if "loss" in name else f"{value:,.0f}"


def _share(correct: int, total: int) -> str:
    return f"{correct}/{total} ({100 * correct / total:.2f}%)"


def interrupt_on_signals(*signals: signal.Signals) -> None:
    """Let these signals end the program as Ctrl-C does, so that what is open is closed in order.

    A signal that is ignored stays so: `nohup` starts programs that way, to let them outlive the terminal.
    """

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for number in signals:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)


def _line_before_main(trace: TracebackType | None) -> int | None:
    """Return the line of the experiment's script that was at work; None in the lab's code, and in other programs."""
    script, frames = _script_that_calls_main(), traceback.extract_tb(trace)
    if any(Path(frame.filename).parent == Path(__file__).parent for frame in frames):
        return None
    return next((frame.lineno for frame in reversed(frames) if Path(frame.filename).resolve() == script), None)


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Show a LabError as its sentence, also one raised while a script still declares its experiment.

    So too what a script's own code raises before it calls `main`. Every other error is a bug.
    """
    if isinstance(error, LabError):
        print(f"error: {error}", file=sys.stderr)
    elif isinstance(error, KeyboardInterrupt):
        print(f"\n{INTERRUPTED}", file=sys.stderr)
    elif (line := _line_before_main(trace)) is not None:
        said = " ".join(str(error).split())
        print(f"error: script: {kind.__name__}: {said} ({Path(sys.argv[0]).name}, line {line})", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _excepthook
