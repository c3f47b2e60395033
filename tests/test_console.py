"""What a run and a study print while they go on, and at the end."""

import dataclasses
import re
import sys
from functools import partial
from typing import Any

import pytest
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import tiny
from helpers import TINY, Screen
from mnist_lab.checking.schedule import FirstWeights
from mnist_lab.console import Console, StudyConsole, print_run_id
from mnist_lab.experiment import Targets
from mnist_lab.measures import HELD_OUT, TESTED
from mnist_lab.paths import own_store
from mnist_lab.running.job import Job
from mnist_lab.training.loop import EpochMetrics
from mnist_lab.verdicts.targets import how_sure, judge

SECOND_EPOCH = EpochMetrics(2, 0.5, 900, 1000, 0.25, 470, 500, lr=0.1, epoch_seconds=1.5)


def job_of(averaged_by: float | None = None, **given: Any) -> Job:
    experiment = tiny.EXPERIMENT
    if averaged_by is not None:
        average = partial(AveragedModel, multi_avg_fn=get_ema_multi_avg_fn(averaged_by))
        experiment = dataclasses.replace(experiment, average=average)
    return Job(**{"script": TINY, "experiment": experiment, "tracking_uri": "sqlite:///none.db", **given})


# ---- a run


@pytest.mark.parametrize(
    ("decay", "raw"),
    [
        (0.998, " (raw weights 96.00 %; the average says little yet: it is 94% the first weights)"),
        (0.9, " (raw weights 96.00 %)"),
        (None, ""),
    ],
)
def test_an_epoch_is_a_line_that_says_what_its_average_means(decay: float | None, raw: str) -> None:
    epoch = dataclasses.replace(SECOND_EPOCH, evaluated_on="validation", raw_correct=480 if decay else None)

    shown = Console(job_of(decay)).epoch_line(epoch)  # after 2 epochs of 16 batches

    begin = "epoch 2/2  train loss 0.5000, accuracy 90.00 %  validation loss 0.2500, accuracy 94.00 %"
    assert shown == f"{begin}{raw}  lr 0.1  1.5 s"


def test_the_share_of_the_first_weights_is_that_of_the_declared_rule() -> None:
    exponential = FirstWeights(job_of(0.9).experiment)
    assert [exponential.share(batches) for batches in (3, 1, 11)] == pytest.approx([0.81, 1, 0.9**10])
    equal = FirstWeights(dataclasses.replace(tiny.EXPERIMENT, average=AveragedModel))
    assert equal.share(8) == pytest.approx(1 / 8)
    unknown = FirstWeights(dataclasses.replace(tiny.EXPERIMENT, average=lambda net: AveragedModel(net[-1])))
    assert unknown.share(8) == 0


def test_a_result_has_what_there_is_to_say(capsys: pytest.CaptureFixture[str]) -> None:
    Console(job_of()).on_verdict(dict.fromkeys(TESTED.summary, 99.0), [])
    shown = capsys.readouterr().out
    assert not [word for word in ("verdict", "Overridden", "reported") if word in shown]

    Console(job_of(holdout=500)).on_verdict(dict.fromkeys(HELD_OUT.summary, 99.0), [])
    shown = capsys.readouterr().out
    assert "best validation accuracy" in shown
    assert "best test accuracy" not in shown
    assert "read once" in shown


def test_the_end_of_a_run_names_the_comparison_that_has_it(capsys: pytest.CaptureFixture[str]) -> None:
    print_run_id("abc", job_of(tracking_uri=own_store()))
    print_run_id("abc", job_of(limit=100, holdout=500, tracking_uri=own_store()))
    print_run_id("abc", job_of(tracking_uri="https://bob:SECRET@host"))
    plain, more, elsewhere = capsys.readouterr().out.splitlines()
    assert '`make ui ARGS="--tracking-uri https://bob:***@host"`' in elsewhere
    assert "run abc;" in plain
    assert "`make compare`" in plain
    assert '`make compare ARGS="--include-overrides --holdout 500"`' in more


# ---- a study


def test_a_terminal_shows_one_bar_for_all_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "100")
    console = StudyConsole(job_of())

    console.on_study("idea 3 seeds", [0, 1, 2], [1, 2], 2)
    console.on_epoch(1, dataclasses.replace(SECOND_EPOCH, epoch=1))
    console.on_epoch(1, SECOND_EPOCH)
    console.on_seed(1, {"final_test_accuracy": 99.1, "best_test_accuracy": 99.2, "best_epoch": 1.0})
    console.on_time()
    console.on_failure(2, "bad luck")
    console.close()

    shown = screen.getvalue()
    assert "idea 3 seeds: finished already, and not trained again: seed 0\n" in shown
    assert re.search(r" 50%\|[^|]*\| 2/4 epochs \[\d\d:\d\d, \d\d:\d\d left, 2/3 seeds\]", shown)
    assert "seed 1  done: test accuracy 99.10 % in the last epoch; best test accuracy 99.20 % in epoch 1" in shown
    assert "seed 2  failed: bad luck" in shown
    assert "train loss" not in shown


def test_how_sure_a_verdict_is() -> None:
    def how_sure_of(*accuracies: float) -> str:
        (verdict,) = judge(Targets(accuracy=99.4), accuracies=accuracies, num_params=1, epochs=1)
        return how_sure(verdict)

    assert how_sure_of(99.45, 99.46, 99.47) == "That the mean is at least 99.4 %: p = 0.0046, from 3 seeds."
    assert re.search(r"at least 99\.4 %: p = 0\.\d+, .*; about [1-9]0* seeds would", how_sure_of(99.45, 99.46, 99.38))
    assert "One seed" in how_sure_of(99.5)
