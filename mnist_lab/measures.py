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

    label: in words, for a table or an axis. cell: its format in a CSV.
    unit: "%", "cross-entropy" (mean per image, in nats), "" for a count, "s", "min", or "number" without a unit.
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


def _in_words(unit: Unit, cell: str, *names: str) -> dict[str, Measure]:
    return {name: Measure(name.replace("_", " "), unit, cell) for name in names}


MEASURES = {
    **_in_words("%", ".3f", "train_accuracy", "final_train_accuracy", "best_train_accuracy"),
    **_in_words("%", ".2f", "test_accuracy", "final_test_accuracy", "best_test_accuracy"),
    **_in_words("%", ".2f", "validation_accuracy", "final_validation_accuracy", "best_validation_accuracy"),
    **_in_words("cross-entropy", ".5f", "train_loss", "test_loss", "final_test_loss"),
    **_in_words("cross-entropy", ".5f", "validation_loss", "final_validation_loss"),
    **_in_words("number", ".5f", "objective"),
    **_in_words("", "", "epochs", "best_epoch", "epochs_at_target"),
    "raw_test_accuracy": Measure("test accuracy without averaging", "%", ".2f"),
    "raw_validation_accuracy": Measure("validation accuracy without averaging", "%", ".2f"),
    "lr": Measure("learning rate", "number", ".6g"),
    **{f"lr_{group}": Measure(f"learning rate of group {group}", "number", ".6g") for group in (1, 2)},
    "epoch_seconds": Measure("time of an epoch", "s", ".1f"),
    "num_params": Measure("parameters", ""),
    "minutes": Measure("time from start to end", "min", ".1f"),
}


@dataclass(frozen=True)
class Protocol:
    """What the runs of one protocol measure, by the names of MEASURES.

    part: the images that each epoch is evaluated on.
    once: logged at the end. MLflow shows the last value of each epoch's metrics by itself, so few are logged again.
    over_seeds: aggregated over the seeds of a study; experiments are judged and compared by the first.
    unit: what a study has one run for each of.
    """

    part: Literal["test", "validation"]
    once: tuple[str, ...]
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
    def summary(self) -> tuple[str, ...]:
        """What is printed at the end of a run."""
        names = ("final_train_accuracy", "best_train_accuracy", f"final_{self.part}_accuracy", self.best, "best_epoch")
        return tuple(dict.fromkeys((*names, "final_test_accuracy", "final_test_loss")))

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
    "test",
    once=("num_params", "final_test_accuracy", "best_test_accuracy", "best_epoch", "epochs_at_target"),
    over_seeds=("final_test_accuracy", "best_test_accuracy"),
)
HELD_OUT = Protocol(  # validated on training images held out, and tested once
    "validation",
    once=(
        *("num_params", "final_validation_accuracy", "best_validation_accuracy", "best_epoch"),
        *("final_test_accuracy", "final_test_loss"),
    ),
    over_seeds=("final_test_accuracy", "final_validation_accuracy", "best_validation_accuracy"),
)
FOLDED = replace(HELD_OUT, over_seeds=("final_validation_accuracy",), unit="fold")  # validated on a fold, never tested


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
