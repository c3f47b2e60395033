"""The CSVs of runs: made from a store or read from files, checked, and written.

A CSV has a row per run, epoch, setting or mistake. Together they are enough to restore a run in another store, without
its network. Here they are tables of text, as the files are; an empty cell is an unknown figure.
"""

from __future__ import annotations

import csv
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, groupby
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from mnist_lab import results
from mnist_lab.errors import LabError, one_line
from mnist_lab.experiment import quoted
from mnist_lab.measures import MEASURES, TESTED
from mnist_lab.results.compare import failures
from mnist_lab.results.runs import COLUMNS as COLUMN_KINDS
from mnist_lab.results.runs import COUNT, PERCENTAGE, TARGETS, TEXT, Kind, LoadedRuns, places, predictions_of

logger = logging.getLogger(__name__)

Tell = Callable[[str], None]
DATE = "%Y-%m-%d %H:%M"
IMAGES = 10_000  # test images
OTHER_FILES = ("effects", "epochs", "settings", "mistakes", "folds")  # CSVs in the folder that belong to no step
# Tags that decide or explain a run's figures, beside those that have a column of their own in <step>.csv.
TAGS = re.compile("code_sha256|data_sha256|threads|memory_format|no_effect|teacher_run_id|teacher_sha256|reported_.*")

# The columns of the files, each with the name in the table that it comes from.
MADE_BY = {name: name for name in ("num_params", "epochs", "minutes", "hardware", "torch", "git_commit", "git_dirty")}
MADE_BY |= {"code_sha256": "code_sha256", "date": "start_time"}
COLUMNS = {  # of <step>.csv
    **{"seed": "seed", "last": "final_test_accuracy", "best": "best_test_accuracy", "best_epoch": "best_epoch"},
    **{"train": "final_train_accuracy", "test_loss": "final_test_loss", **MADE_BY},
    **{f"target_{name}": f"target_{name}" for name in TARGETS},
    "reported_best": "reported_best_test_accuracy",
}
RUN_COLUMNS = {"step": "step", **COLUMNS}
EPOCH_FIGURES = ("test_accuracy", "test_loss", "train_accuracy", "train_loss", "lr", "epoch_seconds", *TESTED.at_times)
EPOCH_COLUMNS = {name: name for name in ("step", "seed", "epoch", *EPOCH_FIGURES)}
SETTING_COLUMNS = {name: name for name in ("step", "seeds", "kind", "name", "value")}
MISTAKE_COLUMNS = {name: name for name in ("step", "seed", "image", "prediction", "confidence")}
FOLD_COLUMNS = {
    **{"step": "step", "folds": "folds", "fold": "seed"},
    **{"accuracy": "final_validation_accuracy", "loss": "final_validation_loss", **MADE_BY},
}
# The formats of cells, and what they can be, by the name of where they come from; those of a run table are known there.
FORMATS = {
    **{name: measure.cell for name, measure in MEASURES.items()},
    **dict.fromkeys((*(f"target_{name}" for name in TARGETS), "reported_best_test_accuracy"), "g"),
    **{"final_validation_accuracy": ".3f", "code_sha256": ".12", "start_time": DATE, "confidence": ".4f"},
}
KINDS = {
    **{name: PERCENTAGE if one.unit == "%" else Kind("float64", 0) for name, one in MEASURES.items()},
    **COLUMN_KINDS,
    "objective": Kind("float64", -sys.float_info.max, sys.float_info.max),
    **{"start_time": Kind(DATE), "epoch": COUNT, "epochs": COUNT, "minutes": Kind("float64", 0, 1e9)},
    **{"image": Kind("Int64", 0, IMAGES - 1), "prediction": Kind("Int64", 0, 9), "confidence": Kind("float64", 0, 1)},
    **{"git_dirty": Kind("str", form="True|False|"), "kind": Kind("str", form="param|tag")},
    **{"name": Kind("str", form=".{1,250}"), "seeds": Kind("str", form=r"(\d{1,19}(-\d{1,19})?(, (?=\d)|$))+")},
}
NEEDED = (
    *("seed", "last", "best", "best_epoch", "num_params", "epochs", "date", "epoch", "folds", "fold", "accuracy"),
    *list(MISTAKE_COLUMNS)[2:],
)
KEY = ("step", "folds", "fold", "seed", "seeds", "epoch", "image", "kind", "name")  # of a row; so rows are sorted
SETTINGS = ("step", "seed", "kind", "name", "value")  # in memory: of one seed each


class Records(NamedTuple):
    """Rows of runs, each with step and seed."""

    runs: pd.DataFrame  # RUN_COLUMNS
    epochs: pd.DataFrame  # EPOCH_COLUMNS
    settings: pd.DataFrame  # SETTINGS, of which kind is "param" or "tag"
    mistakes: pd.DataFrame  # MISTAKE_COLUMNS: the test images that the run got wrong, by their numbers from 0
    folds: pd.DataFrame  # FOLD_COLUMNS, of the runs of cross-validations alone


def rows_of(step: str, rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["step"] == step]


def among(rows: pd.DataFrame, others: pd.DataFrame, *columns: str) -> pd.Series[bool]:
    """Say of each row whether the other rows have its cells of these columns."""
    keys, other_keys = (pd.MultiIndex.from_frame(table[[*columns]].astype("str")) for table in (rows, others))
    return pd.Series(keys.isin(other_keys), rows.index)


def joined(columns: Iterable[str], *tables: pd.DataFrame) -> pd.DataFrame:
    rows = pd.concat([pd.DataFrame(columns=[*columns], dtype="str"), *tables]).fillna("")
    return rows.sort_values([name for name in KEY if name in rows], key=_sortable, ignore_index=True)


def _sortable(cells: pd.Series[Any]) -> pd.Series[Any]:
    if cells.name == "step":
        return places(cells)
    return cells if cells.name in ("kind", "name") else cells.astype("int64")


# ---- from a store


def tracked_records(tracking_uri: str | None, *, restored: bool = True) -> Records:
    """Return the records of the tracked runs: the newest finished run of each step and seed, as declared.

    restored: also those that were restored from files. Raises LabError if the store has no such runs.
    Steps that can't name a file, and mistakes that the store does not have, are left out, with a warning.
    """
    loaded = results.load_runs(tracking_uri, artifacts=True)
    counts = {*loaded.runs["folds"]} - {0}
    folded = [results.newest_runs(results.run_table(columns="all", folds=folds, loaded=loaded)) for folds in counts]
    whole = [runs[runs.groupby("step")["seed"].transform("size") == runs["folds"]] for runs in folded]  # of all folds
    folds = joined(FOLD_COLUMNS, *(cells(runs, FOLD_COLUMNS) for runs in whole))
    if len(folds) and loaded.tested.empty:
        return Records(joined(RUN_COLUMNS), joined(EPOCH_COLUMNS), joined(SETTINGS), joined(MISTAKE_COLUMNS), folds)
    declared = results.newest_runs(results.run_table(columns="all", loaded=loaded))
    if overridden := sorted({*results.run_table(include_overrides=True, loaded=loaded)["step"]} - {*declared["step"]}):
        logger.warning("left out, as they have only overridden runs: %s", ", ".join(overridden))
    if declared.empty and folds.empty:
        raise LabError(f"no finished run as declared in {loaded.name}; train one, e.g. `make step1`")
    runs = _that_can_name_a_file(declared)
    if not restored:
        runs = runs[runs["restored"].isna()]
    for sentence in failures(runs):
        logger.warning("%s", sentence)
    history = results.epoch_history(loaded=loaded, metrics=EPOCH_FIGURES)
    history = history[history["run_id"].isin(runs["run_id"]) & history["test_accuracy"].notna()]
    return Records(
        joined(RUN_COLUMNS, cells(runs, RUN_COLUMNS)),
        joined(EPOCH_COLUMNS, cells(history, EPOCH_COLUMNS)),
        joined(SETTINGS, pd.DataFrame(_settings(loaded, runs), columns=SETTINGS, dtype="str")),
        joined(MISTAKE_COLUMNS, *_mistakes(loaded, runs)),
        folds,
    )


def _that_can_name_a_file(runs: pd.DataFrame) -> pd.DataFrame:
    named = runs["step"].str.fullmatch(r"\w[\w.-]{0,99}") & ~runs["step"].isin(OTHER_FILES)
    for step in runs["step"][~named].unique():
        sentence = f"step: {quoted(step)} can't name a file of figures; up to 100 letters, digits and _ . - can"
        if not named.any():
            raise LabError(sentence)
        logger.warning("left out: %s", sentence)
    return runs[named]


def _settings(loaded: LoadedRuns, runs: pd.DataFrame) -> Iterator[tuple[str, ...]]:
    for step, seed, run_id in runs[["step", "seed", "run_id"]].itertuples(index=False, name=None):
        data = loaded.found[run_id].data
        yield from ((step, str(seed), "param", *param) for param in data.params.items() if param[0] != "seed")
        yield from ((step, str(seed), "tag", *tag) for tag in data.tags.items() if TAGS.fullmatch(tag[0]))


def _mistakes(loaded: LoadedRuns, runs: pd.DataFrame) -> Iterator[pd.DataFrame]:
    unknown = []
    for step, seed, run_id in runs[["step", "seed", "run_id"]].itertuples(index=False, name=None):
        try:
            read = predictions_of(loaded.found[run_id], loaded.uri)
        except LabError as error:
            unknown.append(f"{step} seed {seed} ({error})")
            continue
        wrong = read[read["truth"] != read["prediction"]].rename_axis("image").reset_index()
        yield cells(wrong.assign(step=step, seed=seed), MISTAKE_COLUMNS)
    if unknown:
        logger.warning("not known: which test images %d runs got wrong, the first is %s", len(unknown), unknown[0])


def cells(table: pd.DataFrame, columns: Mapping[str, str], formats: Mapping[str, str] = FORMATS) -> pd.DataFrame:
    """Return these columns of a table as the text that a CSV holds."""
    texts = {
        name: [format(value, formats.get(column, "")) if pd.notna(value) else "" for value in table[column]]
        for name, column in columns.items()
    }
    return pd.DataFrame(texts, dtype="str")


# ---- from files


def read_records(folder: Path) -> Records:
    """Read the CSVs in a folder; raises LabError with file, row and column for what the lab does not write."""
    runs = read_runs(folder)
    return Records(
        runs,
        joined(EPOCH_COLUMNS, _read(folder / "epochs.csv", EPOCH_COLUMNS)),
        joined(SETTINGS, _read_settings(folder / "settings.csv", runs)),
        joined(MISTAKE_COLUMNS, _read(folder / "mistakes.csv", MISTAKE_COLUMNS)),
        joined(FOLD_COLUMNS, _read(folder / "folds.csv", FOLD_COLUMNS)),
    )


def read_runs(folder: Path) -> pd.DataFrame:
    """Read the CSVs of all experiments in a folder, as `read_records` does."""
    files = [file for file in folder.glob("*.csv") if file.stem not in OTHER_FILES]
    return joined(RUN_COLUMNS, *(_read(file, COLUMNS).assign(step=file.stem) for file in files))


def _read(file: Path, columns: Mapping[str, str]) -> pd.DataFrame:
    """Return the rows of a file, and none where there is no file."""
    if not file.exists():
        return pd.DataFrame(columns=[*columns], dtype="str")
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            header, *rows = csv.reader(lines)
    except (OSError, ValueError, csv.Error) as error:
        raise LabError(f"{file}: it can't be read, or is no CSV in UTF-8: {one_line(error)}") from error
    optional = {*TESTED.at_times} & {*columns}
    twice = {name for name in header if header.count(name) > 1}
    for name in sorted(({*columns} ^ {*header}) - optional | twice):
        raise LabError(f"{file}, row 1: the column {name!r} is missing, unknown or there twice")
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise LabError(f"{file}, row {number}: it has {len(row)} cells, not {len(header)}")
    table = pd.DataFrame(rows, columns=header, dtype="str")
    for name in header:
        kind = KINDS.get(columns[name], TEXT)
        right = ~kind.excludes(table[name]) & (table[name].str.isdecimal() | (kind.dtype != "Int64"))
        for place in table.index[~right & (table[name].ne("") | (name in NEEDED))]:
            raise LabError(f"{file}, row {place + 2}, {name}: {quoted(table[name][place])} is not {kind}")
    return _checked_once(file, table)


def _checked_once(file: Path, table: pd.DataFrame) -> pd.DataFrame:
    key = [name for name in KEY if name in table]
    for place, *cells_of_key in table.loc[table.duplicated(key), key].itertuples(name=None):
        raise LabError(f"{file}, row {place + 2}, {key[-1]}: {' '.join(cells_of_key)} is there twice")
    return table


def _read_settings(file: Path, runs: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each setting and seed that there is; those of other steps are left out."""
    known = {step: {int(seed) for seed in seeds} for step, seeds in runs.groupby("step")["seed"]}
    table = _read(file, SETTING_COLUMNS)
    table = table[table["step"].isin([*known])]
    seeds = []
    for place, step, text in table[["step", "seeds"]].itertuples(name=None):
        parts = [sorted(map(int, part.split("-"))) for part in text.split(", ")]
        if unknown := {*chain(*parts)} - known[step]:
            raise LabError(f"{file}, row {place + 2}, seeds: {step} has no seed {unknown.pop()}")
        seeds.append([str(seed) for seed in known[step] if any(part[0] <= seed <= part[-1] for part in parts)])
    settings = table.assign(seed=pd.Series(seeds, table.index, dtype="object")).explode("seed")
    return _checked_once(file, settings[[*SETTINGS]])


def typed(rows: pd.DataFrame, columns: Mapping[str, str]) -> pd.DataFrame:
    """Return rows with numbers as such, and columns named as in the table that they come from."""
    kinds = {column: KINDS.get(column, TEXT).dtype for column in columns.values()}
    numbers = {column: kind for column, kind in kinds.items() if kind in ("Int64", "float64")}
    return rows.replace("", None).rename(columns=columns).astype(numbers)


def to_csv(table: pd.DataFrame) -> str:
    return table.to_csv(index=False, lineterminator="\n")


def by_setting(settings: pd.DataFrame) -> pd.DataFrame:
    seeds = settings.astype({"seed": "int64"}).groupby(["step", "kind", "name", "value"], sort=False)["seed"]
    lines = seeds.agg(seeds=ranges, first="min").reset_index()
    return lines.sort_values(["step", "kind", "name", "first"], key=_sortable)[[*SETTING_COLUMNS]]


def ranges(seeds: Iterable[int]) -> str:
    """Return seeds in short, e.g. "0-4, 7"."""
    ordered = enumerate(sorted(seeds))  # within a range, a seed's place grows as the seed does
    runs = [[seed for _, seed in run] for _, run in groupby(ordered, key=lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
