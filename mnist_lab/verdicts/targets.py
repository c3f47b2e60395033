"""Verdicts: the declared targets and the measured numbers in, words out. A run, a study and a table share this rule."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

from mnist_lab.experiment import Targets
from mnist_lab.verdicts.measures import MEASURES
from mnist_lab.verdicts.statistics import judge_mean

HEADERS = ("target", "wanted", "measured", "verdict")
Word = Literal["met", "missed", "not shown"]


@dataclass(frozen=True)
class Verdict:
    """One target beside what was measured, e.g. accuracy, "at least 99.4 %", 99.47, met.

    measured: the mean, where there are several seeds. n: the number of seeds. target: the number in `wanted`.
    p, seeds_needed: as in `statistics.StudyVerdict`; nan and None where no test was made.
    """

    name: str
    wanted: str
    measured: float
    word: Word
    p: float = math.nan
    seeds_needed: int | None = None
    n: int = 1
    target: float = math.nan


def judge(targets: Targets, *, accuracies: Sequence[float], num_params: int, epochs: int) -> list[Verdict]:
    """Return a verdict for each stated target.

    accuracies: the last epoch's test accuracy in percent, one figure per seed. A single one is met or missed; the
        mean of several is judged by `statistics.judge_mean`.
    """
    verdicts = []
    if (target := targets.accuracy) is not None:
        wanted, mean = f"at least {target:g} %", fmean(accuracies)
        if len(accuracies) == 1:
            verdicts.append(Verdict("accuracy", wanted, mean, "met" if mean >= target else "missed", target=target))
        else:
            word, p, needed = judge_mean(accuracies, target)
            verdicts.append(Verdict("accuracy", f"mean {wanted}", mean, word, p, needed, len(accuracies), target))
    for name, measured, limit in (("params", num_params, targets.params), ("epochs", epochs, targets.epochs)):
        if limit is not None:
            met: Word = "met" if measured < limit else "missed"
            verdicts.append(Verdict(name, f"fewer than {limit:,}", measured, met, target=limit))
    return verdicts


def out_of_reach(targets: Targets, num_params: int, epochs: int) -> list[str]:
    """Return sentences about the targets that are missed before any training."""
    counts = judge(replace(targets, accuracy=None), accuracies=[], num_params=num_params, epochs=epochs)
    return [
        f"targets.{count.name}: {count.wanted} {count.name} are wanted, and there are {count.measured:,}: "
        "missed, whatever the accuracy"
        for count in counts
        if count.word == "missed"
    ]


def rows(verdicts: Sequence[Verdict]) -> list[tuple[str, str, str, str]]:
    """Return a row of text for each verdict, under HEADERS."""
    measures = {"accuracy": "final_test_accuracy", "params": "num_params", "epochs": "epochs"}
    return [(v.name, v.wanted, MEASURES[measures[v.name]].text(v.measured), v.word) for v in verdicts]


def overall(verdicts: Sequence[Verdict]) -> str:
    """Return "met" if all are, "missed" if any is, else "not shown"; "none" where no target was stated."""
    words = {verdict.word for verdict in verdicts}
    if not words:
        return "none"
    return "missed" if "missed" in words else "not shown" if "not shown" in words else "met"
