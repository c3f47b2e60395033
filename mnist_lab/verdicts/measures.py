"""What is measured: how each figure is called and written, by its name in MLflow, in tables and among `reported`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Unit = Literal["%", "cross-entropy", "", "s", "min", "rate"]


@dataclass(frozen=True)
class Measure:
    """One figure of a run or an epoch.

    label: in words, for a table or an axis.
    unit: "%", "cross-entropy" (mean per image, in nats), "" for a count, "s", "min", or "rate" for a learning rate.
    """

    label: str
    unit: Unit

    @property
    def axis(self) -> str:
        """The label with its unit, e.g. "test accuracy (%)"."""
        return self.label if self.unit in ("", "rate") else f"{self.label} ({self.unit})"

    def text(self, value: float | None) -> str:
        """Return a value as it is printed: "99.41 %", "7,852", "0.0182", or "-" where there is none."""
        if value is None or math.isnan(value):
            return "-"
        match self.unit:
            case "%":
                return f"{value:.2f} %"
            case "cross-entropy":
                return f"{value:.4f}"
            case "rate":
                return f"{value:.3g}"
            case "":
                return f"{value:,.0f}"
            case "s" | "min":
                return f"{value:.1f} {self.unit}"


_PARTS = ("train", "validation", "test")
_UNITS: dict[str, Unit] = {
    # of each epoch
    **{f"{part}_loss": "cross-entropy" for part in _PARTS},
    **{f"{part}_accuracy": "%" for part in _PARTS},
    **{f"raw_{part}_accuracy": "%" for part in ("validation", "test")},
    "lr": "rate",
    "epoch_seconds": "s",
    # of a run
    **{f"{which}_{part}_accuracy": "%" for which in ("final", "best") for part in _PARTS},
    **{f"final_{part}_loss": "cross-entropy" for part in ("validation", "test")},
    **dict.fromkeys(("best_epoch", "num_params", "epochs", "epochs_at_target"), ""),
    "minutes": "min",
}
_LABELS = {
    **{f"raw_{part}_accuracy": f"{part} accuracy without averaging" for part in ("validation", "test")},
    "lr": "learning rate",
    "epoch_seconds": "time of an epoch",
    "num_params": "parameters",
    "minutes": "training time",
}
MEASURES = {name: Measure(_LABELS.get(name, name.replace("_", " ")), unit) for name, unit in _UNITS.items()}

# The names under which MLflow's table shows a run's figure and a study's mean in one column, short enough for it.
SHORT = {"last": "final_test_accuracy", "best": "best_test_accuracy", "validation": "final_validation_accuracy"}


def short_figures(figures: Mapping[str, float]) -> dict[str, float]:
    """Return the accuracies among these figures under their short names, in percent with two digits."""
    return {short: round(figures[name], 2) for short, name in SHORT.items() if name in figures}
