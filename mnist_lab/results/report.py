"""The report that is handed on: `steps.html`, one self-contained page, and `steps.md` with its figures beside it.

Each experiment is told by its script's docstring, its tracked runs and their figures. Accuracies are in percent.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import io
import logging
import platform
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mnist_lab import figures, results
from mnist_lab.data import load_mnist
from mnist_lab.errors import LabError
from mnist_lab.paths import PROJECT_ROOT
from mnist_lab.results.evidence import PUBLISHED, TEMPLATES
from mnist_lab.story import Story, read_story
from mnist_lab.tracking.disk import replace_files
from mnist_lab.verdicts.comparison import step_order

logger = logging.getLogger(__name__)

PICTURES = "steps_files"  # the folder beside steps.md
MAX_NAME = 150  # characters of a picture's file name; file systems take 255 bytes
PACKAGES = ("mlflow", "pandas", "numpy", "scipy", "matplotlib", "jinja2")
PLAIN = " =:/;,.()-+*!?@_~"  # what may stand unquoted in the data URI of an SVG


@dataclass(frozen=True)
class Picture:
    """A figure, drawn: the path of its PNG from steps.md, and what the page shows (a data URI, a size in pixels)."""

    path: str
    png: bytes
    source: str
    width: int
    height: int
    alt: str
    caption: str


@dataclass(frozen=True)
class Result:
    """One row of the comparison table, with the figures of its runs, and notes on what could not be drawn."""

    name: str  # the step, with its overrides where there are any
    row: dict[Any, Any]
    pictures: list[Picture]
    notes: list[str]

    @property
    def all_met(self) -> bool:
        words = {self.row[f"verdict_{target}"] for target in ("accuracy", "params", "epochs")}
        return "met" in words and words <= {"met", "-"}


@dataclass(frozen=True)
class Chapter:
    """What the report tells of one experiment.

    copied_from: the script whose Result stands in this one's docstring word for word; "" if none does.
    published: whether docs/results has figures of this script.
    """

    step: str
    story: Story | None
    result: Result | None
    copied_from: str
    published: bool

    @property
    def sections(self) -> list[tuple[str, str]]:
        """The headings that are told, with their texts: what others measured is not this script's."""
        sections = self.story.sections if self.story else []
        return [one for one in sections if not self.copied_from or one[0] not in ("Result", "Analysis")]


def write_report(
    folder: Path, *, tracking_uri: str | None = None, scripts: Path = PROJECT_ROOT / "experiments"
) -> tuple[Path, Path]:
    """Write steps.html and steps.md into the folder and return their paths. Nothing is written before all is drawn.

    The runs that count are those of `newest_runs`, overridden ones only where an experiment has none as declared.

    Raises:
        LabError: if the store is missing or foreign or has no finished run, a script can't be read, or the folder
            can't be written to.
    """
    if not scripts.is_dir():
        raise LabError(f"scripts: {scripts} is not a folder")
    stories = {script.stem: read_story(script) for script in scripts.glob("[!_]*.py")}
    loaded = results.load_runs(tracking_uri)
    runs = results.newest_runs(results.run_table(columns="all", include_overrides="if_none", loaded=loaded))
    if runs.empty:
        raise LabError("no finished run to report on; train first, e.g. `make step1`")
    compared = results.compare_table(include_overrides="if_none", loaded=loaded)
    history = results.epoch_history(include_overrides="if_none", loaded=loaded)
    images = load_mnist().test_images[:, 0].numpy()  # (10000, 28, 28)

    drawn: dict[str, Result] = {}
    for row in compared.to_dict("records"):
        logger.info("Drawing %s", row["step"])
        mine = runs[runs["step"] == row["step"]]
        drawn[row["step"]] = draw(row, mine, history[history["run_id"].isin(mine["run_id"])], images, loaded.uri)
    logger.info("Drawing the overview, and writing the page")
    steps = sorted({*stories, *drawn}, key=step_order)
    published = {file.stem for file in PUBLISHED.glob("*.csv")}
    copied = find_copies(stories, published)
    return _write(
        folder,
        chapters=[
            Chapter(step, stories.get(step), drawn.get(step), copied.get(step, ""), step in published) for step in steps
        ],
        results=[drawn[step] for step in steps if step in drawn],
        overview=draw_overview(runs),
        runs=sorted(runs.to_dict("records"), key=lambda run: (step_order(run["step"]), run["seed"])),
        software=[f"Python {platform.python_version()}", *(f"{p} {importlib.metadata.version(p)}" for p in PACKAGES)],
        system=platform.platform(),
    )


def find_copies(stories: Mapping[str, Story], published: Container[str]) -> dict[str, str]:
    """Return which scripts have another's Result in their docstring, word for word, and whose.

    stories: by script. published: the scripts that have published figures; of scripts with one Result, the first of
    these wrote it, or the first in order. A Result without a figure says nothing of anybody.
    """
    authors: dict[str, str] = {}
    copies = {}
    for step in sorted(stories, key=lambda step: (step not in published, step_order(step))):
        result = " ".join(dict(stories[step].sections).get("Result", "").split())
        if any(letter.isdigit() for letter in result) and authors.setdefault(result, step) != step:
            copies[step] = authors[result]
    return copies


def draw(row: dict[Any, Any], runs: pd.DataFrame, epochs: pd.DataFrame, images: NDArray[np.uint8], uri: str) -> Result:
    """Draw one experiment: training curves over its seeds, confusion matrix and mistakes of the newest run."""
    name = f"{row['step']} [{row['overrides']}]" if row["overrides"] else row["step"]
    result = Result(name, row, pictures=[], notes=[])
    try:
        result.pictures.append(_draw_training(row, runs, epochs))
    except LabError as error:
        result.notes.append(f"No training curves: {error}.")
    try:
        result.pictures.extend(_draw_predictions(row, runs.iloc[0], images, uri))
    except LabError as error:
        result.notes.append(f"No confusion matrix and no mistakes: {error}.")
    return result


def _draw_training(row: dict[Any, Any], runs: pd.DataFrame, epochs: pd.DataFrame) -> Picture:
    target = row["target_accuracy"] if row["target_accuracy"] > 0 else None  # it is NaN where none was stated
    figure = figures.plot_training(epochs, target)
    mean = epochs.groupby("epoch")[["test_accuracy", "train_accuracy"]].mean()
    test, train = mean["test_accuracy"].iloc, mean["train_accuracy"].iloc
    seeds = "one seed" if len(runs) == 1 else f"{len(runs)} seeds"
    alt = (
        f"Two charts, loss and accuracy over {len(mean)} epochs, {seeds}. Test accuracy is {test[0]:.2f} % after the "
        f"first epoch and {test[-1]:.2f} % after the last; training accuracy ends at {train[-1]:.2f} %."
    )
    return _picture(figure, f"{row['step']}-training", alt, f"Loss and accuracy, {seeds}.")


def _draw_predictions(
    row: dict[Any, Any], run: pd.Series[Any], images: NDArray[np.uint8], uri: str
) -> tuple[Picture, Picture]:
    said = results.predictions(run["run_id"], tracking_uri=uri)
    if len(said) != len(images):
        raise LabError(f"run {run['run_id']} has predictions of {len(said):,} images, not of {len(images):,}")
    which = f"seed {run['seed']}, the newest run"
    wrong = said[said["truth"] != said["prediction"]].sort_values("confidence", ascending=False)
    alt = f"Confusion matrix: {len(said) - len(wrong):,} of {len(said):,} test images are read rightly."
    for (truth, read_as), count in Counter(zip(wrong["truth"], wrong["prediction"], strict=True)).most_common(1):
        alt += f" The most frequent mistake is {truth} read as {read_as}, {count} times."
    matrix = figures.plot_confusion(said["truth"], said["prediction"])
    confusion = _picture(matrix, f"{row['step']}-confusion", alt, f"Mistakes by digit, {which}.")
    alt = f"The most confident of {len(wrong)} mistakes, as images with truth, prediction and confidence."
    for truth, read_as, confidence in wrong[["truth", "prediction", "confidence"]].head(1).to_numpy():
        alt += f" The first is a {truth:.0f} read as {read_as:.0f} with {100 * confidence:.1f} %."
    gallery = figures.plot_mistakes(images, said["truth"], said["prediction"], said["confidence"])
    caption = f"The most confident mistakes, {which}."
    return confusion, _picture(gallery, f"{row['step']}-mistakes", alt, caption, vector=False)


def draw_overview(runs: pd.DataFrame) -> Picture:
    """Draw all experiments side by side."""
    means = runs.groupby("step")["final_test_accuracy"].mean().sort_values()
    params = runs.groupby("step")["num_params"].first()
    ends = [f"{step}, {means[step]:.2f} % with {params[step]:,} parameters" for step in means.index]
    alt = f"Test accuracy of the last epoch against parameters, {len(ends)} experiments. Highest: {ends[-1]}."
    alt += f" Lowest: {ends[0]}." if len(ends) > 1 else ""
    caption = (
        "Test accuracy of the last epoch against parameters (above) and one by one (below). Grey marks are figures "
        "that others published; they were not measured here."
    )
    return _picture(figures.plot_steps(runs), "all", alt, caption)


def _picture(figure: Figure, name: str, alt: str, caption: str, *, vector: bool = True) -> Picture:
    """Render a figure as PNG for steps.md, and for the page as SVG, or as that PNG where it is made of images."""
    png, svg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=160, metadata={"Software": None})
    source = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    if vector:
        figure.savefig(svg, format="svg", metadata={"Date": None})
        source = f"data:image/svg+xml,{quote(svg.getvalue(), safe=PLAIN)}"
    file = quote(name, safe=" =,")  # a step's name is free text to the store
    if len(file) > MAX_NAME:
        file = f"{file[:MAX_NAME]}-{hashlib.sha256(file.encode()).hexdigest()[:8]}"
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    return Picture(f"{PICTURES}/{file}.png", png.getvalue(), source, width, height, alt, caption)


def _write(folder: Path, **told: Any) -> tuple[Path, Path]:
    pages = {name: TEMPLATES.get_template(name).render(told).encode() for name in ("steps.html", "steps.md")}
    pictures = [told["overview"], *(picture for result in told["results"] for picture in result.pictures)]
    files = {picture.path: picture.png for picture in pictures} | pages
    try:
        replace_files({folder / path: content for path, content in files.items()})
    except OSError as error:
        raise LabError(f"the report can't be written to {folder}: {error.strerror}: {error.filename}") from error
    return folder / "steps.html", folder / "steps.md"
