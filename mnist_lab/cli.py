"""The command line of every experiment script: `main(EXPERIMENT)`. Flags, console output, exit codes."""

from __future__ import annotations

import argparse
import ast
import re
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, NoReturn

from mnist_lab.console import Console, StudyConsole, print_result, print_study
from mnist_lab.errors import LabError
from mnist_lab.experiment import Experiment, shown
from mnist_lab.running import declaration
from mnist_lab.tracking.sqlite import tracking_uri

if TYPE_CHECKING:  # imported when a run starts: MLflow alone takes seconds, and `--help` needs none of it
    pass

INTERRUPTED = "Interrupted."
# What `--resume` takes from the run that it continues.
OF_THE_RUN = ("seed", "seeds", "epochs", "batch_size", "limit", "holdout", "threads", "set", "again", "workers")
MAX_SEEDS = 10_000  # of one study
MAX_THREADS = 1_024  # starting very many ends the process


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
        from mnist_lab.running import checkpoint

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
        from mnist_lab.running import run as runner

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
        from mnist_lab.running import study

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
