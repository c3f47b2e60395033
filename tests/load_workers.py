"""What the tests of load run in processes of their own: many real runs one after another, and a writer of points."""

import gc
import json
import time
from collections.abc import Mapping
from multiprocessing.synchronize import Barrier
from pathlib import Path

import psutil
import torch
from torch import nn

from forkserver import PATIENCE
from mnist_lab.running import run as runner
from mnist_lab.running.job import Job, read_declaration
from mnist_lab.running.progress import Progress
from mnist_lab.tracking.run import track
from mnist_lab.tracking.store import Store

LIMIT = 256


def train_one_after_another(script: Path, uri: str, seeds: range, report: Path) -> None:
    """Train and track one real run per seed in this process; append a line of figures to `report` after each."""
    process = psutil.Process()
    job = Job(script=script, experiment=read_declaration(script), tracking_uri=uri, limit=LIMIT)
    for seed in seeds:
        measure = _yardstick()
        cpu, wall = time.process_time(), time.perf_counter()
        runner.run(job, seed, Progress())
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        measure += _yardstick()
        gc.collect()
        figures = {
            "seed": seed,
            "cpu_seconds": cpu,
            "wall_seconds": wall,
            "cpu_yardsticks": cpu / measure,
            "megabytes": _own_memory(process) / 2**20,
            "open_files": process.num_fds(),
            "objects": len(gc.get_objects()),
        }
        with report.open("a") as stream:
            stream.write(json.dumps(figures) + "\n")


def _own_memory(process: psutil.Process) -> int:
    """Return the bytes in memory without those of mapped files, which the system drops and reads again as it likes."""
    memory = process.memory_info()
    return memory.rss - getattr(memory, "shared", 0)


def _yardstick() -> float:
    """Return the processor time of a work that is always the same, Python's and torch's in about equal parts.

    Where other programs share a core's caches and clock, processor time itself can be twice as long, and the yardstick
    with it.
    """
    before = time.process_time()
    kept: list[object] = []
    for number in range(60_000):
        kept.append({"number": number, "text": str(number)})
    images, weights = torch.ones(64, 8, 28, 28), torch.ones(8, 8, 3, 3)
    for _ in range(12):
        nn.functional.conv2d(images, weights)
    return time.process_time() - before


def log_points(store: Store, writer: int, epochs: int, names: list[str], together: Barrier) -> None:
    """Log one run of `epochs` points of each metric, beginning when all writers are there."""
    together.wait(PATIENCE)
    with track(store, f"writer {writer}", params={"writer": writer}, tags={}) as run:
        for epoch in range(1, epochs + 1):
            values: Mapping[str, float] = {name: value(writer, epoch, number) for number, name in enumerate(names)}
            run.log_epoch(epoch, values)


def value(writer: int, epoch: int, number: int) -> float:
    """Return the value that a writer logs of a metric: another one for each."""
    return writer * 1_000_000 + epoch * 10 + number
