"""Targets, measures and comparisons in words: no more is claimed than was shown."""

import math
import re
from typing import Any

import pytest

from helpers import ROOT
from mnist_lab.experiment import Targets
from mnist_lab.measures import HELD_OUT, MEASURES, SHORT, TESTED, Protocol, short_figures
from mnist_lab.training.loop import EpochMetrics
from mnist_lab.verdicts.comparison import (
    Comparison,
    adjust,
    effects_text,
    mean_interval_text,
    seeds_text,
    step_order,
    table_text,
)
from mnist_lab.verdicts.statistics import judge_mean
from mnist_lab.verdicts.targets import judge, out_of_reach, overall

STEP = Targets(accuracy=99.4, params=10_000, epochs=15)
BEST: dict[str, Any] = {"accuracies": [100.0], "num_params": 1, "epochs": 1}


@pytest.mark.parametrize(
    ("target", "measured", "word"),
    [
        *(("accuracy", {"accuracies": [a]}, w) for a, w in ((99.4, "met"), (99.39, "missed"), (0.994, "missed"))),
        *(("params", {"num_params": n}, w) for n, w in ((9_999, "met"), (10_000, "missed"), (10_001, "missed"))),
        *(("epochs", {"epochs": n}, w) for n, w in ((14, "met"), (15, "missed"), (16, "missed"))),
    ],
)
def test_a_target_is_met_up_to_its_boundary(target: str, measured: dict[str, Any], word: str) -> None:
    words = {verdict.name: verdict.word for verdict in judge(STEP, **(BEST | measured))}
    assert words == {"accuracy": "met", "params": "met", "epochs": "met"} | {target: word}
    assert overall(judge(STEP, **(BEST | measured))) == word
    alone = Targets(**{target: getattr(STEP, target)})
    assert [verdict.name for verdict in judge(alone, **(BEST | measured))] == [target]


def test_an_accuracy_equals_the_target_that_is_written_like_it() -> None:
    epoch: dict[str, Any] = {"epoch": 1, "train_loss": 0.0, "train_correct": 60_000, "train_images": 60_000, "lr": 0.01}
    epoch |= {"eval_loss": 0.0, "eval_images": 10_000, "epoch_seconds": 1.0}
    for correct in range(9_000, 10_001):  # a rounding error in the percentage would miss the target by a hair
        targets = Targets(accuracy=float(f"{correct // 100}.{correct % 100:02d}"))
        for right, word in ((correct, "met"), (correct - 1, "missed")):
            accuracy = EpochMetrics(**epoch, eval_correct=right).eval_accuracy
            assert judge(targets, **(BEST | {"accuracies": [accuracy]}))[0].word == word


def test_several_seeds_are_judged_by_what_their_mean_shows() -> None:
    seeds = {"met": [99.45, 99.46, 99.47], "not shown": [99.45, 99.46, 99.38], "missed": [99.1, 99.11, 99.12]}
    for word, accuracies in seeds.items():
        verdict, *_ = verdicts = judge(STEP, accuracies=accuracies, num_params=1, epochs=1)
        assert (verdict.word, verdict.p, verdict.seeds_needed) == judge_mean(accuracies, 99.4)
        assert verdict.word == word
        assert (verdict.wanted, verdict.n) == ("mean at least 99.4 %", 3)
        assert verdict.measured == pytest.approx(sum(accuracies) / 3)
        assert overall(verdicts) == word
    assert overall(judge(STEP, accuracies=seeds["met"], num_params=1, epochs=15)) == "missed"


def test_targets_that_no_training_can_meet_are_named_before_it() -> None:
    assert judge(Targets(), accuracies=[10.0], num_params=10**9, epochs=1000) == []
    assert overall([]) == "none"
    assert out_of_reach(STEP, num_params=9_999, epochs=14) == []
    assert out_of_reach(Targets(accuracy=99.4), num_params=10**9, epochs=10**9) == []
    params, epochs = out_of_reach(STEP, num_params=10_000, epochs=15)
    assert params.startswith("targets.params: fewer than 10,000 ")
    assert epochs.startswith("targets.epochs: ")


@pytest.mark.parametrize("protocol", [TESTED, HELD_OUT], ids=lambda protocol: protocol.part)
def test_every_figure_that_is_logged_or_shown_is_on_the_list_and_in_the_docs(protocol: Protocol) -> None:
    logged = {*protocol.each_epoch, *protocol.at_times, *protocol.once}
    assert logged | {*protocol.summary, *protocol.over_seeds, protocol.best, *protocol.curves} <= set(MEASURES)
    docs = (ROOT / "docs" / "metrics.md").read_text() + (ROOT / "docs" / "studies.md").read_text()
    assert {name for name in logged if f"`{name}`" not in docs} == set()


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        *(("final_test_accuracy", 99.414, "99.41 %"), ("num_params", 7852, "7,852"), ("lr", 0.00012345, "0.000123")),
        *(("final_test_loss", 0.01824, "0.0182"), ("epoch_seconds", 20.06, "20.1 s")),
        *(("best_epoch", None, "-"), ("best_epoch", math.nan, "-")),
    ],
)
def test_a_value_is_written_with_its_unit(name: str, value: float | None, text: str) -> None:
    assert MEASURES[name].text(value) == text


@pytest.mark.parametrize("mean", [99.255, 99.25500000000001, 99.25499999999998])
def test_a_mean_between_two_digits_is_rounded_one_way_everywhere(mean: float) -> None:
    assert MEASURES["best_test_accuracy"].text(mean) == "99.26 %"
    assert short_figures(dict.fromkeys(SHORT.values(), mean)) == dict.fromkeys(SHORT, 99.26)


def comparison(**given: object) -> Comparison:
    figures = {"effect": 0.03, "low": -0.01, "high": 0.07, "p": 0.2, "p_holm": 0.2, "test": "paired t-test", "n": (5,)}
    texts = {"a": "plain", "b": "better", "change": "", "differ": ""}
    return Comparison(**{**texts, "seeds_needed": 44, **figures, **given})


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        ({}, "no difference shown (needs about 50 seeds for 0.03 points)"),
        ({"seeds_needed": 12_345}, "no difference shown (needs about 20,000 seeds for 0.03 points)"),
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
        assert few.interval == "too few runs"
        assert "too few runs" in effects_text([few])
    assert comparison(n=(4,)).interval == "-0.01 to +0.07"
    assert [mean_interval_text(n, 99.0, 100.0) for n in (3, 4)] == ["too few runs", "99.00 to 100.00"]


def test_a_table_of_comparisons_is_adjusted_together() -> None:
    adjusted = adjust([comparison(p=0.03), comparison(p=0.04, effect=-0.03)])
    assert [c.p_holm for c in adjusted] == [0.06, 0.06]
    assert {c.word for c in adjusted} == {"not shown"}  # each by itself would be shown
    assert adjust([]) == []
    (row,) = (line for line in effects_text(adjusted).splitlines() if " -0.03 " in line)
    assert re.split(r"  +", row)[1:] == ["-0.03", "not shown", "-0.01 to +0.07", "0.06", "5", "50", "0.04"]


def test_a_table_leaves_out_what_is_empty_and_names_what_it_has_no_place_for() -> None:
    columns = {"name": ["one", "two"], "empty": ["-", "-"], "figure": ["-", "99.4"], "a long\nheader": ["1", "2"]}
    assert "empty" not in table_text(columns)
    narrow = table_text(columns, width=20)
    assert "99.4" in narrow
    assert narrow.endswith("A wider terminal\nalso shows: a long\nheader.")


def test_experiments_are_in_natural_order() -> None:
    names = ["zero", "step10_b", "step2_a", "idea12", "idea3", "step2", "10th", "step"]
    assert sorted(names, key=step_order) == ["step2", "step2_a", "step10_b", "10th", "idea3", "idea12", "step", "zero"]


def test_seeds_needed_are_an_order_of_magnitude() -> None:
    texts = {2: "2", 9: "9", 10: "10", 41: "50", 50: "50", 224: "300", 1_107: "2,000"}
    assert {needed: seeds_text(needed) for needed in texts} == texts
