"""Stepwise model iteration on MNIST, with every run tracked in MLflow.

An experiment script needs three names: `Experiment` and `Targets` to declare, `main` to run. `predict` reads digits.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mnist_lab.cli import main
    from mnist_lab.experiment import Experiment, Targets
    from mnist_lab.reading.pictures import Predictions, predict

__all__ = ["Experiment", "Predictions", "Targets", "main", "predict"]

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # MLflow reads both once, when it is imported
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # else GitPython can't be imported where there is no git


def __getattr__(name: str) -> object:
    """Import a name when it is first asked for: torch takes seconds, and jobs such as `make ui` need none of it."""
    modules = {"main": "cli", "Experiment": "experiment", "Targets": "experiment"}
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{modules.get(name, 'reading.pictures')}"), name)
