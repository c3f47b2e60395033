"""Peak memory of a run of step 4, in a fresh process, and how it grows on the way.

Shown is the peak of the resident set up to each point: after the imports, with the data loaded and the declaration
tried, after the first batch, after the first evaluation, and at the end with figures and model.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from measure import Report, Sample, Setting, interleave, make_parser, parse, run_fresh, train

GIGABYTE = 10**9
POINTS = ("imports", "data loaded and tried", "first batch", "first evaluation", "end of the run")
BARE = "import torch, mlflow"
IMPORTS = f"{BARE}; import sys; sys.path.append('benchmarks'); from memory import peak; print(peak())"


def peak() -> float:
    """Return the greatest resident set of this process so far, in gigabytes."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux's ru_maxrss would count the process that started this one too: it is carried over
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / GIGABYTE
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIGABYTE


def one_run(limit: int, epochs: int) -> dict[str, float]:
    """Train in this process and return the peak at each point."""
    import mnist_lab.running.run  # noqa: F401
    from mnist_lab.running.progress import Progress

    peaks = {POINTS[0]: peak()}

    class Noting(Progress):
        def on_run(self, *ignored: object) -> None:
            peaks[POINTS[1]] = peak()

        def on_batch(self, *ignored: object) -> None:
            peaks.setdefault(POINTS[2], peak())

        def on_epoch(self, *ignored: object) -> None:
            peaks.setdefault(POINTS[3], peak())

    train(limit, epochs, Noting())
    return peaks | {POINTS[4]: peak()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(
        "memory",
        __doc__,
        rounds=Setting(3, 1, "rounds"),
        limit=Setting(2560, 256, "training images of each epoch; all 60,000 are loaded"),
        epochs=Setting(1, 1, "epochs"),
    )
    parser.add_argument("--one-run", action="store_true", help=argparse.SUPPRESS)
    arguments = parse(parser, argv)
    if arguments.one_run:
        print(json.dumps(one_run(arguments.limit, arguments.epochs)))
        return
    report = Report(arguments)
    flags = ("--one-run", "--limit", arguments.limit, "--epochs", arguments.epochs)
    ways = {"run": partial(run_fresh, __file__, *flags), BARE: partial(run_fresh, "-c", IMPORTS)}
    processes = interleave(ways, arguments.rounds)
    peaks = {BARE: Sample([process.result for process in processes[BARE]])}
    peaks |= {point: Sample([process.result[point] for process in processes["run"]]) for point in POINTS}
    report.section("peak so far", peaks, {f"peak / {BARE}": peaks[POINTS[-1]].per(peaks[BARE])}, unit="GB")
    report.write()


if __name__ == "__main__":
    main()
