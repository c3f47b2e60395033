"""A seed on a Ray cluster of this machine, against the same seed in a process of the lab.

Both train the same seeds of step 4, as many at once as there are cores, within one command each: what a command costs
by itself (connecting, looking at the nodes, sending the code) is shown apart, as it counts once. And how many tasks a
second the cluster takes that do nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import pandas as pd
from measure import Report, Sample, Setting, interleave, make_parser, parse, run_fresh, script_of, temporary_store

from mnist_lab import results

STEP = "step4_augment_steplr"
EMPTY_TASKS = 200
EPOCHS = 14  # of a run, of which the share is told


def study(seeds: int, limit: int, *flags: str) -> tuple[float, float]:
    """Train a study of one epoch in a fresh process; return its wall seconds, and the mean seconds of a run."""
    with temporary_store() as uri:
        common = ("--seeds", str(seeds), "--limit", str(limit), "--epochs", "1", "--tracking-uri", uri)
        process = run_fresh(script_of(STEP), *common, *flags)
        runs = results.run_table(columns="all", include_overrides=True, tracking_uri=uri)
    assert len(runs) == seeds, f"{len(runs)} of {seeds} seeds have finished"
    return process.wall, 60 * float(pd.Series(runs["minutes"]).mean())


def tasks_per_second() -> float:
    """Return how many tasks that do nothing a cluster of this machine runs in a second."""
    import ray

    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="critical")
    try:
        nothing = ray.remote(num_cpus=1)(lambda: None)
        ray.get([nothing.remote() for _ in range(20)])  # its workers are there from now on
        start = time.perf_counter()
        ray.get([nothing.remote() for _ in range(EMPTY_TASKS)])
        return EMPTY_TASKS / (time.perf_counter() - start)
    finally:
        ray.shutdown()


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(
        "cluster",
        __doc__,
        rounds=Setting(5, 1, "rounds"),
        seeds=Setting(4, 2, "seeds of a study"),
        limit=Setting(12_800, 640, "training images of the epoch"),
    )
    arguments = parse(parser, argv)
    report = Report(arguments)
    ways = {
        "processes": lambda: study(arguments.seeds, arguments.limit),
        "cluster": lambda: study(arguments.seeds, arguments.limit, "--cluster", "auto"),
    }
    measured = interleave(ways, arguments.rounds)
    walls = {name: Sample(tuple(wall for wall, _ in measured[name])) for name in ways}
    runs = {name: Sample(tuple(run for _, run in measured[name])) for name in ways}
    report.section(
        "a study from start to end", walls, {"cluster / processes": walls["cluster"].per(walls["processes"])}, unit="s"
    )
    report.section(
        "a run from its start to its end",
        runs,
        {"cluster / processes": runs["cluster"].per(runs["processes"])},
        unit="s",
    )
    rates = Sample(tuple(tasks_per_second() for _ in range(arguments.rounds)))
    report.section("tasks that do nothing", {"cluster": rates}, {}, unit="per second")
    report.write()


if __name__ == "__main__":
    main()
