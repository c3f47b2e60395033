"""Peak memory of a run of step 4, in a fresh process, and how it grows on the way.

Shown is the peak of the resident set up to each point: after the imports, with the data loaded, after the first batch,
after the first evaluation, and at the end with figures and model.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from measure import Report, Sample, Setting, interleave, make_parser, parse, run_fresh, script_of, temporary_store

GIGABYTE = 10**9
GOAL = 1.5
POINTS = ("imports", "data loaded", "first batch", "first evaluation", "end of the run")
STEP = "step4_augment_steplr"


def peak() -> float:
    """Return the greatest resident set of this process so far, in gigabytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIGABYTE
    # Linux's ru_maxrss would count the process that started this one too: it is carried over.
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")) / GIGABYTE


def imports_alone() -> dict[str, float]:
    """Return the peak of a process that imports the two large libraries and nothing of the lab."""
    import mlflow  # noqa: F401
    import torch  # noqa: F401

    return {"import torch, mlflow": peak()}


def one_run(limit: int, epochs: int) -> dict[str, float]:
    """Train in this process and return the peak at each point."""
    import dataclasses

    from measure import load_experiment

    from mnist_lab.running import run as runner
    from mnist_lab.running.job import Job
    from mnist_lab.running.progress import Progress

    peaks = {"imports": peak()}

    def note(point: str) -> None:
        peaks.setdefault(point, peak())

    load = runner.load_mnist

    def load_and_note(*arguments: object, **named: object) -> object:
        mnist = load(*arguments, **named)
        note("data loaded")
        return mnist

    runner.load_mnist = load_and_note

    class Noting(Progress):
        def on_batch(self, *ignored: object) -> None:
            note("first batch")

        def on_epoch(self, *ignored: object) -> None:
            note("first evaluation")

    experiment = dataclasses.replace(load_experiment(STEP), epochs=epochs)
    with temporary_store() as uri:
        changes = {"epochs": epochs}
        job = Job(script=script_of(STEP), experiment=experiment, overrides=changes, limit=limit, tracking_uri=uri)
        runner.run(job, 0, Noting())
    note("end of the run")
    return peaks


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(
        "memory",
        __doc__,
        rounds=Setting(3, 1, "rounds"),
        limit=Setting(2560, 256, "training images of each epoch; all 60,000 are loaded"),
        epochs=Setting(1, 1, "epochs"),
    )
    parser.add_argument("--in-process", choices=("run", "imports"), help=argparse.SUPPRESS)
    arguments = parse(parser, argv)
    if arguments.in_process is not None:
        run = arguments.in_process == "run"
        print(json.dumps(one_run(arguments.limit, arguments.epochs) if run else imports_alone()))
        return
    report = Report(arguments)
    flags = ("--limit", str(arguments.limit), "--epochs", str(arguments.epochs))
    processes = interleave(
        {what: partial(run_fresh, __file__, "--in-process", what, *flags) for what in ("run", "imports")},
        arguments.rounds,
    )
    runs, imports = (
        [json.loads(process.output.splitlines()[-1]) for process in processes[what]] for what in ("run", "imports")
    )
    bare = Sample(tuple(peaks["import torch, mlflow"] for peaks in imports))
    peaks = {point: Sample(tuple(run[point] for run in runs)) for point in POINTS}
    whole = peaks[POINTS[-1]]
    goal = f"peak / the goal of {GOAL} GB"
    ratios = {
        goal: Sample(tuple(value / GOAL for value in whole.rounds)),
        "peak / import torch, mlflow": whole.per(bare),
    }
    report.section(
        "peak so far", {"import torch, mlflow": bare, **peaks}, ratios, unit="GB", goals={goal: "less than 1"}
    )
    report.write()


if __name__ == "__main__":
    main()
