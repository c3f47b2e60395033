"""What a trained network says of each test image, as its run stored it."""

from __future__ import annotations

import math
import tempfile
from functools import cache
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from scipy import special

from mnist_lab.data import load_mnist
from mnist_lab.errors import LabError, text_of, without_password
from mnist_lab.paths import tracking_uri as resolve_uri
from mnist_lab.results.runs import reading
from mnist_lab.tracking.sqlite import check_readable, follow_move

MISTAKES = "mistakes.csv"  # an artifact of a restored run: image, prediction, confidence


def predictions(run_id: str, *, tracking_uri: str | None = None) -> pd.DataFrame:
    """Return what a run's trained network says of each of the 10,000 test images, in their order.

    Columns: truth, prediction, confidence (softmax of the predicted digit), logit_0 to logit_9. Of a restored run, only
    mistakes are known: other images have no confidence, and there are no logits.

    Raises:
        LabError: if there is no such run, or it has not finished, or stored no predictions that can be read.
    """
    uri = resolve_uri(tracking_uri)
    check_readable(uri)
    follow_move(uri)
    with reading(uri):
        try:
            run = mlflow.MlflowClient(uri).get_run(run_id)
        except MlflowException as error:
            raise LabError(f"run_id: there is no run {run_id!r} in {without_password(uri)}") from error
    return predictions_of(run, uri)


def predictions_of(run: Run, uri: str) -> pd.DataFrame:
    """Return `predictions` of a run that was loaded with its artifacts; raises LabError."""
    run_id = run.info.run_id
    if run.info.status != "FINISHED":
        raise LabError(f"run {run_id} is {run.info.status}, not FINISHED: it has no predictions")
    name, read = (MISTAKES, _from_mistakes) if "restored" in run.data.tags else ("predictions.npz", _from_logits)
    with tempfile.TemporaryDirectory() as folder, reading(uri):
        artifacts = get_artifact_repository(run.info.artifact_uri, tracking_uri=uri)
        if name not in {artifact.path for artifact in artifacts.list_artifacts()}:
            if name == MISTAKES:
                raise LabError(f"run {run_id} was restored, and which images it got wrong was not kept")
            raise LabError(f"run {run_id} has no predictions: there is no {name} among its artifacts")
        file = Path(artifacts.download_artifacts(name, folder))  # type: ignore[no-untyped-call]
        try:
            return read(file)
        except Exception as error:  # a file from elsewhere breaks zip, zlib, numpy and pandas in many ways
            raise LabError(f"run {run_id}: its {name} can't be read: {text_of(error)}") from error


def keeps_predictions(run_id: str, *, tracking_uri: str | None = None) -> bool:
    """Say whether `predictions` has something to tell of a run; of some published ones it was not kept."""
    try:
        predictions(run_id, tracking_uri=tracking_uri)
    except LabError:
        return False
    return True


@cache
def _test_labels() -> np.ndarray:
    return load_mnist().test_labels.numpy()


def _from_mistakes(file: Path) -> pd.DataFrame:
    """Return what a restored run's network said, as far as it is known: by its mistakes, and the labels of MNIST."""
    mistakes = pd.read_csv(file, index_col="image")
    truth = _test_labels()
    table = pd.DataFrame({"truth": truth, "prediction": truth, "confidence": math.nan})
    table.loc[mistakes.index, ["prediction", "confidence"]] = mistakes[["prediction", "confidence"]]
    return table.astype({"prediction": "int64"})


def _from_logits(file: Path) -> pd.DataFrame:
    """Read truth (N,), prediction (N,) and logits (N, 10); a damaged file raises errors of many kinds."""
    with np.load(file, allow_pickle=False) as arrays:
        truth, prediction, logits = arrays["truth"], arrays["prediction"], arrays["logits"]
    for name, array, kinds, shape in (
        ("truth", truth, "iu", (truth.size,)),
        ("prediction", prediction, "iu", (truth.size,)),
        ("logits", logits, "f", (truth.size, 10)),
    ):
        if array.dtype.kind not in kinds or array.shape != shape or not array.size:
            raise ValueError(f"{name} is {array.dtype} {array.shape}, which is not of the right kind")
    if not np.isin([truth, prediction], range(10)).all():
        raise ValueError("truth or prediction has values that are not digits from 0 to 9")
    if not np.isfinite(logits).all():
        raise ValueError("logits has values that are not finite")
    table = pd.DataFrame({"truth": truth, "prediction": prediction}).astype("int64")
    table["confidence"] = special.softmax(logits, axis=1).max(axis=1)
    return table.join(pd.DataFrame(logits, columns=[f"logit_{digit}" for digit in range(10)]))
