"""What files keep of runs: CSVs with a row per run, epoch, setting and mistake, written from a store and read back.

It is enough to build a run again in another store, but for its network.
"""

from __future__ import annotations

import csv
import io
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import pandas as pd

from mnist_lab.errors import LabError, one_line
from mnist_lab.experiment import quoted
from mnist_lab.results.compare import newest_runs
from mnist_lab.results.predictions import predictions_of
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
    run_table,
)
from mnist_lab.verdicts.comparison import step_order
from mnist_lab.verdicts.measures import MEASURES, TESTED

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
NEEDED = ("seed", "last", "best", "best_epoch", "num_params", "epochs", "date", "epoch", *list(MISTAKE_COLUMNS)[2:])
# Tags that decide or explain a run's figures, beside those that have a column of their own in <step>.csv.
TAGS = re.compile(
    "code_sha256|data_sha256|threads|memory_format|no_effect|teacher_run_id|teacher_sha256|cuda_graph|reported_.*"
)
OTHER_FILES = ("effects", "epochs", "settings", "mistakes")  # CSVs in the folder that belong to no step


run_of = itemgetter("step", "seed")


@dataclass(frozen=True)
class Records:
    """Rows of runs, each with step and seed, in order.

    runs: COLUMNS. epochs: EPOCH_COLUMNS. settings: kind ("param" or "tag"), name and value. mistakes: the test images
    that the run got wrong, by their numbers from 0, with the prediction and its confidence.
    """

    runs: list[Row] = field(default_factory=list)
    epochs: list[Row] = field(default_factory=list)
    settings: list[Row] = field(default_factory=list)
    mistakes: list[Row] = field(default_factory=list)

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
    runs = _that_can_name_a_file(newest_runs(run_table(columns="all", loaded=loaded)))
    if not restored:
        runs = runs[runs["restored"].isna()]
    history = epoch_history(loaded=loaded, metrics=EPOCH_FIGURES)
    history = history[history["run_id"].isin(runs["run_id"]) & history["test_accuracy"].notna()]
    return Records(
        in_order(cells(runs.to_dict("records"), RUN_COLUMNS)),
        in_order(cells(history.to_dict("records"), EPOCH_COLUMNS)),
        in_order(_settings(loaded, runs)),
        in_order(_mistakes(loaded, runs)),
    )


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
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
