"""Verdicts: the declared targets and the measured numbers in, words out. A run, a study and a table share this rule."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from tabulate import tabulate

from mnist_lab.experiment import Targets
from mnist_lab.measures import MEASURES
from mnist_lab.verdicts.comparison import seeds_text
from mnist_lab.verdicts.statistics import Word, judge_mean


@dataclass(frozen=True)
class Verdict:
    """One target beside what was measured, e.g. accuracy, "at least 99.4 %", 99.47, met.

    measured: the mean, where there are several seeds. n: the number of seeds. target: the number in `wanted`.
    p, seeds_needed: as `statistics.judge_mean` returns them; nan and None where no test was made.
    """

    name: str
    wanted: str
    target: float
    measured: float
    word: Word
    p: float = math.nan
    seeds_needed: int | None = None
    n: int = 1


def judge(targets: Targets, *, accuracies: Sequence[float], num_params: int, epochs: int) -> list[Verdict]:
    """Return a verdict for each stated target.

    accuracies: the last epoch's test accuracy in percent, one figure per seed, judged by `statistics.judge_mean`.
    """
    verdicts = []
    if (target := targets.accuracy) is not None:
        n, mean = len(accuracies), fmean(accuracies)
        wanted = f"{'mean ' if n > 1 else ''}at least {target:g} %"
        verdicts.append(Verdict("accuracy", wanted, target, mean, *judge_mean(accuracies, target), n))
    for name, measured, limit in (("params", num_params, targets.params), ("epochs", epochs, targets.epochs)):
        if limit is not None:
            wanted = f"fewer than {limit:,}"
            verdicts.append(Verdict(name, wanted, limit, measured, "met" if measured < limit else "missed"))
    return verdicts


def out_of_reach(targets: Targets, num_params: int, epochs: int) -> list[str]:
    """Return sentences about the targets that are missed before any training."""
    counts = judge(replace(targets, accuracy=None), accuracies=[], num_params=num_params, epochs=epochs)
    return [
        f"targets.{v.name}: {v.wanted} {v.name} are wanted, and there are {v.measured:,}: missed, whatever the accuracy"
        for v in counts
        if v.word == "missed"
    ]


def verdict_table(verdicts: Sequence[Verdict], style: str = "simple") -> str:
    """Return a table of text with a row for each verdict, in one of the styles of tabulate; nothing where none is."""
    measures = {"accuracy": "final_test_accuracy", "params": "num_params", "epochs": "epochs"}
    rows = [(v.name, v.wanted, MEASURES[measures[v.name]].text(v.measured), v.word) for v in verdicts]
    headers = ("target", "wanted", "measured", "verdict")
    return tabulate(rows, headers, tablefmt=style, disable_numparse=True) if rows else ""


def how_sure(verdict: Verdict) -> str:
    """Say how sure the verdict on the accuracy of several seeds is, and how many seeds would decide it if need be."""
    if math.isnan(verdict.p):
        return "One seed, or several with the same accuracy, show nothing about the mean: train more of them."
    side = "at least" if verdict.measured >= verdict.target else "below"
    text = f"That the mean is {side} {verdict.target:g} %: p = {verdict.p:.2g}"
    if verdict.word != "not shown":
        return f"{text}, from {verdict.n} seeds."
    needed = "how many seeds would show it is not known"
    if verdict.seeds_needed is not None:
        needed = f"about {seeds_text(verdict.seeds_needed)} seeds would, if the mean stays where it is"
    return f"{text}, which does not show it; {needed}."


def overall(verdicts: Sequence[Verdict]) -> str:
    """Return "met" if all are, "missed" if any is, else "not shown"; "none" where no target was stated."""
    words = {verdict.word for verdict in verdicts}
    return next((word for word in ("missed", "not shown", "met") if word in words), "none")
