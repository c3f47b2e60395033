"""What is measured: the names in MLflow, how each is called and written, and which way is better."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Unit = Literal["%", "cross-entropy", "", "s", "min", "rate"]


@dataclass(frozen=True)
class Measure:
    """One figure of a run or an epoch.

    name: in MLflow, in tables, and among an experiment's `reported` figures.
    label: in words, for a table or an axis.
    unit: "%", "cross-entropy" (mean per image, in nats), "" for a count, "s", "min", or "rate" for a learning rate.
    better: whether "higher" or "lower" is better, or None where neither is.
    """

    name: str
    label: str
    unit: Unit
    better: Literal["higher", "lower"] | None

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


def _measure(name: str, unit: Unit, better: Literal["higher", "lower"]) -> Measure:
    return Measure(name, name.replace("_", " "), unit, better)


_PARTS = ("train", "validation", "test")
MEASURES = {
    measure.name: measure
    for measure in (
        # of each epoch
        *(_measure(f"{part}_loss", "cross-entropy", "lower") for part in _PARTS),
        *(_measure(f"{part}_accuracy", "%", "higher") for part in _PARTS),
        *(Measure(f"raw_{part}_accuracy", f"{part} accuracy without averaging", "%", "higher") for part in _PARTS[1:]),
        Measure("lr", "learning rate", "rate", None),
        Measure("epoch_seconds", "time of an epoch", "s", "lower"),
        # of a run
        *(_measure(f"{which}_{part}_accuracy", "%", "higher") for which in ("final", "best") for part in _PARTS),
        Measure("best_epoch", "best epoch", "", None),
        *(_measure(f"final_{part}_loss", "cross-entropy", "lower") for part in _PARTS[1:]),
        Measure("num_params", "parameters", "", "lower"),
        Measure("epochs", "epochs", "", "lower"),
        Measure("epochs_at_target", "epochs at target", "", "higher"),
        Measure("minutes", "training time", "min", "lower"),
    )
}
