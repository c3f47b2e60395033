"""The list of measures: every name in use is on it, and values are written one way."""

import math

import pytest

from mnist_lab.console import SUMMARY_METRICS_WITH_HOLD_OUT
from mnist_lab.experiment import SUMMARY_METRICS
from mnist_lab.results.runs import COLUMNS, EPOCH_METRICS, HELD_OUT_METRICS, VALIDATION_COLUMNS
from mnist_lab.running.run import LOGGED_ONCE, LOGGED_ONCE_WITH_HOLD_OUT
from mnist_lab.running.study import FIGURES, FIGURES_WITH_HOLD_OUT
from mnist_lab.verdicts.measures import MEASURES


def test_every_measured_figure_is_on_the_list() -> None:
    names = {*SUMMARY_METRICS, *SUMMARY_METRICS_WITH_HOLD_OUT, *LOGGED_ONCE, *LOGGED_ONCE_WITH_HOLD_OUT}
    names |= {*FIGURES, *FIGURES_WITH_HOLD_OUT, *EPOCH_METRICS, *HELD_OUT_METRICS}
    names |= {name for name in (*COLUMNS, *VALIDATION_COLUMNS) if name.startswith(("final_", "best_", "epochs_"))}
    assert names <= set(MEASURES)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("final_test_accuracy", 99.414, "99.41 %"),
        ("num_params", 7852, "7,852"),
        ("final_test_loss", 0.01824, "0.0182"),
        ("lr", 0.00012345, "0.000123"),
        ("epoch_seconds", 20.06, "20.1 s"),
        ("best_epoch", None, "-"),
        ("best_epoch", math.nan, "-"),
    ],
)
def test_a_value_is_written_with_its_unit(name: str, value: float | None, text: str) -> None:
    assert MEASURES[name].text(value) == text


def test_an_axis_names_the_unit() -> None:
    assert MEASURES["test_accuracy"].axis == "test accuracy (%)"
    assert MEASURES["test_loss"].axis == "test loss (cross-entropy)"
    assert MEASURES["lr"].axis == "learning rate"
