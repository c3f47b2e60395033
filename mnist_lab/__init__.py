"""Stepwise model iteration on MNIST, with every run tracked in MLflow.

An experiment script needs three names: `Experiment` and `Targets` to declare, `main` to run. `predict` reads digits.
"""

import os

from mnist_lab.cli import main
from mnist_lab.experiment import Experiment, Targets
from mnist_lab.pictures import Predictions, predict

__all__ = ["Experiment", "Predictions", "Targets", "main", "predict"]

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # MLflow reads both once, when it is imported
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
