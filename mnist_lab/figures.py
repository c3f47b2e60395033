"""Figures for write-ups, drawn from DataFrames and arrays; each function returns a `matplotlib.figure.Figure`.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; markers and line styles differ too, for print in
grey. Accuracies are in percent. Bad input raises `LabError`. A notebook needs `%matplotlib inline`: pyplot is not used.
"""

import math
import textwrap
from collections.abc import Sequence
from itertools import cycle, pairwise, product
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox
from numpy.typing import ArrayLike, NDArray

from mnist_lab.errors import LabError
from mnist_lab.measures import HELD_OUT, MEASURES, TESTED
from mnist_lab.verdicts.comparison import step_order
from mnist_lab.verdicts.statistics import FEWEST_FOR_INTERVAL

BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#777777"
LOOKS = ((BLUE, "-", "o"), (ORANGE, "--", "s"), (GREEN, "-.", "^"), (PINK, ":", "D"), ("black", "-", "v"))
TARGET: dict[str, Any] = {"color": "black", "ls": (0, (1, 1.5)), "lw": 1.3, "zorder": 1}
SMALL, MEDIUM = 9, 11  # font sizes in points; elsewhere matplotlib's, which are 10 and 12
MEAN: dict[str, Any] = {"color": BLUE, "lw": 1.2, "capsize": 3, "zorder": 3}
MAX_NAME = 60  # characters of a name; it is free text to the store
# By importance: one that is too near to another before it is left out.
ACCURACY_TICKS = (99, 99.4, 100, 98, 95, 90, 50, 0, 99.6, 99.8, 99.2, 99.5, 80, 97)


def plot_samples(images: ArrayLike, labels: ArrayLike, limit: int = 40, columns: int = 10) -> Figure:
    """Draw the first `limit` images with their labels; images (N, 28, 28) uint8 or float, labels (N,)."""
    pictures = _array("images", images, None, None, None)
    digits = _array("labels", labels, len(pictures))
    return _gallery(pictures[: max(limit, 0)], [str(digit) for digit in digits[: max(limit, 0)]], columns, MEDIUM)


def plot_augmentation(before: ArrayLike, after: ArrayLike, limit: int = 10) -> Figure:
    """Draw the first `limit` images (N, 28, 28) above the same augmented: (N, 28, 28), or K draws (K, N, 28, 28)."""
    originals = _array("before", before, None, None, None)
    draws = np.asarray(after)
    draws = _array("after", draws[np.newaxis] if draws.ndim == 3 else draws, None, *originals.shape)
    rows = np.stack([originals, *draws])[:, :limit]  # (1 + K, columns, 28, 28)
    names = ["before", "after"] if len(draws) == 1 else ["before", *(f"draw {k}" for k in range(1, len(rows)))]
    columns = rows.shape[1]
    figure = _gallery(rows.reshape(-1, *rows.shape[2:]), [""] * (len(rows) * columns), columns, MEDIUM)
    (axes,) = figure.axes
    for name, first in zip(names, axes.images[::columns], strict=True):
        axes.text(-6, np.mean(first.get_extent()[2:]), name, ha="right", va="center", fontsize=MEDIUM)
    return figure


def plot_training(history: pd.DataFrame, target_accuracy: float | None = None) -> Figure:
    """Draw loss (left) and accuracy (right) over the epochs: of one step in training and on the test images.

    Several steps have a line each, on the test images. Of several seeds: a line, the mean, and a band to the extremes.

    history: one row per run and epoch with `run_id, step, seed, epoch`, and loss and accuracy, `train_` and `test_` or,
    with a hold-out, `validation_`; of several runs of one seed the first in the table counts.
    """
    measured = HELD_OUT if "validation_accuracy" in history and "test_accuracy" not in history else TESTED
    history = _first_runs(history, measured.curves)
    finite = history[[*measured.curves]].replace([math.inf, -math.inf], math.nan)
    history = history.assign(**finite)
    curves = {_name(step): (rows, str(measured.part)) for step, rows in history.groupby("step", sort=False)}
    title = next(iter(curves)) if len(curves) == 1 else ""
    if title:
        curves = {measured.part: (history, measured.part), "training": (history, "train")}
    figure = Figure(figsize=(9.5, 4.4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for axes, metric in ((loss, "loss"), (accuracy, "accuracy")):
        for (name, (rows, part)), look in zip(curves.items(), cycle(LOOKS), strict=False):
            _plot_over_seeds(axes, rows.pivot(index="epoch", columns="seed", values=f"{part}_{metric}"), name, look)
        axes.set_ylabel(f"{metric} ({MEASURES[f'{measured.part}_{metric}'].unit})")
        _finish_epochs(axes, history)
    if target_accuracy is not None:
        accuracy.axhline(target_accuracy, label=f"target {target_accuracy:g} %", **TARGET)
    _log_scale(loss.yaxis)
    _stretch(accuracy)
    if title:
        missing = {MEASURES[name].label: finite[name].isna().sum() for name in measured.curves}
        absent = ", ".join(f"{label} ({count:,} of {len(history):,})" for label, count in missing.items() if count)
        figure.suptitle(f"{title}\nnot recorded, or not finite: {absent}" if absent else title)
    handles, _ = accuracy.get_legend_handles_labels()
    return _finish(figure, 2 if len(curves) > 2 or len(handles) == 4 else 3, handles=handles)


plot_curves = plot_training  # the name that fits several steps


def _plot_over_seeds(axes: Axes, values: pd.DataFrame, name: str, look: tuple[str, str, str]) -> None:
    """Draw the mean of values (epochs, seeds), and a band from the smallest to the largest of several seeds."""
    color, line, marker = look
    seeds = values.shape[1]
    label = name if seeds == 1 else f"{name}, mean of {seeds} seeds"
    axes.plot(values.index, values.mean(axis=1), color=color, ls=line, marker=marker, ms=4, label=label)
    if seeds > 1:
        band: dict[str, Any] = {"color": color, "alpha": 0.25, "label": f"{name}, smallest to largest"}
        draw, lw = (axes.vlines, 9) if len(values) == 1 else (axes.fill_between, 0)  # one epoch has no width to fill
        draw(values.index, values.min(axis=1), values.max(axis=1), lw=lw, **band)


def plot_learning_rate(history: pd.DataFrame) -> Figure:
    """Draw the learning rates of a history with `run_id, step, seed, epoch, lr`; the same schedules share one line."""
    history = _first_runs(history, ["lr"])
    history = history[np.isfinite(history["lr"].astype("float64"))]
    if history.empty:
        raise LabError("history has no finite learning rate: there is nothing to draw")
    schedules: dict[tuple[tuple[int, float], ...], list[str]] = {}  # points -> names of steps
    for _, run in history.groupby(["step", "seed"], sort=False):
        points = tuple(run[["epoch", "lr"]].sort_values("epoch").itertuples(index=False, name=None))
        schedules.setdefault(points, []).append(_name(run["step"].iloc[0]))

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for (points, names), (color, line, marker) in zip(schedules.items(), cycle(LOOKS), strict=False):
        label = textwrap.fill(", ".join(dict.fromkeys(names)), 90)
        epochs, rates = zip(*points, strict=True)
        axes.plot(epochs, rates, drawstyle="steps-mid", color=color, ls=line, marker=marker, ms=4, label=label)
    axes.set_ylabel(MEASURES["lr"].label)
    _finish_epochs(axes, history)
    if history["lr"].min() > 0 and history["lr"].max() > 5 * history["lr"].min():
        _log_scale(axes.yaxis)
    else:
        axes.set_ylim(bottom=0)
    return _finish(figure)


def plot_steps(table: pd.DataFrame) -> Figure:
    """Draw accuracy against parameters, with the steps joined in their order by arrows: the project in one picture.

    table: one row per experiment, as of `results.compare_table`, with `step, num_params, seeds, last, low, high`. The
    bars are 95 % intervals of the mean, of four or more seeds. The targets that most rows state are drawn too.
    """
    _require(table, "table", ["step", "num_params", "seeds", "last", "low", "high"])
    names = _with_overrides(table)
    number = names.str.extract(r"^step(\d+)_\w+$", expand=False)  # none where it was overridden
    interval = table[["low", "high"]].mask(table["seeds"] < FEWEST_FOR_INTERVAL, table["last"], axis=0)
    table = _in_order(table.assign(name=number.fillna(names.map(_name)), **interval))
    is_step = number.notna()[table.index]
    arrows = [*pairwise(table[is_step][["num_params", "last"]].itertuples(index=False, name=None))]

    figure = Figure(figsize=(9, 6.6), layout="constrained")
    axes = figure.subplots()
    for of_steps, part in table.groupby(is_step, sort=False):
        bars = part[["low", "high"]].sub(part["last"], axis=0).abs().T
        marker, label = ("o", "steps, mean over seeds, 95 % interval") if of_steps else ("s", "other experiments")
        axes.errorbar(part["num_params"], part["last"], yerr=bars, fmt=marker, label=label, **MEAN)
    axes.margins(0.1)  # for the names beside the points
    for accuracy in _of_most(table, "target_accuracy"):
        axes.axhline(accuracy, label=f"target {accuracy:g} %", **TARGET)
    for params in _of_most(table, "target_params"):
        axes.axvline(params, label=f"target {params:,.0f} parameters", **TARGET | {"ls": "--"})
    axes.set(xlabel=MEASURES["num_params"].label, ylabel="test accuracy of the last epoch (%)")
    _log_scale(axes.xaxis)
    _stretch(axes)
    axes.grid(alpha=0.3)
    arrow = {"arrowstyle": "-|>", "color": BLUE, "lw": 1.2, "alpha": 0.55, "shrinkA": 5, "shrinkB": 5}
    for start, end in arrows:
        axes.annotate("", end, start, arrowprops=arrow, zorder=2)
    _finish(figure, 2)
    _label_points(figure, table, arrows)
    return figure


def _of_most(table: pd.DataFrame, column: str) -> list[float]:
    counts = table.get(column, pd.Series()).value_counts()
    return counts.index[2 * counts > len(table)].tolist()


def plot_confusion(truth: ArrayLike, prediction: ArrayLike) -> Figure:
    """Draw how often each true digit was read as which: truth (N,), prediction (N,). Only the errors are coloured."""
    true_digits = _array("truth", truth, None)
    predicted_digits = _array("prediction", prediction, len(true_digits))
    if not np.isin([true_digits, predicted_digits], range(10)).all():
        raise LabError("truth and prediction must hold whole numbers from 0 to 9")
    counts = np.bincount(10 * true_digits.astype(int) + predicted_digits.astype(int), minlength=100).reshape(10, 10)
    errors = np.ma.masked_array(counts, mask=np.eye(10, dtype=bool))
    most, right = max(int(errors.max()), 1), int(np.trace(counts))

    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(errors, cmap="Blues", vmin=0, vmax=most)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            color = GREY if row == column else "white" if count > 0.55 * most else "black"
            axes.text(column, row, f"{count}", ha="center", va="center", color=color, in_layout=False)
    axes.set(xlabel="predicted digit", ylabel="true digit", xticks=range(10), yticks=range(10))
    axes.set_title(f"{right:,} of {len(true_digits):,} right ({100 * right / len(true_digits):.2f} %)")
    figure.colorbar(image, label="errors (images)", ticks=MaxNLocator(integer=True))
    return figure


def plot_mistakes(
    images: ArrayLike, truth: ArrayLike, prediction: ArrayLike, confidence: ArrayLike, limit: int = 32, columns: int = 8
) -> Figure:
    """Draw the first `limit` misclassified images, the most confident mistakes first (ties keep their order).

    images (N, 28, 28); truth, prediction, confidence (N,): the prediction's probability, needed of mistakes only.
    """
    pictures = _array("images", images, None, None, None)
    true_digits = _array("truth", truth, len(pictures))
    predicted_digits = _array("prediction", prediction, len(pictures))
    sure = _array("confidence", confidence, len(pictures))
    wrong = np.flatnonzero(true_digits != predicted_digits)
    if not len(wrong):
        figure = Figure(figsize=(5, 1))
        figure.text(0.5, 0.5, f"no mistakes among {len(pictures):,} images", ha="center", va="center", fontsize=MEDIUM)
        return figure
    order = wrong[np.argsort(-sure[wrong], kind="stable")][: max(limit, 0)]
    titles = [f"{true_digits[i]} read as {predicted_digits[i]}\n{100 * sure[i]:.1f} %" for i in order]
    figure = _gallery(pictures[order], titles, columns, SMALL)
    figure.suptitle(f"{len(order)} of {len(wrong)} mistakes, the most confident first", fontsize=MEDIUM)
    return figure


def _first_runs(history: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    _require(history, "history", ["run_id", "step", "seed", "epoch", *columns])
    history = history.assign(step=_with_overrides(history))
    return _in_order(history[history["run_id"].isin(history.drop_duplicates(["step", "seed"])["run_id"])])


def _with_overrides(frame: pd.DataFrame) -> "pd.Series[str]":
    overrides = frame.get("overrides", pd.Series("", frame.index)).fillna("")
    return frame["step"] + (" [" + overrides + "]").where(overrides != "", "")


def _require(frame: pd.DataFrame, name: str, columns: list[str]) -> None:
    missing = [column for column in columns if column not in frame]
    if missing:
        raise LabError(f"{name} lacks {', '.join(missing)}: it needs the columns {', '.join(columns)}")
    if frame.empty:
        raise LabError(f"{name} has no rows: there is nothing to draw")


def _in_order(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.sort_values("step", key=lambda steps: steps.map(step_order), kind="stable")


def _name(name: object) -> str:
    """Return a step's name on one line that fits into a figure; a longer one has "…" in its middle."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(name)).split())
    if len(text) > MAX_NAME:
        text = f"{text[: MAX_NAME // 2]}…{text[-MAX_NAME // 2 :]}"
    return f" {text}" if text.startswith("_") else text  # matplotlib leaves such a label out of its legends


def _finish(figure: Figure, columns: int = 1, **legend: Any) -> Figure:
    """Add a legend below, and have all text drawn as it is: matplotlib reads mathematics between two dollar signs."""
    figure.legend(loc="outside lower center", ncols=columns, fontsize=SMALL, **legend)
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    return figure


def _label_points(figure: Figure, table: pd.DataFrame, arrows: Sequence[Any]) -> None:
    """Write the name of each row's point at the nearest free place, with a leader line."""
    figure.draw_without_rendering()  # what is free is known only once the layout is
    (axes,) = figure.axes
    unit, frame, to_pixels = figure.dpi / 72, axes.get_window_extent(), axes.transData.transform
    bars = [to_pixels([(x, low), (x, high)]) for x, low, high in table[["num_params", "low", "high"]].to_numpy(float)]
    taken = [Bbox(bar).padded(4 * unit) for bar in bars]
    taken += [line.get_window_extent().padded(2 * unit) for line in axes.lines if line.get_linestyle() != "None"]
    on_arrows = [place for start, end in map(to_pixels, arrows) for place in np.linspace(start, end, 40)]
    taken += [Bbox([place, place]).padded(2 * unit) for place in on_arrows]
    angles = [side + turn for turn in np.deg2rad([0, 15, -15, 30, -30, 45, -45, 60, -60]) for side in (0, math.pi)]
    from_the_top = table.sort_values("last", ascending=False, kind="stable")  # so that neighbours keep their order
    for name, x, y in from_the_top[["name", "num_params", "last"]].itertuples(index=False, name=None):
        width = 1 + 7 * len(name)
        for radius, angle in product(range(12, 200, 4), angles):
            right, up = radius * math.cos(angle), radius * math.sin(angle)
            if len(name) > 3:  # a word begins or ends where its leader does
                right += math.copysign(width / 2 - 4, right)
            middle = to_pixels((x, y)) + np.multiply((right, up), unit)
            box = Bbox([middle, middle]).padded(width * unit / 2, 5.5 * unit)
            if not box.count_overlaps(taken) and np.allclose(Bbox.union([frame, box]).size, frame.size):
                break
        taken.append(box)
        leader = {"arrowstyle": "-", "lw": 0.7, "color": BLUE, "shrinkA": 2, "shrinkB": 0}
        look: dict[str, Any] = {"color": BLUE, "fontsize": MEDIUM, "ha": "center", "va": "center", "in_layout": False}
        axes.annotate(name, (x, y), (right, up), "data", "offset points", leader, parse_math=False, **look)


def _gallery(images: NDArray[Any], titles: Sequence[str], columns: int, title_size: float) -> Figure:
    """Draw images (N, 28, 28) under their titles, in one axes: an axes for each image takes a second to lay out."""
    if (columns := min(columns, len(images))) < 1:
        raise LabError("limit and columns must be 1 or more: there is nothing to draw")
    height = 1.15 + 0.2 * titles[0].count("\n")  # inches of a row
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(max(5, 1.1 * columns), height * rows + 0.3), layout="constrained")
    axes = figure.subplots()
    across, down = 32, 32 * height / 1.1  # pixels of an image's place
    for number, (image, title) in enumerate(zip(images, titles, strict=True)):
        x, y = across * (number % columns), down * (number // columns)
        axes.imshow(image, cmap="gray_r", vmin=images.min(), vmax=images.max(), extent=(x, x + 28, y + 28, y))
        axes.add_patch(Rectangle((x, y), 28, 28, fill=False, lw=0.8))
        axes.text(
            x + 14, y - 1, title, fontsize=title_size, ha="center", va="bottom", linespacing=1.05, in_layout=False
        )
    axes.set(xlim=(-2, across * columns - 2), ylim=(down * rows - down + 30, 28 - down))
    axes.set_axis_off()
    return figure


def _finish_epochs(axes: Axes, history: pd.DataFrame) -> None:
    axes.set(xlabel="epoch", xlim=(history["epoch"].min() - 0.5, history["epoch"].max() + 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)


def _log_scale(axis: Axis) -> None:
    if not math.isfinite(axis.get_minpos()):
        return
    axes = axis.axes
    (axes.set_yscale if axis is axes.yaxis else axes.set_xscale)("log")
    axes.autoscale_view()
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 4 * low else MaxNLocator(5))
    axis.set_major_formatter(lambda value, _: f"{value:,.7g}")
    axis.set_minor_locator(NullLocator())


def _stretch(axes: Axes) -> None:
    """Stretch an axis of accuracies that spans more than half a point towards 100 %, by the asinh of the error."""
    low, high = axes.get_ylim()
    if high - low <= 0.5:
        return

    def scale(accuracy: ArrayLike) -> NDArray[np.float64]:
        return -np.arcsinh((100 - np.asarray(accuracy)) / 0.2)

    axes.set_yscale("function", functions=(scale, lambda place: 100 + 0.2 * np.sinh(place)))
    axes.autoscale_view()
    low, high = axes.get_ylim()
    apart = 0.05 * (scale(high) - scale(low))
    ticks: list[float] = []
    for tick in (*ACCURACY_TICKS, *MaxNLocator(5).tick_values(low, high)):
        if max(low, 0) <= tick <= high and all(abs(scale(tick) - scale(other)) > apart for other in ticks):
            ticks.append(tick)
    axes.set_yticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axes.set_ylabel(f"{axes.get_ylabel()}, stretched towards 100")


def _array(name: str, values: ArrayLike, *shape: int | None) -> NDArray[Any]:
    """Return values as an array of this shape, where None is any length; raises LabError."""
    array = np.asarray(values)
    fits = array.ndim == len(shape) and all(wanted in (None, n) for wanted, n in zip(shape, array.shape, strict=True))
    if not fits or not array.size:
        wanted = ", ".join("N" if length is None else str(length) for length in shape)
        raise LabError(f"{name} has the shape {array.shape}: it must be ({wanted}), and not empty")
    return array
