"""Verdicts: the declared targets and the measured numbers in, met or missed out."""

from __future__ import annotations

from dataclasses import dataclass

from mnist_lab.experiment import Targets


@dataclass(frozen=True)
class Verdict:
    """One target beside what was measured, e.g. accuracy, "at least 99.4 %", 99.47, met."""

    name: str
    wanted: str
    measured: float
    met: bool

    @property
    def word(self) -> str:
        return "met" if self.met else "missed"


def judge(targets: Targets, *, final_test_accuracy: float, num_params: int, epochs: int) -> list[Verdict]:
    """Return a verdict for each stated target. The accuracy judged is the last epoch's, in percent."""
    verdicts = []
    if targets.accuracy is not None:
        wanted = f"at least {targets.accuracy:g} %"
        verdicts.append(Verdict("accuracy", wanted, final_test_accuracy, final_test_accuracy >= targets.accuracy))
    if targets.params is not None:
        verdicts.append(Verdict("params", f"fewer than {targets.params:,}", num_params, num_params < targets.params))
    if targets.epochs is not None:
        verdicts.append(Verdict("epochs", f"fewer than {targets.epochs}", epochs, epochs < targets.epochs))
    return verdicts


def overall(verdicts: list[Verdict]) -> str:
    """Return "met" if all are, "missed" if any is not, "none" where no target was stated."""
    if not verdicts:
        return "none"
    return "met" if all(verdict.met for verdict in verdicts) else "missed"
