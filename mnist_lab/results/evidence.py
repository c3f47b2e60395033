"""The figures that are committed: CSVs of the tracked runs in docs/results, and the tables that are made of them.

The tables in README.md and docs/results/README.md are made from the CSVs alone, so that a test can make them again.
"""

from __future__ import annotations

import csv
import html
import io
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from mnist_lab.errors import LabError
from mnist_lab.experiment import Targets, quoted
from mnist_lab.tracking.disk import replace_files
from mnist_lab.verdicts import statistics
from mnist_lab.verdicts.comparison import (
    PAIRS,
    Comparison,
    Pair,
    adjust,
    compare_seeds,
    interval_text,
    p_text,
    step_order,
)
from mnist_lab.verdicts.measures import MEASURES
from mnist_lab.verdicts.targets import judge

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

Row = dict[str, str]  # one line of a CSV; an empty cell is a figure that is not known

# The columns of <step>.csv, and where in the run table each one is.
COLUMNS = {
    "seed": "seed",
    "last": "final_test_accuracy",
    "best": "best_test_accuracy",
    "best_epoch": "best_epoch",
    "train": "final_train_accuracy",
    "test_loss": "final_test_loss",
    "num_params": "num_params",
    "epochs": "epochs",
    "minutes": "minutes",
    "hardware": "hardware",
    "torch": "torch",
    "git_commit": "git_commit",
    "git_dirty": "git_dirty",
    "code_sha256": "code_sha256",
    "date": "start_time",
    "target_accuracy": "target_accuracy",
    "target_params": "target_params",
    "target_epochs": "target_epochs",
    "reported_best": "reported_best_test_accuracy",
}
EPOCH_COLUMNS = ("step", "seed", "epoch", "test_accuracy")
EFFECT_COLUMNS = ("change", "from", "to", "points", "low", "high", "p", "p_holm", "test", "seeds", "seeds_needed")
OTHER_FILES = ("effects", "epochs")  # CSVs in the folder that are no step's


@dataclass(frozen=True)
class Study:
    """The runs of one experiment as they are committed, one row per seed."""

    step: str
    rows: list[Row]

    def values(self, column: str) -> list[float]:
        """Return the figures that are known of a column, by seed."""
        return [float(row[column]) for row in self.rows if row[column]]

    def stated(self, column: str) -> float | None:
        """Return a figure that all runs share, such as a target; None where there is none."""
        return next(iter(self.values(column)), None)

    @property
    def last(self) -> dict[int, float]:
        """The test accuracy of the last epoch in percent, by seed."""
        return {int(row["seed"]): float(row["last"]) for row in self.rows}

    def shared(self, column: str) -> str:
        """Return the different values of a column, in the order of the seeds, as Markdown."""
        return _plain(", ".join(dict.fromkeys(row[column] for row in self.rows if row[column]))) or "not recorded"


def export_runs(folder: Path, readme: Path, *, tracking_uri: str | None = None) -> list[Path]:
    """Write the tracked runs' CSVs into the folder, and the tables of `readme` and the folder's README.md from them.

    A step that the store has no runs of keeps the CSV it has, and so do seeds that the same code computed elsewhere.
    A step whose name can't be that of a file is left out, with a warning. Returns what was written.

    Raises:
        LabError: if the store has no runs that can be exported, a page has no markers for its tables, or a file can't
            be read or written; then nothing was changed.
    """
    from mnist_lab import results  # MLflow takes seconds to import, which the tables alone need not

    loaded = results.load_runs(tracking_uri)
    runs = _exportable(results.newest_runs(results.run_table(loaded=loaded)))
    history = results.epoch_history(loaded=loaded)
    history = history[history["run_id"].isin(runs["run_id"]) & history["test_accuracy"].notna()]
    try:
        of_steps = {str(step): _run_rows(of_step) for step, of_step in runs.groupby("step")}
        kept = {step: _rows_of_other_seeds(_read(folder / f"{step}.csv"), rows) for step, rows in of_steps.items()}
        exported = [
            Study(step, sorted(rows + kept[step], key=lambda row: int(row["seed"]))) for step, rows in of_steps.items()
        ]
        kept_seeds = {(step, row["seed"]) for step, rows in kept.items() for row in rows}
        epochs = _epoch_rows(history) + [
            row
            for row in _read(folder / "epochs.csv")
            if row["step"] not in of_steps or (row["step"], row["seed"]) in kept_seeds
        ]
        epochs.sort(key=lambda row: (step_order(row["step"]), int(row["seed"]), int(row["epoch"])))
        others = [study for study in read_studies(folder) if study.step not in of_steps]
        studies = sorted(exported + others, key=lambda study: step_order(study.step))
        made = tables_of(studies)
        written = {
            **{folder / f"{study.step}.csv": _csv(COLUMNS, study.rows) for study in exported},
            folder / "epochs.csv": _csv(EPOCH_COLUMNS, epochs),
            folder / "effects.csv": _csv(EFFECT_COLUMNS, effect_rows(compare_studies(studies))),
            **{page: with_tables(page.read_text("utf-8"), made) for page in (readme, folder / "README.md")},
        }
        replace_files(written)
    except OSError as error:
        raise LabError(f"the results can't be exported: {error.strerror}: {error.filename}") from error
    except UnicodeDecodeError as error:
        raise LabError(f"the results can't be exported: a file in {folder} or {readme} is not UTF-8") from error
    return sorted(written)


def _exportable(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs whose step can name a file; it is free text to the store."""
    named = [bool(re.fullmatch(r"\w[\w.-]{0,99}", step)) and step not in OTHER_FILES for step in runs["step"]]
    sentences = [
        f"step: {quoted(step)} can't name a file of figures; up to 100 letters, digits and _ . - can"
        for step in runs["step"][[not can for can in named]].unique()
    ]
    if sentences and not any(named):
        raise LabError(sentences[0])
    for sentence in sentences:
        logger.warning("left out: %s", sentence)
    return runs[named]


def _rows_of_other_seeds(before: Iterable[Row], now: Sequence[Row]) -> list[Row]:
    """Return the rows of a CSV whose seeds are not among those exported now, if the same code computed them."""
    seeds, codes = {row["seed"] for row in now}, {row["code_sha256"] for row in now}
    return [row for row in before if row["seed"] not in seeds and row["code_sha256"] in codes]


def read_studies(folder: Path) -> list[Study]:
    """Read the CSVs of all experiments in a folder, the steps first."""
    files = [file for file in folder.glob("*.csv") if file.stem not in OTHER_FILES]
    return [Study(file.stem, _read(file)) for file in sorted(files, key=lambda file: step_order(file.stem))]


def compare_studies(studies: Iterable[Study], pairs: Iterable[Pair] = PAIRS) -> list[Comparison]:
    """Compare the pairs of experiments that both have several seeds, adjusted for their number (Holm)."""
    last = {study.step: study.last for study in studies}
    several = {step for step, accuracies in last.items() if len(accuracies) > 1}
    return adjust([compare_seeds(pair, last[pair.a], last[pair.b]) for pair in pairs if {pair.a, pair.b} <= several])


def effect_rows(comparisons: Iterable[Comparison]) -> list[Row]:
    """Return the rows of effects.csv; points with three decimals, p with four that count."""

    def number(value: float, form: str) -> str:
        return "" if math.isnan(value) else format(value, form)

    return [
        {
            "change": c.change,
            "from": c.a,
            "to": c.b,
            "points": f"{c.effect:.3f}",
            "low": number(c.low, ".3f"),
            "high": number(c.high, ".3f"),
            "p": number(c.p, ".4g"),
            "p_holm": number(c.p_holm, ".4g"),
            "test": c.test,
            "seeds": c.seeds,
            "seeds_needed": "" if c.seeds_needed is None else str(c.seeds_needed),
        }
        for c in comparisons
    ]


# ---- the tables, in Markdown


def tables(folder: Path) -> dict[str, str]:
    """Return each table that is made from the CSVs in a folder, by the name of its markers."""
    return tables_of(read_studies(folder))


def tables_of(studies: Sequence[Study]) -> dict[str, str]:
    """Return each table of these experiments, by the name of its markers."""
    return {
        "results": results_table(studies),
        "effects": effects_table(compare_studies(studies)),
        "runs": runs_table(studies),
    }


def results_table(studies: Sequence[Study]) -> str:
    """Return one row per experiment: its last epoch over the seeds, and what that shows."""
    headers = ["experiment", "seeds", "last epoch", "95 % interval", "best epoch*", "training", "parameters", "epochs"]
    headers += ["verdict", "reported best"]
    rows = []
    for study in studies:
        last = statistics.aggregate(list(study.last.values()))
        spread = "" if math.isnan(last.sd) else f" ± {last.sd:.3f}"
        rows.append(
            [
                f"`{study.step}`",
                str(last.n),
                f"**{last.mean:.2f}**{spread}",
                interval_text(last.low, last.high),
                _mean(study.values("best")),
                _mean(study.values("train")),
                MEASURES["num_params"].text(study.values("num_params")[0]),
                MEASURES["epochs"].text(study.values("epochs")[0]),
                _verdict(study),
                _mean(study.values("reported_best")),
            ]
        )
    return _markdown(headers, rows, right=range(1, 8))


def effects_table(comparisons: Sequence[Comparison]) -> str:
    """Return one row per change: what it is worth in points, and whether that is shown."""
    if not comparisons:
        return "No change has runs of several seeds on both sides yet."
    headers = ["change", "from → to", "points", "95 % interval", "p", "p (Holm)", "seeds", "what is shown"]
    rows = [
        [
            c.change,
            f"`{c.a}` → `{c.b}`",
            f"{c.effect:+.2f}",
            interval_text(c.low, c.high, signed=True),
            p_text(c.p),
            p_text(c.p_holm),
            c.seeds,
            c.verdict,
        ]
        for c in comparisons
    ]
    return _markdown(headers, rows, right=range(2, 7))


def runs_table(studies: Sequence[Study]) -> str:
    """Return how the runs of each experiment were made."""
    headers = ["experiment", "command", "seeds", "commit", "code", "hardware", "torch", "minutes (median)", "date"]
    rows = []
    for study in studies:
        commits = dict.fromkeys(
            _plain(row["git_commit"][:10]) + (" + changes" if row["git_dirty"] == "True" else "") for row in study.rows
        )
        dates = sorted({row["date"][:10] for row in study.rows})
        minutes = study.values("minutes")
        rows.append(
            [
                f"`{study.step}`",
                f"`python experiments/{study.step}.py --seed N`",
                _ranges(study.last),
                ", ".join(commits),
                study.shared("code_sha256"),
                study.shared("hardware"),
                study.shared("torch"),
                f"{median(minutes):.0f}" if minutes else "not recorded",
                " to ".join(dict.fromkeys([dates[0], dates[-1]])),
            ]
        )
    return _markdown(headers, rows, right=[7])


def with_tables(page: str, made: Mapping[str, str]) -> str:
    """Return a page with the tables put between its markers, `<!-- results -->` to `<!-- /results -->` and so on.

    Raises:
        LabError: if the page has no markers at all.
    """
    found = 0
    for name, table in made.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, marker, rest = page.partition(start)
        _, closing, after = rest.partition(end)
        if marker and closing:
            page, found = f"{before}{start}\n{table}\n\n{end}{after}", found + 1
    if not found:
        raise LabError(f"the page has no markers for a table: {', '.join(f'<!-- {name} -->' for name in made)}")
    return page


def _verdict(study: Study) -> str:
    """Return the verdict on each stated target; on the accuracy of several seeds, what their mean shows."""
    names = ("accuracy", "params", "epochs")
    stated = {name: value for name in names if (value := study.stated(f"target_{name}")) is not None}
    verdicts = judge(
        Targets(**stated),  # type: ignore[arg-type]
        accuracies=list(study.last.values()),
        num_params=int(study.values("num_params")[0]),
        epochs=int(study.values("epochs")[0]),
    )
    if not verdicts:
        return "no target stated"
    needs = {v.name: f" (needs about {v.seeds_needed:,} seeds)" for v in verdicts if v.seeds_needed}
    return ", ".join(f"{v.name} {v.word}{needs.get(v.name, '')}" for v in verdicts)


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.2f}" if values else "–"


def _ranges(seeds: Iterable[int]) -> str:
    """Return seeds in short, e.g. "0-4, 7"."""
    runs: list[list[int]] = []
    for seed in sorted(seeds):
        if runs and seed == runs[-1][-1] + 1:
            runs[-1].append(seed)
        else:
            runs.append([seed])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _plain(text: str) -> str:
    """Return text that a store holds as Markdown that shows it: without HTML, in one cell of a table."""
    return " ".join(html.escape(text, quote=False).replace("|", "\\|").split())


def _markdown(headers: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int]) -> str:
    aligned = set(right)
    line = ["---:" if column in aligned else "---" for column in range(len(headers))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [headers, line, *rows])


# ---- CSV


def _run_rows(runs: pd.DataFrame) -> list[Row]:
    """Return the rows of one step's CSV, from its part of the run table."""
    forms: dict[str, Callable[[object], str]] = {
        **dict.fromkeys(("last", "best"), lambda value: f"{value:.2f}"),
        "train": lambda value: f"{value:.3f}",
        "test_loss": lambda value: f"{value:.5f}",
        "minutes": lambda value: f"{value:.1f}",
        "code_sha256": lambda value: str(value)[:12],
        "date": lambda value: f"{value:%Y-%m-%d %H:%M}",
        **dict.fromkeys(("target_accuracy", "target_params", "target_epochs", "reported_best"), lambda v: f"{v:g}"),
    }
    import pandas as pd

    rows = []
    for run in runs.sort_values("seed").to_dict("records"):
        cells = {name: run[column] for name, column in COLUMNS.items()}
        known = {name: value for name, value in cells.items() if pd.notna(value)}
        rows.append({name: forms.get(name, str)(known[name]) if name in known else "" for name in COLUMNS})
    return rows


def _epoch_rows(history: pd.DataFrame) -> list[Row]:
    return [
        {
            "step": epoch["step"],
            "seed": str(epoch["seed"]),
            "epoch": str(epoch["epoch"]),
            "test_accuracy": f"{epoch['test_accuracy']:.2f}",
        }
        for epoch in history.to_dict("records")
    ]


def _csv(columns: Iterable[str], rows: Iterable[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _read(file: Path) -> list[Row]:
    if not file.exists():
        return []
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))
