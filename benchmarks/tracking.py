"""MLflow's share of a run of step 4 as declared, model and figures included.

Each round is a fresh process that trains a few epochs on few images, with a clock around importing MLflow, opening the
store, all that is logged, and drawing the figures. The training of a full run is scaled from the same process, its
batches to those of 60,000 images; the logging of epochs is scaled to 14.
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
    STEP,
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
    train,
)


class Clock:
    """Adds up the seconds that functions take, by name; one that another of them calls counts as part of that."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.is_running = False

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        if self.is_running:
            yield
            return
        start, self.is_running = time.perf_counter(), True
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self.is_running = False

    def around(self, owner: Any, name: str) -> None:
        """Put the clock around a function of a module or class."""
        function: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            with self.running(name):
                return function(*arguments, **named)

        setattr(owner, name, timed)


def one_run(limit: int, epochs: int) -> dict[str, Any]:
    """Train and track in this process; return the seconds of tracking by part, and those of a full run's training."""
    import torch  # noqa: F401 - the training needs it too, so its import is no part of tracking

    clock = Clock()
    with clock.running("import mlflow"):
        import mlflow  # noqa: F401

        from mnist_lab.tracking.run import TrackedRun
    from mnist_lab.running import run as runner
    from mnist_lab.running.progress import Progress

    clock.around(runner, "open_store")
    clock.around(runner.Record, "draw")
    begin_and_end = runner.track

    @contextmanager
    def track(*arguments: Any, **named: Any) -> Iterator[Any]:
        context = begin_and_end(*arguments, **named)
        with clock.running("track"):
            tracked = context.__enter__()
        yield tracked
        with clock.running("track"):
            context.__exit__(None, None, None)

    runner.track = track
    for name, value in list(vars(TrackedRun).items()):
        if inspect.isfunction(value) and not name.startswith("_"):
            clock.around(TrackedRun, name)

    declared = load_experiment(STEP)
    full: list[float] = []
    laps = Laps()

    class Timing(Progress):
        def on_batch(self, *ignored: object) -> None:
            laps.lap()

        def on_epoch(self, seed: int, metrics: Any) -> None:
            # The seconds that the epoch took, plus those of the batches that a full one has more.
            more = TRAIN_IMAGES / declared.batch_size - len(laps.laps)
            full.append(metrics.epoch_seconds + more * laps.batch)
            laps.restart()

    train(limit, epochs, Timing())
    clock.seconds["log_missing"] *= declared.epochs / epochs
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
    flags = ("--one-run", "--limit", arguments.limit, "--epochs", arguments.epochs)
    (processes,) = interleave({"a tracked run": lambda: run_fresh(__file__, *flags)}, arguments.rounds).values()
    runs = [process.result for process in processes]
    parts = {name: Sample([run["tracking"][name] for run in runs]) for name in runs[0]["tracking"]}
    tracking = Sample([sum(run["tracking"].values()) for run in runs])
    training = Sample([run["training"] for run in runs])
    report.section(
        "a run of 14 epochs",
        {**parts, "tracking, all of these": tracking, "training, scaled to 60,000 images": training},
        {"tracking / training": tracking.per(training)},
        unit="s",
    )
    report.note("open_store includes the first use of a store, which makes its database; later runs are spared that.")
    report.write()


if __name__ == "__main__":
    main()
