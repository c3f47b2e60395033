"""Many writers at once and many runs one after another: no point is lost, nothing grows, and runs take no longer.

The short forms run with every `make test`. `make test-long` runs the long ones and prints their figures; the number of
runs is SOAK_RUNS, 200 if not set.
"""

import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from tabulate import tabulate

from forkserver import processes
from helpers import TINY, TrackedRun, read_runs, read_value
from load_workers import log_points, train_one_after_another, value
from mnist_lab.tracking.store import open_store

WRITERS = 8
SOAK_RUNS = int(os.environ.get("SOAK_RUNS", "200"))
AT_A_TIME = 8
# The first runs of a process import modules and fill caches.
WARM_UP = 3
COMPARED = 20  # runs at either end
# MLflow keeps two artifact stores per run, of the last 512 runs: 150 objects and less than 0.1 MB a run.
OBJECTS_PER_RUN = 500
# The allocator takes a step of 12 to 16 MB at times and then stays there; a leaked figure a run is 33 MB in all.
MEGABYTES, MEGABYTES_PER_RUN = 20, 0.1
SLOWER = 1.10

FILES = {
    "model_summary.txt",
    "environment.json",
    "source/tiny.py",
    "predictions.npz",
    "figures/augmentation.png",
    "figures/confusion.png",
    "figures/learning_rate.png",
    "figures/mistakes.png",
    "figures/training.png",
}
EVERY_EPOCH = {"train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr", "epoch_seconds"}
ONCE = {"num_params", "final_test_accuracy", "best_test_accuracy", "best_epoch", "epochs_at_target", "last", "best"}


def run_at_once(target: Callable[..., None], arguments: Iterable[tuple[Any, ...]], timeout: float) -> list[int | None]:
    """Run a process for each tuple of arguments, all at once, and return their exit codes."""
    started = [processes.Process(target=target, args=each) for each in arguments]
    deadline = time.monotonic() + timeout
    try:
        for process in started:
            process.start()
        for process in started:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in started]
    finally:
        for process in started:
            process.kill()
            process.join()


# ---- many writers


@pytest.mark.parametrize(
    ("epochs", "names"),
    [
        pytest.param(200, ["train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr"], id="200 epochs of 5"),
        pytest.param(1000, ["test_accuracy"], id="1000 epochs of 1", marks=pytest.mark.long),
    ],
)
def test_eight_processes_that_log_at_once_lose_no_point(
    epochs: int, names: list[str], uri: str, database: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store, together = open_store(uri), processes.Barrier(WRITERS)
    before = time.monotonic()

    codes = run_at_once(
        log_points, [(store, writer, epochs, names, together) for writer in range(WRITERS)], timeout=3600
    )

    seconds = time.monotonic() - before
    assert codes == [0] * WRITERS, capfd.readouterr().err
    with closing(sqlite3.connect(database)) as connection:
        query = "SELECT p.value, m.key, m.step, m.value FROM metrics m JOIN params p USING (run_uuid)"
        points = sorted(connection.execute(query).fetchall())
    assert points == sorted(
        (str(writer), name, epoch, value(writer, epoch, number))
        for writer in range(WRITERS)
        for epoch in range(1, epochs + 1)
        for number, name in enumerate(names)
    )
    assert [run.status for run in read_runs(database)] == ["FINISHED"] * WRITERS
    assert read_value(database, "PRAGMA integrity_check") == "ok"
    with capfd.disabled():
        print(f"\n{WRITERS} writers, {len(points):,} points, none lost or doubled, in {seconds:.0f} s")


# ---- many runs


def soak(uri: str, folder: Path, seeds: list[range], timeout: float) -> list[list[dict[str, float]]]:
    """Train the seeds of each range in a process of its own, all at once; return the figures of each process's runs."""
    open_store(uri)
    reports = [folder / f"report {number}.jsonl" for number in range(len(seeds))]
    arguments = [(TINY, uri, each, report) for each, report in zip(seeds, reports, strict=True)]
    assert run_at_once(train_one_after_another, arguments, timeout) == [0] * len(seeds)
    return [[json.loads(line) for line in report.read_text().splitlines()] for report in reports]


def incomplete(runs: list[TrackedRun]) -> list[str]:
    """Return what any of the runs lacks."""
    lacking = []
    for run in runs:
        files = {str(file.relative_to(run.artifacts)) for file in run.artifacts.rglob("*") if file.is_file()}
        steps = {name: [step for step, _ in points] for name, points in run.metrics.items()}
        wanted = {name: [1, 2] for name in EVERY_EPOCH} | {name: [0] for name in ONCE}
        if run.status != "FINISHED":
            lacking.append(f"{run.name}: is {run.status}")
        if missing := FILES - files:
            lacking.append(f"{run.name}: without {missing}")
        if steps != wanted:
            lacking.append(f"{run.name}: has the points {steps}")
        if not {"lr", "batch_size", "epochs", "seed", "optimizer", "dropout"} <= run.params.keys():
            lacking.append(f"{run.name}: has only the params {run.params}")
        if not {"targets", "git_commit", "code_sha256", "verdict_accuracy"} <= run.tags.keys():
            lacking.append(f"{run.name}: has only the tags {run.tags}")
    return lacking


def assert_complete(database: Path, count: int) -> None:
    """Check the runs of `count` seeds, and their models, which MLflow keeps beside them."""
    runs = read_runs(database)
    assert sorted(int(run.params["seed"]) for run in runs) == list(range(count))
    assert incomplete(runs) == []
    with closing(sqlite3.connect(database)) as connection:
        query = "SELECT source_run_id, artifact_location FROM logged_models"
        models = dict(connection.execute(query).fetchall())
    assert models.keys() == {run.run_id for run in runs}
    for location in models.values():
        assert list(Path(location.removeprefix("file://")).rglob("*.pt2")), location
    assert read_value(database, "PRAGMA integrity_check") == "ok"
    assert not list((database.parent / "checkpoints").iterdir())


def assert_nothing_grows(runs: list[dict[str, float]], warm: int = WARM_UP) -> None:
    """Compare a process after its last run with what it was after `warm` runs."""
    first, last, between = runs[warm - 1], runs[-1], len(runs) - warm
    assert max(run["open_files"] for run in runs[warm:]) <= first["open_files"]
    assert last["objects"] - first["objects"] < OBJECTS_PER_RUN * between
    assert last["megabytes"] - first["megabytes"] < MEGABYTES + MEGABYTES_PER_RUN * between


def table(runs: list[dict[str, float]]) -> str:
    """Return the medians of the first and the last runs of a process once it is warm."""
    count = min(COMPARED, (len(runs) - WARM_UP) // 2)
    ends = runs[WARM_UP:][:count], runs[-count:]
    rows = []
    for name, digits in (
        ("wall_seconds", 2),
        ("cpu_seconds", 2),
        ("cpu_yardsticks", 2),
        ("megabytes", 1),
        ("open_files", 0),
        ("objects", 0),
    ):
        first, last = (median(run[name] for run in end) for end in ends)
        rows.append((name, f"{first:,.{digits}f}", f"{last:,.{digits}f}", f"{100 * (last / first - 1):+.1f} %"))
    return tabulate(rows, ("median", f"first {count}", f"last {count}", "change"), disable_numparse=True)


def test_a_few_runs_one_after_another_leave_no_file_open_and_nothing_in_memory(
    uri: str, database: Path, tmp_path: Path
) -> None:
    (runs,) = soak(uri, tmp_path, [range(WARM_UP + 3)], timeout=1800)

    assert_complete(database, WARM_UP + 3)
    assert_nothing_grows(runs)


@pytest.mark.long
@pytest.mark.load
def test_runs_one_after_another_take_no_more_memory_files_or_time(
    uri: str, database: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Time is judged in yardsticks (see `load_workers`): processor time, freed of how busy the machine is."""
    (runs,) = soak(uri, tmp_path, [range(SOAK_RUNS)], timeout=60 * SOAK_RUNS)

    with capfd.disabled():
        print(f"\n{SOAK_RUNS} runs one after another\n{table(runs)}")
    assert_complete(database, SOAK_RUNS)
    assert_nothing_grows(runs, warm=COMPARED)
    times = [run["cpu_yardsticks"] for run in runs]
    assert median(times[-COMPARED:]) < SLOWER * median(times[WARM_UP:][:COMPARED])


@pytest.mark.long
def test_runs_eight_at_a_time_are_all_complete_and_nothing_grows(
    uri: str, database: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bounds = [SOAK_RUNS * number // AT_A_TIME for number in range(AT_A_TIME + 1)]
    seeds = [range(first, end) for first, end in pairwise(bounds)]
    before = time.monotonic()

    reports = soak(uri, tmp_path, seeds, timeout=60 * SOAK_RUNS)

    seconds = time.monotonic() - before
    with capfd.disabled():
        print(f"\n{SOAK_RUNS} runs, {AT_A_TIME} at a time, in {seconds:.0f} s; the first process of the {AT_A_TIME}")
        print(table(reports[0]))
    assert_complete(database, SOAK_RUNS)
    for runs in reports:
        assert_nothing_grows(runs)
