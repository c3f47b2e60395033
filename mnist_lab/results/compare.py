"""Experiments side by side: one row per experiment, and what each single change is worth. Accuracies are in percent."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from itertools import starmap
from pathlib import Path
from statistics import fmean
from typing import Any, Unpack

import pandas as pd

from mnist_lab.errors import LabError
from mnist_lab.experiment import Targets
from mnist_lab.measures import HELD_OUT, TESTED, percent, protocol
from mnist_lab.paths import EXPERIMENTS, PUBLISHED, script_named
from mnist_lab.results.runs import COLUMNS, TARGETS, RunFilter, Steps, full_names, load_runs, run_table
from mnist_lab.running.identity import code_sha256, find_sources
from mnist_lab.story import read_stories
from mnist_lab.verdicts import statistics
from mnist_lab.verdicts.comparison import Comparison, Pair, adjust, rounds_alike, seeds_text, step_order, table_text
from mnist_lab.verdicts.targets import judge

UNSAID = "all that differs"
Compared = tuple[list[Comparison], list[str]]  # and a sentence on the pairs that have runs but can't be compared


def newest_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the newest run of each step and seed, without those of another experiment; the newest stand first.

    runs: a run table with all columns (LabError if not).
    Another experiment: another `code_sha256`, number of parameters, teacher or hyperparameter than the step's newest
    run has, of those of its script as it stands, if there are any; `left_out` is their number.
    """
    if not {"start_time", "code_sha256", "overrides"} <= set(runs):
        raise LabError('runs: all columns of a run table are needed, from results.run_table(columns="all")')
    runs = runs.sort_values("start_time", ascending=False, kind="stable")
    several = runs.groupby("step")["code_sha256"].nunique() > 1
    other = runs["code_sha256"] != runs["step"].map(codes(several.index[several]))
    runs = runs.loc[other.sort_values(kind="stable").index]
    experiment = [runs["step"], runs["overrides"]]
    settings = [name for name in runs if name not in COLUMNS]  # a script may read them from a file, or draw them
    code = runs.groupby(["code_sha256", "num_params", "teacher_sha256", *settings], dropna=False).ngroup()
    same = code == code.groupby(experiment).transform("first")
    left_out = (~same).groupby(experiment).transform("sum").astype("int64")
    return runs.assign(left_out=left_out)[same].drop_duplicates(["step", "overrides", "seed"])


def codes(steps: Container[str]) -> dict[str, str]:
    """Return the `code_sha256` of each step's script as it stands, if there is one."""
    scripts = (script for script in EXPERIMENTS.glob("*.py") if script.stem in steps)
    return {script.stem: code_sha256(find_sources(script)) for script in scripts}


def compare_table(steps: Steps = None, **which: Unpack[RunFilter]) -> pd.DataFrame:
    """Return one row per experiment: the mean over its seeds, of the finished runs that `newest_runs` leaves.

    steps, include_overrides, holdout, folds, tracking_uri, loaded: as for `run_table`. With folds, these take the place
        of seeds, the accuracy is that on the held-out images, and the target for test images is not judged.

    Columns: step, overrides, seeds (their number), left_out (as by `newest_runs`), failed (as in `run_table`),
    num_params, epochs, last, last_sd, low and high (95 % interval of the mean; missing for one seed, as last_sd is),
    above (the highest target that the mean is shown to be above), best, train, the targets, the reported figures,
    verdict_accuracy, verdict_params, verdict_epochs, and p and seeds_needed of the accuracy's verdict. Accuracies are
    in percent; last and train are of the last epoch, best as in `run_table`.

    A verdict is "met" or "missed", "-" where no target was stated; of several seeds' accuracy, also "not shown".
    """
    return summarise(newest_runs(run_table(steps, columns="all", **which)), which.get("folds", 0))


def summarise(runs: pd.DataFrame, folds: int = 0) -> pd.DataFrame:
    facts = [str(name) for name in runs if str(name).startswith(("target_", "reported_"))]
    best = (HELD_OUT if HELD_OUT.best in runs else TESTED).best
    columns = ["step", "overrides", "seeds", "left_out", "failed", "num_params", "epochs", "last", "last_sd", "low"]
    columns += ["high", "above", "best", "train", *facts, *(f"verdict_{name}" for name in TARGETS), "p", "seeds_needed"]
    rows = []
    for _, group in runs.groupby(["step", "overrides"]):
        newest, accuracies = group.iloc[0], group[protocol(0, folds).judged].tolist()
        last, counts = statistics.aggregate(accuracies), newest[["num_params", "epochs"]]
        row = {
            **newest[["step", "overrides", "left_out", "failed", *counts.index, *facts]],
            **{"seeds": last.n, "last": last.mean, "last_sd": last.sd, "low": last.low, "high": last.high},
            "above": statistics.lower_bound(accuracies),
            "best": fmean(group[best]),
            "train": group["final_train_accuracy"].mean(),
            **{f"verdict_{name}": "-" for name in TARGETS},
        }
        for verdict in judge(stated_targets(newest), accuracies=accuracies, **counts):
            row[f"verdict_{verdict.name}"] = verdict.word
            if verdict.name == "accuracy":
                row |= {"p": verdict.p, "seeds_needed": verdict.seeds_needed}
        rows.append(row)
    rows.sort(key=lambda row: (step_order(row["step"]), row["overrides"]))
    table = pd.DataFrame(rows, columns=columns)
    return table.astype({"num_params": "Int64", "epochs": "Int64", "p": "float64", "seeds_needed": "Int64"})


def stated_targets(run: Mapping[Any, Any] | pd.Series[Any]) -> Targets:
    accuracy, *counts = (run[f"target_{name}"] for name in TARGETS)
    params, epochs = (None if pd.isna(count) else int(count) for count in counts)
    return Targets(accuracy=None if pd.isna(accuracy) else accuracy, params=params, epochs=epochs)


def named(row: Mapping[Any, Any] | pd.Series[Any]) -> str:
    return " ".join(f"{row['step']} {row['overrides']}".split())


def failures(rows: pd.DataFrame) -> list[str]:
    failed = rows[rows["failed"] != ""].drop_duplicates(["step", "overrides"]).to_dict("records")
    return [f"{named(row)}: its figures are without seeds or folds that failed: {row['failed']}." for row in failed]


def compare_text(table: pd.DataFrame, *, holdout: int = 0, folds: int = 0, width: int | None = None) -> str:
    """Return `compare_table` as text, without columns that no row has a value in; width: as for `table_text`."""
    rows = table.to_dict("records")
    columns = {
        "experiment": [named(row) for row in rows],
        "last": [percent(row["last"]) + ("" if row["seeds"] == 1 else f" +- {row['last_sd']:.3f}") for row in rows],
        "verdict": [row["verdict_accuracy"] for row in rows],
        "folds" if folds else "seeds": [str(row["seeds"]) for row in rows],
        "wanted": ["-" if pd.isna(row["target_accuracy"]) else f"{row['target_accuracy']:g}" for row in rows],
        "parameters": [f"{row['num_params']:,} {row['verdict_params']}" for row in rows],
        "epochs": [f"{row['epochs']} {row['verdict_epochs']}" for row in rows],
        "seeds\nneeded": ["-" if pd.isna(row["seeds_needed"]) else seeds_text(row["seeds_needed"]) for row in rows],
        "best\nvalidation" if holdout or folds else "best": [percent(row["best"]) for row in rows],
        "train": [percent(row["train"]) for row in rows],
        "reported\nlast": [percent(row["reported_final_test_accuracy"]) for row in rows],
        "reported\nbest": [percent(row["reported_best_test_accuracy"]) for row in rows],
    }
    return table_text(columns, width)


def compare(a: str, b: str, **which: Unpack[RunFilter]) -> Comparison:
    """Compare two experiments by the test accuracy of their last epochs, b - a, in points; docs/statistics.md says how.

    a, b: steps, e.g. "gap_alone" and "step3_gap"; their runs that `newest_runs` keeps count.
    holdout, folds, tracking_uri, loaded: as for `run_table`. LabError if a step has no such run, or a single seed.
    """
    loaded = which["loaded"] = which.get("loaded") or load_runs(which.get("tracking_uri"))
    a, b = full_names([a, b], loaded)
    runs = newest_runs(run_table([a, b], columns="all", **which))
    declared = (pair for pair in declared_pairs() if (pair.a, pair.b) == (a, b))
    return _compare(next(declared, Pair(a, b, UNSAID)), runs, which.get("folds", 0))


def median_run(step: str, *, tracking_uri: str | None = None) -> pd.Series[Any]:
    """Return the `run_table` row of the step's median seed by the last epoch's test accuracy, of two the lower one.

    The runs that `newest_runs` keeps count, except restored ones, which have no network; LabError if there are none.
    """
    runs = newest_runs(run_table(step, columns="all", tracking_uri=tracking_uri))
    trained = runs[runs["restored"].isna()].sort_values(["final_test_accuracy", "seed"])
    if trained.empty:
        raise LabError(f"steps: no run of {step!r} as declared was trained in this store, and others have no network")
    return trained.iloc[(len(trained) - 1) // 2]


def declared_pairs(scripts: Path = EXPERIMENTS) -> list[Pair]:
    """Return the pairs that the scripts' docstrings declare, each by a line "Compared with step3_gap: more dropout."

    A line that was copied from a script with published figures says nothing about the change.
    """
    stories = read_stories(scripts)
    published = {file.stem for file in PUBLISHED.glob("*.csv")} & stories.keys()
    of_published = {line for step in published for line in stories[step].compared_with}
    changes: dict[tuple[str, str], str] = {}  # what is said first of each pair
    for step in sorted(stories, key=step_order):
        for other, change in stories[step].compared_with:
            pair, is_copied = (script_named(other), step), step not in published and (other, change) in of_published
            if changes.get(pair, UNSAID) == UNSAID:
                changes[pair] = UNSAID if is_copied else change
    return [Pair(a, b, change) for (a, b), change in changes.items() if a != b]


def compare_pairs(pairs: Iterable[Pair] | None = None, **which: Unpack[RunFilter]) -> Compared:
    """Compare the pairs of experiments that both have runs, as `compare` does, with `p_holm` adjusted for their number.

    pairs: `declared_pairs()` unless others are given. For those that can't be compared, a sentence says why.
    """
    runs = newest_runs(run_table(columns="all", **which))
    return compare_runs(declared_pairs() if pairs is None else pairs, runs, which.get("folds", 0))


def compare_runs(pairs: Iterable[Pair], runs: pd.DataFrame, folds: int = 0) -> Compared:
    found, steps, reasons = [], {*runs["step"]}, dict[str, list[str]]()
    for pair in pairs:
        if pair.b not in steps:
            continue
        try:
            found.append(_compare(pair, runs, folds))
        except LabError as error:
            reasons.setdefault(str(error), []).append(f"{pair.b} with {pair.a}")
    return adjust(found), [f"not compared: {', '.join(names)}: {reason}" for reason, names in reasons.items()]


def _compare(pair: Pair, runs: pd.DataFrame, folds: int) -> Comparison:
    runs_a, runs_b = (runs[runs["step"] == step] for step in (pair.a, pair.b))
    figure = protocol(0, folds).judged
    if runs_a.empty:
        missing = "no script, or no finished run as declared with the same --holdout and --folds"
        advice = "train one, or `make restore` the committed ones, which have neither"
        raise LabError(f"the second of each has {missing}; {advice}")
    for step, trained in ((pair.a, runs_a), (pair.b, runs_b)):
        count = len(trained)
        if "overrides" in runs and trained["overrides"].nunique() > 1:
            raise LabError(f"{step} has runs as declared and overridden, or with several overrides")
        if count < folds:
            raise LabError(f"{step} has {count} of {folds} folds; the command that trained them trains the others")
        if count == 1:
            raise LabError("one or both have a single seed, which shows nothing of a change; train several")
    both = runs_a.merge(runs_b, on="seed")[["hardware_x", "hardware_y"]].fillna("")
    # One fold has the same images on all hardware.
    paired = folds > 0 or all(starmap(rounds_alike, both.itertuples(index=False, name=None)))
    a, b = (dict(zip(trained["seed"], trained[figure], strict=True)) for trained in (runs_a, runs_b))
    more = {"seeds_needed": None} if folds else {}  # there are no more folds
    found = vars(statistics.compare_means(a, b, paired=paired)) | more
    settings = runs.columns.difference([*({*COLUMNS} - {"num_params"}), "left_out"])
    differ = runs_a.iloc[0][settings].compare(runs_b.iloc[0][settings]).index
    return Comparison(**vars(pair), **found, p_holm=found["p"], differ=", ".join(differ))
