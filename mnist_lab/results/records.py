"""What files keep of runs: one row per run, epoch, setting and mistake, taken from a store and read from CSVs.

What is kept of a run is enough to build it again in another store, but for its network.
"""

from __future__ import annotations

import csv
import io
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import pandas as pd

from mnist_lab.errors import LabError
from mnist_lab.experiment import quoted
from mnist_lab.results.compare import newest_runs
from mnist_lab.results.predictions import predictions
from mnist_lab.results.runs import LoadedRuns, epoch_history, load_runs, run_table
from mnist_lab.verdicts.comparison import step_order

logger = logging.getLogger(__name__)

Row = dict[str, str]  # one line of a CSV with its step; an empty cell is an unknown figure

# The columns of each CSV, with their names in the tables that they come from and their formats. First <step>.csv:
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
    "hardware": ("hardware", ""),
    "torch": ("torch", ""),
    "git_commit": ("git_commit", ""),
    "git_dirty": ("git_dirty", ""),
    "code_sha256": ("code_sha256", ".12"),
    "date": ("start_time", "%Y-%m-%d %H:%M"),
    "target_accuracy": ("target_accuracy", "g"),
    "target_params": ("target_params", "g"),
    "target_epochs": ("target_epochs", "g"),
    "reported_best": ("reported_best_test_accuracy", "g"),
}
RUN_COLUMNS = {"step": ("step", ""), **COLUMNS}
EPOCH_FORMATS = {
    "test_accuracy": ".2f",
    "test_loss": ".5f",
    "train_accuracy": ".3f",
    "train_loss": ".5f",
    "lr": ".6g",
    "epoch_seconds": ".1f",
}
RARE_FORMATS = {"raw_test_accuracy": ".2f", "objective": ".5f", "lr_1": ".6g", "lr_2": ".6g"}  # of some experiments
EPOCH_FORMATS |= RARE_FORMATS
EPOCH_COLUMNS = {name: (name, "") for name in ("step", "seed", "epoch")} | {n: (n, f) for n, f in EPOCH_FORMATS.items()}
SETTING_COLUMNS = ("step", "seeds", "kind", "name", "value")
MISTAKE_COLUMNS = {name: (name, "") for name in ("step", "seed", "image", "prediction")} | {
    "confidence": ("confidence", ".4f")
}
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

    def __add__(self, other: Records) -> Records:
        both = (in_order(chain(mine, theirs)) for mine, theirs in zip(self._parts, other._parts, strict=True))
        return Records(*both)

    @property
    def _parts(self) -> tuple[list[Row], ...]:
        return self.runs, self.epochs, self.settings, self.mistakes

    def csvs(self, folder: Path, steps: Iterable[str]) -> dict[Path, str]:
        """Return the files of these steps, and those that hold the rows of all steps."""
        unused = {name for name in RARE_FORMATS if not any(row.get(name) for row in self.epochs)}
        return {
            **{folder / f"{step}.csv": to_csv(COLUMNS, rows_of(step, self.runs)) for step in steps},
            folder / "epochs.csv": to_csv([name for name in EPOCH_COLUMNS if name not in unused], self.epochs),
            folder / "settings.csv": to_csv(SETTING_COLUMNS, _by_setting(self.settings)),
            folder / "mistakes.csv": to_csv(MISTAKE_COLUMNS, self.mistakes),
        }


def tracked_records(tracking_uri: str | None, *, restored: bool = True) -> Records:
    """Return what is kept of the tracked runs: the newest finished run of each step and seed, as declared.

    restored: also those that were restored from files.
    A step that can't name a file is left out, and so are mistakes that the store does not say; a warning tells so.

    Raises:
        LabError: if the store has no such runs.
    """
    loaded = load_runs(tracking_uri)
    runs = _that_can_name_a_file(newest_runs(run_table(columns="all", loaded=loaded)))
    if not restored:
        runs = runs[runs["restored"].isna()]
    history = epoch_history(loaded=loaded, metrics=[*EPOCH_FORMATS])
    history = history[history["run_id"].isin(runs["run_id"]) & history["test_accuracy"].notna()]
    return Records(
        in_order(cells(runs.to_dict("records"), RUN_COLUMNS)),
        in_order(cells(history.to_dict("records"), EPOCH_COLUMNS)),
        in_order(_settings(loaded, runs)),
        in_order(_mistakes(loaded, runs)),
    )


def read_records(folder: Path) -> Records:
    """Read the CSVs in a folder.

    Raises:
        OSError, UnicodeDecodeError: if one can't be read.
        LabError: if one has other columns, or a seed or epoch that is no number.
    """
    try:
        epochs, settings, mistakes = (read_csv(folder / f"{name}.csv") for name in ("epochs", "settings", "mistakes"))
        return Records(read_rows(folder), in_order(epochs), in_order(_by_run(settings)), in_order(mistakes))
    except UnicodeDecodeError:
        raise
    except (KeyError, ValueError) as error:
        raise LabError(f"a CSV in {folder} is not as the lab writes it: {error}") from error


def read_rows(folder: Path) -> list[Row]:
    """Read the CSVs of all experiments in a folder, the steps first."""
    files = [file for file in folder.glob("*.csv") if file.stem not in OTHER_FILES]
    return in_order({"step": file.stem, **row} for file in files for row in read_csv(file))


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
    for step, seed, run_id in _identities(runs):
        data = loaded.found[run_id].data
        params = {name: value for name, value in data.params.items() if name != "seed"}
        tags = {name: value for name, value in data.tags.items() if TAGS.fullmatch(name)}
        for kind, named in (("param", params), ("tag", tags)):
            for name, value in named.items():
                yield {"step": step, "seed": str(seed), "kind": kind, "name": name, "value": value}


def _mistakes(loaded: LoadedRuns, runs: pd.DataFrame) -> Iterable[Row]:
    unknown = []
    for step, seed, run_id in _identities(runs):
        try:
            said = predictions(run_id, tracking_uri=loaded.uri)
        except LabError as error:
            unknown.append(f"{step} seed {seed} ({error})")
            continue
        wrong = said[said["truth"] != said["prediction"]].rename_axis("image").reset_index()
        rows = [{"step": step, "seed": seed, **row} for row in wrong.to_dict("records")]
        yield from cells(rows, MISTAKE_COLUMNS)
    if unknown:
        runs_are = "1 run" if len(unknown) == 1 else f"{len(unknown)} runs"
        logger.warning("not known: which test images %s got wrong, the first is %s", runs_are, unknown[0])


def _identities(runs: pd.DataFrame) -> list[tuple[str, int, str]]:
    identities = runs[["step", "seed", "run_id"]].itertuples(index=False, name=None)
    return sorted(identities, key=lambda identity: (step_order(identity[0]), identity[1]))


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


def _by_run(lines: Iterable[Row]) -> Iterable[Row]:
    for line in lines:
        for part in line["seeds"].split(", "):
            first, _, last = part.partition("-")
            for seed in range(int(first), int(last or first) + 1):
                yield {"seed": str(seed), **{name: line[name] for name in ("step", "kind", "name", "value")}}


def ranges(seeds: Iterable[int]) -> str:
    """Return seeds in short, e.g. "0-4, 7"."""
    runs: list[list[int]] = []
    for seed in sorted(seeds):
        if runs and seed == runs[-1][-1] + 1:
            runs[-1].append(seed)
        else:
            runs.append([seed])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


# ---- CSV


def cells(records: Iterable[Mapping[Any, Any]], columns: Mapping[str, tuple[str, str]]) -> list[Row]:
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


def read_csv(file: Path) -> list[Row]:
    """Return a file's rows, and none where there is no file."""
    if not file.exists():
        return []
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))
