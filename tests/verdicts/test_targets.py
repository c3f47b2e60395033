"""Verdicts at their boundaries."""

import math
from typing import Any

import pytest

from mnist_lab.experiment import Targets
from mnist_lab.training.loop import EpochMetrics
from mnist_lab.verdicts.statistics import judge_mean
from mnist_lab.verdicts.targets import judge, out_of_reach, overall

STEP = Targets(accuracy=99.4, params=10_000, epochs=15)


def words(targets: Targets, **measured: Any) -> dict[str, str]:
    best = {"accuracies": [100.0], "num_params": 1, "epochs": 1}
    return {verdict.name: verdict.word for verdict in judge(targets, **(best | measured))}


def accuracy_of(correct: int) -> float:
    epoch = EpochMetrics(
        epoch=1,
        train_loss=0.0,
        train_correct=60_000,
        train_images=60_000,
        eval_loss=0.0,
        eval_correct=correct,
        eval_images=10_000,
        lr=0.01,
        epoch_seconds=1.0,
    )
    return epoch.eval_accuracy


@pytest.mark.parametrize(("accuracy", "word"), [(99.4, "met"), (99.39, "missed"), (99.41, "met"), (0.994, "missed")])
def test_accuracy_is_met_from_the_target_on(accuracy: float, word: str) -> None:
    assert words(STEP, accuracies=[accuracy])["accuracy"] == word


@pytest.mark.parametrize(("num_params", "word"), [(9_999, "met"), (10_000, "missed"), (10_001, "missed")])
def test_parameters_must_be_fewer_than_the_target(num_params: int, word: str) -> None:
    assert words(STEP, num_params=num_params)["params"] == word


@pytest.mark.parametrize(("epochs", "word"), [(14, "met"), (15, "missed"), (16, "missed")])
def test_epochs_must_be_fewer_than_the_target(epochs: int, word: str) -> None:
    assert words(STEP, epochs=epochs)["epochs"] == word


def test_an_accuracy_equals_the_target_that_is_written_like_it() -> None:
    for correct in range(9_000, 10_001):  # a rounding error in the percentage would miss the target by a hair
        target = float(f"{correct // 100}.{correct % 100:02d}")
        assert words(Targets(accuracy=target), accuracies=[accuracy_of(correct)]) == {"accuracy": "met"}
        assert words(Targets(accuracy=target), accuracies=[accuracy_of(correct - 1)]) == {"accuracy": "missed"}


def test_a_verdict_says_what_was_wanted_and_measured() -> None:
    verdicts = judge(STEP, accuracies=[99.47], num_params=10_970, epochs=14)

    assert [(v.name, v.wanted, v.measured, v.word) for v in verdicts] == [
        ("accuracy", "at least 99.4 %", 99.47, "met"),
        ("params", "fewer than 10,000", 10_970, "missed"),
        ("epochs", "fewer than 15", 14, "met"),
    ]
    assert all(math.isnan(v.p) and v.seeds_needed is None for v in verdicts)


def test_several_seeds_are_judged_by_what_their_mean_shows() -> None:
    above, near, below = (
        judge(Targets(accuracy=99.4), accuracies=accuracies, num_params=1, epochs=1)[0]
        for accuracies in ([99.45, 99.46, 99.47], [99.45, 99.46, 99.38], [99.1, 99.11, 99.12])
    )

    assert [v.word for v in (above, near, below)] == ["met", "not shown", "missed"]
    assert (above.wanted, above.measured, above.n) == ("mean at least 99.4 %", pytest.approx(99.46), 3)
    assert above.p == pytest.approx(judge_mean([99.45, 99.46, 99.47], 99.4).p)
    assert near.seeds_needed == judge_mean([99.45, 99.46, 99.38], 99.4).seeds_needed
    assert above.seeds_needed is None


@pytest.mark.parametrize("stated", ["accuracy", "params", "epochs"])
def test_only_stated_targets_are_judged(stated: str) -> None:
    targets = Targets(**{stated: getattr(STEP, stated)})

    assert list(words(targets)) == [stated]


def test_overall_is_met_only_if_all_are() -> None:
    measured: dict[str, Any] = {"accuracies": [99.4], "num_params": 7_852, "epochs": 14}

    assert overall(judge(STEP, **measured)) == "met"
    for change in ({"accuracies": [99.39]}, {"num_params": 10_970}, {"epochs": 15}):
        assert overall(judge(STEP, **(measured | change))) == "missed"


def test_overall_is_not_shown_where_the_mean_shows_nothing_and_nothing_is_missed() -> None:
    measured: dict[str, Any] = {"accuracies": [99.45, 99.46, 99.38], "num_params": 7_852}

    assert overall(judge(STEP, **measured, epochs=14)) == "not shown"
    assert overall(judge(STEP, **measured, epochs=15)) == "missed"


def test_no_target_gives_no_verdict() -> None:
    verdicts = judge(Targets(), accuracies=[10.0], num_params=10**9, epochs=1000)

    assert verdicts == []
    assert overall(verdicts) == "none"


def test_targets_that_no_training_can_meet_are_named_before_it() -> None:
    assert out_of_reach(STEP, num_params=9_999, epochs=14) == []
    assert out_of_reach(Targets(accuracy=99.4), num_params=10**9, epochs=10**9) == []
    params, epochs = out_of_reach(STEP, num_params=10_000, epochs=15)
    assert params.startswith("targets.params: ")
    assert "10,000" in params
    assert epochs.startswith("targets.epochs: ")
