"""Verdicts at their boundaries."""

import pytest

from mnist_lab.experiment import Targets
from mnist_lab.training.loop import EpochMetrics
from mnist_lab.verdicts.targets import judge, overall

STEP = Targets(accuracy=99.4, params=10_000, epochs=15)


def words(targets: Targets, **measured: float) -> dict[str, str]:
    best = {"final_test_accuracy": 100.0, "num_params": 1, "epochs": 1}
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
    assert words(STEP, final_test_accuracy=accuracy)["accuracy"] == word


@pytest.mark.parametrize(("num_params", "word"), [(9_999, "met"), (10_000, "missed"), (10_001, "missed")])
def test_parameters_must_be_fewer_than_the_target(num_params: int, word: str) -> None:
    assert words(STEP, num_params=num_params)["params"] == word


@pytest.mark.parametrize(("epochs", "word"), [(14, "met"), (15, "missed"), (16, "missed")])
def test_epochs_must_be_fewer_than_the_target(epochs: int, word: str) -> None:
    assert words(STEP, epochs=epochs)["epochs"] == word


def test_an_accuracy_equals_the_target_that_is_written_like_it() -> None:
    for correct in range(9_000, 10_001):  # a rounding error in the percentage would miss the target by a hair
        target = float(f"{correct // 100}.{correct % 100:02d}")
        assert words(Targets(accuracy=target), final_test_accuracy=accuracy_of(correct)) == {"accuracy": "met"}
        assert words(Targets(accuracy=target), final_test_accuracy=accuracy_of(correct - 1)) == {"accuracy": "missed"}


def test_a_verdict_says_what_was_wanted_and_measured() -> None:
    accuracy, params, epochs = judge(STEP, final_test_accuracy=99.47, num_params=10_970, epochs=14)

    assert (accuracy.name, accuracy.wanted, accuracy.measured, accuracy.met) == (
        "accuracy",
        "at least 99.4 %",
        99.47,
        True,
    )
    assert (params.name, params.wanted, params.measured, params.met) == ("params", "fewer than 10,000", 10_970, False)
    assert (epochs.name, epochs.wanted, epochs.measured, epochs.met) == ("epochs", "fewer than 15", 14, True)


@pytest.mark.parametrize("stated", ["accuracy", "params", "epochs"])
def test_only_stated_targets_are_judged(stated: str) -> None:
    targets = Targets(**{stated: getattr(STEP, stated)})

    assert list(words(targets)) == [stated]


def test_overall_is_met_only_if_all_are() -> None:
    measured = {"final_test_accuracy": 99.4, "num_params": 7_852, "epochs": 14}

    assert overall(judge(STEP, **measured)) == "met"
    for change in ({"final_test_accuracy": 99.39}, {"num_params": 10_970}, {"epochs": 15}):
        assert overall(judge(STEP, **(measured | change))) == "missed"


def test_no_target_gives_no_verdict() -> None:
    verdicts = judge(Targets(), final_test_accuracy=10.0, num_params=10**9, epochs=1000)

    assert verdicts == []
    assert overall(verdicts) == "none"
