"""Tests of mnist_lab.figures: what is drawn is read back from the figure and computed anew here."""

import io
import math
from collections.abc import Callable
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from mnist_lab import figures
from mnist_lab.errors import LabError
from mnist_lab.results.publish import PUBLISHED, headline, summary_of
from mnist_lab.results.records import read_runs

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (60, 28, 28), dtype=np.uint8)
LABELS = np.arange(60) % 10
LONG = "step4_augment_steplr_rotation_15_degrees_nesterov"
STEPS = [
    ("step1_baseline", 10_970, 99.29),
    ("step2_dropout", 6_864, 99.28),
    ("step3_gap", 8_008, 99.37),
    ("step3_gap_no_dropout", 8_008, 99.35),
    ("step4_augment_only", 7_852, 99.42),
    ("step4_augment_steplr", 7_852, 99.46),
    ("step4_steplr_only", 7_852, 99.40),
    ("four_conv", 593_200, 99.24),
    ("under_20k", 14_320, 99.43),
]
ODD_STEPS = [(LONG, 7_852, 99.46), ("linear", 7_850, 30.0)]


def make_history(step: str = "step3_gap", seeds: int = 3, epochs: int = 14, lr: float = 0.01) -> pd.DataFrame:
    rows = []
    for seed in range(seeds):
        for epoch in range(1, epochs + 1):
            test = 0.6 + 2 / epoch + RNG.uniform(0, 0.1)
            train = 0.5 + 7 / epoch + RNG.uniform(0, 0.1)
            rows.append((f"{step} {seed}", step, seed, epoch, train / 30, 100 - train, test / 30, 100 - test, lr, 1.0))
    metrics = ["train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr", "epoch_seconds"]
    return pd.DataFrame(rows, columns=["run_id", "step", "seed", "epoch", *metrics])


def make_table(*steps: tuple[str, int, float], seeds: int = 10) -> pd.DataFrame:
    rows = [(step, num_params, seeds, mean, mean - 0.03, mean + 0.03) for step, num_params, mean in steps]
    return pd.DataFrame(rows, columns=["step", "num_params", "seeds", "last", "low", "high"])


def curves(axes: Axes) -> dict[str, NDArray[np.float64]]:
    return {str(line.get_label()): np.asarray(line.get_ydata(), dtype=float) for line in axes.lines}


def bars(axes: Axes) -> list[tuple[float, float, float, float]]:
    """Return (x, y, low, high) of each vertical error bar."""
    found = []
    for container in axes.containers:
        assert isinstance(container, ErrorbarContainer)
        points, _, (collection,) = container.lines
        assert points is not None
        for (x, y), segment in zip(np.asarray(points.get_xydata()), collection.get_segments(), strict=True):
            found.append((float(x), float(y), float(segment[0, 1]), float(segment[1, 1])))
    return found


def legend_texts(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def titles(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def drawn_texts(figure: Figure, monkeypatch: pytest.MonkeyPatch) -> list[Text]:
    """Render with Agg and return every text that reached the canvas."""
    drawn: dict[int, Text] = {}
    draw = Text.draw

    def record(self: Text, renderer: Any, *args: Any, **kwargs: Any) -> None:
        if self.get_visible() and self.get_text().strip():
            drawn[id(self)] = self
        draw(self, renderer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Text, "draw", record)
        figure.savefig(io.BytesIO(), dpi=figure.dpi)
    return list(drawn.values())


DRAWINGS: dict[str, Callable[[], Figure]] = {
    "samples": lambda: figures.plot_samples(IMAGES, LABELS, limit=13),
    "augmentation": lambda: figures.plot_augmentation(IMAGES[:12], np.stack([IMAGES[:12]] * 3)),
    "training": lambda: figures.plot_training(make_history(LONG, 10, 20)),
    "training, one epoch": lambda: figures.plot_training(make_history(seeds=2, epochs=1)),
    "learning rate": lambda: figures.plot_learning_rate(
        pd.concat([make_history(LONG + str(i), 2, 14, lr) for i, lr in enumerate((0.1, 0.1, 0.1, 0.01, 0.0001))])
    ),
    "steps, one run": lambda: figures.plot_steps(make_table(STEPS[5], seeds=1)),
    "steps, long names and a bad one": lambda: figures.plot_steps(make_table(*STEPS, *ODD_STEPS)),
    "README's picture": lambda: figures.plot_steps(headline(summary_of(read_runs(PUBLISHED)))),
    "confusion": lambda: figures.plot_confusion(np.repeat(np.arange(10), 1000), RNG.integers(0, 10, 10_000)),
    "mistakes": lambda: figures.plot_mistakes(IMAGES, LABELS, (LABELS + 1) % 10, np.linspace(0.3, 1, 60), 20),
    "no mistakes": lambda: figures.plot_mistakes(IMAGES, LABELS, LABELS, np.linspace(0.3, 1, 60)),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_texts_neither_overlap_nor_leave_the_figure_nor_are_tiny(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = DRAWINGS[name]()
    texts = drawn_texts(figure, monkeypatch)
    assert texts
    extents = [(text.get_text(), Text.get_window_extent(text)) for text in texts]
    for (one, box), (other, other_box) in combinations(extents, 2):
        assert not box.padded(-0.5).overlaps(other_box.padded(-0.5)), f"{one!r} overlaps {other!r}"
    for text, box in extents:
        assert Bbox.union([figure.bbox.padded(1), box]).size == pytest.approx(figure.bbox.padded(1).size), text
    assert min(float(text.get_fontsize()) for text in texts) >= 9


def test_samples_and_augmented_images_stand_in_rows_on_one_grey_scale() -> None:
    figure = figures.plot_samples(IMAGES, LABELS, limit=13, columns=5)
    assert titles(figure) == [str(label) for label in LABELS[:13]]
    (axes,) = figure.axes
    for shown, image in zip(axes.images, IMAGES, strict=False):
        np.testing.assert_array_equal(shown.get_array(), image)
    assert len({image.get_extent()[2] for image in axes.images}) == 3  # rows of five
    assert {image.get_clim() for image in axes.images} == {(0, 255)}

    draws = np.stack([IMAGES[:6] // 2, IMAGES[:6] // 3])
    (axes,) = figures.plot_augmentation(IMAGES[:6], draws, limit=4).axes
    drawn = np.array([image.get_array() for image in axes.images]).reshape(3, 4, 28, 28)
    np.testing.assert_array_equal(drawn, [IMAGES[:4], draws[0, :4], draws[1, :4]])
    assert [text.get_text() for text in axes.texts if text.get_text()] == ["before", "draw 1", "draw 2"]
    assert {image.get_clim() for image in axes.images} == {(0, 255)}
    assert titles(figures.plot_augmentation(IMAGES[:6], draws[0]))[-2:] == ["before", "after"]


def test_training_draws_mean_and_range_over_seeds() -> None:
    history = make_history(seeds=3).sample(frac=1, random_state=1)  # in any order
    figure = figures.plot_training(history, target_accuracy=99.4)
    for axes, metric in zip(figure.axes, ("loss", "accuracy"), strict=True):
        for kind, name, band in (("test", "test", 0), ("train", "training", 1)):
            table = history.pivot(index="epoch", columns="seed", values=f"{kind}_{metric}").to_numpy()  # (14, 3)
            np.testing.assert_allclose(curves(axes)[f"{name}, mean of 3 seeds"], table.mean(axis=1))
            vertices = axes.collections[band].get_paths()[0].vertices
            for epoch, row in enumerate(table, start=1):
                edge = np.unique(vertices[vertices[:, 0] == epoch, 1])  # type: ignore[index]
                np.testing.assert_allclose(edge[[0, -1]], [row.min(), row.max()])
    assert curves(figure.axes[1])["target 99.4 %"].tolist() == [99.4, 99.4]
    assert {"test, smallest to largest", "training, smallest to largest"} < set(legend_texts(figure))


def test_curves_of_one_seed_have_no_band_and_those_of_several_steps_are_told_apart_in_grey() -> None:
    one = figures.plot_training(make_history(seeds=1).assign(overrides="epochs=1"), target_accuracy=None)
    assert one.get_suptitle() == "step3_gap [epochs=1]"
    history = pd.concat([make_history(seeds=2), make_history(seeds=1).assign(step="other", run_id="other")])
    several = figures.plot_training(history, target_accuracy=None)
    for axes, other, metric in zip(one.axes, several.axes, ("loss", "accuracy"), strict=True):
        assert set(curves(axes)) == {"test", "training"}
        assert not axes.collections
        mean = history[history["step"] == "step3_gap"].groupby("epoch")[f"test_{metric}"].mean()
        np.testing.assert_allclose(curves(other)["step3_gap, mean of 2 seeds"], mean)
        assert len(curves(other)["other"]) == 14
        for drawn in (axes, other):
            assert len({line.get_linestyle() for line in drawn.lines}) == 2


def test_values_that_are_not_finite_are_announced() -> None:
    history = make_history(seeds=2)
    history.loc[history["seed"] == 0, "train_loss"] = [math.nan] * 7 + [math.inf] * 7
    figure = figures.plot_training(history)
    assert figure.get_suptitle() == "step3_gap\nnot recorded, or not finite: train loss (14 of 28)"
    expected = history.loc[history["seed"] == 1, "train_loss"]
    np.testing.assert_allclose(curves(figure.axes[0])["training, mean of 2 seeds"], expected)
    figures.plot_training(history.assign(train_loss=math.nan, test_loss=math.nan)).draw_without_rendering()


def test_learning_rate_has_one_line_a_schedule_and_none_where_it_is_no_number() -> None:
    steplr = make_history("step4", 2, 14)
    steplr["lr"] = 0.1 * 0.6 ** ((steplr["epoch"] - 1) // 2)
    odd = [make_history("a", 1, 2, math.nan), make_history("b", 1, 2, math.inf)]
    figure = figures.plot_learning_rate(pd.concat([steplr, make_history("step2"), *odd, make_history("step1")]))
    (axes,) = figure.axes
    assert list(curves(axes)) == ["step1, step2", "step4"]  # in the order of their names, whatever that of the rows
    np.testing.assert_allclose(curves(axes)["step4"], [0.1 * 0.6**k for k in range(7) for _ in range(2)])
    np.testing.assert_allclose(curves(axes)["step1, step2"], [0.01] * 14)
    assert axes.get_yscale() == "log"
    assert len({line.get_linestyle() for line in axes.lines}) == 2
    assert figures.plot_learning_rate(make_history()).axes[0].get_yscale() == "linear"


def test_steps_are_numbered_beside_their_points_with_intervals_of_four_seeds_or_more_and_joined_in_order() -> None:
    table = make_table(*reversed(STEPS)).assign(overrides="")
    table.loc[0, ["seeds", "overrides"]] = [3, "lr=1"]  # under_20k
    figure = figures.plot_steps(table.assign(target_accuracy=99.4, target_params=[1e4, *[math.nan] * 8]))
    figure.savefig(io.BytesIO(), dpi=figure.dpi)
    (axes,) = figure.axes
    drawn = {(x, y): (low, high) for x, y, low, high in bars(axes)}
    assert drawn == {(n, mean): pytest.approx((mean - 0.03, mean + 0.03)) for _, n, mean in STEPS[:-1]} | {
        (14_320, 99.43): (99.43, 99.43)
    }
    assert [text for text in legend_texts(figure) if text.startswith("target")] == ["target 99.4 %"]
    annotations = [text for text in axes.texts if isinstance(text, Annotation)]
    steps = [(params, mean) for step, params, mean in STEPS if step.startswith("step")]
    arrows = [(text.xyann, text.xy) for text in annotations if not text.get_text()]
    assert arrows == list(pairwise(steps))

    changed = figures.plot_steps(table.assign(overrides="lr=2"))  # these are other experiments than the steps
    assert "steps, mean over seeds, 95 % interval" not in legend_texts(changed)
    names = {text.xy: text for text in annotations if text.get_text()}
    assert {text.get_text() for text in names.values()} == {"1", "2", "3", "4", "four_conv", "under_20k [lr=1]"}
    markers = [axes.transData.transform((params, mean)) for _, params, mean in STEPS]
    for point, name in names.items():
        box = Text.get_window_extent(name)
        assert not any(box.contains(*marker) for marker in markers)
        away = box.get_points().mean(axis=0) - axes.transData.transform(point)
        assert np.linalg.norm(away) * 72 / figure.dpi < 70  # points


def test_confusion_counts_and_colours_errors_only() -> None:
    truth = np.array([0] * 990 + [4] * 1000 + [9] * 8)
    prediction = np.array([0] * 990 + [4] * 997 + [9] * 3 + [9] * 7 + [4])
    figure = figures.plot_confusion(truth, prediction)
    axes = figure.axes[0]
    cells = {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in axes.texts}
    assert cells == {(0, 0): "990", (4, 4): "997", (4, 9): "3", (9, 9): "7", (9, 4): "1"}  # (truth, prediction)
    image = axes.images[0]
    assert image.get_clim() == (0, 3)
    shades = image.get_array()
    assert isinstance(shades, np.ma.MaskedArray)
    assert (int(shades[4, 9]), int(shades[9, 4]), int(shades.sum())) == (3, 1, 4)  # without the diagonal
    assert axes.get_title() == "1,994 of 1,998 right (99.80 %)"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted digit", "true digit")


def test_mistakes_are_the_wrong_ones_most_confident_first() -> None:
    truth = np.array([1, 2, 3, 4, 5, 6])
    prediction = np.array([1, 7, 3, 9, 8, 0])
    confidence = np.array([1.0, 0.6, 0.99, 0.95, 0.6, 0.7])
    figure = figures.plot_mistakes(IMAGES[:6], truth, prediction, confidence, limit=3)
    assert titles(figure) == ["4 read as 9\n95.0 %", "6 read as 0\n70.0 %", "2 read as 7\n60.0 %"]
    for shown, i in zip(figure.axes[0].images, (3, 5, 1), strict=True):
        np.testing.assert_array_equal(shown.get_array(), IMAGES[i])
    assert figure.get_suptitle() == "3 of 4 mistakes, the most confident first"


HISTORY, SEEDLESS = make_history(), make_table(*STEPS).drop(columns="seeds")
ERRORS: dict[str, Callable[[], Figure]] = {
    r"labels .*\(3,\)": lambda: figures.plot_samples(IMAGES, LABELS[:3]),
    "limit and columns must be 1": lambda: figures.plot_samples(IMAGES, LABELS, limit=-1),
    r"after .*59, 28, 28\)": lambda: figures.plot_augmentation(IMAGES, IMAGES[1:]),
    "history has no rows": lambda: figures.plot_training(HISTORY.iloc[:0]),
    "history lacks epoch, train_loss": lambda: figures.plot_training(HISTORY.drop(columns=["epoch", "train_loss"])),
    "no finite learning rate": lambda: figures.plot_learning_rate(HISTORY.assign(lr=math.nan)),
    "table lacks seeds: .* step, num_params, seeds, last, low": lambda: figures.plot_steps(SEEDLESS),
    "prediction .* 0 to 9": lambda: figures.plot_confusion(LABELS, LABELS - 1),
}


def test_bad_input_is_named() -> None:
    for named, plot in ERRORS.items():
        with pytest.raises(LabError, match=named):
            plot()


HOSTILE = ["a$\\frac{$", "_hidden", "two\nlines\tand\x00more", "m" * 5_000]


def test_names_are_free_text_and_drawn_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    history = pd.concat([make_history(name, 1, 3, 0.01 * rate) for rate, name in enumerate(HOSTILE, start=1)])
    table = make_table(*((name, 7_852, 99.4) for name in HOSTILE))
    for figure in (figures.plot_learning_rate(history), figures.plot_steps(table)):
        texts = drawn_texts(figure, monkeypatch)
        for shown in ("a$\\frac{$", "_hidden", "two lines and more", f"{'m' * 30}…{'m' * 30}"):
            assert any(shown in " ".join(text.get_text().split()) for text in texts), shown
        assert not any(text.get_parse_math() for text in texts)
        assert figure.get_figwidth() < 20
    assert figures.plot_training(make_history(HOSTILE[0])).get_suptitle() == HOSTILE[0]
