"""How two experiments differ: differences over seeds, in words that claim no more than was shown."""

from __future__ import annotations

import dataclasses
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from tabulate import tabulate

from mnist_lab.verdicts import statistics
from mnist_lab.verdicts.statistics import ALPHA_DIFFERENCE, FEWEST_FOR_INTERVAL, Difference

TOO_FEW = "too few runs"
WIDE = 80  # characters of a terminal; a narrower one shows names and changes on more lines


@dataclass(frozen=True)
class Pair:
    """Two experiments that differ by one change: `b` has it, `a` does not."""

    a: str
    b: str
    change: str


@dataclass(frozen=True)
class Comparison(Difference, Pair):
    """How experiment `b` differs from `a` in test accuracy, in points (percentage points), b - a.

    p_holm: p adjusted for the other comparisons of the same table; the same as p for one by itself.
    differ: the hyperparameters in which they differ, and num_params, e.g. "epochs, lr".
    """

    p_holm: float
    differ: str

    @property
    def seeds(self) -> str:
        """The seeds that were compared, e.g. "10", or "10, 8" where they are not paired."""
        return ", ".join(str(n) for n in self.n)

    @property
    def interval(self) -> str:
        return mean_interval_text(min(self.n), self.low, self.high, sign="+")

    @property
    def word(self) -> str:
        return ("better" if self.effect > 0 else "worse") if self.p_holm < ALPHA_DIFFERENCE else "not shown"

    @property
    def verdict(self) -> str:
        """What was shown: "better by 0.12 points", or "no difference shown (needs about 50 seeds for 0.03 points)"."""
        size = f"{abs(self.effect):.2f} points"
        if self.word != "not shown":
            return f"{self.word} by {size}"
        if self.p < ALPHA_DIFFERENCE:
            return "no difference shown (among so many comparisons)"
        if self.seeds_needed is None or size == "0.00 points":
            return "no difference shown"
        return f"no difference shown (needs about {seeds_text(self.seeds_needed)} seeds for {size})"


def rounds_alike(one: str, other: str) -> bool:
    """Say whether both add in the same order: one GPU, or one name of processor with the same vector instructions."""
    named = {re.sub(r", \d+ cores,", ",", name) for name in (one, other)}
    return len(named) == 1 and one != "" and not one.endswith(" cores")


def adjust(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Set `p_holm` for the number of comparisons in one table."""
    adjusted = statistics.holm([comparison.p for comparison in comparisons])
    return [dataclasses.replace(comparison, p_holm=p) for comparison, p in zip(comparisons, adjusted, strict=True)]


def effects_text(comparisons: Sequence[Comparison], width: int | None = None, unit: str = "seeds") -> str:
    folded, arrow = (str, " -> ") if width is None or width >= WIDE else (partial(textwrap.fill, width=22), "\n  -> ")
    indented = partial(textwrap.fill, width=40, initial_indent="  differ in ", subsequent_indent="    ")
    columns = {
        "change": [f"{folded(c.change)}\n  {c.a}{arrow}{c.b}\n{indented(c.differ)}".rstrip() for c in comparisons],
        "points": [f"{c.effect:+.2f}" for c in comparisons],
        "verdict": [c.word for c in comparisons],
        "95 % interval": [c.interval for c in comparisons],
        "p\n(Holm)": [p_text(c.p_holm) for c in comparisons],
        unit: [c.seeds for c in comparisons],
        "seeds\nneeded": ["-" if c.seeds_needed is None else seeds_text(c.seeds_needed) for c in comparisons],
        "p": [p_text(c.p) for c in comparisons],
    }
    return table_text(columns, width)


def table_text(columns: Mapping[str, Sequence[str]], width: int | None = None) -> str:
    """Return a table as text, without columns of "-" alone.

    width: of the terminal; the last columns that it has no place for are left out, and named below the table.
    """
    shown = {name: cells for name, cells in columns.items() if {*cells} != {"-"}}
    left_out: list[str] = []
    while True:
        text = tabulate(list(zip(*shown.values(), strict=True)), list(shown), disable_numparse=True)
        if width is None or len(shown) == 1 or max(map(len, text.splitlines())) <= width:
            break
        left_out.insert(0, " ".join(shown.popitem()[0].split()))
    if left_out and width is not None:
        text += "\n" + textwrap.fill(f"A wider terminal also shows: {', '.join(left_out)}.", width)
    return text


def mean_interval_text(seeds: int, low: float, high: float, sign: str = "") -> str:
    if seeds < FEWEST_FOR_INTERVAL:
        return TOO_FEW
    return "-" if math.isnan(low) else f"{low:{sign}.2f} to {high:{sign}.2f}"


def seeds_text(needed: int) -> str:
    """Return a number of seeds needed as it is printed, rounded up to one digit that counts: 224 as "300"."""
    unit: int = 10 ** (len(str(needed)) - 1)
    return f"{-(-needed // unit) * unit:,}"


def p_text(p: float) -> str:
    """Return a p-value as it is printed: at most two digits that count, never a bare zero."""
    if math.isnan(p):
        return "-"
    return "<0.0001" if p < 0.0001 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


def step_order(step: str) -> str:
    """Return the text by which experiments are sorted: the steps before the rest, step 10 after step 9."""
    is_other = not re.match(r"step\d", step)
    return f"{is_other:d} " + re.sub(r"\d+", lambda number: number[0].zfill(20), step)
