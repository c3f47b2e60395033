"""What the benchmarks share: settings, rounds taken in turns, fresh processes, a printed report and its JSON file.

A ratio is taken within each round and its median reported, so that a slow spell of the machine falls on both sides.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from tabulate import tabulate

from mnist_lab.experiment import Experiment
from mnist_lab.running import provenance

ROOT = Path(__file__).resolve().parents[1]
OUT = Path(__file__).resolve().parent / "out"
TRAIN_IMAGES, TEST_IMAGES = 60_000, 10_000
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
    parser = argparse.ArgumentParser(
        prog=f"{name}.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for flag, setting in settings.items():
        text = f"{setting.help} (default {setting.default}, with --quick {setting.quick})"
        parser.add_argument(f"--{flag.replace('_', '-')}", type=int, metavar="N", help=text)
    parser.add_argument(
        "--quick", action="store_true", help="the smallest setting: shows that it works, measures little"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="of torch (default: torch's own choice)")
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
        if getattr(arguments, flag) < 1:
            parser.error(f"--{flag.replace('_', '-')}: {getattr(arguments, flag)} is not 1 or more")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # for the processes that a benchmark starts
    return arguments


def script_of(step: str) -> Path:
    """Return the script that declares an experiment."""
    return ROOT / "experiments" / f"{step}.py"


def load_experiment(step: str) -> Experiment:
    """Return what experiments/<step>.py declares."""
    spec = importlib.util.spec_from_file_location(f"experiments.{step}", script_of(step))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EXPERIMENT


# ---- measuring


@dataclass(frozen=True)
class Sample:
    """One figure, measured once in each round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def per(self, other: Sample) -> Sample:
        """Return the ratio to `other`, round by round."""
        return Sample(tuple(a / b for a, b in zip(self.rounds, other.rounds, strict=True)))


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


@dataclass(frozen=True)
class Process:
    """A process that has ended: its wall and CPU seconds, and what it printed.

    CPU seconds include those of the processes that it started and waited for.
    """

    wall: float
    cpu: float
    output: str


def run_fresh(*command: str | Path) -> Process:
    """Run Python with these arguments in a new process, in the project's folder, to its end."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=errors
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if process.returncode != 0:
            sys.exit(f"python {' '.join(map(str, command))} ended with {process.returncode}:\n{errors.read()}")
        return Process(wall, usage.ru_utime + usage.ru_stime, output.read())


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Send what is printed to the null device, where printing it costs about as much as on a terminal."""
    with (
        open(os.devnull, "w") as nowhere,  # noqa: PTH123
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


@contextlib.contextmanager
def temporary_store() -> Iterator[str]:
    """Yield the URI of a tracking store that does not exist yet, in a folder that is removed again."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        yield f"sqlite:///{Path(folder) / 'mlflow.db'}"


# ---- reporting


class Report:
    """Prints sections of figures and ratios as they are measured, and writes all of them as JSON at the end."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device | None = None) -> None:
        self.arguments = arguments
        self.sections: dict[str, dict[str, object]] = {}
        self.notes: list[str] = []
        self.environment = provenance.environment(device or torch.device("cpu"))
        print(f"== {arguments.name}: {self.environment['hardware']}, {self.environment['threads']} threads, ", end="")
        print(f"torch {self.environment['torch']}")

    def section(
        self,
        title: str,
        figures: Mapping[str, Sample],
        ratios: Mapping[str, Sample],
        *,
        unit: str,
        goals: Mapping[str, str] | None = None,
    ) -> None:
        """Print the medians with the least and the greatest of the rounds; `goals` say what a ratio should reach."""
        goals = goals or {}
        rounds = len(next(iter(figures.values())).rounds)
        print(f"\n{title} ({rounds} {'round' if rounds == 1 else 'rounds'})")
        table = [(name, *_shown(sample)) for name, sample in figures.items()]
        print(tabulate(table, headers=("", unit, "least", "most"), disable_numparse=True, colalign=_ALIGNED))
        if ratios:
            table = [(name, *_shown(sample), goals.get(name, "")) for name, sample in ratios.items()]
            headers = ("ratio", "median", "least", "most", "goal")
            print()
            print(tabulate(table, headers=headers, disable_numparse=True, colalign=(*_ALIGNED, "left")))
        self.sections[title] = {
            "figures": {name: {"unit": unit, **_plain(sample)} for name, sample in figures.items()},
            "ratios": {
                name: {**_plain(sample), **({"goal": goals[name]} if name in goals else {})}
                for name, sample in ratios.items()
            },
        }

    def note(self, text: str) -> None:
        """Print what a reader must know to read the figures."""
        print(text)
        self.notes.append(text)

    def write(self) -> Path:
        """Write `<out>/<name>.json` and return its path."""
        commit = provenance.commit(Path(__file__))
        arguments = self.arguments
        flags = {flag: getattr(arguments, flag) for flag in arguments.settings}
        content = {
            "benchmark": arguments.name,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "git_commit": commit.sha,
            "git_dirty": commit.dirty,
            "settings": {**flags, "quick": arguments.quick, "threads": arguments.threads},
            "environment": self.environment,
            "sections": self.sections,
            "notes": self.notes,
        }
        arguments.out.mkdir(parents=True, exist_ok=True)
        file = arguments.out / f"{arguments.name}.json"
        file.write_text(json.dumps(content, indent=2) + "\n")
        print(f"Written: {file}\n")
        return file


_ALIGNED = ("left", "right", "right", "right")


def _shown(sample: Sample) -> tuple[str, str, str]:
    return _digits(sample.median), _digits(min(sample.rounds)), _digits(max(sample.rounds))


def _digits(value: float) -> str:
    """Show three digits that count, and no exponent."""
    if value == 0:
        return "0"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _plain(sample: Sample) -> dict[str, object]:
    return {
        "median": sample.median,
        "least": min(sample.rounds),
        "most": max(sample.rounds),
        **dataclasses.asdict(sample),
    }
