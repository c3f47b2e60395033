"""The report that is handed on: `steps.html`, one self-contained page, and `steps.md` with its figures beside it.

Each experiment is told by its script's docstring, its tracked runs and their figures. Accuracies are in percent.
"""

from __future__ import annotations

import base64
import hashlib
import io
import logging
import platform
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from mnist_lab import figures, results
from mnist_lab.data import load_mnist
from mnist_lab.errors import LabError, counted
from mnist_lab.paths import PROJECT_ROOT, PUBLISHED, script_named
from mnist_lab.results.compare import stated_targets, summarise
from mnist_lab.results.publish import TEMPLATES
from mnist_lab.results.runs import TARGETS, LoadedRuns, by_step, full_names, predictions_of
from mnist_lab.story import Story, read_stories
from mnist_lab.tracking.store import replace_files
from mnist_lab.verdicts.comparison import step_order
from mnist_lab.verdicts.measures import percent

logger = logging.getLogger(__name__)

PICTURES = "steps_files"  # the folder beside steps.md
MAX_NAME = 150  # characters of a picture's file name; file systems take 255 bytes
PACKAGES = ("mlflow", "pandas", "numpy", "scipy", "matplotlib", "jinja2")
PIXELS_PER_INCH, COLOURS = 96, 64  # of pictures, which are shown in their own size


@dataclass(frozen=True)
class Picture:
    """A figure, drawn: the path of its PNG from steps.md, and its size on the page in pixels."""

    path: str
    png: bytes
    width: int
    height: int
    alt: str
    caption: str

    @property
    def source(self) -> str:
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


@dataclass
class Chapter:
    """What the report tells of one experiment.

    copied_from: the script whose Result stands in this one's docstring word for word; "" if none does.
    published: whether docs/results has figures of this script.
    """

    step: str
    story: Story | None
    trouble: str  # why its script has no story, where it can't be read
    copied_from: str
    published: bool
    row: dict[Any, Any] | None  # of the comparison; none without runs
    pictures: list[Picture] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # on what could not be drawn

    @property
    def name(self) -> str:
        return f"{self.step} [{self.row['overrides']}]" if self.row and self.row["overrides"] else self.step

    @property
    def all_met(self) -> bool:
        words = {self.row[f"verdict_{target}"] for target in TARGETS} if self.row else set()
        return "met" in words and words <= {"met", "-"}

    @property
    def sections(self) -> list[tuple[str, str]]:
        """The headings that are told, with their texts: what others measured is not this script's."""
        sections = self.story.sections if self.story else []
        return [one for one in sections if not self.copied_from or one[0] not in ("Result", "Analysis")]


def write_report(
    folder: Path,
    steps: Sequence[str] = (),
    *,
    tracking_uri: str | None = None,
    scripts: Path = PROJECT_ROOT / "experiments",
) -> tuple[Path, Path]:
    """Write steps.html and steps.md into the folder and return their paths. Nothing is written before all is drawn.

    The runs that count are those of `newest_runs`. Overridden ones are told where an experiment has none as declared,
    and are compared with others only if they were asked for. steps: only these, of which a short name will do.
    """
    stories, troubles = read_stories(scripts)
    for trouble in troubles.values():
        logger.warning("%s", trouble)
    loaded = results.load_runs(tracking_uri, artifacts=True)
    runs = results.newest_runs(results.run_table(columns="all", include_overrides="if_none", loaded=loaded))
    published = {file.stem for file in PUBLISHED.glob("*.csv")}
    copied = find_copies(stories, published)
    names = {*stories, *troubles, *runs["step"]}
    if steps:
        named = [next((name for name in (step, script_named(step)) if name in names), None) for step in steps]
        names = {name or full_names(step, loaded)[0] for name, step in zip(named, steps, strict=True)}
        runs = runs[runs["step"].isin(names)]
    if runs.empty:
        raise LabError("no finished run to report on; train first, e.g. `make step1`")
    history = results.epoch_history(include_overrides="if_none", loaded=loaded)
    summary = summarise(runs)
    rows = {row["step"]: row for row in summary.to_dict("records")}
    images = load_mnist().test_images[:, 0].numpy()  # (10000, 28, 28)
    chapters = [
        Chapter(one, stories.get(one), troubles.get(one, ""), copied.get(one, ""), one in published, rows.get(one))
        for one in sorted(names, key=step_order)
    ]
    drawn = [chapter for chapter in chapters if chapter.row]
    for number, chapter in enumerate(drawn, start=1):
        logger.info("Drawing %s (%d of %d)", chapter.step, number, len(drawn))
        draw(chapter, runs[runs["step"] == chapter.step], history, images, loaded)
    logger.info("Drawing the overview, and writing the page")
    compared = [chapter for chapter in drawn if steps or chapter.name == chapter.step]
    steps_drawn = {chapter.step for chapter in compared}
    overview = draw_overview(summary[summary["step"].isin(steps_drawn)]) if compared else None
    page = {
        **{"chapters": chapters, "results": compared, "overview": overview},
        "runs": by_step(runs).to_dict("records"),
        "software": [f"Python {platform.python_version()}", *(f"{one} {version(one)}" for one in PACKAGES)],
        "system": platform.platform(),
    }
    files = {folder / name: TEMPLATES.get_template(name).render(page).encode() for name in ("steps.html", "steps.md")}
    pictures = [overview, *(picture for chapter in drawn for picture in chapter.pictures)]
    replace_files({folder / picture.path: picture.png for picture in pictures if picture} | files)
    return folder / "steps.html", folder / "steps.md"


def find_copies(stories: Mapping[str, Story], published: Container[str]) -> dict[str, str]:
    """Return which scripts have another's Result in their docstring, word for word, and whose.

    Of scripts with one Result, the first that has published figures wrote it, or the first in order.
    """
    authors: dict[str, str] = {}
    copies = {}
    for step in sorted(stories, key=lambda step: (step not in published, step_order(step))):
        result = " ".join(dict(stories[step].sections).get("Result", "").split())
        if any(letter.isdigit() for letter in result) and authors.setdefault(result, step) != step:
            copies[step] = authors[result]
    return copies


def draw(
    chapter: Chapter, runs: pd.DataFrame, history: pd.DataFrame, images: NDArray[np.uint8], loaded: LoadedRuns
) -> None:
    try:
        chapter.pictures.append(_draw_training(runs, history[history["run_id"].isin(runs["run_id"])]))
    except LabError as error:
        chapter.notes.append(f"No training curves: {error}.")
    try:
        chapter.pictures.extend(_draw_predictions(runs.iloc[0], images, loaded))
    except LabError as error:
        chapter.notes.append(f"No confusion matrix and no mistakes: {error}.")


def _draw_training(runs: pd.DataFrame, epochs: pd.DataFrame) -> Picture:
    newest = runs.iloc[0]
    figure = figures.plot_training(epochs, stated_targets(newest).accuracy)
    mean = epochs.groupby("epoch")[["test_accuracy", "train_accuracy"]].mean()
    test, train = mean["test_accuracy"].iloc, mean["train_accuracy"].iloc
    seeds, length = counted(len(runs), "seed"), counted(len(mean), "epoch")
    alt = (
        f"Two charts, loss and accuracy over {length}, {seeds}. Test accuracy is {percent(test[0])} % after the first "
        f"epoch and {percent(test[-1])} % after the last; training accuracy ends at {percent(train[-1])} %."
    )
    return _picture(figure, f"{newest['step']}-training", alt, f"Loss and accuracy, {seeds}.")


def _draw_predictions(run: pd.Series[Any], images: NDArray[np.uint8], loaded: LoadedRuns) -> list[Picture]:
    read = predictions_of(loaded.found[run["run_id"]], loaded.uri)
    if len(read) != len(images):
        raise LabError(f"run {run['run_id']} has predictions of {len(read):,} images, not of {len(images):,}")
    which = f"seed {run['seed']}, the newest run"
    wrong = read[read["truth"] != read["prediction"]].sort_values("confidence", ascending=False)
    alt = f"Confusion matrix: {len(read) - len(wrong):,} of {len(read):,} test images are read rightly."
    for (truth, read_as), count in Counter(zip(wrong["truth"], wrong["prediction"], strict=True)).most_common(1):
        alt += f" The most frequent mistake is {truth} read as {read_as}, {count} times."
    matrix = figures.plot_confusion(read["truth"], read["prediction"])
    confusion = _picture(matrix, f"{run['step']}-confusion", alt, f"Mistakes by digit, {which}.")
    alt = f"The most confident of {len(wrong)} mistakes, as images with truth, prediction and confidence."
    for truth, read_as, confidence in wrong[["truth", "prediction", "confidence"]].head(1).to_numpy():
        alt += f" The first is a {truth:.0f} read as {read_as:.0f} with {100 * confidence:.1f} %."
    gallery = figures.plot_mistakes(images, read["truth"], read["prediction"], read["confidence"])
    caption = f"The most confident mistakes, {which}."
    return [confusion, _picture(gallery, f"{run['step']}-mistakes", alt, caption)]


def draw_overview(summary: pd.DataFrame) -> Picture:
    ordered = summary.sort_values("last", ascending=False, kind="stable")
    ends = [
        f"{step}, {percent(last)} % with {params:,} parameters"
        for step, last, params in ordered[["step", "last", "num_params"]].itertuples(index=False, name=None)
    ]
    alt = f"Test accuracy of the last epoch against parameters, {len(ends)} experiments. Highest: {ends[0]}."
    alt += f" Lowest: {ends[-1]}." if len(ends) > 1 else ""
    return _picture(figures.plot_steps(summary), "all", alt, "Test accuracy of the last epoch against parameters.")


def _picture(figure: Figure, name: str, alt: str, caption: str) -> Picture:
    drawn, png = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=PIXELS_PER_INCH)
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(COLOURS).save(png, format="png", optimize=True)
        width, height = image.size
    file = quote(name, safe=" =,")  # a step's name is free text to the store
    if len(file) > MAX_NAME:
        file = f"{file[:MAX_NAME]}-{hashlib.sha256(file.encode()).hexdigest()[:8]}"
    return Picture(f"{PICTURES}/{file}.png", png.getvalue(), width, height, alt, caption)
