"""Stored predictions that are no predictions: one sentence says so, and the rest goes on."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest

from mnist_lab import results
from mnist_lab.errors import LabError
from mnist_lab.results.report import write_report
from mnist_lab.tracking.store import Store, open_store
from mnist_lab.verdicts.comparison import Pair
from run_writer import write_run

T0 = 1_700_000_000_000
TRUTH = np.arange(50, dtype=np.uint8) % 10
GOOD = {"truth": TRUTH, "prediction": TRUTH, "logits": np.eye(10, dtype=np.float32)[TRUTH]}


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **(GOOD | arrays))
    return file.getvalue()


def log_predictions(store: Store, step: str, content: bytes, folder: Path) -> str:
    run_id: str = write_run(store, step, 0, [99.0], start_time=T0).info.run_id
    file = folder / "predictions.npz"
    file.write_bytes(content)
    mlflow.MlflowClient(store.uri).log_artifact(run_id, str(file))
    return run_id


DAMAGED: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", ""),
    "cut": (lambda: npz()[:200], ""),
    "flipped": (lambda: npz()[:60] + bytes([npz()[60] ^ 255]) + npz()[61:], ""),
    "missing": (lambda: npz(truth=TRUTH).replace(b"logits", b"lagits"), "logits"),
    "pickled": (lambda: npz(truth=np.array([{}] * 50)), "allow_pickle=False"),
    "longer": (lambda: npz(prediction=np.zeros(51, np.uint8)), "prediction"),
    "none": (lambda: npz(truth=TRUTH[:0], prediction=TRUTH[:0]), "truth"),
    "eleven": (lambda: npz(truth=TRUTH + 9), "digit from 0 to 9"),
    "flat logits": (lambda: npz(logits=np.zeros(500, np.float32)), "logits"),
    "nan": (lambda: npz(logits=np.full((50, 10), np.nan, np.float32)), "logits"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_file_that_holds_no_predictions_is_refused_with_a_sentence(name: str, uri: str, tmp_path: Path) -> None:
    content, reason = DAMAGED[name]
    run_id = log_predictions(open_store(uri), "a", content(), tmp_path)
    with pytest.raises(LabError, match=rf"^run {run_id}: its predictions\.npz can't be read: .*{reason}"):
        results.predictions(run_id, tracking_uri=uri)


def test_it_is_said_whether_a_run_keeps_predictions(uri: str, tmp_path: Path) -> None:
    store = open_store(uri)
    kept = log_predictions(store, "good", npz(), tmp_path)
    lost = write_run(store, "bare", 0, [99.0], start_time=T0).info.run_id
    said = [results.keeps_predictions(run_id, tracking_uri=uri) for run_id in (kept, lost, "0" * 32)]
    assert said == [True, False, False]


def test_predictions_of_other_images_are_not_compared(uri: str, tmp_path: Path) -> None:
    store = open_store(uri)
    log_predictions(store, "a", npz(), tmp_path)
    log_predictions(store, "b", npz(truth=(TRUTH + 1) % 10), tmp_path)
    log_predictions(store, "c", npz(**{name: array[:40] for name, array in GOOD.items()}), tmp_path)
    log_predictions(store, "d", b"", tmp_path)
    pairs = [Pair("a", "a", "none"), Pair("a", "b", "labels"), Pair("a", "c", "number"), Pair("a", "d", "damaged")]
    found, refused = results.compare_pairs(pairs, tracking_uri=uri)
    assert [comparison.b for comparison in found] == ["a"]
    assert ["not of the same images" in sentence for sentence in refused] == [True, True, False]


def test_a_report_goes_on_without_predictions_that_wont_do(uri: str, tmp_path: Path) -> None:
    store = open_store(uri)
    short, damaged = (log_predictions(store, step, content, tmp_path) for step, content in (("a", npz()), ("b", b"")))
    html, _ = write_report(tmp_path / "reports", tracking_uri=uri, scripts=tmp_path)
    page = html.read_text("utf-8")
    assert f"No confusion matrix and no mistakes: run {short} has predictions of 50 images, not of 10,000." in page
    assert f"No confusion matrix and no mistakes: run {damaged}: its predictions.npz can&#39;t be read" in page
