"""Many writers at once and many runs one after another: no point is lost, and nothing grows.

`make test-long` has more runs: SOAK_RUNS, 200 if not set.
"""

import gc
import json
import os
import platform
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from forkserver import processes
from helpers import TINY, TrackedRun, log_points, point, read_runs, read_value
from mnist_lab.running import run as runner
from mnist_lab.running.job import Job, read_declaration
from mnist_lab.running.machine import keep_freed_memory, set_threads
from mnist_lab.running.progress import Progress
from mnist_lab.tracking.store import open_store

SOAK_RUNS = int(os.environ.get("SOAK_RUNS", "200"))
WARM_UP = 3  # the first runs of a process import modules and fill caches
# MLflow keeps two artifact stores per run, of the last 512 runs: 150 objects and less than 0.1 MB a run.
OBJECTS_PER_RUN = 500
# The allocator takes a step of 12 to 16 MB at times and then stays there; a leaked figure a run is 33 MB in all.
MEGABYTES, MEGABYTES_PER_RUN = 20, 0.1

FILES = {
    *("model_summary.txt", "environment.json", "source/tiny.py", "predictions.npz"),
    *(f"figures/{name}.png" for name in ("augmentation", "confusion", "learning_rate", "mistakes", "training")),
}
EVERY_EPOCH = {"train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr", "epoch_seconds"}
ONCE = {"num_params", "final_test_accuracy", "best_test_accuracy", "best_epoch", "epochs_at_target", "last", "best"}


# ---- in processes of their own


def train_one_after_another(uri: str, seeds: range, report: Path) -> None:
    process = psutil.Process()
    job = Job(script=TINY, experiment=read_declaration(TINY), tracking_uri=uri, limit=256)
    for seed in seeds:
        runner.run(job, seed, Progress())
        gc.collect()
        memory = process.memory_info()
        # Without mapped files, which the system drops and reads again as it likes.
        megabytes = (memory.rss - getattr(memory, "shared", 0)) / 2**20
        with report.open("a") as stream:
            stream.write(json.dumps([megabytes, process.num_fds(), len(gc.get_objects())]) + "\n")


def run_at_once(target: Callable[..., None], *arguments: tuple[Any, ...]) -> None:
    started = [processes.Process(target=target, args=each) for each in arguments]
    try:
        for process in started:
            process.start()
        for process in started:
            process.join(3600)
        assert [process.exitcode for process in started] == [0] * len(started)
    finally:
        for process in started:
            process.kill()
            process.join()


# ---- many writers


@pytest.mark.parametrize(("writers", "epochs"), [(4, 50), pytest.param(8, 1000, marks=pytest.mark.long)])
def test_processes_that_log_at_once_lose_no_point(writers: int, epochs: int, uri: str, database: Path) -> None:
    store, together, names = open_store(uri), processes.Barrier(writers), ["train_loss", "test_loss"]

    run_at_once(log_points, *((store, writer, epochs, names, together, {}) for writer in range(writers)))

    runs = sorted(read_runs(database), key=lambda run: run.params["writer"])
    assert [run.status for run in runs] == ["FINISHED"] * writers
    for writer, run in enumerate(runs):
        for number, name in enumerate(names):
            assert run.metrics[name] == [(epoch, point(writer, epoch, number)) for epoch in range(1, epochs + 1)]
    assert read_value(database, "PRAGMA integrity_check") == "ok"


# ---- many runs


def check_complete(run: TrackedRun) -> None:
    files = {str(file.relative_to(run.artifacts)) for file in run.artifacts.rglob("*") if file.is_file()}
    steps = {name: [step for step, _ in points] for name, points in run.metrics.items()}
    assert run.status == "FINISHED"
    assert files >= FILES
    assert steps == {name: [1, 2] for name in EVERY_EPOCH} | {name: [0] for name in ONCE}


@pytest.mark.parametrize("count", [WARM_UP + 3, pytest.param(SOAK_RUNS, marks=[pytest.mark.long, pytest.mark.load])])
def test_runs_one_after_another_leave_nothing_open(count: int, uri: str, database: Path, tmp_path: Path) -> None:
    open_store(uri)
    report = tmp_path / "report.jsonl"

    run_at_once(train_one_after_another, (uri, range(count), report))

    runs = read_runs(database)
    assert sorted(int(run.params["seed"]) for run in runs) == list(range(count))
    for run in runs:
        check_complete(run)
    assert read_value(database, "SELECT COUNT(DISTINCT source_run_id) FROM logged_models") == count
    assert not list((database.parent / "checkpoints").iterdir())
    figures = [json.loads(line) for line in report.read_text().splitlines()]
    warm = WARM_UP if count < 50 else 20
    (megabytes, open_files, objects), (last_megabytes, _, last_objects) = figures[warm - 1], figures[-1]
    assert max(files for _, files, _ in figures[warm:]) <= open_files
    assert last_objects - objects < OBJECTS_PER_RUN * (count - warm)
    assert last_megabytes - megabytes < MEGABYTES + MEGABYTES_PER_RUN * (count - warm)


# ---- threads and memory

PAGES = (48 << 20) // 4096  # of a block that glibc gives back by default, since it is larger than 32 MiB


def test_a_run_takes_every_core_that_it_may_use_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr("mnist_lab.running.machine.available_cores", lambda: 4)
        for wanted, threads in ((None, 4), (3, 3)):
            set_threads(wanted)
            assert torch.get_num_threads() == threads
        torch.set_num_threads(2)
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        set_threads(None)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_blocks_that_are_freed_are_not_fetched_from_the_system_again() -> None:
    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            torch.ones(48 << 18)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    keep_freed_memory()
    faults()

    assert 20 * faults() < PAGES
