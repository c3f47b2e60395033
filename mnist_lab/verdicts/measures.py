"""What is measured: the name of each figure in MLflow, in tables and among `reported`; and which run logs it where."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

Unit = Literal["%", "cross-entropy", "", "s", "min", "number"]
HALF = 1e-9  # added before rounding, so that the mean of 99.25 and 99.26 is 99.26 whatever the last bit of the sum


@dataclass(frozen=True)
class Measure:
    """One figure of a run or an epoch.

    label: in words, for a table or an axis.
    unit: "%", "cross-entropy" (mean per image, in nats), "" for a count, "s", "min", or "number" without a unit.
    cell: its format in a CSV.
    """

    label: str
    unit: Unit
    cell: str = ""

    def text(self, value: float | None) -> str:
        """Return a value as it is printed: "99.41 %", "7,852", "0.0182", or "-" where there is none."""
        if value is None or math.isnan(value):
            return "-"
        forms = {"%": f"{percent(value)} %", "cross-entropy": f"{value:.4f}", "number": f"{value:.3g}"}
        return forms.get(self.unit, f"{value:.1f} {self.unit}" if self.unit else f"{value:,.0f}")


def _accuracy(label: str, cell: str = ".2f") -> Measure:
    return Measure(f"{label} accuracy", "%", cell)


def _loss(label: str) -> Measure:
    return Measure(f"{label} loss", "cross-entropy", ".5f")


MEASURES = {
    # of each epoch
    "train_loss": _loss("train"),
    "train_accuracy": _accuracy("train", ".3f"),
    "test_loss": _loss("test"),
    "test_accuracy": _accuracy("test"),
    "validation_loss": _loss("validation"),
    "validation_accuracy": _accuracy("validation"),
    "raw_test_accuracy": Measure("test accuracy without averaging", "%", ".2f"),
    "raw_validation_accuracy": Measure("validation accuracy without averaging", "%", ".2f"),
    "objective": Measure("objective", "number", ".5f"),
    "lr": Measure("learning rate", "number", ".6g"),
    "lr_1": Measure("learning rate of group 1", "number", ".6g"),
    "lr_2": Measure("learning rate of group 2", "number", ".6g"),
    "epoch_seconds": Measure("time of an epoch", "s", ".1f"),
    # of a run
    "final_train_accuracy": _accuracy("final train", ".3f"),
    "best_train_accuracy": _accuracy("best train", ".3f"),
    "final_test_accuracy": _accuracy("final test"),
    "best_test_accuracy": _accuracy("best test"),
    "final_test_loss": _loss("final test"),
    "final_validation_accuracy": _accuracy("final validation"),
    "best_validation_accuracy": _accuracy("best validation"),
    "final_validation_loss": _loss("final validation"),
    "best_epoch": Measure("best epoch", ""),
    "epochs_at_target": Measure("epochs at target", ""),
    "num_params": Measure("parameters", ""),
    "epochs": Measure("epochs", ""),
    "minutes": Measure("training time", "min", ".1f"),
}


@dataclass(frozen=True)
class Protocol:
    """What the runs of one protocol measure, by the names of MEASURES.

    part: the images that each epoch is evaluated on.
    once: logged at the end. MLflow shows the last value of each epoch's metrics by itself, so few are logged again.
    summary: printed at the end.
    over_seeds: aggregated over the seeds of a study; experiments are judged and compared by the first.
    unit: what a study has one run for each of.
    """

    part: Literal["test", "validation"]
    once: tuple[str, ...]
    summary: tuple[str, ...]
    over_seeds: tuple[str, ...]
    unit: Literal["seed", "fold"] = "seed"

    @property
    def best(self) -> str:
        """The accuracy that the best epoch is chosen by."""
        return f"best_{self.part}_accuracy"

    @property
    def judged(self) -> str:
        return self.over_seeds[0]

    @property
    def curves(self) -> tuple[str, ...]:
        return ("train_loss", "train_accuracy", f"{self.part}_loss", f"{self.part}_accuracy")

    @property
    def each_epoch(self) -> tuple[str, ...]:
        return (*self.curves, "lr", "epoch_seconds")

    @property
    def at_times(self) -> tuple[str, ...]:
        """As `each_epoch`, of some experiments only."""
        return (f"raw_{self.part}_accuracy", "objective", "lr_1", "lr_2")


TESTED = Protocol(  # on the test images after each epoch: the protocol of the write-ups
    part="test",
    once=("num_params", "final_test_accuracy", "best_test_accuracy", "best_epoch", "epochs_at_target"),
    summary=(
        *("final_train_accuracy", "best_train_accuracy", "final_test_accuracy", "best_test_accuracy", "best_epoch"),
        "final_test_loss",
    ),
    over_seeds=("final_test_accuracy", "best_test_accuracy"),
)
HELD_OUT = Protocol(  # validated on training images held out, and tested once
    part="validation",
    once=(
        *("num_params", "final_validation_accuracy", "best_validation_accuracy", "best_epoch"),
        *("final_test_accuracy", "final_test_loss"),
    ),
    summary=(
        *("final_train_accuracy", "best_train_accuracy", "final_validation_accuracy", "best_validation_accuracy"),
        *("best_epoch", "final_test_accuracy", "final_test_loss"),
    ),
    over_seeds=("final_test_accuracy", "final_validation_accuracy", "best_validation_accuracy"),
)
FOLDED = replace(  # validated on the fold that is held out, and never tested
    HELD_OUT,
    once=("num_params", "final_validation_accuracy", "best_validation_accuracy", "best_epoch"),
    summary=("final_train_accuracy", "final_validation_accuracy"),
    over_seeds=("final_validation_accuracy",),
    unit="fold",
)


def protocol(holdout: int, folds: int = 0) -> Protocol:
    """Return the protocol of a run that holds out so many training images, or one of so many folds."""
    return FOLDED if folds else HELD_OUT if holdout else TESTED


# The names under which MLflow's table shows a run's figure and a study's mean in one column, short enough for it.
SHORT = {"last": "final_test_accuracy", "best": "best_test_accuracy", "validation": "final_validation_accuracy"}


def short_figures(figures: Mapping[str, float]) -> dict[str, float]:
    """Return the accuracies among these figures under their short names, in percent with two digits."""
    return {short: round(figures[name] + HALF, 2) for short, name in SHORT.items() if name in figures}


def percent(accuracy: float, missing: str = "-") -> str:
    """Return an accuracy as it is printed, e.g. "99.41"."""
    return missing if math.isnan(accuracy) else f"{accuracy + HALF:.2f}"
