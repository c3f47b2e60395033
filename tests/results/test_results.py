"""Run tables and comparisons, read from real stores."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from mlflow.entities import Metric

from helpers import ROOT
from mnist_lab import results
from mnist_lab.errors import LabError
from mnist_lab.measures import TESTED
from mnist_lab.results.compare import compare_runs, declared_pairs
from mnist_lab.results.runs import load_runs
from mnist_lab.running.identity import code_sha256, find_sources
from mnist_lab.tracking.connection import short_timeouts
from mnist_lab.tracking.store import Store, open_store
from mnist_lab.verdicts.comparison import Pair, effects_text, seeds_text
from mnist_lab.verdicts.statistics import compare_means, seeds_needed
from run_writer import STEP4, T0, TARGETS, log_predictions, predict, write_run, write_seeds

NO_SCHEDULE = {name: STEP4[name] for name in ("batch_size", "epochs", "optimizer", "momentum", "device")}
NO_SCHEDULE |= {"scheduler": "none", "lr": "0.01", "dropout": "0.1"}


@pytest.fixture(scope="module")
def many(new_store: Callable[[], Store]) -> Store:
    store = new_store()
    write_run(store, "step4", 0, [99.0, 99.5, 99.4], start_time=T0)
    write_run(store, "step4", 1, [98.9, 99.3, 99.3], start_time=T0 + 1000)
    write_run(store, "step4", 0, [99.1, 99.6, 99.5], start_time=T0 + 2000)  # seed 0 again: this one counts
    step2 = write_run(store, "step2", 0, [98.0, 99.0], start_time=T0 + 3000, num_params=6864, params=NO_SCHEDULE)
    store.client.log_metric(step2.info.run_id, "test_accuracy", 98.5, timestamp=T0 + 3500, step=1)  # logged twice
    write_run(store, "my_idea", 0, [97.0], start_time=T0 + 4000, num_params=20_000, tags={})
    write_run(store, "step4", 0, [99.9], start_time=T0 + 5000, tags={"overrides": "lr=0.2"})
    write_run(store, "step4", 2, [98.0, 98.5], start_time=T0 + 6000, status="FAILED")
    write_run(store, "step4", 3, [98.0], start_time=T0 + 7000, status=None)
    study = store.client.create_run(store.experiment_id, T0 + 8000, tags={"study": "step4", "step": "step4"})
    store.client.log_metric(study.info.run_id, "final_test_accuracy", 99.0)
    store.client.set_terminated(study.info.run_id)
    return store


EIGHT = ["step", "seed", "num_params", "epochs", "final_test_accuracy", "best_test_accuracy", "targets", "run_id"]


def test_a_run_table_has_a_typed_row_per_finished_run_and_the_columns_wanted(many: Store) -> None:
    table = results.run_table(columns="all", tracking_uri=many.uri)
    assert table["step"].tolist() == ["step2", "step4", "step4", "step4", "my_idea"]
    assert table["seed"].tolist() == [0, 0, 0, 1, 0]
    newest = table.iloc[1]  # of two runs of seed 0
    figures = ["final_test_accuracy", "best_test_accuracy", "best_epoch", "num_params", "minutes"]
    assert newest[figures].tolist() == [99.5, 99.6, 2, 7852, 1]
    assert newest["final_train_accuracy"] == pytest.approx(99.4)
    assert newest["start_time"] == pd.Timestamp(T0 + 2000, unit="ms", tz="UTC")
    kinds = {"batch_size": "Int64", "step_size": "Int64", "lr": "float64", "dropout": "float64", "git_dirty": "boolean"}
    assert {name: str(table[name].dtype) for name in kinds} == kinds
    assert pd.isna(table.iloc[0]["step_size"])  # step 2 has no schedule
    assert table.iloc[0]["dropout"] == 0.1
    assert list(results.run_table(tracking_uri=many.uri)) == EIGHT
    assert list(results.run_table("step4", include_overrides=True, tracking_uri=many.uri)) == [*EIGHT, "overrides"]
    with pytest.raises(LabError, match="^columns: 'some'"):
        results.run_table(columns="some", tracking_uri=many.uri)  # type: ignore[arg-type]


def test_run_table_filters(many: Store) -> None:
    def ids(**filters: object) -> list[tuple[str, int]]:
        table = results.run_table(tracking_uri=many.uri, **filters)
        return list(zip(table["step"], table["seed"], strict=True))

    assert ids(steps=["my_idea", "step2"]) == [("step2", 0), ("my_idea", 0)]
    assert ids(steps="step4", seeds=1) == ids(seeds=[1, 7]) == [("step4", 1)]
    assert ids(steps="step4", include_overrides=True) == [("step4", 0), ("step4", 0), ("step4", 0), ("step4", 1)]
    assert ids(status="FAILED") == [("step4", 2)]
    assert len(ids(status=None)) == 7  # the study's own run is none
    for name, meant in (("my_idae", "my_idea"), ("my", "my_idea")):
        with pytest.raises(LabError, match=f"no run of '{name}' .*did you mean '{meant}'.*my_idea, step2, step4"):
            ids(steps=name)
    for name, value in {"status": "DONE", "include_overrides": "ifnone", "holdout": "a", "hold_out": 500}.items():
        with pytest.raises(LabError, match=f"^{name}: (unknown|{value!r} is none of )"):
            ids(**{name: value})
    nothing = results.run_table(seeds=77, columns="all", tracking_uri=many.uri)
    assert nothing.empty
    assert {*EIGHT, "lr"} <= {*nothing}
    assert results.epoch_history(seeds=77, tracking_uri=many.uri).empty


def test_overridden_runs_are_shown_where_a_step_has_no_others(store: Store, lab: Callable[..., str]) -> None:
    write_seeds(store, "my_idea", 98.0, 98.0, tags={"overrides": "epochs=1"})
    write_run(store, "begun", 0, [98.0], start_time=T0, status=None)
    for step, kind in (("my_idea", "overridden"), ("begun", "RUNNING")):
        with pytest.raises(LabError, match=f"^steps: no finished run of '{step}' .*{kind}"):
            results.run_table(steps=step, tracking_uri=store.uri)
    assert len(results.run_table(steps="my_idea", include_overrides=True, tracking_uri=store.uri)) == 2
    assert "my_idea epochs=1" in lab("compare", "--tracking-uri", store.uri)
    write_seeds(store, "my_idea", 98.5, 98.6)
    told = lab("compare", "my_idea", "--tracking-uri", store.uri)
    assert "my_idea epochs=1" not in told
    assert "Left out: 1 overridden" in told
    assert "my_idea epochs=1" in lab("compare", "--include-overrides", "--tracking-uri", store.uri)


def test_a_short_name_of_a_step_will_do(store: Store) -> None:
    for step in ("step3_gap", "step4_augment_steplr", "step44_a", "step44_b"):
        write_seeds(store, step, 99.0, 99.1)
    assert results.run_table("step4", tracking_uri=store.uri)["step"].tolist() == ["step4_augment_steplr"] * 2
    assert results.epoch_history(["step3"], tracking_uri=store.uri)["step"].unique().tolist() == ["step3_gap"]
    assert results.compare("step3", "step4", tracking_uri=store.uri).change == "step 4 as a whole"
    compared = results.compare_table(steps=["step4", "step3"], tracking_uri=store.uri)
    assert compared["step"].tolist() == ["step3_gap", "step4_augment_steplr"]
    assert results.median_run("step4", tracking_uri=store.uri)["step"] == "step4_augment_steplr"
    with pytest.raises(LabError, match="^steps: 'step44' is not clear; there are runs of step44_a, step44_b"):
        results.run_table("step44", tracking_uri=store.uri)


def test_epoch_history_is_tidy(many: Store) -> None:
    history = results.epoch_history(tracking_uri=many.uri)
    assert list(history.columns) == ["run_id", "step", "overrides", "seed", "epoch", *TESTED.each_epoch]
    assert len(history) == 3 + 3 + 3 + 2 + 1
    assert not history.isna().any().any()
    one = history[(history["step"] == "step4") & (history["seed"] == 1)]
    assert one["epoch"].tolist() == [1, 2, 3]
    assert one["lr"].tolist() == pytest.approx([0.1, 0.1, 0.06])
    step2 = results.epoch_history("step2", tracking_uri=many.uri)
    assert step2["test_accuracy"].tolist() == [98.5, 99.0]  # of a point that was logged twice the later value


def test_a_server_that_goes_away_while_histories_are_read_is_one_sentence(many: Store) -> None:
    loaded = dataclasses.replace(load_runs(many.uri), uri="http://127.0.0.1:9")
    with short_timeouts(), pytest.raises(LabError, match="can't be read: no connection to the server"):
        results.epoch_history(loaded=loaded)


def test_compare_takes_the_newest_run_of_each_seed_and_their_mean(many: Store) -> None:
    table = results.compare_table(tracking_uri=many.uri).set_index("step")
    assert table.index.tolist() == ["step2", "step4", "my_idea"]  # the steps first
    step4 = table.loc["step4"]
    assert step4[["seeds", "last", "best"]].tolist() == [2, pytest.approx(99.4), pytest.approx(99.45)]
    assert table["failed"].tolist() == ["", "2", ""]
    assert step4["last_sd"] == pytest.approx(np.std([99.5, 99.3], ddof=1))
    assert (step4["low"], step4["high"]) == pytest.approx((99.4 - 12.7062 * 0.1, 100), abs=1e-3)
    assert step4["verdict_accuracy"] == "not shown"  # the mean of the last epochs, 99.40, not one lucky seed
    assert step4["p"] == pytest.approx(0.5, abs=1e-6)
    assert table.loc["step2", ["verdict_accuracy", "verdict_params"]].tolist() == ["missed", "met"]
    assert pd.isna(table.loc["step2", "last_sd"])
    assert table.loc["my_idea", "verdict_accuracy"] == "-"  # no target stated


def test_the_verdict_on_several_seeds_is_what_their_mean_shows(store: Store) -> None:
    write_seeds(store, "above", 99.50, 99.52, 99.51)
    write_seeds(store, "below", 99.1, 99.12, 99.11)
    write_seeds(store, "near", 99.3, 99.6, 99.45)
    write_seeds(store, "one", 99.5)
    table = results.compare_table(tracking_uri=store.uri).set_index("step")
    assert table["verdict_accuracy"].to_dict() == {"above": "met", "below": "missed", "near": "not shown", "one": "met"}
    assert table.loc["near", "seeds_needed"] == seeds_needed(0.05 / 0.15, arms=1, tail=0.01)
    assert table["seeds_needed"].isna().tolist() == [True, True, False, True]
    text = results.compare_text(table.reset_index())
    header, _, _, _, *rows = [re.split(r"  +", line) for line in text.splitlines()]
    assert " ".join(header) == "experiment last verdict seeds wanted parameters epochs seeds best train"
    assert rows[1][1:5] == ["99.45 +- 0.150", "not shown", "3", "99.4"]
    assert rows[1][7] == seeds_text(table.loc["near", "seeds_needed"])
    assert rows[2][1:4] == ["99.50", "met", "1"]


def test_seeds_of_other_code_teachers_or_values_are_not_averaged(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = [(0, 98.0, "old"), (1, 98.1, "old"), (2, 98.2, "old"), (0, 99.0, "new"), (1, 99.1, "new")]
    for start, (seed, accuracy, digest) in enumerate(seeds, start=T0):
        write_run(store, "code", seed, [accuracy], start_time=start, tags={"code_sha256": digest})
        write_run(store, "taught", seed, [accuracy], start_time=start, tags={"teacher_sha256": digest})
        write_run(store, "read", seed, [accuracy], start_time=start, params={**STEP4, "lr": digest})
    write_seeds(store, "bare", 97.0, 97.2)  # runs without such a tag are of one kind, but for those of another network
    write_run(store, "bare", 2, [50.0], start_time=T0 - 5, num_params=10)
    table = results.compare_table(tracking_uri=store.uri).set_index("step")
    newest = {"seeds": 2, "left_out": 3, "last": pytest.approx(99.05)}
    assert table[["seeds", "left_out", "last"]].to_dict("index") == {
        **{"code": newest, "taught": newest, "read": newest},
        "bare": {"seeds": 2, "left_out": 1, "last": pytest.approx(97.1)},
    }
    # The script was changed back.
    monkeypatch.setitem(results.newest_runs.__globals__, "codes", lambda steps: dict.fromkeys(steps, "old"))
    back = results.compare_table("code", tracking_uri=store.uri)
    assert back[["seeds", "left_out", "last"]].to_numpy().tolist() == [[3, 2, pytest.approx(98.1)]]


@pytest.fixture
def held_out(store: Store) -> str:
    """Return a store with a run of each protocol of one step, and one that is overridden besides."""
    write_run(store, "step1", 0, [98.0, 99.0], start_time=T0)
    write_held_out_run(store, "step1", 0, [97.0, 98.9, 98.8], tested=98.7)
    write_held_out_run(store, "step1", 1, [98.5], tested=98.4, overrides="lr=0.5 ")
    return store.uri


def write_held_out_run(
    store: Store, step: str, seed: int, accuracies: list[float], *, tested: float, overrides: str = ""
) -> None:
    params, tags = {**STEP4, "holdout": "10000"}, {"overrides": f"{overrides}holdout=10000"}
    run_id = write_run(store, step, seed, [], start_time=T0 + 1, params=params, tags=tags).info.run_id
    best = max(accuracies)
    once = {
        **{"num_params": 7852, "final_test_accuracy": tested, "final_test_loss": 0.04},
        **{"final_validation_accuracy": accuracies[-1], "best_validation_accuracy": best},
        "best_epoch": 1 + accuracies.index(best),
    }
    points = [Metric(name, value, T0, 0) for name, value in once.items()]
    for epoch, accuracy in enumerate(accuracies, start=1):
        values = {"validation_accuracy": accuracy, "validation_loss": (100 - accuracy) / 30, "train_accuracy": accuracy}
        points += [Metric(name, value, T0 + epoch, epoch) for name, value in values.items()]
    store.client.log_batch(run_id, metrics=points)


def test_the_protocols_are_in_separate_tables(held_out: str) -> None:
    tested = results.run_table(columns="all", tracking_uri=held_out)
    assert tested[["holdout", "final_test_accuracy", "best_test_accuracy"]].to_numpy().tolist() == [[0, 99.0, 99.0]]
    assert "final_validation_accuracy" not in tested
    (validated,) = results.run_table(columns="all", holdout=10_000, tracking_uri=held_out).to_dict("records")
    expected = {
        **{"holdout": 10_000, "overrides": "", "final_validation_accuracy": 98.8, "best_validation_accuracy": 98.9},
        **{"best_epoch": 2, "final_test_accuracy": 98.7, "final_test_loss": 0.04},
        "final_validation_loss": pytest.approx(1.2 / 30),
    }
    assert validated.items() >= expected.items()
    assert "best_test_accuracy" not in validated
    everything = results.run_table(holdout=10_000, include_overrides=True, tracking_uri=held_out)
    assert everything["overrides"].tolist() == ["", "lr=0.5"]  # holding out is a protocol, with its own column
    history = results.epoch_history(holdout=10_000, tracking_uri=held_out)
    assert history["validation_accuracy"].tolist() == [97.0, 98.9, 98.8]
    assert "test_accuracy" not in history
    table = results.compare_table(holdout=10_000, tracking_uri=held_out)
    assert table[["last", "best"]].to_numpy().tolist() == [[98.7, 98.9]]
    assert "validation" in results.compare_text(table, holdout=10_000)
    with pytest.raises(LabError, match="holdout: .* no run with holdout 5,000; .* holdout 0; .* holdout 10,000"):
        results.run_table(holdout=5_000, tracking_uri=held_out)


# ---- two experiments


def test_seeds_are_paired_and_compared_pairs_adjusted_for_their_number(store: Store) -> None:
    write_run(store, "a", 0, [90.0], start_time=T0 - 1)  # an older run of seed 0
    write_seeds(store, "a", 99.0, 99.1, 98.9)
    for seed, accuracy in ((2, 99.12), (1, 99.25), (0, 99.2)):  # in another order of time
        write_run(store, "b", seed, [accuracy], start_time=T0 - seed)
    write_run(store, "b", 9, [50.0], start_time=T0 + 30, tags={"overrides": "lr=9"})
    write_seeds(store, "c", 99.20, 99.31, 99.1, num_params=9_000, params={**STEP4, "lr": "0.3", "nesterov": "True"})
    write_run(store, "c", 5, [50.0], start_time=T0 - 99)  # left out, as it had other hyperparameters
    write_seeds(store, "single", 99.0)
    pairs = [Pair("a", "b", "first"), Pair("b", "c", "second"), Pair("gone", "a", "third"), Pair("a", "single", "4th")]

    (first, second), refused = results.compare_pairs(pairs, tracking_uri=store.uri)

    expected = compare_means(dict(enumerate([99.0, 99.1, 98.9])), dict(enumerate([99.2, 99.25, 99.12])))
    wanted = (expected.effect, expected.low, expected.high, expected.p, 2 * expected.p)
    assert (first.effect, first.low, first.high, first.p, first.p_holm) == pytest.approx(wanted)
    assert (first.change, first.test, first.seeds) == ("first", "paired t-test", "3")
    assert (second.change, second.p_holm, second.word) == ("second", pytest.approx(second.p), "not shown")
    assert (first.differ, second.differ) == ("", "lr, nesterov, num_params")
    assert "  differ in lr, nesterov, num_params" in effects_text([first, second])
    assert [sentence.split(": ")[1] for sentence in refused] == ["a with gone", "single with a"]
    one, back = (results.compare(*names, tracking_uri=store.uri) for names in (("a", "b"), ("b", "a")))
    assert one.word == "better"
    assert (back.effect, back.word) == (pytest.approx(-0.19), "worse")


@pytest.mark.parametrize(
    ("one", "other", "test"),
    [
        ("AMD EPYC, 2 cores, AVX2", "AMD EPYC, 4 cores, AVX2", "paired t-test"),
        ("AMD EPYC, 2 cores, AVX512", "Intel Xeon, 2 cores, AVX512", "Welch's t-test"),
        ("NVIDIA H100", "NVIDIA H100", "paired t-test"),
        ("AMD EPYC, 2 cores, AVX2", "AMD EPYC, 2 cores, AVX512", "Welch's t-test"),
        ("AMD EPYC, 2 cores", "AMD EPYC, 2 cores", "Welch's t-test"),  # which instructions is not known
        (None, None, "Welch's t-test"),
    ],
)
def test_seeds_are_pairs_where_both_machines_round_alike(one: str | None, other: str | None, test: str) -> None:
    accuracies = {"a": [99.1, 99.2, 99.0, 99.1], "b": [99.3, 99.45, 99.3, 99.2]}
    rows = [(step, seed, accuracy) for step, of in accuracies.items() for seed, accuracy in enumerate(of)]
    runs = pd.DataFrame(rows, columns=["step", "seed", "final_test_accuracy"])
    runs["hardware"] = runs["step"].map({"a": one, "b": other})
    ((found,), _) = compare_runs([Pair("a", "b", "")], runs)
    runs.loc[0, "hardware"] = "another"  # of one seed
    ((mixed,), _) = compare_runs([Pair("a", "b", "")], runs)
    assert (found.test, mixed.test) == (test, "Welch's t-test")


def test_the_predictions_of_a_run_are_read_with_their_confidence(store: Store) -> None:
    run = write_run(store, "a", 0, [98.0], start_time=T0)
    arrays = predict(TRUTH, accuracy=98.0)
    log_predictions(store, run, truth=TRUTH, **arrays)
    table = results.predictions(run.info.run_id, tracking_uri=store.uri)
    assert np.array_equal(table.filter(like="logit_").to_numpy(), arrays["logits"])
    largest = np.exp(arrays["logits"].max(axis=1))  # the others are 0
    assert table["confidence"].to_numpy() == pytest.approx(largest / (largest + 9))


def test_scripts_declare_with_which_experiments_they_are_compared(tmp_path: Path) -> None:
    declared = declared_pairs()
    assert Pair("step2_dropout", "gap_alone", "GAP alone") in declared
    scripts = {file.stem for file in (ROOT / "experiments").glob("*.py")}
    assert {step for pair in declared for step in (pair.a, pair.b)} <= scripts
    (tmp_path / "my_idea.py").write_text(
        '"""An idea.\n\nChange: two.\nCompared with step4: a,\nb.\ncompared with x.2, y.py : c\nCompared with y: d."""'
    )
    (tmp_path / "step4_augment_steplr.py").write_text('"""Published.\n\nCompared with step3_gap: copied."""')
    copy = '"""Mine.\n\nCompared with step3_gap: copied.\nCompared with a_copy: itself."""'
    (tmp_path / "a_copy.py").write_text(copy)
    (tmp_path / "broken.py").write_text("(")
    assert declared_pairs(tmp_path) == [
        Pair("step3_gap", "step4_augment_steplr", "copied"),
        Pair("step3_gap", "a_copy", "all that differs"),
        Pair("step4_augment_steplr", "my_idea", "a, b"),
        Pair("x.2", "my_idea", "c"),
        Pair("y", "my_idea", "c"),
    ]


def test_what_cannot_be_compared_is_refused_with_the_reason(held_out: str) -> None:
    store = open_store(held_out)
    write_seeds(store, "several", 99.0, 99.0)
    write_held_out_run(store, "held", 0, [99.0], tested=98.7)
    write_run(store, "changed", 0, [99.0], start_time=T0, tags={"overrides": "lr=9"})
    for a, b, sentence in (
        ("step1", "nothing", "steps: no run of 'nothing' in "),
        ("step1", "held", "'held' as declared .*holdout 10,000"),
        ("several", "step1", "a single seed"),
        ("step1", "changed", "'changed' .*overridden"),
    ):
        with pytest.raises(LabError, match=sentence):
            results.compare(a, b, tracking_uri=held_out)
    write_seeds(store, "several", 9.0, 9.0, tags={"overrides": "lr=9"})
    with pytest.raises(LabError, match="^several has runs as declared and overridden"):
        results.compare("several", "step1", include_overrides=True, tracking_uri=held_out)


def test_compare_prints_the_tables_of_one_protocol(held_out: str, lab: Callable[..., str]) -> None:
    store = open_store(held_out)
    now = {one: code_sha256(find_sources(ROOT / "experiments" / f"{one}.py")) for one in ("step2_dropout", "gap_alone")}
    write_seeds(store, "step2_dropout", 99.0, 99.1, tags={**TARGETS, "code_sha256": now["step2_dropout"]})
    write_seeds(store, "gap_alone", 99.3, 99.1, tags={**TARGETS, "code_sha256": "of before"})
    for seed, how in ((2, "FAILED"), (3, "FAILED"), (0, "FAILED"), (4, "KILLED")):
        code = {"code_sha256": now["step2_dropout"]}
        write_run(store, "step2_dropout", seed, [9.0], start_time=T0, status=how, tags=code)
    quick_look = {"code_sha256": now["gap_alone"], "overrides": "epochs=1"}
    write_run(store, "gap_alone", 0, [9.0], start_time=T0 + 9, tags=quick_look)
    write_seeds(store, "step4_augment_steplr", 9.0, tags=quick_look)
    write_seeds(store, "step3_gap", 99.2)
    text = lab("compare", "--tracking-uri", held_out)
    assert re.findall(r"^(\w+): its script has changed", text, re.MULTILINE) == ["gap_alone"]
    assert re.search(r"^step2_dropout +99\.05 \+- 0\.071 +not shown +2 .* 4 ", text, re.MULTILINE)
    assert re.search(r"^GAP alone +\+0\.15 +not shown +too few runs ", text, re.MULTILINE)
    assert "not compared: step3_gap with gap_alone: one or both have a single seed" in text
    assert "not compared: step4_augment_steplr, as its runs are overridden" in text
    assert "step2_dropout: its figures are without seeds or folds that failed: 2, 3." in text
    assert "step3_gap" not in lab("compare", "step2_dropout", "gap_alone", "--tracking-uri", held_out)
    write_seeds(store, "my_idea", 99.5, 99.3)
    write_run(store, "my_idea", 0, [99.5], start_time=T0 + 9, tags={"restored": "abc"})
    text = lab("compare", "step2_dropout", "gap_alone", "my_idea", "--tracking-uri", held_out)
    assert re.search(r"^GAP alone .*\n +step2_dropout -> gap_alone$", text, re.MULTILINE)  # which a script declares
    assert re.search(r"^all that differs +\+0\.35 .*\n +step2_dropout -> my_idea$", text, re.MULTILINE)
    assert "my_idea: 1 of its 2 seeds were restored" in text
    text = lab("compare", "--holdout", 10_000, "--tracking-uri", held_out)
    assert re.search(r"best\s.*\n.*validation", text)
    assert "98.70" in text
    assert "step2_dropout" not in text


def test_a_store_without_runs_says_what_to_run_and_is_not_made(uri: str, tmp_path: Path) -> None:
    open_store(uri)
    before = sorted(tmp_path.iterdir())
    for read in (results.run_table, results.epoch_history, results.compare_table):
        with pytest.raises(LabError, match="no runs yet in .*make step1"):
            read(tracking_uri=uri)
        with pytest.raises(LabError, match="no runs yet: .*make step1"):
            read(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert sorted(tmp_path.iterdir()) == before
    with short_timeouts(), pytest.raises(LabError, match="tracking store 'http://127.0.0.1:9' can't be read"):
        results.run_table(tracking_uri="http://127.0.0.1:9")
    with short_timeouts(), pytest.raises(LabError, match="tracking store 'http://127.0.0.1:9' can't be read"):
        results.predictions("0" * 32, tracking_uri="http://127.0.0.1:9")


# ---- predictions that won't do

TRUTH = np.arange(50, dtype=np.uint8) % 10
GOOD = {"truth": TRUTH, "prediction": TRUTH, "logits": np.eye(10, dtype=np.float32)[TRUTH]}


def test_predictions_that_are_not_there_are_refused(many: Store) -> None:
    def run_id(**filters: str) -> str:
        return results.run_table(tracking_uri=many.uri, **filters)["run_id"].iloc[0]

    for wanted, sentence in (
        ("0" * 32, "there is no run '0000"),
        (run_id(status="RUNNING"), "is RUNNING, not FINISHED"),
        (run_id(status="FAILED"), "is FAILED, not FINISHED"),
        (run_id(steps="step2"), "has no predictions"),
    ):
        with pytest.raises(LabError, match=sentence):
            results.predictions(wanted, tracking_uri=many.uri)


@pytest.mark.parametrize(
    ("damaged", "reason"),
    [
        (lambda good: b"", ""),
        (lambda good: good[:60] + bytes([good[60] ^ 255]) + good[61:], ""),
        (lambda good: good.replace(b"logits", b"lagits"), "logits"),
        ({"truth": np.array([{}] * 50)}, "allow_pickle=False"),
        ({"prediction": np.zeros(51, np.uint8)}, "prediction"),
        ({"truth": TRUTH[:0], "prediction": TRUTH[:0]}, "truth"),
        ({"truth": TRUTH + 9}, "digit from 0 to 9"),
        ({"logits": np.zeros(500, np.float32)}, "logits"),
        ({"logits": np.full((50, 10), np.nan, np.float32)}, "logits"),
    ],
)
def test_a_file_that_holds_no_predictions_is_refused_with_a_sentence(
    damaged: Callable[[bytes], bytes] | dict[str, np.ndarray], reason: str, uri: str
) -> None:
    store = open_store(uri)
    run = write_run(store, "a", 0, [99.0], start_time=T0)
    log_predictions(store, run, **(GOOD | (damaged if isinstance(damaged, dict) else {})))
    if not isinstance(damaged, dict):
        file = Path(run.info.artifact_uri.removeprefix("file://")) / "predictions.npz"
        file.write_bytes(damaged(file.read_bytes()))
    with pytest.raises(LabError, match=rf"^run {run.info.run_id}: its predictions\.npz can't be read: .*{reason}"):
        results.predictions(run.info.run_id, tracking_uri=uri)
