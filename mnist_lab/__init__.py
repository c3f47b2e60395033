"""Stepwise model iteration on MNIST, with every run tracked in MLflow.

An experiment script needs three names: `Experiment` and `Targets` to declare, `main` to run. It imports them before
torch, so that `--help` is answered at once.
"""

from mnist_lab.cli import answer_early, main
from mnist_lab.experiment import Experiment, Targets

__all__ = ["Experiment", "Targets", "main"]

answer_early()
