"""The list of measures: what is logged and shown is on it, and values are written one way."""

import math

import pytest

from helpers import ROOT
from mnist_lab.experiment import SUMMARY_METRICS
from mnist_lab.verdicts.measures import HELD_OUT, MEASURES, SHORT, TESTED, Protocol, short_figures


@pytest.mark.parametrize("protocol", [TESTED, HELD_OUT], ids=lambda protocol: protocol.part)
def test_every_figure_that_is_logged_or_shown_is_on_the_list_and_in_the_docs(protocol: Protocol) -> None:
    logged = {*protocol.each_epoch, *protocol.at_times, *protocol.once}
    assert logged | {*protocol.summary, *protocol.over_seeds, protocol.best, *protocol.curves} <= set(MEASURES)
    docs = (ROOT / "docs" / "metrics.md").read_text() + (ROOT / "docs" / "studies.md").read_text()
    assert {name for name in logged if f"`{name}`" not in docs} == set()


def test_what_may_be_reported_is_what_is_printed_beside_it() -> None:
    assert TESTED.summary == SUMMARY_METRICS


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


@pytest.mark.parametrize("mean", [99.255, 99.25500000000001, 99.25499999999998])
def test_a_mean_between_two_digits_is_rounded_one_way_everywhere(mean: float) -> None:
    assert MEASURES["best_test_accuracy"].text(mean) == "99.26 %"
    assert short_figures(dict.fromkeys(SHORT.values(), mean)) == dict.fromkeys(SHORT, 99.26)
