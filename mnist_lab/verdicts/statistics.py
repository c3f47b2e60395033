"""What repeated runs show: numbers in, means, intervals and tests out. docs/statistics.md says which test when.

The tests are those of scipy.stats and statsmodels. Values are one figure per seed, in any unit; the units are kept.
"""

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

# scipy.stats and statsmodels take two seconds to import, so the functions that need them do it.

ALPHA_TARGET = 0.01  # one-sided: the field's standard for records is a mean over runs with p < 0.01
ALPHA_DIFFERENCE = 0.05  # two-sided
ROUNDING = 1e-12  # of figures: those that differ by a smaller share are the same
POWER = 0.8  # the chance of seeing a difference that exists
FEWEST_FOR_INTERVAL = 4  # seeds; with fewer, the interval of a mean is 2.5 or 9 times the sd to each side
Word = Literal["met", "missed", "not shown"]


@dataclass(frozen=True)
class Aggregate:
    """One figure in percent over n seeds. The sd (with n - 1) is nan of one seed, the interval where all are equal."""

    n: int
    mean: float
    sd: float
    low: float  # of the 95 % t-interval, cut off at 0 and 100 %
    high: float
    minimum: float
    median: float
    maximum: float
    share_at_target: float  # of the seeds at or above the target, 0 to 1; nan where there is no target


@dataclass(frozen=True)
class Difference:
    """The difference b - a, with its 95 % interval and a two-sided p.

    n: what the test counts: pairs of seeds; or the seeds of a and of b.
    seeds_needed: about how many per arm would show a difference of this size; None where it is shown, or can't be said.
    """

    effect: float
    low: float
    high: float
    p: float
    test: str
    n: tuple[int, ...]
    seeds_needed: int | None


def chance_of_best(accuracy: float, images: int, n: int) -> float:
    """Return by how many points chance lifts the best of n >= 1 accuracies of this size, each on this many images.

    On average the largest of n normal draws exceeds their mean by this many standard deviations: the integral of
    n x phi(x) Phi(x)^(n - 1) over x (David and Nagaraja, Order Statistics, 2003, section 3.1).
    """
    from scipy.stats import norm

    deviations = norm.expect(lambda x: n * x * norm.cdf(x) ** (n - 1))
    return float(deviations) * math.sqrt(accuracy * (100 - accuracy) / images)


def aggregate(values: Sequence[float], target: float | None = None) -> Aggregate:
    """Describe one figure, in percent, over seeds: one at least, and finite."""
    x = np.array(values, dtype=np.float64)
    mean, minimum, median, maximum = (float(of(x)) for of in (np.mean, np.min, np.median, np.max))
    sd = float(x.std(ddof=1)) if len(x) > 1 else math.nan
    low, high = np.clip(_interval(x), 0.0, 100.0).tolist()
    share_at_target = math.nan if target is None else float((x >= target).mean())
    return Aggregate(len(x), mean, sd, low, high, minimum, median, maximum, share_at_target)


def lower_bound(values: Sequence[float]) -> float:
    """Return the highest target that `judge_mean` shows a mean to be above, its one-sided 99 % bound; nan if none."""
    low, _ = _interval(np.array(values, dtype=np.float64), ALPHA_TARGET)
    return low if low >= 0 else math.nan


def interval_for_new_images(wrong: NDArray[np.bool_]) -> tuple[float, float]:
    """Return the 95 % interval of a mean accuracy, in percent, for other seeds and other images of the same kind.

    wrong: (seeds, images), whether the network of that seed reads that image wrongly.

    The variance is clustered by seed and by image: Cameron, Gelbach and Miller, Robust Inference with Multiway
    Clustering, 2011. It is at least that of either alone, and has one degree of freedom fewer than the smaller number
    of clusters: Cameron and Miller, A Practitioner's Guide to Cluster-Robust Inference, 2015.
    """
    from scipy import stats

    mean, (seeds, images) = wrong.mean(), wrong.shape
    by_seed = seeds / (seeds - 1) * ((wrong.sum(axis=1) - images * mean) ** 2).sum()
    by_image = images / (images - 1) * ((wrong.sum(axis=0) - seeds * mean) ** 2).sum()
    by_both = wrong.size * mean * (1 - mean)
    deviation = math.sqrt(max(by_seed + by_image - by_both, by_seed, by_image)) / wrong.size
    half = float(stats.t.ppf(0.975, min(seeds, images) - 1)) * deviation
    low, high = np.clip([1 - mean - half, 1 - mean + half], 0.0, 1.0)
    return 100 * float(low), 100 * float(high)


def judge_mean(values: Sequence[float], target: float) -> tuple[Word, float, int | None]:
    """Judge the mean over seeds by a one-sided one-sample t-test: "met" needs mean > target at p < ALPHA_TARGET.

    A single value is met or missed by itself; several without any spread show nothing.

    Returns the word, p on the side where the mean lies, nan where there is no test, and about how many seeds would show
    a difference of the observed size, None where it can't be said.
    """
    over = np.array(values, dtype=np.float64) - target
    word: Word = "met" if over.mean() >= 0 else "missed"
    if _same(values):
        return word if len(over) == 1 else "not shown", math.nan, None

    from scipy import stats

    p = float(stats.ttest_1samp(over, 0.0, alternative="greater" if word == "met" else "less").pvalue)
    if p < ALPHA_TARGET:
        return word, p, None
    return "not shown", p, seeds_needed(over.mean() / over.std(ddof=1), arms=1, tail=ALPHA_TARGET)


def compare_means(a: Mapping[int, float], b: Mapping[int, float], *, paired: bool = True) -> Difference:
    """Compare two means of figures by seed: by the paired t-test over the seeds, else by Welch's t-test.

    They are paired where both have the same seeds. Without any spread there is no test, and p is nan.
    a, b: two seeds at least, as one has no spread. paired: whether one seed means the same in both.
    """
    from scipy import stats

    paired = paired and a.keys() == b.keys()
    x = np.array(list(a.values()), dtype=np.float64)
    y = np.array([b[seed] for seed in (a if paired else b)], dtype=np.float64)
    assert min(len(x), len(y)) > 1, "one seed has no spread"
    effect, sd = y.mean() - x.mean(), math.sqrt((x.var(ddof=1) + y.var(ddof=1)) / 2)
    n: tuple[int, ...] = (len(x), len(y))
    if paired:
        effect, sd, n = (y - x).mean(), (y - x).std(ddof=1), (len(x),)
    test = "paired t-test" if paired else "Welch's t-test"
    if sd <= ROUNDING * np.abs([*x, *y]).max():
        return Difference(float(effect), math.nan, math.nan, math.nan, test, n, None)
    found = stats.ttest_rel(y, x) if paired else stats.ttest_ind(y, x, equal_var=False)
    (low, high), p = found.confidence_interval(0.95), float(found.pvalue)
    needed = None
    if p >= ALPHA_DIFFERENCE:
        needed = seeds_needed(effect / sd, arms=1 if paired else 2, tail=ALPHA_DIFFERENCE / 2)
    return Difference(float(effect), float(low), float(high), p, test, n, needed)


def seeds_needed(effect_size: float, *, arms: Literal[1, 2], tail: float) -> int | None:
    """Return the fewest seeds (per arm) with which a t-test shows an effect with POWER; None where it can't be said.

    effect_size: the difference in standard deviations: of the values, or with two arms, of either arm.
    tail: the alpha of one tail, half of a two-sided test's. The far tail has less than one part in 10,000 of the power.

    Power is that of the noncentral t-distribution (Cohen 1988, chapter 2), as computed by statsmodels.
    """
    from statsmodels.stats.power import TTestIndPower, TTestPower

    test = TTestPower() if arms == 1 else TTestIndPower()

    def enough(n: int) -> bool:
        return float(test.power(abs(effect_size), n, tail, alternative="larger")) >= POWER

    doubled = (2**times for times in range(1, 20))  # to half a million; the power far beyond what is needed is nan
    high = next(filter(enough, doubled), None)
    return high and bisect.bisect_left(range(high), True, lo=max(2, high // 2), key=enough)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values by Holm (1979) for being a family; nan stays nan and is not of the family."""
    from statsmodels.stats.multitest import multipletests

    p = np.array(p_values, dtype=np.float64)
    tested = np.isfinite(p)
    if tested.any():
        p[tested] = multipletests(p[tested], method="holm")[1]
    return [float(value) for value in p]


def _interval(x: NDArray[np.float64], tail: float = 0.025) -> tuple[float, float]:
    from scipy import stats

    if _same(x):
        return math.nan, math.nan
    half = float(stats.t.ppf(1 - tail, len(x) - 1)) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return float(x.mean()) - half, float(x.mean()) + half


def _same(values: Sequence[float] | NDArray[np.float64]) -> bool:
    return bool(np.ptp(values) <= ROUNDING * np.abs(values).max())
