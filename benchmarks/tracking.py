"""MLflow's share of a run of step 4 as declared, model and figures included.

Each round is a fresh process that trains a few epochs on few images through mnist_lab.running.run, with a clock around
what it calls of mnist_lab.tracking.run, around drawing the figures and around importing MLflow. The training of a full
run is scaled from the same process, its batches to those of 60,000 images; the logging of epochs is scaled to 14.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from measure import (
    TRAIN_IMAGES,
    Laps,
    Report,
    Sample,
    Setting,
    interleave,
    load_experiment,
    make_parser,
    parse,
    run_fresh,
    script_of,
    temporary_store,
)

STEP = "step4_augment_steplr"
GOAL = 0.02


class Clock:
    """Adds up the seconds that functions take, by name; one that another of them calls counts as part of that."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.depth = 0

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
            if self.depth == 0:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with a clock around it; of a context manager, around its entry and its exit."""

        @functools.wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            with self.running(name):
                result = function(*arguments, **named)
            return self._around_context(name, result) if hasattr(result, "__enter__") else result

        return timed

    @contextmanager
    def _around_context(self, name: str, context: Any) -> Iterator[Any]:
        with self.running(name):
            value = context.__enter__()
        try:
            yield value
        finally:  # a run that fails ends this benchmark, so the exit needs no details
            with self.running(name):
                context.__exit__(None, None, None)


def one_run(limit: int, epochs: int) -> dict[str, Any]:
    """Train and track in this process; return the seconds of tracking by part, and those of a full run's training."""
    import dataclasses

    import torch  # noqa: F401 - the training needs it too, so its import is no part of tracking

    clock = Clock()
    with clock.running("import mlflow"):
        import mlflow  # noqa: F401

        import mnist_lab.tracking.run
    from mnist_lab.running import record
    from mnist_lab.running import run as runner
    from mnist_lab.running.job import Job
    from mnist_lab.running.progress import Progress

    record.track = clock.around("track", record.track)
    for name, value in list(vars(mnist_lab.tracking.run.TrackedRun).items()):
        if inspect.isfunction(value) and not name.startswith("_"):
            setattr(mnist_lab.tracking.run.TrackedRun, name, clock.around(name, value))
    record.draw = clock.around("draw figures", record.draw)

    declared = load_experiment(STEP)
    experiment = dataclasses.replace(declared, epochs=epochs)
    full: list[float] = []
    laps = Laps()

    class Timing(Progress):
        def on_batch(self, *ignored: object) -> None:
            laps.lap()

        def on_epoch(self, seed: int, metrics: Any) -> None:
            # The seconds that the epoch took, plus those of the batches that a full one has more.
            more = TRAIN_IMAGES / experiment.batch_size - len(laps.laps)
            full.append(metrics.epoch_seconds + more * laps.batch)
            laps.restart()

    with temporary_store() as uri:
        changes = {"epochs": epochs}
        job = Job(script=script_of(STEP), experiment=experiment, overrides=changes, limit=limit, tracking_uri=uri)
        runner.run(job, 0, Timing())
    clock.seconds["log_epoch"] *= declared.epochs / epochs
    return {"tracking": clock.seconds, "training": declared.epochs * statistics.median(full)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(
        "tracking",
        __doc__,
        rounds=Setting(3, 1, "rounds"),
        limit=Setting(1280, 256, "training images of each epoch; at least two batches"),
        epochs=Setting(4, 1, "epochs"),
    )
    parser.add_argument("--one-run", action="store_true", help=argparse.SUPPRESS)
    arguments = parse(parser, argv)
    if arguments.one_run:
        print(json.dumps(one_run(arguments.limit, arguments.epochs)))
        return
    report = Report(arguments)
    flags = ("--one-run", "--limit", str(arguments.limit), "--epochs", str(arguments.epochs))
    processes = interleave({"a tracked run": lambda: run_fresh(__file__, *flags)}, arguments.rounds)
    runs = [json.loads(process.output.splitlines()[-1]) for process in processes["a tracked run"]]
    parts = {name: Sample(tuple(run["tracking"][name] for run in runs)) for name in runs[0]["tracking"]}
    tracking = Sample(tuple(sum(run["tracking"].values()) for run in runs))
    training = Sample(tuple(run["training"] for run in runs))
    share = "tracking / training"
    report.section(
        "a run of 14 epochs",
        {**parts, "tracking, all of these": tracking, "training, scaled to 60,000 images": training},
        {share: tracking.per(training)},
        unit="s",
        goals={share: f"{GOAL} or less"},
    )
    report.note("open_store includes the first use of a store, which makes its database; later runs are spared that.")
    report.write()


if __name__ == "__main__":
    main()
