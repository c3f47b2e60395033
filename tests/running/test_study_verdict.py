"""What a study's seeds show together, in a word and in a sentence."""

import pytest

from mnist_lab.experiment import Targets
from mnist_lab.running.progress import StudyResult
from mnist_lab.running.study import judge_runs, tables
from mnist_lab.tracking.store import FinishedRun
from mnist_lab.verdicts.targets import overall


def finished(accuracies: list[float]) -> list[FinishedRun]:
    figures = [
        {"final_test_accuracy": accuracy, "best_test_accuracy": accuracy + 0.05, "num_params": 7852.0}
        for accuracy in accuracies
    ]
    return [FinishedRun(str(seed), seed, metrics) for seed, metrics in enumerate(figures)]


def judged(accuracies: list[float], targets: Targets | None = None) -> StudyResult:
    return judge_runs(targets or Targets(), 14, "abc", finished(accuracies))


@pytest.mark.parametrize(
    ("accuracies", "targets", "word"),
    [
        ([99.45, 99.46, 99.47], Targets(accuracy=99.4, params=10_000, epochs=15), "met"),
        ([99.45, 99.46, 99.47], Targets(accuracy=99.4, params=7_000, epochs=15), "missed"),
        ([99.45, 99.46, 99.38], Targets(accuracy=99.4, params=10_000, epochs=15), "not shown"),
        ([99.45, 99.46, 99.38], Targets(accuracy=99.4, params=10_000, epochs=14), "missed"),
        ([99.1, 99.11, 99.12], Targets(accuracy=99.4), "missed"),
        ([99.45], Targets(accuracy=99.4), "met"),  # one seed is judged as one run is
        ([99.39], Targets(accuracy=99.4), "missed"),
        ([99.45], Targets(), "none"),
        ([], Targets(accuracy=99.4), "none"),
    ],
)
def test_the_verdict_of_a_study(accuracies: list[float], targets: Targets, word: str) -> None:
    result = judged(accuracies, targets)

    assert overall(result.verdicts) == word


def test_an_interval_of_accuracies_ends_at_100() -> None:
    result = judged([99.0, 99.9, 99.9, 99.9])

    (over_seeds, headers), _ = tables(result)
    assert over_seeds[0][headers.index("95 % interval")] == "98.96 to 100.00"


@pytest.mark.parametrize("accuracies", [[99.4], [58.0, 58.2], [99.38, 99.51, 99.4]])
def test_under_four_seeds_there_are_too_few_for_an_interval(accuracies: list[float]) -> None:
    result = judged(accuracies)

    (over_seeds, headers), _ = tables(result)
    assert over_seeds[0][headers.index("95 % interval")] == "too few seeds"
