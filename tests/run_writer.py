"""Write runs into a real store as the runner does, but without training: for what only reads or publishes them."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow.entities import Metric, Param, Run, RunTag

from mnist_lab.data import Mnist
from mnist_lab.measures import short_figures
from mnist_lab.results import publish as files
from mnist_lab.tracking.store import Store

STEP4 = {
    **{"batch_size": "128", "epochs": "3", "optimizer": "SGD", "lr": "0.1", "momentum": "0.9"},
    **{"scheduler": "StepLR", "step_size": "2", "gamma": "0.6", "device": "cpu"},
}
T0 = 1_790_000_000_000  # milliseconds since 1970
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


REPORTED = {"reported_best_test_accuracy": "99.46", "reported_best_train_accuracy": "99.32"}
Sample = tuple[str, int, Sequence[float]]  # step, seed, test accuracy of each epoch in percent
RUNS: list[Sample] = [  # the oldest run first
    ("step1_plain", 0, (97.5, 98.9, 98.97)),
    ("step1_plain", 1, (97.1, 98.8, 98.83)),
    ("step2_better", 0, (98.0, 98.1, 98.2)),  # the later run of seed 0 counts instead
    ("step2_better", 1, (98.3, 99.86, 99.83)),
    ("step2_better", 0, (98.1, 99.80, 99.81)),
]
NUM_PARAMS = {"step1_plain": 10_970}


def write_sample_store(store: Store, mnist: Mnist, runs: Sequence[Sample] = RUNS, **tags: str) -> Store:
    """Write these runs into a store, a minute after each other, each with its `predictions.npz`."""
    truth, tags = mnist.test_labels.numpy(), TARGETS | (tags or REPORTED)
    for number, (step, seed, accuracies) in enumerate(runs):
        start, num_params = T0 + number * 60_000, NUM_PARAMS.get(step, 7_852)
        run = write_run(store, step, seed, accuracies, start_time=start, num_params=num_params, tags=tags)
        log_predictions(store, run, truth=truth, **predict(truth, accuracies[-1]))
    return store


def predict(truth: np.ndarray, accuracy: float) -> dict[str, np.ndarray]:
    """Return predictions of that accuracy: the first images are read as the next digit, the first most confidently."""
    wrong = round(len(truth) * (1 - accuracy / 100))
    prediction = truth.copy()
    prediction[:wrong] = (truth[:wrong] + 1) % 10
    logits = np.zeros((len(truth), 10), dtype=np.float32)
    logits[np.arange(len(truth)), prediction] = np.linspace(9, 3, len(truth))
    return {"prediction": prediction, "logits": logits}


@dataclass(frozen=True)
class Published:
    uri: str
    folder: Path
    readme: Path

    def publish(self, *, replace: bool = False) -> list[str]:
        changes: list[str] = []
        files.publish(self.folder, self.readme, replace=replace, tracking_uri=self.uri, progress=changes.append)
        return changes


def new_place(uri: str, place: Path) -> Published:
    (place / "results").mkdir(parents=True)
    (place / "README.md").write_text(PAGE)
    (place / "results" / "README.md").write_text("<!-- runs -->\n<!-- /runs -->\n")
    return Published(uri, place / "results", place / "README.md")


def publish_sample(store: Store, mnist: Mnist, place: Path) -> Published:
    named = [(step, seed) for step in ("step1_baseline", "step2_dropout") for seed in range(3)] + [("idea", 5)]
    runs = [(step, seed, (98.0 + seed / 10, 99.3 + number / 100)) for number, (step, seed) in enumerate(named)]
    hardware = {"hardware": "a CPU, 2 cores, AVX2", "torch": "2.15.0", "threads": "1"}
    reported = {"reported_best_test_accuracy": "99.46"}
    write_sample_store(store, mnist, runs, code_sha256="0123456789abcdef", **hardware, **reported)
    published = new_place(store.uri, place)
    published.publish()
    return published
