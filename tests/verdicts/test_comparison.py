"""Comparisons in words: no more is claimed than was shown."""

import math
import re

import pytest

from mnist_lab.verdicts.comparison import (
    Comparison,
    adjust,
    effects_text,
    mean_interval_text,
    p_text,
    seeds_text,
    step_order,
    table_text,
)


def comparison(**given: object) -> Comparison:
    figures = {"effect": 0.03, "low": -0.01, "high": 0.07, "p": 0.2, "p_holm": 0.2, "test": "paired t-test", "n": (5,)}
    return Comparison(**{"a": "plain", "b": "better", "change": "", **figures, "seeds_needed": 44, **given})


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        ({}, "no difference shown (needs about 40 seeds for 0.03 points)"),
        ({"effect": -0.03}, "no difference shown (needs about 40 seeds for 0.03 points)"),
        ({"seeds_needed": 12_345}, "no difference shown (needs about 10,000 seeds for 0.03 points)"),
        ({"effect": 0.0, "p": 1.0, "p_holm": 1.0, "seeds_needed": None}, "no difference shown"),
        ({"p": math.nan, "p_holm": math.nan, "seeds_needed": None}, "no difference shown"),
        ({"p": 0.01, "p_holm": 0.03, "seeds_needed": None}, "better by 0.03 points"),
        ({"p": 0.01, "p_holm": 0.03, "seeds_needed": None, "effect": -0.2}, "worse by 0.20 points"),
        ({"p": 0.01, "p_holm": 0.06, "seeds_needed": None}, "no difference shown (among so many comparisons)"),
    ],
)
def test_the_verdict_says_what_was_shown(given: dict[str, object], verdict: str) -> None:
    assert comparison(**given).verdict == verdict


def test_a_difference_of_under_four_seeds_has_no_interval() -> None:
    for test, n in (("paired t-test", (3,)), ("Welch's t-test", (10, 3))):
        few = comparison(test=test, n=n)
        assert few.interval == "too few seeds"
        assert "too few seeds" in effects_text([few])
    assert comparison(n=(4,)).interval == "-0.01 to +0.07"
    assert comparison(test="McNemar's exact test", n=(10_000,)).interval == "-0.01 to +0.07"
    assert [mean_interval_text(n, 99.0, 100.0) for n in (3, 4)] == ["too few seeds", "99.00 to 100.00"]


def test_a_table_of_comparisons_is_adjusted_together() -> None:
    adjusted = adjust([comparison(p=0.03), comparison(p=0.04, effect=-0.03)])
    assert [c.p_holm for c in adjusted] == [0.06, 0.06]
    assert not any(c.shown for c in adjusted)  # each by itself would be
    assert adjust([]) == []
    (row,) = (line for line in effects_text(adjusted).splitlines() if " -0.03 " in line)
    assert re.split(r"  +", row)[1:] == ["-0.03", "not shown", "-0.01 to +0.07", "0.06", "5", "40", "0.04"]


def test_a_table_leaves_out_what_is_empty_and_names_what_it_has_no_place_for() -> None:
    columns = {"name": ["one", "two"], "empty": ["-", "-"], "figure": ["-", "99.4"], "a long\nheader": ["1", "2"]}
    assert "empty" not in table_text(columns)
    narrow = table_text(columns, width=20)
    assert "99.4" in narrow
    assert narrow.endswith("A wider terminal\nalso shows: a long\nheader.")


def test_a_p_value_is_never_a_bare_zero() -> None:
    texts = {1.0: "1.00", 0.153: "0.15", 0.0712: "0.071", 0.0042: "0.0042", 1e-9: "<0.0001", math.nan: "-"}
    assert {p: p_text(p) for p in texts} == texts


def test_experiments_are_in_natural_order() -> None:
    names = ["zero", "step10_b", "step2_a", "idea12", "idea3", "step2", "10th", "step"]
    assert sorted(names, key=step_order) == ["step2", "step2_a", "step10_b", "10th", "idea3", "idea12", "step", "zero"]


def test_seeds_needed_are_an_order_of_magnitude() -> None:
    texts = {2: "2", 9: "9", 44: "40", 45: "50", 99: "100", 224: "200", 1_107: "1,000"}
    assert {needed: seeds_text(needed) for needed in texts} == texts
