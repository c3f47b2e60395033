"""The statistics, against examples that were published with their figures.

Student's sleep data: Student (1908), The probable error of a mean, Biometrika 6, 1-25; the figures to seven digits are
those of R's `t.test` on its data set `sleep`.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pytest

from mnist_lab.verdicts.statistics import (
    Difference,
    aggregate,
    compare_means,
    holm,
    interval_for_new_images,
    judge_mean,
    lower_bound,
    seeds_needed,
)

# Hours of sleep that ten patients gained by each of two drugs.
DRUG_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
DRUG_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
GAINS = [b - a for a, b in zip(DRUG_1, DRUG_2, strict=True)]
PATIENTS = list(range(10))


def compare(
    a: Sequence[float], b: Sequence[float], paired_by: tuple[Sequence[int], Sequence[int]] | None = None
) -> Difference:
    """Compare figures by their seeds; where none are given, no seed is shared."""
    of_a, of_b = paired_by or (range(len(a)), range(100, 100 + len(b)))
    return compare_means(dict(zip(of_a, a, strict=True)), dict(zip(of_b, b, strict=True)))


# ---- one figure over seeds


def test_aggregate_has_the_mean_spread_and_interval_of_students_sleep_data() -> None:
    gain = aggregate(GAINS, target=1.25)
    assert gain.n == 10
    assert gain.mean == pytest.approx(1.58)
    assert gain.sd == pytest.approx(1.2299955, abs=1e-7)
    assert (gain.low, gain.high) == pytest.approx((0.7001142, 2.4598858), abs=1e-7)
    assert (gain.minimum, gain.median, gain.maximum) == pytest.approx((0.0, 1.3, 4.6))
    assert gain.share_at_target == 0.6


def test_aggregate_of_one_seed_has_no_spread_and_a_value_at_the_target_reaches_it() -> None:
    one = aggregate([99.39])
    assert (one.n, one.mean, one.minimum, one.maximum) == (1, 99.39, 99.39, 99.39)
    assert all(math.isnan(value) for value in (one.sd, one.low, one.high, one.share_at_target))
    assert aggregate([99.4, 99.39], target=99.4).share_at_target == 0.5


def test_the_lower_bound_is_the_target_that_is_just_met() -> None:
    bound = lower_bound(GAINS)
    assert judge_mean(GAINS, bound - 1e-6)[0] == "met"
    assert judge_mean(GAINS, bound + 1e-6)[0] == "not shown"
    assert all(math.isnan(lower_bound(values)) for values in ([99.4], [99.41] * 7, [60.0, 99.0]))  # the last: below 0
    assert math.isnan(aggregate([99.41] * 7).low)


def test_the_interval_for_new_images_is_that_of_a_bootstrap_over_seeds_and_images() -> None:
    """Some images are hard for every network, as in MNIST; networks differ a little."""
    random = np.random.default_rng(0)
    hard = random.beta(0.02, 3.0, size=2000)
    wrong = random.random((40, 2000)) < hard * random.normal(1.0, 0.2, size=(40, 1))
    drawn = [wrong[random.integers(0, 40, 40)][:, random.integers(0, 2000, 2000)].mean() for _ in range(1000)]
    low, high = interval_for_new_images(wrong)
    assert (low + high) / 2 == pytest.approx(100 * (1 - wrong.mean()))
    expected = np.percentile(drawn, 97.5) - np.percentile(drawn, 2.5)
    assert high - low == pytest.approx(100 * expected, rel=0.1)


def test_the_interval_for_new_images_has_bounds_where_seeds_err_apart() -> None:
    wrong = np.kron(np.eye(5, dtype=bool), np.ones(20, dtype=bool))
    low, high = interval_for_new_images(np.pad(wrong, ((0, 0), (0, 9900))))
    assert 99 < low < 99.8 < high <= 100


# ---- a mean against a target


def test_judge_mean_gives_the_probability_that_student_published() -> None:
    """Student (1908), section IX: the odds are 666 to 1, P = .9985, that the second drug is the better one."""
    word, p, needed = judge_mean(GAINS, 0.0)
    assert (word, needed) == ("met", None)
    assert 1 - p == pytest.approx(0.9985, abs=1e-4)
    assert p == pytest.approx(0.002832890 / 2, abs=1e-8)  # half of R's two-sided p
    assert judge_mean([-gain for gain in GAINS], 0.0) == ("missed", pytest.approx(p), None)


def test_a_mean_above_the_target_that_the_test_does_not_show_is_not_met() -> None:
    """Student (1908): for the first drug P = .8873 only, read from his table; 0.8912 by today's."""
    word, p, needed = judge_mean(DRUG_1, 0.0)
    assert word == "not shown"
    assert 1 - p == pytest.approx(0.8873, abs=5e-3)
    assert needed == seeds_needed(0.75 / np.std(DRUG_1, ddof=1), arms=1, tail=0.01)
    assert needed == 60


def test_values_without_any_spread_show_nothing_but_a_single_one_is_met_or_missed() -> None:
    none = (pytest.approx(math.nan, nan_ok=True), None)
    assert judge_mean([99.5] * 30, 99.4) == ("not shown", *none)
    assert [judge_mean([value], 99.4) for value in (99.4, 99.3)] == [("met", *none), ("missed", *none)]


# ---- two means


def test_paired_comparison_of_students_sleep_data() -> None:
    """R: t.test(extra ~ group, data = sleep, paired = TRUE) gives t = -4.0621, df = 9, p-value = 0.002833."""
    difference = compare(DRUG_1, DRUG_2, paired_by=(PATIENTS, PATIENTS))
    assert (difference.test, difference.n) == ("paired t-test", (10,))
    assert difference.effect == pytest.approx(1.58)
    assert (difference.low, difference.high) == pytest.approx((0.7001142, 2.4598858), abs=1e-7)
    assert difference.p == pytest.approx(0.002833, abs=1e-6)
    assert difference.seeds_needed is None


def test_welchs_comparison_of_students_sleep_data() -> None:
    """R: t.test(extra ~ group, data = sleep) gives t = -1.8608, df = 17.776, p-value = 0.07939."""
    difference = compare(DRUG_1, DRUG_2)
    assert (difference.test, difference.n) == ("Welch's t-test", (10, 10))
    assert difference.effect == pytest.approx(1.58)
    assert (difference.low, difference.high) == pytest.approx((-0.2054832, 3.3654832), abs=1e-7)
    assert difference.p == pytest.approx(0.07939, abs=1e-5)
    assert difference.seeds_needed == 24


def test_the_same_seeds_are_paired_in_any_order_and_of_others_all_count() -> None:
    difference = compare([1.0, 2.0, 3.0], [3.3, 1.0, 2.1], paired_by=([0, 1, 2], [2, 0, 1]))
    assert (difference.n, difference.effect) == ((3,), pytest.approx((0.0 + 0.1 + 0.3) / 3))
    assert compare(DRUG_1, DRUG_2[:3], paired_by=(PATIENTS, PATIENTS[:3])).n == (10, 3)


def test_a_difference_without_any_spread_is_not_tested() -> None:
    for a, b, seeds in [
        ([99.1, 99.2], [99.2, 99.3], ([0, 1], [0, 1])),
        (DRUG_1, DRUG_1, (PATIENTS, PATIENTS)),
        ([99.1, 99.1], [99.2, 99.2], ([0, 1], [2, 3])),
    ]:
        untested = compare(a, b, paired_by=seeds)
        assert untested.effect == pytest.approx(b[0] - a[0])
        assert all(math.isnan(figure) for figure in (untested.low, untested.high, untested.p))
        assert untested.seeds_needed is None


# ---- how many seeds


@pytest.mark.parametrize(
    ("effect_size", "arms", "needed"),
    [
        *((0.2, 2, 394), (0.5, 2, 64), (0.8, 2, 26)),  # 393.4 would have the power; Cohen rounds it down
        *((0.0, 1, None), (1e-9, 1, None), (3.0, 1, 4), (1e6, 1, 2), (-3.0, 1, 4)),
    ],
)
def test_seeds_needed_are_cohens_and_bounded(effect_size: float, arms: Literal[1, 2], needed: int | None) -> None:
    """Cohen (1992), A power primer, Psychological Bulletin 112, 155-159, table 2: difference of means, alpha .05."""
    assert seeds_needed(effect_size, arms=arms, tail=0.025) == needed


# ---- a table of comparisons


def test_holm_on_a_published_example_and_without_what_was_not_compared() -> None:
    """The worked example of the article "Holm-Bonferroni method" in Wikipedia: at 0.05 only H4 and H1 are rejected."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.01, math.nan, 0.02]) == pytest.approx([0.02, math.nan, 0.02], nan_ok=True)
    assert holm([]) == []
