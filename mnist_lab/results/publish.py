"""Tables and a picture of the tracked runs, from the CSVs of `records` alone, for `make export` and `make publish`."""

import html
import io
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from mnist_lab.errors import LabError, one_line
from mnist_lab.figures import plot_steps
from mnist_lab.measures import MEASURES, TESTED, percent
from mnist_lab.paths import PUBLISHED
from mnist_lab.results import records as files
from mnist_lab.results.compare import compare_runs, declared_pairs, summarise
from mnist_lab.results.runs import TARGETS
from mnist_lab.tracking.store import replace_files
from mnist_lab.verdicts.comparison import TOO_FEW, Comparison, adjust, mean_interval_text, p_text, seeds_text
from mnist_lab.verdicts.statistics import FEWEST_FOR_INTERVAL, aggregate, interval_for_new_images

logger = logging.getLogger(__name__)

EFFECT_COLUMNS = {"change": "change", "from": "a", "to": "b", "points": "effect"}
EFFECT_COLUMNS |= {name: name for name in ("low", "high", "p", "p_holm", "test", "seeds", "seeds_needed")}
EFFECT_FORMATS = {"effect": ".3f", "low": ".3f", "high": ".3f", "p": ".4g", "p_holm": ".4g", "seeds_needed": ".0f"}
TABLES = ("summary", "results", "effects", "folds", "runs")


def export_runs(folder: Path, *, tracking_uri: str | None = None) -> list[Path]:
    """Write the tracked runs' CSVs into a folder of the user's, and the tables made from them into its README.md.

    Returns what was written. Raises LabError, and has changed nothing, if the store has no such runs, the folder is
    that of the published figures, its README.md has no markers for tables, or a file can't be read or written.
    """
    if folder.resolve() == PUBLISHED.resolve():
        raise LabError(f"folder: {folder} holds the published figures; `make publish` adds to them")
    records = files.tracked_records(tracking_uri)
    logger.info("Judging what each change is worth, and writing the tables")
    steps, page = {*records.runs["step"]}, folder / "README.md"
    with _file_errors(folder):
        old = page.read_text("utf-8") if page.exists() else TEMPLATES.get_template("exported.md").render()
        written = files_of(records, folder, steps, {page: old})
        replace_files(written)
        for step in sorted({file.stem for file in folder.glob("*.csv")} - steps - {*files.OTHER_FILES}):
            logger.warning("left as it is: %s.csv, as the store has no runs of that step", step)
    return sorted(written)


def publish(
    folder: Path, readme: Path, *, replace: bool = False, tracking_uri: str | None = None, progress: files.Tell = print
) -> list[Path]:
    """Lay the tracked runs over the published CSVs in the folder, and make the tables of `readme` and its README.md.

    A step without runs in the store keeps its published CSV; so do other seeds of the same code keep their rows.
    replace: whether a published row may be replaced or removed. progress: is called with a sentence per changed row.

    Returns what was written. LabError, and nothing is changed, as by `export_runs`, or if a row would be replaced.
    """
    own = files.tracked_records(tracking_uri, restored=False)
    with _file_errors(folder):
        old = files.read_records(folder)
        records = _laid_over(own, old)
        added, replaced = _changes(old, records)
        for sentence in added + replaced or ["The published rows are those of the store already."]:
            progress(sentence)
        if replaced and not replace:
            advice = 'if that is meant, `make publish ARGS="--replace"`'
            rows = f"published rows that would be replaced or removed: {len(replaced)}"
            raise LabError(f"nothing was written: {rows}; {advice}")
        pages = {page: page.read_text("utf-8") for page in (readme, folder / "README.md")}
        written = files_of(records, folder, {*own.runs["step"]}, pages)
        if len(records.runs):
            written[folder / "accuracy.svg"] = picture(records.runs)
        replace_files(written)
    return sorted(written)


def files_of(records: files.Records, folder: Path, steps: set[str], pages: Mapping[Path, str]) -> dict[Path, str]:
    """Return the pages with their tables, the CSVs of these steps, and those that hold the rows of all steps."""
    runs, epochs, made = records.runs, records.epochs, tables(records)
    used = [name for name in files.EPOCH_COLUMNS if name not in TESTED.at_times or epochs[name].any()]
    csvs = {
        **{step: files.rows_of(step, runs)[[*files.COLUMNS]] for step in steps},
        **{"epochs": epochs[used], "settings": files.by_setting(records.settings), "mistakes": records.mistakes},
        **{"folds": records.folds, "effects": effect_rows(compare_rows(runs))},
    }
    written = {folder / f"{name}.csv": files.to_csv(table) for name, table in csvs.items()}
    return written | {page: with_tables(text, made) for page, text in pages.items()}


def _laid_over(own: files.Records, old: files.Records) -> files.Records:
    """Return the store's rows over the published ones; folds of other code than the published seeds are left out."""
    same_code = files.among(old.runs, own.runs, "step", "code_sha256")
    elsewhere = same_code & ~files.among(old.runs, own.runs, "step", "seed")
    kept = old.runs[~files.among(old.runs, own.runs, "step") | elsewhere]
    runs, epochs, settings, mistakes = (
        files.joined([], rows, published[files.among(published, kept, "step", "seed")])
        for rows, published in zip(own[:4], old[:4], strict=True)
    )
    folds = files.joined(files.FOLD_COLUMNS, own.folds, old.folds[~files.among(old.folds, own.folds, "step", "folds")])
    folds = folds[~files.among(folds, runs, "step") | files.among(folds, runs, "step", "code_sha256")]
    return files.Records(runs, epochs, settings, mistakes, folds)


def _changes(before: files.Records, after: files.Records) -> tuple[list[str], list[str]]:
    was, now = (
        {f"{row['step']} seed {row['seed']}": row for row in records.runs.to_dict("records")}
        | {f"{row['step']} fold {row['fold']} of {row['folds']}": row for row in records.folds.to_dict("records")}
        for records in (before, after)
    )
    added, replaced = [], []
    for name, row in (was | now).items():
        accuracy = row.get("last", row.get("accuracy"))
        if name not in was:
            added.append(f"{name}: added, {accuracy} on {row['hardware'] or 'unknown hardware'}")
        elif name not in now:
            replaced.append(f"{name}: removed, {accuracy}; the store's runs of the step are of other code")
        elif (old := was[name]) != row:
            cells = [f"{column} {old[column]} -> {cell}" for column, cell in row.items() if old[column] != cell]
            replaced.append(f"{name}: replaced, {', '.join(cells)}")
    return added, replaced


@contextmanager
def _file_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, UnicodeError) as error:  # a page that is not UTF-8; a name that the locale has no letters for
        raise LabError(f"the figures can't be written to {folder}: {one_line(error)}") from error


def compare_rows(rows: pd.DataFrame) -> list[Comparison]:
    """Compare the pairs that scripts declare and that both have several seeds."""
    return compare_runs(declared_pairs(), files.typed(rows, files.RUN_COLUMNS))[0]


def compare_folds(rows: pd.DataFrame) -> list[Comparison]:
    """Compare the pairs that scripts declare and that have the same folds."""
    pairs, runs = declared_pairs(), files.typed(rows, files.FOLD_COLUMNS)
    alike = [(folds, runs[runs["folds"] == folds]) for folds in runs["folds"].unique()]
    return adjust([found for folds, trained in alike for found in compare_runs(pairs, trained, folds)[0]])


def effect_rows(comparisons: Sequence[Comparison]) -> pd.DataFrame:
    table = pd.DataFrame([{**vars(one), "seeds": one.seeds} for one in comparisons], columns=[*EFFECT_COLUMNS.values()])
    table.loc[[one.interval == TOO_FEW for one in comparisons], ["low", "high"]] = math.nan
    return files.cells(table, EFFECT_COLUMNS, EFFECT_FORMATS)


# ---- the tables, in Markdown


def summary_of(rows: pd.DataFrame) -> pd.DataFrame:
    return summarise(files.typed(rows, files.RUN_COLUMNS).assign(overrides="", left_out=0, failed=""))


def tables(records: files.Records) -> dict[str, str]:
    """Return each table that is made of the rows of the CSVs, by the name of its template and its markers."""
    summary = summary_of(records.runs)
    folds = {key: rows.to_dict("records") for key, rows in records.folds.groupby(["step", "folds"], sort=False)}
    values = {
        "experiments": summary.to_dict("records"),
        "headline": headline(summary).to_dict("records"),
        "comparisons": compare_rows(records.runs),
        "studies": {step: rows.to_dict("records") for step, rows in records.runs.groupby("step", sort=False)},
        "new_images": {step: _new_images(files.rows_of(step, records.mistakes)) for step in summary["step"]},
        "validated": {key: aggregate([float(row["accuracy"]) for row in rows]) for key, rows in folds.items()},
        "folds": folds,
        "fold_comparisons": compare_folds(records.folds),
    }
    return {name: TEMPLATES.get_template(f"{name}.md").render(values).strip() for name in TABLES}


def _new_images(mistakes: pd.DataFrame) -> tuple[int, float, float] | None:
    """Return the interval of a mean accuracy for other seeds and images, and from how many seeds' mistakes it is."""
    places, seeds = pd.factorize(mistakes["seed"])
    if len(seeds) < FEWEST_FOR_INTERVAL:
        return None
    wrong = np.zeros((len(seeds), files.IMAGES), dtype=bool)
    wrong[places, mistakes["image"].astype("int64")] = True
    return len(seeds), *interval_for_new_images(wrong)


def headline(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `summary_of` for the experiments that README shows; all of them where none has targets.

    Ablations, which are compared with their step elsewhere, and experiments without targets are left out.
    """
    ablations = {step for pair in declared_pairs() for step in (pair.a, pair.b) if not re.match(r"step\d+_", step)}
    chosen = summary[summary["target_accuracy"].notna() & ~summary["step"].isin(ablations)]
    return summary if chosen.empty else chosen


def picture(rows: pd.DataFrame) -> str:
    """Return the picture of the experiments of `headline` as SVG; its description lists the points that are drawn."""
    drawn = headline(summary_of(rows))
    points = "; ".join(
        f"{row['step']}: {row['num_params']:,} parameters, {percent(row['last'])} %, seeds: {row['seeds']}"
        for row in drawn.to_dict("records")
    )
    svg = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "mnist_lab"}):  # else each drawing has ids of its own
        plot_steps(drawn).savefig(svg, format="svg", metadata={"Date": None, "Description": points})
    return svg.getvalue()


def with_tables(page: str, made: Mapping[str, str]) -> str:
    """Put the tables between a page's markers, `<!-- results -->` to `<!-- /results -->` and so on."""
    place = re.compile(rf"(<!-- ({'|'.join(made)}) -->\n).*?(<!-- /\2 -->)", re.DOTALL)
    page, found = place.subn(lambda marks: f"{marks[1]}\n{made[marks[2]]}\n\n{marks[3]}", page)
    if not found:
        raise LabError(f"the page has no markers for a table: {', '.join(f'<!-- {name} -->' for name in made)}")
    return page


def verdict(row: Mapping[Any, Any], *, short: bool = False) -> str:
    """Return the verdict on each stated target, and how many seeds it needs; if short, those unmet, or "all met"."""
    words = {name: f"{name} {row[f'verdict_{name}']}" for name in TARGETS if row[f"verdict_{name}"] != "-"}
    if short:
        unmet = [word for word in words.values() if not word.endswith(" met")]
        return ", ".join(unmet) or ("all met" if words else "none stated")
    if pd.notna(row["seeds_needed"]):
        words["accuracy"] += f" (needs about {seeds_text(row['seeds_needed'])} seeds)"
    return ", ".join(words.values()) or "no target stated"


def markdown_cell(text: str) -> str:
    """Return text as Markdown that shows it in one cell of a table, without HTML."""
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
    "commit": lambda row: markdown_cell(row["git_commit"][:10]) + (" + changes" if row["git_dirty"] == "True" else ""),
    "median": median,
    "p_text": p_text,
    "ranges": files.ranges,
    "verdict": verdict,
}
