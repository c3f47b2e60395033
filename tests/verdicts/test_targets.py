"""Verdicts at their boundaries."""

from typing import Any

import pytest

from mnist_lab.experiment import Targets
from mnist_lab.training.loop import EpochMetrics
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


def test_where_nothing_was_wanted_there_is_no_verdict() -> None:
    assert judge(Targets(), accuracies=[10.0], num_params=10**9, epochs=1000) == []
    assert overall([]) == "none"


def test_several_seeds_are_judged_by_what_their_mean_shows() -> None:
    seeds = {"met": [99.45, 99.46, 99.47], "not shown": [99.45, 99.46, 99.38], "missed": [99.1, 99.11, 99.12]}
    for word, accuracies in seeds.items():
        shown = judge_mean(accuracies, 99.4)
        verdict, *_ = verdicts = judge(STEP, accuracies=accuracies, num_params=1, epochs=1)
        assert (verdict.word, verdict.p, verdict.seeds_needed) == (word, shown.p, shown.seeds_needed)
        assert (verdict.wanted, verdict.n) == ("mean at least 99.4 %", 3)
        assert verdict.measured == pytest.approx(sum(accuracies) / 3)
        assert overall(verdicts) == word
    assert overall(judge(STEP, accuracies=seeds["met"], num_params=1, epochs=15)) == "missed"


def test_targets_that_no_training_can_meet_are_named_before_it() -> None:
    assert out_of_reach(STEP, num_params=9_999, epochs=14) == []
    assert out_of_reach(Targets(accuracy=99.4), num_params=10**9, epochs=10**9) == []
    params, epochs = out_of_reach(STEP, num_params=10_000, epochs=15)
    assert params.startswith("targets.params: fewer than 10,000 ")
    assert epochs.startswith("targets.epochs: ")
