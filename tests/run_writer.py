"""Write runs into a real store as the runner does, but without training: for what only reads them."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow.entities import Metric, Param, Run, RunTag

from mnist_lab.tracking.store import Store
from mnist_lab.verdicts.measures import short_figures

STEP4 = {
    "batch_size": "128",
    "epochs": "3",
    "optimizer": "SGD",
    "lr": "0.1",
    "momentum": "0.9",
    "scheduler": "StepLR",
    "step_size": "2",
    "gamma": "0.6",
    "device": "cpu",
}
T0 = 1_700_000_000_000  # milliseconds since 1970
PAGE = """# Page

Before.

<!-- results -->
old
<!-- /results -->

Between.

<!-- effects -->
<!-- /effects -->

After.
"""
TARGETS = {"target_accuracy": "99.4", "target_params": "10000", "target_epochs": "15"}


def write_run(
    store: Store,
    step: str,
    seed: int,
    test_accuracies: Sequence[float],
    *,
    start_time: int,
    num_params: int = 7852,
    params: Mapping[str, str] = STEP4,
    tags: Mapping[str, str] = TARGETS,
    status: str | None = "FINISHED",
) -> Run:
    """Write one run whose epochs had these test accuracies (in percent); status None leaves it RUNNING.

    start_time: milliseconds since 1970; the run ends a minute later.
    """
    client = mlflow.MlflowClient(store.uri)
    tags = {"step": step, "overrides": "", "git_commit": "abc", "git_dirty": "false", "hardware": "a CPU", **tags}
    run = client.create_run(store.experiment_id, start_time=start_time, tags=tags, run_name=f"{step} seed {seed}")
    metrics = []
    for epoch, accuracy in enumerate(test_accuracies, start=1):
        values = {
            "train_loss": 1 / epoch,
            "train_accuracy": accuracy - 0.1,
            "test_loss": (100 - accuracy) / 30,
            "test_accuracy": accuracy,
            "lr": 0.1 * 0.6 ** ((epoch - 1) // 2),
            "epoch_seconds": 20.0 + epoch,
        }
        metrics += [Metric(name, value, start_time + epoch, epoch) for name, value in values.items()]
    if status == "FINISHED" and test_accuracies:
        once = {
            "num_params": num_params,
            "final_test_accuracy": test_accuracies[-1],
            "best_test_accuracy": max(test_accuracies),
            "best_epoch": 1 + list(test_accuracies).index(max(test_accuracies)),
            "epochs_at_target": sum(accuracy >= 99.4 for accuracy in test_accuracies),
        }
        once |= short_figures(once)
        metrics += [Metric(name, float(value), start_time + 99, 0) for name, value in once.items()]
    all_params = {**params, "epochs": str(max(1, len(test_accuracies))), "seed": str(seed)}
    client.log_batch(
        run.info.run_id,
        metrics=metrics,
        params=[Param(name, value) for name, value in all_params.items()],
        tags=[RunTag("targets", "met")] if status == "FINISHED" else [],
    )
    if status is not None:
        client.set_terminated(run.info.run_id, status=status, end_time=start_time + 60_000)
    return client.get_run(run.info.run_id)


def write_seeds(store: Store, step: str, *accuracies: float, **more: Any) -> None:
    """Write a run of one epoch for each of these accuracies: seeds 0, 1, 2 and so on; `more` is `write_run`'s."""
    for seed, accuracy in enumerate(accuracies):
        write_run(store, step, seed, [accuracy], start_time=T0 + seed, **more)


def log_predictions(store: Store, run: Run, **arrays: np.ndarray) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "predictions.npz")
        np.savez_compressed(file, **arrays)
        store.client.log_artifact(run.info.run_id, str(file))
