"""A store whose runs were published into a folder."""

from collections.abc import Callable

import pytest

from mnist_lab.data import Mnist
from mnist_lab.tracking.store import Store
from report_store import Published, new_place, predict
from run_writer import T0, TARGETS, log_predictions, write_run


@pytest.fixture(scope="session")
def published(new_store: Callable[[], Store], mnist: Mnist, tmp_path_factory: pytest.TempPathFactory) -> Published:
    """Publish two steps of three seeds and one of one, for tests that change nothing of it."""
    store, truth = new_store(), mnist.test_labels.numpy()
    tags = TARGETS | {
        **{"code_sha256": "0123456789abcdef", "threads": "1", "hardware": "a CPU, 2 cores, AVX2"},
        **{"torch": "2.15.0", "reported_best_test_accuracy": "99.46"},
    }
    runs = [(step, seed) for step in ("step1_baseline", "step2_dropout") for seed in range(3)] + [("idea", 5)]
    for number, (step, seed) in enumerate(runs):
        accuracies = [98.0 + seed / 10, 99.3 + number / 100]
        run = write_run(store, step, seed, accuracies, start_time=T0 + 60_000 * number, tags=tags)
        log_predictions(store, run, truth=truth, **predict(truth, accuracies[-1]))
    published = new_place(store.uri, tmp_path_factory.mktemp("published") / "here")
    published.publish()
    return published
