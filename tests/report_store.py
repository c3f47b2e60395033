"""A small real store for the report and the browser, and a place to publish a store's runs into."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mnist_lab.data import Mnist
from mnist_lab.results import publish as files
from mnist_lab.tracking.store import Store
from run_writer import PAGE, TARGETS, log_predictions, write_run

T0 = 1_790_000_000_000
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
