"""The command line of every experiment script: `main(EXPERIMENT)`. Flags, console output, exit codes."""

from __future__ import annotations

import argparse
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, NoReturn

from mnist_lab.errors import LabError
from mnist_lab.experiment import SUMMARY_METRICS, Experiment

if TYPE_CHECKING:  # imported when a run starts: MLflow alone takes seconds, and `--help` needs none of it
    import torch
    from torch import Tensor, nn
    from tqdm import tqdm

    from mnist_lab.runner import RunResult
    from mnist_lab.training import EpochMetrics

INTERRUPTED = "Interrupted."
REFRESH_SECONDS = 0.5  # reading the running figures waits for the device, so the bar does it this often only


def main(experiment: Experiment, argv: Sequence[str] | None = None) -> None:
    """Train one run as the command line says, print its verdict, and track it in MLflow.

    The name of the script that was started names the step.
    """
    script = Path(sys.argv[0]).resolve()
    arguments = parser(experiment, script).parse_args(argv)
    experiment.check()
    changes = dict(assignment(text) for text in arguments.set)
    for flag in ("epochs", "batch_size"):
        if (value := getattr(arguments, flag)) is not None:
            changes[flag] = value
    experiment, overrides = experiment.override(changes)
    experiment.check()
    interrupt_on_signals(signal.SIGTERM, signal.SIGHUP)
    try:
        from mnist_lab import runner

        with closing(Console(experiment.epochs)) as console:
            result = runner.run(
                experiment,
                script,
                console,
                overrides=overrides,
                seed=arguments.seed,
                device=arguments.device,
                data_dir=arguments.data_dir,
                tracking_uri=arguments.tracking_uri,
                limit=arguments.limit,
            )
    except KeyboardInterrupt:
        print(
            f"\n{INTERRUPTED} A run that had begun is marked KILLED; its finished epochs are in MLflow.",
            file=sys.stderr,
        )
        sys.exit(128 + signal.SIGINT)
    print_result(result, experiment)


def parser(experiment: Experiment, script: Path) -> argparse.ArgumentParser:
    """Return the flags that every experiment script takes."""
    declared = ", ".join(f"{name}={value}" for name, value in experiment.hyperparameters().items())
    parser = argparse.ArgumentParser(
        prog=script.name,
        description=f"Train {script.stem} on MNIST and track the run in MLflow.",
        epilog=f"Declared: {declared}.",
    )
    parser.add_argument("--epochs", type=int, help="epochs to train (an override)")
    parser.add_argument("--batch-size", type=int, help="images per batch (an override)")
    parser.add_argument("--seed", type=_from(0), default=0, help="of weights, order, dropout, augmentation (default 0)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first of them that is there)")
    parser.add_argument("--data-dir", type=Path, help="where MNIST is kept (default: MNIST_LAB_DATA, else data/)")
    parser.add_argument("--tracking-uri", help="MLflow store (default: MLFLOW_TRACKING_URI, else mlruns/mlflow.db)")
    parser.add_argument("--limit", type=_from(1), metavar="N", help="train on the first N images, for a quick look")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="override a declared hyperparameter, e.g. --set lr=0.05; may be repeated",
    )
    return parser


def _from(least: int) -> Callable[[str], int]:
    """Return what reads a whole number for argparse and refuses one below `least`, before anything slow is imported."""

    def number(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]+", text) or (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return value

    return number


def assignment(text: str) -> tuple[str, str]:
    """Split "lr=0.05" into its name and value.

    Raises:
        LabError: if it is no such pair.
    """
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise LabError(f"--set: {text!r} is not NAME=VALUE, e.g. lr=0.05")
    return name.strip(), value.strip()


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
        print(
            f"epoch {metrics.epoch:>{len(str(self.epochs))}}/{self.epochs}  "
            f"train loss {metrics.train_loss:.4f}, "
            f"accuracy {_share(metrics.train_correct, metrics.train_images)}  "
            f"test loss {metrics.test_loss:.4f}, "
            f"accuracy {_share(metrics.test_correct, metrics.test_images)}  "
            f"lr {metrics.lr:.3g}  {metrics.epoch_seconds:.1f} s",
            flush=True,
        )

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


def print_result(result: RunResult, experiment: Experiment) -> None:
    """Print each target with its measured value and verdict, and the reported figures beside the measured ones."""
    from tabulate import tabulate

    measured = result.measured
    print()
    if result.verdicts:
        judged = [(v.name, v.wanted, _figure(v.name, v.measured), v.word) for v in result.verdicts]
        print(tabulate(judged, headers=("target", "wanted", "measured", "verdict"), disable_numparse=True))
        print()
    rows = [
        (name.replace("_", " "), _figure(name, measured[name]), _figure(name, experiment.reported.get(name)))
        for name in SUMMARY_METRICS
    ]
    print(tabulate(rows, headers=("", "measured", "reported"), disable_numparse=True))
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


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Show a LabError as its sentence, also one raised while a script still declares its experiment."""
    if isinstance(error, LabError):
        print(f"error: {error}", file=sys.stderr)
    elif isinstance(error, KeyboardInterrupt):
        print(f"\n{INTERRUPTED}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _excepthook
