"""What the benchmarks share: settings, rounds taken in turns, fresh processes, a printed report and its JSON file.

A ratio is taken within each round and its median reported, so that a slow spell of the machine falls on both sides.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import math
import os
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from tabulate import tabulate

from mnist_lab.commandline import number_from
from mnist_lab.experiment import Experiment
from mnist_lab.running import identity

if TYPE_CHECKING:
    from mnist_lab.running.progress import Progress

ROOT = Path(__file__).resolve().parents[1]
OUT = Path(__file__).resolve().parent / "out"
TRAIN_IMAGES, TEST_IMAGES = 60_000, 10_000
STEP = "step4_augment_steplr"  # what is trained where a benchmark is about one experiment
T = TypeVar("T")

sys.path.append(str(ROOT / "tests"))  # run_writer fills a store with runs
sys.path.append(str(ROOT / "experiments"))  # where an ablation finds its step


# ---- settings


@dataclass(frozen=True)
class Setting:
    """A whole number that the command line can set: its value in a full and in a quick measurement."""

    default: int
    quick: int
    help: str


def make_parser(name: str, description: str | None, **settings: Setting) -> argparse.ArgumentParser:
    """Return the flags of one benchmark: its settings, and those that all benchmarks take."""
    parser = argparse.ArgumentParser(f"{name}.py", None, description, formatter_class=argparse.RawTextHelpFormatter)
    count = {"type": number_from(1), "metavar": "N"}
    for flag, setting in settings.items():
        text = f"{setting.help} (default {setting.default}, with --quick {setting.quick})"
        parser.add_argument(f"--{flag.replace('_', '-')}", help=text, **count)
    quick = "the smallest setting: shows that it works, measures little"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--threads", help="of torch (default: torch's own choice)", **count)
    parser.add_argument(
        "--out", type=Path, default=OUT, metavar="FOLDER", help="of the JSON file (default: %(default)s)"
    )
    parser.set_defaults(name=name, settings=settings)
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; settings that it leaves open get their full or quick value."""
    arguments = parser.parse_args(argv)
    for flag, setting in arguments.settings.items():
        if getattr(arguments, flag) is None:
            setattr(arguments, flag, setting.quick if arguments.quick else setting.default)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # for the processes that a benchmark starts
    return arguments


# ---- what is measured


def script_of(step: str) -> Path:
    """Return the script that declares an experiment."""
    return ROOT / "experiments" / f"{step}.py"


def load_experiment(step: str) -> Experiment:
    """Return what experiments/<step>.py declares."""
    return runpy.run_path(str(script_of(step)))["EXPERIMENT"]


def train(limit: int, epochs: int, progress: Progress) -> None:
    """Train and track a run of step 4 in this process: a few epochs of `limit` images each."""
    from mnist_lab.running import run as runner
    from mnist_lab.running.job import Job

    experiment = dataclasses.replace(load_experiment(STEP), epochs=epochs)
    with temporary_store() as uri:
        changes = {"epochs": epochs}
        job = Job(script=script_of(STEP), experiment=experiment, overrides=changes, limit=limit, tracking_uri=uri)
        runner.run(job, 0, progress)


@contextlib.contextmanager
def temporary_store() -> Iterator[str]:
    """Yield the URI of a tracking store that does not exist yet, in a folder that is removed again."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        yield f"sqlite:///{Path(folder) / 'mlflow.db'}"


@dataclass(frozen=True)
class Process:
    """A process that has ended: its wall and CPU seconds, and what it printed.

    CPU seconds include those of the processes that it started and waited for.
    """

    wall: float
    cpu: float
    output: str

    @property
    def result(self) -> Any:
        """What its last line says in JSON."""
        return json.loads(self.output.splitlines()[-1])


def run_fresh(*command: str | int | Path) -> Process:
    """Run Python with these arguments in a new process, in the project's folder, to its end."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        sys.exit(f"python {' '.join(map(str, command))} ended with {done.returncode}:\n{done.stderr}")
    return Process(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Send what is printed to the null device, where printing it costs about as much as on a terminal."""
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


# ---- measuring


@dataclass(frozen=True)
class Sample:
    """One figure, measured once in each round."""

    rounds: Sequence[float]

    @property
    def summary(self) -> dict[str, Any]:
        least, most = min(self.rounds), max(self.rounds)
        return {"median": statistics.median(self.rounds), "least": least, "most": most, "rounds": self.rounds}

    def per(self, other: Sample) -> Sample:
        """Return the ratio to `other`, round by round."""
        return Sample([a / b for a, b in zip(self.rounds, other.rounds, strict=True)])


def interleave(ways: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Call each way once a round and return what it gave. Each round starts with another way than the one before."""
    names = list(ways)
    results: dict[str, list[T]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            show(f"round {number + 1}/{rounds}: {name}")
            results[name].append(ways[name]())
    show("")
    return results


def show(text: str) -> None:
    """Show on a terminal what is being measured, on a line that the next text replaces."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


class Laps:
    """The times of one pass over batches: its start, the end of each batch, its end.

    A pass over few batches stands for a longer one: what comes before the second batch (a loader's workers starting,
    say) and after the last one counts once, the time from batch to batch as often as there are batches.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.start = time.perf_counter()
        self.laps: list[float] = []

    def lap(self, *ignored: object) -> None:
        """Note the end of a batch."""
        self.laps.append(time.perf_counter())

    def stop(self) -> None:
        self.end = time.perf_counter()

    @property
    def batch(self) -> float:
        """Seconds from batch to batch."""
        assert len(self.laps) > 1, "one batch alone shows no time from batch to batch"
        return (self.laps[-1] - self.laps[0]) / (len(self.laps) - 1)

    def seconds(self, batches: float) -> float:
        """Return the seconds of a pass over so many batches."""
        return self.laps[0] - self.start + self.batch * (batches - 1) + self.end - self.laps[-1]


# ---- reporting


class Report:
    """Prints a table of figures and ratios for each section as it is measured; all of them go into one JSON file."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device | None = None) -> None:
        self.arguments = arguments
        self.sections: dict[str, dict[str, object]] = {}
        self.notes: list[str] = []
        self.environment = identity.environment(device or torch.device("cpu"))
        machine = f"{self.environment['hardware']}, {self.environment['threads']} threads"
        print(f"== {arguments.name}: {machine}, torch {self.environment['torch']}")

    def section(self, title: str, figures: Mapping[str, Sample], ratios: Mapping[str, Sample], *, unit: str) -> None:
        """Print the medians with the least and the greatest of the rounds."""
        section = {
            "figures": {name: {"unit": unit, **sample.summary} for name, sample in figures.items()},
            "ratios": {name: sample.summary for name, sample in ratios.items()},
        }
        self.sections[title] = section
        rows = [
            [name, *(_digits(found[column]) for column in ("median", "least", "most"))]
            for found_of in section.values()
            for name, found in found_of.items()
        ]
        print(f"\n{title} ({unit}; {len(next(iter(figures.values())).rounds)} rounds)")
        headers, aligned = ("", "median", "least", "most"), ("left", "right", "right", "right")
        print(tabulate(rows, headers=headers, disable_numparse=True, colalign=aligned))

    def note(self, text: str) -> None:
        """Print what a reader must know to read the figures."""
        print(text)
        self.notes.append(text)

    def write(self) -> None:
        """Write `<out>/<name>.json`."""
        arguments, commit = self.arguments, identity.commit_tags(Path(__file__))
        content = {
            "benchmark": arguments.name,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **commit,
            "settings": {flag: getattr(arguments, flag) for flag in (*arguments.settings, "quick", "threads")},
            "environment": self.environment,
            "sections": self.sections,
            "notes": self.notes,
        }
        arguments.out.mkdir(parents=True, exist_ok=True)
        file = arguments.out / f"{arguments.name}.json"
        file.write_text(json.dumps(content, indent=2) + "\n")
        print(f"Written: {file}\n")


def _digits(value: float) -> str:
    """Show three digits that count, and no exponent."""
    digits = 0 if value == 0 else 2 - math.floor(math.log10(abs(value)))
    return f"{value:,.{max(0, digits)}f}"
