"""Figures as files: CSVs of the tracked runs, and the tables made of them.

Exported, they are one's own; published, they are those of docs/results and README.md. The tables there are made from
the CSVs alone, so that a test can make them again.
"""

from __future__ import annotations

import html
import io
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote

import matplotlib
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from mnist_lab.errors import LabError
from mnist_lab.figures import plot_summary
from mnist_lab.paths import PROJECT_ROOT
from mnist_lab.results.compare import summarise
from mnist_lab.results.records import (
    COLUMNS,
    OTHER_FILES,
    Row,
    cells,
    ranges,
    read_records,
    rows_of,
    run_of,
    to_csv,
    tracked_records,
)
from mnist_lab.results.runs import TARGETS
from mnist_lab.tracking.disk import replace_files
from mnist_lab.verdicts.comparison import (
    PAIRS,
    TOO_FEW,
    Comparison,
    adjust,
    compare_seeds,
    mean_interval_text,
    p_text,
    seeds_text,
)
from mnist_lab.verdicts.measures import MEASURES, percent

logger = logging.getLogger(__name__)

TEXTS = ("hardware", "torch", "git_commit", "git_dirty", "code_sha256", "date")
EFFECT_COLUMNS = {
    **{"change": ("change", ""), "from": ("a", ""), "to": ("b", "")},
    **{"points": ("effect", ".3f"), "low": ("low", ".3f"), "high": ("high", ".3f")},
    **{"p": ("p", ".4g"), "p_holm": ("p_holm", ".4g")},
    **{name: (name, "") for name in ("test", "seeds", "seeds_needed")},
}
TABLES = ("summary", "results", "effects", "runs")
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
            folder / "effects.csv": _effects(records.runs),
            page: with_tables(old, tables(records.runs)),
        }
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

    A step that the store has no runs of keeps the CSV it has, and so do seeds that the same code computed elsewhere,
    such as those that were restored into the store. Nothing is written. A step that can't name a file is left out, with
    a warning.

    Raises:
        LabError: if the store has no runs that can be published, a page has no markers for its tables, or a file can't
            be read.
    """
    own = tracked_records(tracking_uri, restored=False)
    steps = {row["step"] for row in own.runs}
    seeds = set(map(run_of, own.runs))
    codes = {(row["step"], row["code_sha256"]) for row in own.runs}
    with _file_errors(folder, readme):
        old = read_records(folder)
        kept = {
            run_of(row)
            for row in old.runs
            if row["step"] not in steps or (run_of(row) not in seeds and (row["step"], row["code_sha256"]) in codes)
        }
        records = own + old.only(kept.__contains__)
        made = tables(records.runs)
        files = {
            **records.csvs(folder, steps),
            folder / "effects.csv": _effects(records.runs),
            folder / PICTURE: picture(records.runs),
            **{page: with_tables(page.read_text("utf-8"), made) for page in (readme, folder / "README.md")},
        }
    return Publication(*_changes(old.runs, records.runs), files)


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
            refusals += _mixed_hardware(rows_of(step, old), rows_of(step, new), f"the seeds of {step}")
    return added + replaced, refusals


def _mixed_hardware(old: Iterable[Row], new: Iterable[Row], what: str) -> list[str]:
    """Say so where the new rows are of several kinds of hardware, and not all of these are among the old ones."""
    was, now = ({row["hardware"] for row in rows if row["hardware"]} for rows in (old, new))
    return [f"{what} would mix hardware: {' and '.join(map(repr, sorted(now)))}"] if len(now) > 1 and now - was else []


def _effects(rows: Iterable[Row]) -> str:
    return to_csv(EFFECT_COLUMNS, effect_rows(compare_rows(rows)))


@contextmanager
def _file_errors(*files: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LabError(f"the results can't be exported: {error.strerror}: {error.filename}") from error
    except UnicodeDecodeError as error:
        where = " or ".join(map(str, files))
        raise LabError(f"the results can't be exported: a file in {where} is not UTF-8") from error


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
    return cells(rows, EFFECT_COLUMNS)


# ---- the tables, in Markdown


def summary_of(rows: Sequence[Row]) -> pd.DataFrame:
    """Return the rows of `compare_table` for the rows of the CSVs."""
    table = pd.DataFrame(rows, columns=["step", *COLUMNS], dtype="str").replace("", None)
    table = table.astype({name: "float64" for name in COLUMNS if name not in TEXTS}).assign(overrides="", left_out=0)
    return summarise(table.rename(columns={name: column for name, (column, _) in COLUMNS.items()}))


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """Return each table that is made of the rows of the CSVs, by the name of its template and its markers."""
    summary = summary_of(rows)
    told = {
        "experiments": summary.to_dict("records"),
        "headline": headline(summary).to_dict("records"),
        "comparisons": compare_rows(rows),
        "studies": {step: rows_of(step, rows) for step in dict.fromkeys(row["step"] for row in rows)},
    }
    return {name: TEMPLATES.get_template(f"{name}.md").render(told).strip() for name in TABLES}


def headline(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `summary_of` for the experiments that README shows; all of them where none has targets.

    Ablations, which are compared with their step elsewhere, and experiments without targets are left out.
    """
    ablations = {step for pair in PAIRS for step in (pair.a, pair.b) if not re.match(r"step\d+_", step)}
    chosen = summary[summary["target_params"].notna() & ~summary["step"].isin(ablations)]
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
