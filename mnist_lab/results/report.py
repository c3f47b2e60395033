"""The report of `make report`: `steps.html`, one self-contained page, and `steps.md` with its figures beside it.

For each experiment it has its script's docstring, its tracked runs and their figures. Accuracies are in percent.
"""

from __future__ import annotations

import base64
import hashlib
import io
import logging
import platform
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from mnist_lab import figures, results
from mnist_lab.data import load_mnist
from mnist_lab.errors import LabError, counted
from mnist_lab.measures import percent
from mnist_lab.paths import EXPERIMENTS, PUBLISHED
from mnist_lab.results.compare import failures, named, stated_targets, summarise
from mnist_lab.results.publish import TEMPLATES, verdict
from mnist_lab.results.runs import LoadedRuns, full_names, predictions_of
from mnist_lab.story import Story, read_stories
from mnist_lab.tracking.store import replace_files
from mnist_lab.verdicts.comparison import step_order

logger = logging.getLogger(__name__)

MAX_NAME = 150  # characters of a picture's file name; file systems take 255 bytes
PACKAGES = ("mlflow", "pandas", "numpy", "scipy", "matplotlib", "jinja2")


def write_report(
    folder: Path, steps: Sequence[str] = (), *, tracking_uri: str | None = None, scripts: Path = EXPERIMENTS
) -> tuple[Path, Path]:
    """Write steps.html and steps.md into the folder and return their paths. Nothing is written before all is drawn.

    The runs that count are those of `newest_runs`. Overridden ones are reported if an experiment has none as declared,
    and compared with others only if they are among `steps`. steps: only these, by their names or short names.
    """
    stories = read_stories(scripts)
    for trouble in (story.trouble for story in stories.values() if story.trouble):
        logger.warning("%s", trouble)
    loaded = results.load_runs(tracking_uri, artifacts=True)
    runs = results.newest_runs(results.run_table(columns="all", include_overrides="if_none", loaded=loaded))
    published = {file.stem for file in PUBLISHED.glob("*.csv")}
    copied = find_copies(stories, published)
    names = {*stories, *runs["step"]}
    if steps:
        names = {*full_names(steps, loaded, names)}
        runs = runs[runs["step"].isin(names)]
    if runs.empty:
        raise LabError("no finished run to report on; train first, e.g. `make step1`")
    history = results.epoch_history(include_overrides="if_none", loaded=loaded)
    summary = summarise(runs)
    rows = {row["step"]: row for row in summary.to_dict("records")}
    images = load_mnist().test_images[:, 0].numpy()  # (10000, 28, 28)
    chapters = [
        _chapter(step, rows.get(step), stories.get(step), copied.get(step), step in published)
        for step in sorted(names, key=step_order)
    ]
    drawn = [chapter for chapter in chapters if chapter["row"]]
    for number, chapter in enumerate(drawn, start=1):
        logger.info("Drawing %s (%d of %d)", chapter["step"], number, len(drawn))
        chapter["notes"] += failures(summary[summary["step"] == chapter["step"]])
        draw(chapter, runs[runs["step"] == chapter["step"]], history, images, loaded)
    logger.info("Drawing the overview, and writing the page")
    compared = [chapter for chapter in drawn if steps or chapter["name"] == chapter["step"]]
    pictures = [picture for chapter in drawn for picture in chapter["pictures"]]
    if compared:
        pictures.append(draw_overview(summary[summary["step"].isin([chapter["step"] for chapter in compared])]))
    page = {
        **{"chapters": chapters, "results": compared, "overview": pictures[-1] if compared else None},
        "runs": runs.sort_index().to_dict("records"),
        "software": [f"Python {platform.python_version()}", *(f"{one} {version(one)}" for one in PACKAGES)],
        "system": platform.platform(),
    }
    files = {folder / name: TEMPLATES.get_template(name).render(page).encode() for name in ("steps.html", "steps.md")}
    replace_files({folder / picture["path"]: picture["png"] for picture in pictures} | files)
    return folder / "steps.html", folder / "steps.md"


def _chapter(step: str, row: Any, story: Story | None, copied_from: str | None, published: bool) -> dict[str, Any]:
    """Return what the page tells of an experiment, but for its pictures and the notes on what could not be drawn.

    row: of the comparison; None without runs. published: whether docs/results has figures of its script.
    copied_from: the script whose Result stands in this one's docstring word for word, if one does.
    """
    overridden = row and row["overrides"]
    # What others measured, or the script as declared, is not what these runs show.
    left_out = ("Result", "Analysis") if copied_from or overridden else ()
    return {
        **{"step": step, "row": row, "story": story, "copied_from": copied_from, "published": published},
        **{"pictures": [], "notes": [], "name": f"{step} [{overridden}]" if overridden else step},
        "all_met": row is not None and verdict(row, short=True) == "all met",
        "sections": [one for one in story.sections if one[0] not in left_out] if story else [],
    }


def find_copies(stories: Mapping[str, Story], published: Container[str]) -> dict[str, str]:
    """Return the scripts whose docstring has another script's Result, word for word, and which script's.

    Of scripts with one Result, the first that has published figures wrote it, or the first in order.
    """
    order = sorted(stories, key=lambda step: (step not in published, step_order(step)))
    told = {step: " ".join(dict(stories[step].sections).get("Result", "").split()) for step in order}
    authors = {told[step]: step for step in reversed(order) if any(map(str.isdigit, told[step]))}
    return {step: authors[told[step]] for step in order if authors.get(told[step], step) != step}


def draw(
    chapter: dict[str, Any], runs: pd.DataFrame, history: pd.DataFrame, images: NDArray[np.uint8], loaded: LoadedRuns
) -> None:
    try:
        chapter["pictures"].append(_draw_training(runs, history[history["run_id"].isin(runs["run_id"])]))
    except LabError as error:
        chapter["notes"].append(f"No training curves: {error}.")
    try:
        chapter["pictures"].extend(_draw_predictions(runs.iloc[0], images, loaded))
    except LabError as error:
        chapter["notes"].append(f"No confusion matrix and no mistakes: {error}.")


def _draw_training(runs: pd.DataFrame, epochs: pd.DataFrame) -> dict[str, Any]:
    newest = runs.iloc[0]
    figure = figures.plot_training(epochs, stated_targets(newest).accuracy)
    mean = epochs.groupby("epoch")[["test_accuracy", "train_accuracy"]].mean()
    first, last, seeds = mean.iloc[0], mean.iloc[-1], counted(len(runs), "seed")
    alt = (
        f"Two charts, loss and accuracy over {counted(len(mean), 'epoch')}, {seeds}. Test accuracy is "
        f"{percent(first['test_accuracy'])} % after the first epoch and {percent(last['test_accuracy'])} % after the "
        f"last; training accuracy ends at {percent(last['train_accuracy'])} %."
    )
    return _picture(figure, f"{newest['step']}-training", alt, f"Loss and accuracy, {seeds}.")


def _draw_predictions(run: pd.Series[Any], images: NDArray[np.uint8], loaded: LoadedRuns) -> Iterator[dict[str, Any]]:
    read = predictions_of(loaded.found[run["run_id"]], loaded.uri)
    if len(read) != len(images):
        raise LabError(f"run {run['run_id']} has predictions of {len(read):,} images, not of {len(images):,}")
    which = f"seed {run['seed']}, the newest run"
    wrong = read[read["truth"] != read["prediction"]].sort_values("confidence", ascending=False)
    alt = f"Confusion matrix: {len(read) - len(wrong):,} of {len(read):,} test images are read rightly."
    for (truth, read_as), count in Counter(zip(wrong["truth"], wrong["prediction"], strict=True)).most_common(1):
        alt += f" The most frequent mistake is {truth} read as {read_as}, {count} times."
    matrix = figures.plot_confusion(read["truth"], read["prediction"])
    yield _picture(matrix, f"{run['step']}-confusion", alt, f"Mistakes by digit, {which}.")
    alt = f"The most confident of {len(wrong)} mistakes, as images with truth, prediction and confidence."
    for truth, read_as, confidence in wrong.iloc[:1, :3].to_numpy():
        alt += f" The first is a {truth:.0f} read as {read_as:.0f} with {100 * confidence:.1f} %."
    gallery = figures.plot_mistakes(images, read["truth"], read["prediction"], read["confidence"], limit=24)
    yield _picture(gallery, f"{run['step']}-mistakes", alt, f"The most confident mistakes, {which}.")


def draw_overview(summary: pd.DataFrame) -> dict[str, Any]:
    best_first = summary.sort_values("last", ascending=False, kind="stable").to_dict("records")
    ends = [f"{named(row)}, {percent(row['last'])} % with {row['num_params']:,} parameters" for row in best_first]
    caption = "Test accuracy of the last epoch against parameters"
    alt = f"{caption}, {counted(len(ends), 'experiment')}. Highest: {ends[0]}. Lowest: {ends[-1]}."
    return _picture(figures.plot_steps(summary), "all", alt, f"{caption}.")


def _picture(figure: Figure, name: str, alt: str, caption: str) -> dict[str, Any]:
    """Return a figure as the page shows it: its PNG, whose path is seen from steps.md, and its size in pixels."""
    canvas: Any = FigureCanvasAgg(figure)
    figure.set_dpi(96)  # which it is shown with
    canvas.draw()  # `savefig` would lay it out twice
    image, png = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"), io.BytesIO()
    image.quantize(64).save(png, format="png", optimize=True)
    shown = {"alt": alt, "caption": caption, "width": image.width, "height": image.height}
    file = quote(name, safe=" =,")  # a step's name is free text to the store
    if len(file) > MAX_NAME:
        file = f"{file[:MAX_NAME]}-{hashlib.sha256(file.encode()).hexdigest()[:8]}"
    source = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    return {"path": f"steps_files/{file}.png", "png": png.getvalue(), "source": source, **shown}
