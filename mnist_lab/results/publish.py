"""Figures as files: CSVs of the tracked runs, and the tables made of them.

A CSV has a row per run, epoch, setting or mistake; together they are enough to build a run again in another store, but
for its network. Exported, they are one's own; published, they are those of docs/results and README.md. The tables there
are made from the CSVs alone, so that a test can make them again.
"""

from __future__ import annotations

import csv
import html
import io
import logging
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from dataclasses import replace as replace_field
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote

import matplotlib
import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from mnist_lab.errors import LabError, one_line
from mnist_lab.experiment import quoted
from mnist_lab.figures import plot_summary
from mnist_lab.paths import PROJECT_ROOT
from mnist_lab.results.compare import hardware_of, newest_runs, summarise
from mnist_lab.results.runs import COLUMNS as COLUMN_KINDS
from mnist_lab.results.runs import (
    COUNT,
    PERCENTAGE,
    TARGETS,
    TEXT,
    Kind,
    LoadedRuns,
    epoch_history,
    load_runs,
    predictions_of,
    run_table,
)
from mnist_lab.tracking.store import replace_files
from mnist_lab.verdicts.comparison import (
    PAIRS,
    TOO_FEW,
    Comparison,
    adjust,
    compare_seeds,
    mean_interval_text,
    p_text,
    seeds_text,
    step_order,
)
from mnist_lab.verdicts.measures import MEASURES, TESTED, percent
from mnist_lab.verdicts.statistics import FEWEST_FOR_INTERVAL, aggregate, interval_for_new_images

logger = logging.getLogger(__name__)

Row = dict[str, str]  # one line of a CSV with its step; an empty cell is an unknown figure
DATE = "%Y-%m-%d %H:%M"
IMAGES = 10_000  # test images


Columns = Mapping[str, tuple[str, str]]  # by name: the name in the table that it comes from, and the format of a cell
# First <step>.csv, then the CSVs with the rows of all steps.
COLUMNS = {
    "seed": ("seed", ""),
    "last": ("final_test_accuracy", ".2f"),
    "best": ("best_test_accuracy", ".2f"),
    "best_epoch": ("best_epoch", ""),
    "train": ("final_train_accuracy", ".3f"),
    "test_loss": ("final_test_loss", ".5f"),
    "num_params": ("num_params", ""),
    "epochs": ("epochs", ""),
    "minutes": ("minutes", ".1f"),
    **{name: (name, "") for name in ("hardware", "torch", "git_commit", "git_dirty")},
    "code_sha256": ("code_sha256", ".12"),
    "date": ("start_time", DATE),
    **{f"target_{name}": (f"target_{name}", "g") for name in TARGETS},
    "reported_best": ("reported_best_test_accuracy", "g"),
}
RUN_COLUMNS = {"step": ("step", ""), **COLUMNS}
EPOCH_FIGURES = ("test_accuracy", "test_loss", "train_accuracy", "train_loss", "lr", "epoch_seconds", *TESTED.at_times)
EPOCH_COLUMNS = {
    **{name: (name, "") for name in ("step", "seed", "epoch")},
    **{name: (name, MEASURES[name].cell) for name in EPOCH_FIGURES},
}
SETTING_COLUMNS = {name: (name, "") for name in ("step", "seeds", "kind", "name", "value")}
MISTAKE_COLUMNS = {
    **{name: (name, "") for name in ("step", "seed", "image", "prediction")},
    "confidence": ("confidence", ".4f"),
}
# What the cells of these columns can be, by the name of where they come from; those of a run table are known there.
KINDS = {
    **{name: PERCENTAGE if one.unit == "%" else Kind("float64", 0) for name, one in MEASURES.items()},
    **COLUMN_KINDS,
    "objective": Kind("float64", -sys.float_info.max, sys.float_info.max),
    **{"start_time": Kind(DATE), "epoch": COUNT, "epochs": COUNT, "minutes": Kind("float64", 0, 1e9)},
    **{"image": Kind("Int64", 0, IMAGES - 1), "prediction": Kind("Int64", 0, 9), "confidence": Kind("float64", 0, 1)},
    **{"git_dirty": Kind("str", form="True|False|"), "kind": Kind("str", form="param|tag")},
    **{"name": Kind("str", form=".+"), "seeds": Kind("str", form=r"\d{1,19}(-\d{1,19})?(, \d{1,19}(-\d{1,19})?)*")},
}
NEEDED = (
    *("seed", "last", "best", "best_epoch", "num_params", "epochs", "date", "epoch", "folds", "fold", "accuracy"),
    *list(MISTAKE_COLUMNS)[2:],
)
# Tags that decide or explain a run's figures, beside those that have a column of their own in <step>.csv.
TAGS = re.compile("code_sha256|data_sha256|threads|memory_format|no_effect|teacher_run_id|teacher_sha256|reported_.*")
FOLD_COLUMNS = {
    **{"step": ("step", ""), "folds": ("folds", ""), "fold": ("seed", "")},
    **{"accuracy": ("final_validation_accuracy", ".3f"), "loss": ("final_validation_loss", ".5f")},
    **{name: COLUMNS[name] for name in ("num_params", "epochs", "minutes", "hardware", "torch", "git_commit")},
    **{name: COLUMNS[name] for name in ("git_dirty", "code_sha256", "date")},
}
OTHER_FILES = ("effects", "epochs", "settings", "mistakes", "folds")  # CSVs in the folder that belong to no step


run_of = itemgetter("step", "seed")
cross_validation_of = itemgetter("step", "folds")


@dataclass(frozen=True)
class Records:
    """Rows of runs, each with step and seed, in order.

    runs: COLUMNS. epochs: EPOCH_COLUMNS. settings: kind ("param" or "tag"), name and value. mistakes: the test images
    that the run got wrong, by their numbers from 0, with the prediction and its confidence. folds: of the runs of
    cross-validations, which are no others' rows: FOLD_COLUMNS.
    """

    runs: list[Row] = field(default_factory=list)
    epochs: list[Row] = field(default_factory=list)
    settings: list[Row] = field(default_factory=list)
    mistakes: list[Row] = field(default_factory=list)
    folds: list[Row] = field(default_factory=list)

    def only(self, wanted: Callable[[tuple[str, str]], bool]) -> Records:
        """Return the rows of the runs whose step and seed are wanted."""
        return Records(*([row for row in rows if wanted(run_of(row))] for rows in self._parts))

    def by_run(self) -> list[Records]:
        """Return the rows of each run by themselves."""
        of_run = {run_of(row): Records([row]) for row in self.runs}
        for part, rows in enumerate(self._parts[1:], start=1):
            for row in rows:
                if run_of(row) in of_run:
                    of_run[run_of(row)]._parts[part].append(row)
        return list(of_run.values())

    def __add__(self, other: Records) -> Records:
        both = (in_order(chain(mine, theirs)) for mine, theirs in zip(self._parts, other._parts, strict=True))
        return Records(*both)

    @property
    def _parts(self) -> tuple[list[Row], ...]:
        return self.runs, self.epochs, self.settings, self.mistakes

    def csvs(self, folder: Path, steps: Iterable[str]) -> dict[Path, str]:
        """Return the files of these steps, and those that hold the rows of all steps."""
        unused = {name for name in TESTED.at_times if not any(row.get(name) for row in self.epochs)}
        return {
            **{folder / f"{step}.csv": to_csv(COLUMNS, rows_of(step, self.runs)) for step in steps},
            folder / "epochs.csv": to_csv([name for name in EPOCH_COLUMNS if name not in unused], self.epochs),
            folder / "settings.csv": to_csv(SETTING_COLUMNS, _by_setting(self.settings)),
            folder / "mistakes.csv": to_csv(MISTAKE_COLUMNS, self.mistakes),
            folder / "folds.csv": to_csv(FOLD_COLUMNS, self.folds),
            folder / "effects.csv": to_csv(EFFECT_COLUMNS, effect_rows(compare_rows(self.runs))),
        }


# ---- from a store


def tracked_records(tracking_uri: str | None, *, restored: bool = True) -> Records:
    """Return what is kept of the tracked runs: the newest finished run of each step and seed, as declared.

    restored: also those that were restored from files.
    A step that can't name a file is left out, and so are mistakes that the store does not say; a warning tells so.

    Raises:
        LabError: if the store has no such runs.
    """
    loaded = load_runs(tracking_uri, artifacts=True)
    folds = _folds(loaded)
    if folds and loaded.tested.empty:
        return Records(folds=folds)
    runs = _that_can_name_a_file(newest_runs(run_table(columns="all", loaded=loaded)))
    others = run_table(include_overrides="if_none", loaded=loaded)["step"]
    if overridden := sorted({*others} - {*run_table(loaded=loaded)["step"]}):
        logger.warning("left out, as they have only overridden runs: %s", ", ".join(overridden))
    if not restored:
        runs = runs[runs["restored"].isna()]
    history = epoch_history(loaded=loaded, metrics=EPOCH_FIGURES)
    history = history[history["run_id"].isin(runs["run_id"]) & history["test_accuracy"].notna()]
    return Records(
        in_order(cells(runs.to_dict("records"), RUN_COLUMNS)),
        in_order(cells(history.to_dict("records"), EPOCH_COLUMNS)),
        in_order(_settings(loaded, runs)),
        in_order(_mistakes(loaded, runs)),
        folds,
    )


def _folds(loaded: LoadedRuns) -> list[Row]:
    """Return the rows of the cross-validations, as declared, that have all their folds."""
    found: list[Row] = []
    for folds in sorted({*loaded.runs["folds"]} - {0}):
        runs = newest_runs(run_table(columns="all", folds=folds, loaded=loaded))
        whole = runs[runs.groupby("step")["seed"].transform("size") == folds].sort_values("seed")
        found += cells(whole.to_dict("records"), FOLD_COLUMNS)
    return sorted(found, key=_fold_order)


def _fold_order(row: Row) -> tuple[object, ...]:
    return step_order(row["step"]), int(row["folds"]), int(row["fold"])


def _that_can_name_a_file(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs whose step can name a file; it is free text to the store."""
    named = runs["step"].str.fullmatch(r"\w[\w.-]{0,99}") & ~runs["step"].isin(OTHER_FILES)
    sentences = [
        f"step: {quoted(step)} can't name a file of figures; up to 100 letters, digits and _ . - can"
        for step in runs["step"][~named].unique()
    ]
    if sentences and not named.any():
        raise LabError(sentences[0])
    for sentence in sentences:
        logger.warning("left out: %s", sentence)
    return runs[named]


def _settings(loaded: LoadedRuns, runs: pd.DataFrame) -> Iterable[Row]:
    for step, seed, run_id in runs[["step", "seed", "run_id"]].itertuples(index=False, name=None):
        data = loaded.found[run_id].data
        params = [("param", name, value) for name, value in data.params.items() if name != "seed"]
        tags = [("tag", name, value) for name, value in data.tags.items() if TAGS.fullmatch(name)]
        for kind, name, value in params + tags:
            yield {"step": step, "seed": str(seed), "kind": kind, "name": name, "value": value}


def _mistakes(loaded: LoadedRuns, runs: pd.DataFrame) -> Iterable[Row]:
    unknown = []
    for step, seed, run_id in runs[["step", "seed", "run_id"]].itertuples(index=False, name=None):
        try:
            told = predictions_of(loaded.found[run_id], loaded.uri)
        except LabError as error:
            unknown.append(f"{step} seed {seed} ({error})")
            continue
        wrong = told[told["truth"] != told["prediction"]].rename_axis("image").reset_index()
        rows = [{"step": step, "seed": seed, **row} for row in wrong.to_dict("records")]
        yield from cells(rows, MISTAKE_COLUMNS)
    if unknown:
        runs_are = "1 run" if len(unknown) == 1 else f"{len(unknown)} runs"
        logger.warning("not known: which test images %s got wrong, the first is %s", runs_are, unknown[0])


# ---- from files


def read_records(folder: Path) -> Records:
    """Read the CSVs in a folder, and check each cell.

    Raises:
        LabError: if one can't be read, or holds what the lab does not write: it names the file, the row and the column.
    """
    runs = read_rows(folder)
    seeds: dict[str, set[int]] = {}
    for row in runs:
        seeds.setdefault(row["step"], set()).add(int(row["seed"]))
    return Records(
        runs,
        in_order(_read(folder / "epochs.csv", EPOCH_COLUMNS, "step", "seed", "epoch")),
        in_order(_read_settings(folder / "settings.csv", seeds)),
        in_order(_read(folder / "mistakes.csv", MISTAKE_COLUMNS, "step", "seed", "image")),
        _read(folder / "folds.csv", FOLD_COLUMNS, "step", "folds", "fold"),
    )


def read_rows(folder: Path) -> list[Row]:
    """Read the CSVs of all experiments in a folder, the steps first; raises LabError as `read_records`."""
    files = [file for file in folder.glob("*.csv") if file.stem not in OTHER_FILES]
    return in_order({"step": file.stem, **row} for file in files for row in _read(file, COLUMNS, "seed"))


def _read(file: Path, columns: Columns, *key: str) -> list[Row]:
    """Return the rows of a file, and none where there is no file; `key` says what a row is of, once."""
    if not file.exists():
        return []
    table = _read_table(file)
    header = [str(name) for name in table]
    twice = [name for name in header if header.count(name) > 1]
    for name in twice or sorted(({*columns} ^ {*header}) - {*TESTED.at_times}):
        found = "is there twice" if twice else "is unknown" if name in header else "is missing"
        raise LabError(f"{file}, row 1: the column {name!r} {found}")
    for name in header:
        kind = KINDS.get(columns[name][0], TEXT)
        if kind != TEXT:
            right = kind.has(table[name]) & (table[name].str.isdecimal() | (kind.dtype != "Int64"))
            for place in table.index[~right & (table[name].ne("") | (name in NEEDED))]:
                raise LabError(f"{file}, row {place + 2}, {name}: {quoted(table[name][place])} is not {kind}")
    for place in table.index[table.duplicated([*key])]:
        raise LabError(f"{file}, row {place + 2}, {key[-1]}: {' '.join(table.loc[place, [*key]])} is there twice")
    return [{str(name): str(cell) for name, cell in row.items()} for row in table.to_dict("records")]


def _read_table(file: Path) -> pd.DataFrame:
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            header, *rows = csv.reader(lines)
    except OSError as error:
        raise LabError(f"{file}: it can't be read: {error.strerror}") from error
    except (ValueError, csv.Error) as error:
        raise LabError(f"{file}: it is no CSV in UTF-8: {one_line(error)}") from error
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise LabError(f"{file}, row {number}: it has {len(row)} cells, not {len(header)}")
    return pd.DataFrame(rows, columns=header, dtype="str")


def _read_settings(file: Path, seeds: Mapping[str, set[int]]) -> Iterator[Row]:
    """Read the settings, one row for each seed that there is; those of other steps are left out."""
    there = set()
    for number, line in enumerate(_read(file, SETTING_COLUMNS, "step", "seeds", "kind", "name"), start=2):
        parts = [part.partition("-") for part in line["seeds"].split(", ")]
        ranges_of = [(int(first), int(last or first)) for first, _, last in parts]
        known = seeds.get(line["step"])
        if known is None:
            continue
        for first, last in ranges_of:
            if not {first, last} <= known:
                raise LabError(f"{file}, row {number}, seeds: {line['step']} has no seeds {first} and {last}")
        for seed in known:
            if any(first <= seed <= last for first, last in ranges_of):
                row = {"seed": str(seed), **{name: line[name] for name in ("step", "kind", "name", "value")}}
                if (identity := (*run_of(row), row["kind"], row["name"])) in there:
                    raise LabError(f"{file}, row {number}, name: {' '.join(identity)} is there twice")
                there.add(identity)
                yield row


# ---- CSV


def rows_of(step: str, rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["step"] == step]


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Sort rows by their runs, and within a run as they belong."""
    return sorted(
        rows,
        key=lambda row: (
            step_order(row["step"]),
            int(row["seed"]),
            *(int(row.get(name, 0)) for name in ("epoch", "image")),
            *(row.get(name, "") for name in ("kind", "name")),
        ),
    )


def _by_setting(settings: Iterable[Row]) -> list[Row]:
    """Put the settings that several seeds of a step share on one line."""
    seeds: dict[tuple[str, ...], list[int]] = {}
    for row in settings:
        seeds.setdefault(itemgetter("step", "kind", "name", "value")(row), []).append(int(row["seed"]))
    return [
        dict(zip(SETTING_COLUMNS, (step, ranges(of), kind, name, value), strict=True))
        for (step, kind, name, value), of in sorted(
            seeds.items(), key=lambda item: (step_order(item[0][0]), *item[0][1:3], min(item[1]))
        )
    ]


def ranges(seeds: Iterable[int]) -> str:
    """Return seeds in short, e.g. "0-4, 7"."""
    runs: list[list[int]] = []
    for seed in sorted(seeds):
        if runs and seed == runs[-1][-1] + 1:
            runs[-1].append(seed)
        else:
            runs.append([seed])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def cells(records: Iterable[Mapping[Any, Any]], columns: Columns) -> list[Row]:
    """Return these columns of a run table, an epoch history or a comparison as the text that a CSV holds."""
    return [
        {name: format(row[column], form) if pd.notna(row[column]) else "" for name, (column, form) in columns.items()}
        for row in records
    ]


def to_csv(columns: Iterable[str], rows: Iterable[Row]) -> str:
    return pd.DataFrame(rows, columns=list(columns), dtype="str").to_csv(index=False, lineterminator="\n")


# ---- into files

TEXTS = ("hardware", "torch", "git_commit", "git_dirty", "code_sha256", "date")
EFFECT_COLUMNS = {
    **{"change": ("change", ""), "from": ("a", ""), "to": ("b", "")},
    **{"points": ("effect", ".3f"), "low": ("low", ".3f"), "high": ("high", ".3f")},
    **{"p": ("p", ".4g"), "p_holm": ("p_holm", ".4g")},
    **{name: (name, "") for name in ("test", "seeds", "seeds_needed")},
}
TABLES = ("summary", "results", "effects", "folds", "runs")
PICTURE = "accuracy.svg"  # beside the CSVs: accuracy against parameters
PUBLISHED = PROJECT_ROOT / "docs" / "results"


def export_runs(folder: Path, *, tracking_uri: str | None = None) -> list[Path]:
    """Write the tracked runs' CSVs into a folder of one's own, and the tables made of them into its README.md.

    A step that can't name a file is left out, with a warning; so is a CSV in the folder of which the store has no runs.
    Returns what was written.

    Raises:
        LabError: if the store has no runs that can be exported, the folder is that of the published figures, its
            README.md has no markers for tables, or a file can't be read or written; then nothing was changed.
    """
    if folder.resolve() == PUBLISHED.resolve():
        raise LabError(f"folder: {folder} holds the published figures; `make publish` adds to them")
    records = tracked_records(tracking_uri)
    logger.info("Judging what each change is worth, and writing the tables")
    steps, page = {row["step"] for row in records.runs}, folder / "README.md"
    with _file_errors(folder):
        old = page.read_text("utf-8") if page.exists() else TEMPLATES.get_template("exported.md").render()
        files = {
            **records.csvs(folder, steps),
            page: with_tables(old, tables(records)),
        }
        replace_files(files)
        for step in sorted({file.stem for file in folder.glob("*.csv")} - steps - {*OTHER_FILES}):
            logger.warning("left as it is: %s.csv, as the store has no runs of that step", step)
    return sorted(files)


def publish(
    folder: Path,
    readme: Path,
    *,
    replace: bool = False,
    tracking_uri: str | None = None,
    progress: Callable[[str], None] = print,
) -> list[Path]:
    """Lay the tracked runs over the published CSVs in the folder, and make the tables of `readme` and its README.md.

    A step that the store has no runs of keeps the CSV it has, and so do seeds that the same code computed elsewhere,
    such as those that were restored into the store. A step that can't name a file is left out, with a warning.
    replace: whether a published row may be replaced or removed. progress: is told of each row that changes.
    Returns what was written.

    Raises:
        LabError: if the store has no runs that can be published, a published row would be replaced unasked, a page has
            no markers for its tables, or a file can't be read or written; then nothing was changed.
    """
    own = tracked_records(tracking_uri, restored=False)
    steps = {row["step"] for row in own.runs}
    seeds = set(map(run_of, own.runs))
    codes = {(row["step"], row["code_sha256"]) for row in own.runs}
    with _file_errors(folder):
        old = read_records(folder)
        kept = {
            run_of(row)
            for row in old.runs
            if row["step"] not in steps or (run_of(row) not in seeds and (row["step"], row["code_sha256"]) in codes)
        }
        records = own + old.only(kept.__contains__)
        records = replace_field(records, folds=_all_folds(own, old, records.runs))
        added, replaced = _changes(_by_name(old), _by_name(records))
        for sentence in added + replaced or ["The published rows are those of the store already."]:
            progress(sentence)
        if replaced and not replace:
            raise LabError(
                f"nothing was written: published rows that would be replaced or removed: {len(replaced)}; "
                'if that is meant, `make publish ARGS="--replace"`'
            )
        made = tables(records)
        files = {
            **records.csvs(folder, steps),
            **({folder / PICTURE: picture(records.runs)} if records.runs else {}),
            **{page: with_tables(page.read_text("utf-8"), made) for page in (readme, folder / "README.md")},
        }
        replace_files(files)
    return sorted(files)


def _all_folds(own: Records, old: Records, runs: Sequence[Row]) -> list[Row]:
    """Return the store's folds over the published ones; those of other code than the published seeds are left out."""
    renewed = set(map(cross_validation_of, own.folds))
    folds = own.folds + [row for row in old.folds if cross_validation_of(row) not in renewed]
    code = {row["step"]: row["code_sha256"] for row in runs}
    return sorted(
        (row for row in folds if code.get(row["step"], row["code_sha256"]) == row["code_sha256"]), key=_fold_order
    )


def _by_name(records: Records) -> dict[str, Row]:
    """Return the rows of runs by what they are called."""
    folds = {
        f"{row['step']} fold {row['fold']} of {row['folds']}": {**row, "last": row["accuracy"]} for row in records.folds
    }
    return {f"{row['step']} seed {row['seed']}": row for row in records.runs} | folds


def _changes(before: Mapping[str, Row], after: Mapping[str, Row]) -> tuple[list[str], list[str]]:
    """Return a sentence for each row that is added, and one for each that is replaced or removed."""
    added = [
        f"{name}: added, {row['last']} on {row['hardware'] or 'unknown hardware'}"
        for name, row in after.items()
        if name not in before
    ]
    replaced = []
    for name, was in before.items():
        row = after.get(name)
        if row is None:
            replaced.append(f"{name}: removed, {was['last']}; the store's runs of the step are of other code")
        elif was != row:
            cells = [f"{column} {was.get(column)} -> {cell}" for column, cell in row.items() if was.get(column) != cell]
            replaced.append(f"{name}: replaced, {', '.join(cells)}")
    return added, replaced


@contextmanager
def _file_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LabError(f"the figures can't be written to {folder}: {error.strerror}: {error.filename}") from error
    except UnicodeDecodeError as error:
        raise LabError(f"the figures can't be written to {folder}: a page is not UTF-8") from error


def compare_rows(rows: Sequence[Row]) -> list[Comparison]:
    """Compare the PAIRS of experiments that both have several seeds, adjusted for their number (Holm)."""
    last: dict[str, dict[int, float]] = {}
    for row in rows:
        last.setdefault(row["step"], {})[int(row["seed"])] = float(row["last"])
    several = {step for step, accuracies in last.items() if len(accuracies) > 1}
    pairs, made_on = [pair for pair in PAIRS if {pair.a, pair.b} <= several], hardware_of(rows)
    return adjust([compare_seeds(pair, last[pair.a], last[pair.b], made_on) for pair in pairs])


def compare_folds(rows: Sequence[Row]) -> list[Comparison]:
    """Compare the PAIRS of experiments that were cross-validated with the same folds, adjusted for their number."""
    of: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        of.setdefault(row["folds"], {}).setdefault(row["step"], {})[int(row["fold"])] = float(row["accuracy"])
    return adjust(
        [
            compare_seeds(pair, accuracies[pair.a], accuracies[pair.b])
            for accuracies in of.values()
            for pair in PAIRS
            if {pair.a, pair.b} <= accuracies.keys()
        ]
    )


def effect_rows(comparisons: Sequence[Comparison]) -> list[Row]:
    """Return the rows of effects.csv; of too few seeds, without an interval."""
    rows = [{**vars(comparison), "seeds": comparison.seeds} for comparison in comparisons]
    for row, comparison in zip(rows, comparisons, strict=True):
        if comparison.interval == TOO_FEW:
            row |= {"low": math.nan, "high": math.nan}
    return cells(rows, EFFECT_COLUMNS)


# ---- the tables, in Markdown


def summary_of(rows: Sequence[Row]) -> pd.DataFrame:
    """Return the rows of `compare_table` for the rows of the CSVs."""
    table = pd.DataFrame(rows, columns=["step", *COLUMNS], dtype="str").replace("", None)
    table = table.astype({name: "float64" for name in COLUMNS if name not in TEXTS}).assign(overrides="", left_out=0)
    return summarise(table.rename(columns={name: column for name, (column, _) in COLUMNS.items()}))


def tables(records: Records) -> dict[str, str]:
    """Return each table that is made of the rows of the CSVs, by the name of its template and its markers."""
    rows, summary = records.runs, summary_of(records.runs)
    validated = {key: list(of) for key, of in groupby(records.folds, cross_validation_of)}
    told = {
        "experiments": summary.to_dict("records"),
        "headline": headline(summary).to_dict("records"),
        "comparisons": compare_rows(rows),
        "studies": {step: rows_of(step, rows) for step in dict.fromkeys(row["step"] for row in rows)},
        "new_images": {step: _new_images(step, records) for step in summary["step"]},
        "validated": {key: aggregate([float(row["accuracy"]) for row in of]) for key, of in validated.items()},
        "folds": validated,
        "fold_comparisons": compare_folds(records.folds),
    }
    return {name: TEMPLATES.get_template(f"{name}.md").render(told).strip() for name in TABLES}


def _new_images(step: str, records: Records) -> tuple[int, float, float] | None:
    """Return the interval of a mean accuracy for other seeds and images, and from how many seeds' mistakes it is."""
    mistakes = rows_of(step, records.mistakes)
    seeds = {seed: place for place, seed in enumerate(sorted({row["seed"] for row in mistakes}))}
    if len(seeds) < FEWEST_FOR_INTERVAL:
        return None
    wrong = np.zeros((len(seeds), IMAGES), dtype=bool)
    wrong[[seeds[row["seed"]] for row in mistakes], [int(row["image"]) for row in mistakes]] = True
    return len(seeds), *interval_for_new_images(wrong)


def headline(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `summary_of` for the experiments that README shows; all of them where none has targets.

    Ablations, which are compared with their step elsewhere, and experiments without targets are left out.
    """
    ablations = {step for pair in PAIRS for step in (pair.a, pair.b) if not re.match(r"step\d+_", step)}
    chosen = summary[summary["target_accuracy"].notna() & ~summary["step"].isin(ablations)]
    return summary if chosen.empty else chosen


def picture(rows: Sequence[Row]) -> str:
    """Return the picture of accuracy against parameters as SVG; its description lists the points that are drawn.

    The experiments are those of `headline`.
    """
    drawn = headline(summary_of(rows))
    points = "; ".join(
        f"{row['step']}: {row['num_params']:,} parameters, {row['last']:.2f} %, seeds: {row['seeds']}"
        for row in drawn.to_dict("records")
    )
    svg = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "mnist_lab"}):  # else each drawing has ids of its own
        plot_summary(drawn).savefig(svg, format="svg", metadata={"Date": None, "Description": points})
    return svg.getvalue()


def with_tables(page: str, made: Mapping[str, str]) -> str:
    """Return a page with the tables put between its markers, `<!-- results -->` to `<!-- /results -->` and so on.

    Raises:
        LabError: if the page has no markers at all.
    """
    place = re.compile(rf"(<!-- ({'|'.join(made)}) -->\n).*?(<!-- /\2 -->)", re.DOTALL)
    page, found = place.subn(lambda marks: f"{marks[1]}\n{made[marks[2]]}\n\n{marks[3]}", page)
    if not found:
        raise LabError(f"the page has no markers for a table: {', '.join(f'<!-- {name} -->' for name in made)}")
    return page


def _words(row: Mapping[Any, Any]) -> dict[str, str]:
    """Return the verdict on each stated target, e.g. "accuracy met"."""
    return {name: f"{name} {row[f'verdict_{name}']}" for name in TARGETS if row[f"verdict_{name}"] != "-"}


def _verdict(row: Mapping[Any, Any]) -> str:
    """Return the verdicts; on the accuracy of several seeds, also how many would show it."""
    words = _words(row)
    if pd.notna(row["seeds_needed"]):
        words["accuracy"] += f" (needs about {seeds_text(row['seeds_needed'])} seeds)"
    return ", ".join(words.values()) or "no target stated"


def _in_short(row: Mapping[Any, Any]) -> str:
    """Return the verdicts in a few words: what is not met, or that all is."""
    words = _words(row)
    return ", ".join(word for word in words.values() if not word.endswith(" met")) or (
        "all met" if words else "none stated"
    )


def _commit(row: Row) -> str:
    return markdown_cell(row["git_commit"][:10]) + (" + changes" if row["git_dirty"] == "True" else "")


def markdown_cell(text: str) -> str:
    """Return a store's text as Markdown that shows it in one cell of a table, without HTML."""
    return " ".join(html.escape(text, quote=False).replace("|", "\\|").split())


# The templates of these tables and of the report.
TEMPLATES = Environment(
    loader=PackageLoader("mnist_lab.results"),
    autoescape=select_autoescape(),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
TEMPLATES.globals |= {"mean_interval": mean_interval_text}
TEMPLATES.filters |= {
    "percent": lambda value: percent(value, "–"),
    "wanted": lambda value: "–" if value != value else f"{value:g}",  # as the script states it
    "floored": lambda value: "–" if value != value else f"{math.floor(100 * value) / 100:.2f}",
    "cell": markdown_cell,
    "md": lambda text: html.escape(text, quote=False),  # Markdown may hold HTML
    "paragraphs": lambda text: re.split(r"\n\s*\n", text),
    "laid_out": lambda text: re.search(r"^( |[-*|] )", text, re.MULTILINE) is not None,
    "recorded": lambda value: value if isinstance(value, str) else "not recorded",
    "minutes": MEASURES["minutes"].text,
    "quote": quote,
    "commit": _commit,
    "median": median,
    "p_text": p_text,
    "ranges": ranges,
    "verdict": _verdict,
    "in_short": _in_short,
}
