"""Figures as files: CSVs of the tracked runs, and the tables made of them.

Exported, they are one's own; published, they are those of docs/results and README.md. The tables there are made from
the CSVs alone, so that a test can make them again.
"""

from __future__ import annotations

import csv
import html
import io
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote

import matplotlib
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from mnist_lab.errors import LabError
from mnist_lab.experiment import quoted
from mnist_lab.figures import plot_summary
from mnist_lab.results.compare import TARGETS, newest_runs, summarise
from mnist_lab.results.runs import epoch_history, load_runs, run_table
from mnist_lab.tracking.disk import replace_files
from mnist_lab.tracking.sqlite import PROJECT_ROOT
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
from mnist_lab.verdicts.measures import MEASURES

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
TEXTS = ("hardware", "torch", "git_commit", "git_dirty", "code_sha256", "date")
EPOCH_COLUMNS = {name: (name, "") for name in ("step", "seed", "epoch")} | {"test_accuracy": ("test_accuracy", ".2f")}
EFFECT_COLUMNS = {
    "change": ("change", ""),
    "from": ("a", ""),
    "to": ("b", ""),
    "points": ("effect", ".3f"),
    "low": ("low", ".3f"),
    "high": ("high", ".3f"),
    "p": ("p", ".4g"),
    "p_holm": ("p_holm", ".4g"),
    "test": ("test", ""),
    "seeds": ("seeds", ""),
    "seeds_needed": ("seeds_needed", ""),
}
TABLES = ("summary", "results", "effects", "runs")
PICTURE = "accuracy.svg"  # beside the CSVs: accuracy against parameters
OTHER_FILES = ("effects", "epochs")  # CSVs in the folder that belong to no step
PUBLISHED = PROJECT_ROOT / "docs" / "results"
EXPORTED_PAGE = """# The figures of the tracked runs

Test accuracy in percent, mean ± sd over the seeds. \\* The best epoch was picked on the test images.

<!-- results -->
<!-- /results -->

## What each change is worth

<!-- effects -->
<!-- /effects -->

## How the runs were made

<!-- runs -->
<!-- /runs -->
"""


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
    rows, epochs = _tracked(tracking_uri)
    steps, page = {row["step"] for row in rows}, folder / "README.md"
    with _file_errors(folder):
        old = page.read_text("utf-8") if page.exists() else EXPORTED_PAGE
        files = {**_csvs(folder, steps, rows, epochs), page: with_tables(old, tables(rows))}
        replace_files(files)
        for step in sorted({file.stem for file in folder.glob("*.csv")} - steps - {*OTHER_FILES}):
            logger.warning("left as it is: %s.csv, as the store has no runs of that step", step)
    return sorted(files)


@dataclass(frozen=True)
class Publication:
    """What publishing the tracked runs would change.

    changes: a sentence for each row that is added, replaced or removed.
    refusals: why it takes `--replace`; a sentence each.
    """

    changes: list[str]
    refusals: list[str]
    files: dict[Path, str]

    def write(self) -> list[Path]:
        """Write the files, and return them.

        Raises:
            LabError: if one can't be written; then nothing was changed.
        """
        with _file_errors(*self.files):
            replace_files(self.files)
        return sorted(self.files)


def prepare_publication(folder: Path, readme: Path, *, tracking_uri: str | None = None) -> Publication:
    """Lay the tracked runs over the published CSVs in the folder, and make the tables of `readme` and its README.md.

    A step that the store has no runs of keeps the CSV it has, and so do seeds that the same code computed elsewhere.
    Nothing is written. A step that can't name a file is left out, with a warning.

    Raises:
        LabError: if the store has no runs that can be published, a page has no markers for its tables, or a file can't
            be read.
    """
    exported, history = _tracked(tracking_uri)
    seed_of, code_of = itemgetter("step", "seed"), itemgetter("step", "code_sha256")
    steps = {row["step"] for row in exported}
    seeds, codes = set(map(seed_of, exported)), set(map(code_of, exported))
    with _file_errors(folder, readme):
        old = read_rows(folder)
        kept = [row for row in old if row["step"] not in steps or (seed_of(row) not in seeds and code_of(row) in codes)]
        kept_seeds = set(map(seed_of, kept))
        kept_epochs = [
            row for row in _read(folder / "epochs.csv") if row["step"] not in steps or seed_of(row) in kept_seeds
        ]
        rows, epochs = _in_order(exported + kept), _in_order(history + kept_epochs)
        made = tables(rows)
        files = {
            **_csvs(folder, steps, rows, epochs),
            folder / PICTURE: picture(rows),
            **{page: with_tables(page.read_text("utf-8"), made) for page in (readme, folder / "README.md")},
        }
    return Publication(*_changes(old, rows), files)


def _changes(old: Sequence[Row], new: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Return a sentence for each row that changes, and one for each reason not to publish without being told to."""
    before, after = ({(row["step"], row["seed"]): row for row in rows} for rows in (old, new))
    added, replaced = [], []
    for step, seed in dict.fromkeys([*after, *before]):
        was, row, name = before.get((step, seed)), after.get((step, seed)), f"{step} seed {seed}"
        if was is None and row is not None:
            added.append(f"{name}: added, {row['last']} on {row['hardware'] or 'unknown hardware'}")
        elif was is not None and row is None:
            replaced.append(f"{name}: removed, {was['last']}; the store's runs of the step are of other code")
        elif was is not None and row is not None and was != row:
            cells = [f"{column} {was.get(column)} -> {cell}" for column, cell in row.items() if was.get(column) != cell]
            replaced.append(f"{name}: replaced, {', '.join(cells)}")
    refusals = []
    if replaced:
        rows_are = "row" if len(replaced) == 1 else "rows"
        refusals.append(f"{len(replaced)} published {rows_are} would be replaced or removed")
    refusals += _mixed_hardware(old, new, "the tables")
    if not refusals:
        for step in dict.fromkeys(row["step"] for row in new):
            refusals += _mixed_hardware(_of(step, old), _of(step, new), f"the seeds of {step}")
    return added + replaced, refusals


def _mixed_hardware(old: Iterable[Row], new: Iterable[Row], what: str) -> list[str]:
    """Say so where the new rows are of several kinds of hardware, and not all of these are among the old ones."""
    was, now = ({row["hardware"] for row in rows if row["hardware"]} for rows in (old, new))
    return [f"{what} would mix hardware: {' and '.join(map(repr, sorted(now)))}"] if len(now) > 1 and now - was else []


def _tracked(tracking_uri: str | None) -> tuple[list[Row], list[Row]]:
    """Return the rows of the tracked runs and those of their epochs, as the CSVs hold them."""
    loaded = load_runs(tracking_uri)
    runs = _exportable(newest_runs(run_table(columns="all", loaded=loaded)))
    history = epoch_history(loaded=loaded)
    history = history[history["run_id"].isin(runs["run_id"]) & history["test_accuracy"].notna()]
    rows = _cells(runs.to_dict("records"), {"step": ("step", ""), **COLUMNS})
    return _in_order(rows), _in_order(_cells(history.to_dict("records"), EPOCH_COLUMNS))


def _csvs(folder: Path, steps: Iterable[str], rows: Sequence[Row], epochs: Iterable[Row]) -> dict[Path, str]:
    """Return the CSVs of these steps, and those of the epochs and effects of all rows."""
    return {
        **{folder / f"{step}.csv": _csv(COLUMNS, _of(step, rows)) for step in steps},
        folder / "epochs.csv": _csv(EPOCH_COLUMNS, epochs),
        folder / "effects.csv": _csv(EFFECT_COLUMNS, effect_rows(compare_rows(rows))),
    }


@contextmanager
def _file_errors(*files: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LabError(f"the results can't be exported: {error.strerror}: {error.filename}") from error
    except UnicodeDecodeError as error:
        where = " or ".join(map(str, files))
        raise LabError(f"the results can't be exported: a file in {where} is not UTF-8") from error


def _exportable(runs: pd.DataFrame) -> pd.DataFrame:
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


def read_rows(folder: Path) -> list[Row]:
    """Read the CSVs of all experiments in a folder, the steps first."""
    files = [file for file in folder.glob("*.csv") if file.stem not in OTHER_FILES]
    return _in_order({"step": file.stem, **row} for file in files for row in _read(file))


def compare_rows(rows: Iterable[Row]) -> list[Comparison]:
    """Compare the PAIRS of experiments that both have several seeds, adjusted for their number (Holm)."""
    last: dict[str, dict[int, float]] = {}
    for row in rows:
        last.setdefault(row["step"], {})[int(row["seed"])] = float(row["last"])
    several = {step for step, accuracies in last.items() if len(accuracies) > 1}
    return adjust([compare_seeds(pair, last[pair.a], last[pair.b]) for pair in PAIRS if {pair.a, pair.b} <= several])


def effect_rows(comparisons: Sequence[Comparison]) -> list[Row]:
    """Return the rows of effects.csv; of too few seeds, without an interval."""
    rows = [{**vars(comparison), "seeds": comparison.seeds} for comparison in comparisons]
    for row, comparison in zip(rows, comparisons, strict=True):
        if comparison.interval == TOO_FEW:
            row |= {"low": math.nan, "high": math.nan}
    return _cells(rows, EFFECT_COLUMNS)


# ---- the tables, in Markdown


def summary_of(rows: Sequence[Row]) -> pd.DataFrame:
    """Return the rows of `compare_table` for the rows of the CSVs."""
    table = pd.DataFrame(rows, columns=["step", *COLUMNS], dtype="str").replace("", None)
    table = table.astype({name: "float64" for name in COLUMNS if name not in TEXTS}).assign(overrides="", left_out=0)
    return summarise(table.rename(columns={name: column for name, (column, _) in COLUMNS.items()}))


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """Return each table that is made of the rows of the CSVs, by the name of its template and its markers."""
    told = {
        "experiments": summary_of(rows).to_dict("records"),
        "comparisons": compare_rows(rows),
        "studies": {step: _of(step, rows) for step in dict.fromkeys(row["step"] for row in rows)},
    }
    return {name: TEMPLATES.get_template(f"{name}.md").render(told).strip() for name in TABLES}


def picture(rows: Sequence[Row]) -> str:
    """Return the picture of accuracy against parameters as SVG; its description lists the points that are drawn.

    Ablations, which are compared with their step elsewhere, and experiments without targets are left out.
    """
    summary = summary_of(rows)
    ablations = {step for pair in PAIRS for step in (pair.a, pair.b) if not step.startswith("step")}
    drawn = summary[summary["target_params"].notna() & ~summary["step"].isin(ablations)]
    if drawn.empty:
        drawn = summary
    svg = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "mnist_lab"}):  # else each drawing has ids of its own
        plot_summary(drawn).savefig(svg, format="svg", metadata={"Date": None, "Description": described(drawn)})
    return svg.getvalue()


def described(summary: pd.DataFrame) -> str:
    """Return the points of a picture as text: the step, its parameters, its mean accuracy and its seeds."""
    return "; ".join(
        f"{row['step']}: {row['num_params']:,} parameters, {row['last']:.2f} %, seeds: {row['seeds']}"
        for row in summary.to_dict("records")
    )


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


def _verdict(row: Mapping[Any, Any]) -> str:
    """Return the verdict on each stated target; on the accuracy of several seeds, what their mean shows."""
    words = {name: f"{name} {row[f'verdict_{name}']}" for name in TARGETS if row[f"verdict_{name}"] != "-"}
    if pd.notna(row["seeds_needed"]):
        words["accuracy"] += f" (needs about {seeds_text(row['seeds_needed'])} seeds)"
    return ", ".join(words.values()) or "no target stated"


def _in_short(row: Mapping[Any, Any]) -> str:
    """Return the verdicts in a few words: what is not met, or that all is."""
    words = {name: row[f"verdict_{name}"] for name in TARGETS if row[f"verdict_{name}"] != "-"}
    if not words:
        return "none stated"
    return ", ".join(f"{name} {word}" for name, word in words.items() if word != "met") or "all met"


def _commit(row: Row) -> str:
    return markdown_cell(row["git_commit"][:10]) + (" + changes" if row["git_dirty"] == "True" else "")


def _ranges(seeds: Iterable[int]) -> str:
    """Return seeds in short, e.g. "0-4, 7"."""
    runs: list[list[int]] = []
    for seed in sorted(seeds):
        if runs and seed == runs[-1][-1] + 1:
            runs[-1].append(seed)
        else:
            runs.append([seed])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


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
    "percent": lambda value: "–" if value != value else f"{value:.2f}",
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
    "ranges": _ranges,
    "verdict": _verdict,
    "in_short": _in_short,
}


# ---- CSV


def _of(step: str, rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["step"] == step]


def _in_order(rows: Iterable[Row]) -> list[Row]:
    """Sort the rows of runs, or of their epochs."""
    return sorted(rows, key=lambda row: (step_order(row["step"]), int(row["seed"]), int(row.get("epoch", 0))))


def _cells(records: Iterable[Mapping[Any, Any]], columns: Mapping[str, tuple[str, str]]) -> list[Row]:
    """Return these columns of a run table, an epoch history or a comparison as the text that a CSV holds."""
    return [
        {name: format(row[column], form) if pd.notna(row[column]) else "" for name, (column, form) in columns.items()}
        for row in records
    ]


def _csv(columns: Iterable[str], rows: Iterable[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _read(file: Path) -> list[Row]:
    if not file.exists():
        return []
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))
