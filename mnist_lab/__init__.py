"""Stepwise model iteration on MNIST, with every run tracked in MLflow.

An experiment script needs three names: `Experiment` and `Targets` to declare, `main` to run.
"""

from mnist_lab.cli import main
from mnist_lab.experiment import Experiment, Targets

__all__ = ["Experiment", "Targets", "main"]
