"""Stepwise model iteration on MNIST, with every run tracked in MLflow.

An experiment script needs three names: `Experiment` and `Targets` to declare, `main` to run. It imports them before
torch, so that `--help` is answered at once.
"""

import os

from mnist_lab.cli import answer_early, main
from mnist_lab.experiment import Experiment, Targets

__all__ = ["Experiment", "Targets", "main"]

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # MLflow reads both once, when it is imported
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
answer_early()
