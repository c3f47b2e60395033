"""What repeated runs show: numbers in, means, intervals and tests out. docs/statistics.md says which test when.

The tests are those of scipy.stats and statsmodels. Values are one figure per seed, in any unit; the units are kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mnist_lab.errors import LabError

# scipy.stats and statsmodels take two seconds to import, so the functions that need them do it.

ALPHA_TARGET = 0.01  # one-sided: the field's standard for records is a mean over runs with p < 0.01
ALPHA_DIFFERENCE = 0.05  # two-sided
POWER = 0.8  # the chance to see a difference that is there
MOST_SEEDS = 1_000_000  # beyond this, "it can't be said"


@dataclass(frozen=True)
class Aggregate:
    """One figure in percent over n seeds. sd has n - 1; nan for one seed.

    low to high is the 95 % t-interval of the mean, cut off at 0 and 100 %; nan for one seed.
    """

    n: int
    mean: float
    sd: float
    low: float
    high: float
    minimum: float
    median: float
    maximum: float
    share_at_target: float  # of the seeds at or above the target, 0 to 1; nan where there is no target


@dataclass(frozen=True)
class StudyVerdict:
    """Whether the mean over seeds is shown to reach a target.

    word: "met" (shown to be above), "missed" (shown to be below) or "not shown".
    p: of the one-sided test on the side where the mean lies; nan for one seed.
    seeds_needed: about how many seeds would show a difference of the observed size; None where it can't be said.
    """

    word: Literal["met", "missed", "not shown"]
    n: int
    mean: float
    target: float
    p: float
    seeds_needed: int | None


@dataclass(frozen=True)
class Difference:
    """The difference b - a, with its 95 % interval and a two-sided p.

    test: "paired t-test", "Welch's t-test", "sign test" or "McNemar's exact test".
    n: what the test counts: pairs of seeds; or the seeds of a and of b; or images.
    seeds_needed: about how many seeds an arm would show a difference of this size; None where it shows already or
        can't be said.
    """

    effect: float
    low: float
    high: float
    p: float
    test: str
    n: tuple[int, ...]
    seeds_needed: int | None

    @property
    def shown(self) -> bool:
        return self.p < ALPHA_DIFFERENCE


@dataclass(frozen=True)
class McNemar:
    """Two networks on the same n images: how many only one of them reads rightly, and the exact two-sided p.

    effect is the difference b - a of the shares read rightly (0 to 1), low to high its 95 % interval.
    """

    n: int
    only_a: int
    only_b: int
    effect: float
    low: float
    high: float
    p: float


def aggregate(values: Sequence[float], target: float | None = None) -> Aggregate:
    """Describe one figure, in percent, over seeds."""
    x = _numbers(values)
    low, high = np.clip(_interval(x), 0.0, 100.0)
    return Aggregate(
        n=len(x),
        mean=float(x.mean()),
        sd=float(x.std(ddof=1)) if len(x) > 1 else math.nan,
        low=float(low),
        high=float(high),
        minimum=float(x.min()),
        median=float(np.median(x)),
        maximum=float(x.max()),
        share_at_target=math.nan if target is None else float((x >= target).mean()),
    )


def judge_mean(values: Sequence[float], target: float, *, alpha: float = ALPHA_TARGET) -> StudyVerdict:
    """Judge the mean over seeds by a one-sided one-sample t-test: "met" needs mean > target at p < alpha.

    Where all values are the same there is no spread to measure by; then the sign test is made, by which 7 seeds on
    one side of the target show it.
    """
    from scipy import stats

    x = _numbers(values)
    mean, over = float(x.mean()), x - target
    if len(x) == 1:
        return StudyVerdict("not shown", 1, mean, target, math.nan, None)
    needed: int | None
    if _same(x):
        side = 0 if _same(np.append(x, target)) else float(np.sign(over.mean()))
        p = 0.5 ** len(x) if side else 0.5  # the sign test: all n on one side
        needed = math.ceil(math.log(alpha) / math.log(0.5)) if side else None
    else:
        side = float(np.sign(over.mean()))
        p = float(stats.ttest_1samp(x, target, alternative="greater" if side >= 0 else "less").pvalue)
        needed = seeds_needed(over.mean() / x.std(ddof=1), arms=1, tail=alpha)
    if side and p < alpha:
        return StudyVerdict("met" if side > 0 else "missed", len(x), mean, target, p, None)
    return StudyVerdict("not shown", len(x), mean, target, p, needed)


def compare_means(
    a: Sequence[float],
    b: Sequence[float],
    paired_by: tuple[Sequence[int], Sequence[int]] | None = None,
    *,
    alpha: float = ALPHA_DIFFERENCE,
) -> Difference:
    """Compare two means over seeds: by the paired t-test over the seeds that both have, else by Welch's t-test.

    paired_by: the seeds of a and of b, in their order. Where fewer than two are shared, or None is given, the values
        are taken as independent.

    Raises:
        LabError: if a or b has fewer than two values, and so no spread to measure a difference by.
    """
    from scipy import stats

    x, y = _numbers(a), _numbers(b)
    if min(len(x), len(y)) < 2:
        raise LabError(f"a comparison of means needs at least two seeds on each side; there are {len(x)} and {len(y)}")
    if paired_by is not None:
        seeds_a, seeds_b = paired_by
        of_a, of_b = dict(zip(seeds_a, x, strict=True)), dict(zip(seeds_b, y, strict=True))
        shared = [seed for seed in of_a if seed in of_b]
        if len(shared) > 1:
            d = np.array([of_b[seed] - of_a[seed] for seed in shared])
            scale = float(np.abs(x).max())
            if _same(np.append(d, 0.0), scale):
                return Difference(0.0, 0.0, 0.0, 1.0, "paired t-test", (len(d),), None)
            if _same(d, scale):
                p = float(stats.binomtest(len(d), len(d)).pvalue)
                needed = math.ceil(math.log(alpha / 2) / math.log(0.5)) if p >= alpha else None
                return Difference(float(d.mean()), math.nan, math.nan, p, "sign test", (len(d),), needed)
            p = float(stats.ttest_1samp(d, 0.0).pvalue)
            needed = seeds_needed(d.mean() / d.std(ddof=1), arms=1, tail=alpha / 2) if p >= alpha else None
            return Difference(float(d.mean()), *_interval(d), p, "paired t-test", (len(d),), needed)
    effect, sizes = float(y.mean() - x.mean()), (len(x), len(y))
    sd = math.sqrt((x.var(ddof=1) + y.var(ddof=1)) / 2)
    if _same(x) and _same(y):  # neither side has a spread: there is nothing to test by
        same = _same(np.concatenate([x, y]))
        return Difference(effect, math.nan, math.nan, 1.0 if same else math.nan, "Welch's t-test", sizes, None)
    welch = stats.ttest_ind(y, x, equal_var=False)
    interval = welch.confidence_interval(0.95)
    p = float(welch.pvalue)
    needed = seeds_needed(effect / sd, arms=2, tail=alpha / 2) if p >= alpha else None
    return Difference(effect, float(interval.low), float(interval.high), p, "Welch's t-test", sizes, needed)


def seeds_needed(effect_size: float, *, arms: Literal[1, 2], tail: float, power: float = POWER) -> int | None:
    """Return the fewest seeds (an arm) by which a t-test shows an effect with that power; None where it can't be said.

    effect_size: the difference in standard deviations: of the values, or with two arms, of either arm.
    tail: the alpha of one tail; half of alpha for a two-sided test. The far tail of a two-sided test is left out: at
        80 % power it has less than one part in 10,000.

    Power is that of the noncentral t-distribution (Cohen 1988, chapter 2), as computed by statsmodels.
    """
    from statsmodels.stats.power import TTestIndPower, TTestPower

    effect_size = abs(effect_size)
    test = TTestPower() if arms == 1 else TTestIndPower()

    def enough(n: int) -> bool:
        return float(test.power(effect_size, n, tail, alternative="larger")) >= power

    high = 2
    while not enough(high):
        high *= 2
        if high > MOST_SEEDS:
            return None
    low = max(2, high // 2)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return high


def mcnemar_exact(a_correct: ArrayLike, b_correct: ArrayLike) -> McNemar:
    """Compare two networks on the same images by McNemar's exact test, which is binomial on the discordant images.

    a_correct, b_correct: (N,) booleans, in the same order of images.

    The interval of the difference is Wald's for matched pairs (Agresti, Categorical Data Analysis, 2002, 10.1.2).
    """
    from scipy import stats
    from statsmodels.stats.contingency_tables import mcnemar

    a, b = np.asarray(a_correct, dtype=bool), np.asarray(b_correct, dtype=bool)
    assert a.shape == b.shape, f"{a.shape} and {b.shape} are not the same images"
    assert a.size, "there are no images"
    n, only_a, only_b = a.size, int((a & ~b).sum()), int((~a & b).sum())
    table = [[int((a & b).sum()), only_a], [only_b, int((~a & ~b).sum())]]
    effect = (only_b - only_a) / n
    half = float(stats.norm.ppf(0.975)) * math.sqrt((only_a + only_b) - (only_b - only_a) ** 2 / n) / n
    p = min(1.0, float(mcnemar(table, exact=True).pvalue))
    return McNemar(n, only_a, only_b, effect, effect - half, effect + half, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values adjusted by Holm (1979) for being a family; nan stays nan and is not of the family."""
    from statsmodels.stats.multitest import multipletests

    p = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(p.shape, np.nan)
    tested = np.isfinite(p)
    if tested.any():
        adjusted[tested] = multipletests(p[tested], method="holm")[1]
    return [float(value) for value in adjusted]


def _numbers(values: Sequence[float]) -> NDArray[np.float64]:
    x = np.asarray(values, dtype=np.float64)
    assert x.ndim == 1, f"one figure per seed is wanted, not {x.shape}"
    assert x.size, "there are no values"
    assert np.isfinite(x).all(), f"not all values are numbers: {values}"
    return x


def _interval(x: NDArray[np.float64]) -> tuple[float, float]:
    """Return the 95 % t-interval of the mean."""
    from scipy import stats

    if len(x) == 1:
        return math.nan, math.nan
    half = float(stats.t.ppf(0.975, len(x) - 1)) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return float(x.mean()) - half, float(x.mean()) + half


def _same(x: NDArray[np.float64], scale: float = 0.0) -> bool:
    """Say whether the values are one value, but for the rounding of floats of their size, or of that scale."""
    return bool(np.ptp(x) <= 1e-12 * max(scale, float(np.abs(x).max())))
