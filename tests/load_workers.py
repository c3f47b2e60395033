"""A writer of points, which tests of load run in processes of their own."""

import os
from collections.abc import Mapping
from multiprocessing.synchronize import Barrier

from forkserver import PATIENCE
from mnist_lab.tracking.run import track
from mnist_lab.tracking.store import Store


def log_points(
    store: Store, writer: int, epochs: int, names: list[str], together: Barrier, env: Mapping[str, str] | None = None
) -> None:
    """Log one run of `epochs` points of each metric, beginning when all writers are there."""
    os.environ.update(env or {})
    together.wait(PATIENCE)
    with track(store, f"writer {writer}", params={"writer": writer}, tags={}) as run:
        for epoch in range(1, epochs + 1):
            run.log_epoch(epoch, {name: value(writer, epoch, number) for number, name in enumerate(names)})


def value(writer: int, epoch: int, number: int) -> float:
    """Return the value that a writer logs of a metric: another one for each."""
    return writer * 1_000_000 + epoch * 10 + number
