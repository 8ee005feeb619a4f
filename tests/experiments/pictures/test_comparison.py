import itertools
import math
import sys

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from hintjax.experiments import pictures as viz
from hintjax.experiments.pictures.histories import _apart, draw_histories
from hintjax.experiments.pictures.maps import draw_maps
from hintjax.experiments.pictures.points import draw_points

ARMS = (
    *("backpropagation", "backpropagation, He init", "KD", "KD, He init"),
    *("attention transfer", "attention transfer, He init", "FitNets"),
    *("FitNets, He init", "FitNets, the hints of an untrained teacher"),
    # Between two dollars stands a formula, for those who forget to switch that off.
    r"FitNets in one stage, $\slow decay$, so slow_that it ends after the others",
)


def histories(arms=ARMS, seeds=3, spread=0.6):
    at = np.arange(0, 21)
    return {
        arm: [
            viz.History(
                at,
                0.1 + spread * number / len(arms) * (1 - np.exp(-at / 5)) + 0.002 * s,
                8.0 + s if arm.startswith("FitNets") else None,
            )
            for s in range(seeds)
        ]
        for number, arm in enumerate(arms)
    }


def accuracies(arms=ARMS):
    return {arm: [0.3 + 0.05 * i, 0.4, 0.5] for i, arm in enumerate(arms)}


def pictures(count=6, channels=1):
    shape = (count, 8, 8, channels)
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def maps(names, count=6):
    draw = np.random.default_rng(1).random
    sizes = itertools.cycle((4, 8, 16))
    return {
        name: draw((count, size, size))
        for name, size in zip(names, sizes, strict=False)
    }


# The panels of a comparison, each alone.


def curves(runs, *, xlabel="epoch", chance=None):
    figure = Figure(figsize=(10, 5.6), dpi=100)
    draw_histories(figure, (0.02, 0.02, 0.96, 0.96), runs, xlabel, chance)
    return figure


def accuracy_points(values, reference):
    figure = Figure(figsize=(10, 3), dpi=100)
    box = (0.02, 0.03, 0.96, 0.94)
    draw_points(figure, box, values, "test accuracy", reference)
    return figure


def attention_maps(images, values):
    figure = Figure(figsize=(12, 16), dpi=100)
    draw_maps(figure, (0.02, 0.02, 0.96, 0.96), images, values)
    return figure


def boxes(figure):
    """The place of every text that is shown, in pixels."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    hidden = set()  # the labels of ticks beyond the ends of an axis are not drawn
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            labels = zip(
                axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True
            )
            for at, label in labels:
                if not (axes.axison and low <= at <= high):
                    hidden.add(label)
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text()]
    return [
        (t.get_text(), t.get_window_extent(renderer)) for t in texts if t not in hidden
    ]


def assert_readable(figure):
    places = boxes(figure)
    width, height = FigureCanvasAgg(figure).get_width_height()
    for text, box in places:
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
        assert inside, f"{text!r} leaves the picture"
    for (text, box), (other, its) in itertools.combinations(places, 2):
        # Two lines of one pixel are shared by neighbors that merely touch.
        over = min(box.x1, its.x1) - max(box.x0, its.x0)
        high = min(box.y1, its.y1) - max(box.y0, its.y0)
        assert over <= 1 or high <= 1, f"{text!r} lies on {other!r}"


def lines_of(axes, style=None):
    return [line for line in axes.get_lines() if style in (None, line.get_linewidth())]


@pytest.mark.parametrize("spread", [0.6, 0.0], ids=["spread", "all at chance"])
def test_comparison_of_ten_long_names_is_readable_at_1600_by_900(spread):
    figure = viz.comparison(
        histories(spread=spread),
        pictures(8),
        maps(("teacher", *ARMS), 8),
        accuracies=accuracies(),
        reference=("teacher", 0.992),
        title="A title",
        chance=None,
    )
    assert FigureCanvasAgg(figure).get_width_height() == (1600, 900)
    assert_readable(figure)


@pytest.mark.parametrize("arms", [ARMS[:1], ARMS[1:5]], ids=len)
def test_comparison_of_few_arms_is_readable(arms):
    figure = viz.comparison(histories(arms), pictures(), maps(("teacher", *arms)))
    assert_readable(figure)


@pytest.mark.quick
def test_figures_do_not_touch_pyplot():
    before = "matplotlib.pyplot" in sys.modules
    figure = viz.comparison(histories(), pictures(2), maps(["teacher"], 2))
    assert isinstance(figure, Figure)
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_curves_draw_every_seed_their_mean_and_the_boundary():
    runs = histories(ARMS[6:8], seeds=3)
    figure = curves(runs, xlabel="step", chance=0.1)
    (axes,) = figure.axes
    thin, thick = lines_of(axes, 0.8), lines_of(axes, 2.2)
    assert len(thin) == 6 and len(thick) == 2
    expected = np.mean([run.accuracy for run in runs["FitNets"]], 0)
    np.testing.assert_allclose(thick[0].get_ydata(), expected, rtol=1e-12)
    dashed = [line for line in lines_of(axes, 1.0) if set(line.get_xdata()) == {9.0}]
    assert len(dashed) == 1
    dots = [line.get_xdata() for line in axes.get_lines() if line.get_marker() == "o"]
    np.testing.assert_array_equal(dots, [[9.0], [9.0]])
    texts = [text for text, _ in boxes(figure)]
    assert any("hint stage ends" in text for text in texts)
    assert {"FitNets", "FitNets, He init", "step", "chance"} <= set(texts)


def test_arms_that_change_stage_at_other_times_have_their_own_lines():
    early, late = (viz.History(range(9), np.linspace(0.1, 0.9, 9), at) for at in (2, 5))
    (axes,) = curves({"FSP": [early], "FitNets": [late]}).axes
    vertical = [set(line.get_xdata()) for line in lines_of(axes, 1.0)]
    assert {2.0} in vertical and {5.0} in vertical and {3.5} not in vertical


def test_curves_without_a_hint_stage_mark_no_boundary():
    figure = curves(histories(ARMS[:2]))
    assert not any("hint stage" in text for text, _ in boxes(figure))


@pytest.mark.parametrize("boundary", [0.0, 2.0, 10.0, 19.5, 20.0])
def test_the_boundary_is_readable_wherever_it_is(boundary):
    run = viz.History(range(21), np.linspace(0.1, 1.0, 21), boundary)
    assert_readable(curves({"FitNets": [run]}))


def test_the_mean_is_over_what_all_seeds_reached_and_skips_what_is_not_finite():
    short = viz.History([0, 2, 4], [0.0, 0.2, 0.4])
    long = viz.History([0, 1, 2, 3, 4, 5], [0.2, 0.3, math.nan, 0.5, 0.6, 0.9])
    (axes,) = curves({"KD": [short, long]}).axes
    (mean,) = lines_of(axes, 2.2)
    np.testing.assert_allclose(mean.get_xdata(), [0, 1, 2, 3, 4])
    np.testing.assert_allclose(mean.get_ydata(), [0.1, 0.2, 0.3, 0.4, 0.5])


def test_a_line_that_begins_after_the_boundary_is_joined_to_it():
    run = viz.History([3, 4, 5], [0.2, 0.4, 0.6], 2.0)
    (axes,) = curves({"FitNets": [run]}).axes
    (joined,) = [line for line in axes.get_lines() if line.get_linestyle() == ":"]
    np.testing.assert_allclose(joined.get_xydata(), [[2, 0.2], [3, 0.2]])


def test_an_arm_without_results_is_left_out():
    runs = histories(ARMS[:1]) | {"failed": [viz.History([1], [math.nan])], "none": []}
    texts = [text for text, _ in boxes(curves(runs))]
    assert ARMS[0] in texts and "failed" not in texts


def test_points_show_every_seed_the_mean_and_its_interval():
    figure = accuracy_points(
        {"KD": [0.90, 0.92, 0.94], "AT": [0.5]}, reference=("teacher", 0.99)
    )
    (axes,) = figure.axes
    lines = [list(np.round(line.get_xdata(), 3)) for line in axes.get_lines()]
    assert [0.90, 0.92, 0.94] in lines and [0.5] in lines
    assert [0.87, 0.97] in lines  # t(0.975, 2) * 0.02 / sqrt(3)
    texts = [text for text, _ in boxes(figure)]
    assert {"92.0 ± 2.0 %", "50.0 %", "teacher 99.0 %", "KD", "AT"} <= set(texts)


def test_maps_of_any_size_share_one_scale_and_are_enlarged_by_nearest():
    names = ["teacher", "student"]
    values = maps(names, 2) | {
        "flat": np.full((2, 4, 4), 7.0),
        "dead": np.zeros((2, 4, 4)),
    }
    figure = attention_maps(pictures(2), values)
    shown = [image for axes in figure.axes for image in axes.get_images()]
    assert len(shown) == 2 * 5
    gray, colored = shown[:2], shown[2:]
    np.testing.assert_allclose(gray[0].get_array(), pictures(2)[0, :, :, 0] / 255)
    assert {image.get_interpolation() for image in shown} == {"nearest"}
    assert {image.get_clim() for image in colored} == {(0, 3)}
    for image in colored[:6]:
        assert np.sqrt(np.mean(image.get_array() ** 2)) == pytest.approx(1)
    np.testing.assert_allclose(colored[4].get_array(), 1.0)
    np.testing.assert_array_equal(colored[6].get_array(), 0.0)
    # Side by side: the maps of one image stand at one height.
    rows = [image.get_extent()[2:] for image in shown]
    assert rows[0] == rows[2] == rows[4] and rows[1] == rows[3] != rows[0]


def test_many_networks_are_stacked_and_readable():
    figure = attention_maps(pictures(3), maps(("teacher", *ARMS), 3))
    shown = [image for axes in figure.axes for image in axes.get_images()]
    assert shown[0].get_extent()[:2] == shown[3].get_extent()[:2]
    assert_readable(figure)


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_images_of_any_kind_are_shown_between_0_and_1(channels, kind):
    images = pictures(1, channels).astype(kind)
    if kind == np.float32:
        images = images / 60.0 - 2.0  # standardized
    shown = attention_maps(images, maps(["teacher"], 1)).axes[0].get_images()[0]
    array = shown.get_array()
    assert array.shape == ((8, 8, 3) if channels == 3 else (8, 8))
    assert array.min() >= 0 and array.max() <= 1


@pytest.mark.quick
@pytest.mark.parametrize(
    "images, values, named",
    [
        (np.zeros((2, 8, 8)), {"t": np.zeros((2, 4, 4))}, r"\(2, 8, 8\)"),
        (np.zeros((0, 8, 8, 1)), {"t": np.zeros((0, 4, 4))}, r"\(0, 8, 8, 1\)"),
        (np.zeros((2, 8, 8, 1)), {}, "0 networks"),
        (np.zeros((2, 8, 8, 1)), {"t": np.zeros((3, 4, 4))}, r"\(3, 4, 4\) for 't'"),
        (np.zeros((2, 8, 8, 1)), {"t": np.zeros((2, 4, 4, 9))}, r"\(2, 4, 4, 9\)"),
    ],
)
def test_wrong_maps_are_named(unchecked, images, values, named):
    with pytest.raises(ValueError, match=named):
        viz.comparison(histories(), images, values)


@pytest.mark.quick
def test_a_history_of_two_lengths_is_refused():
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        curves({"KD": [viz.History([0, 1], [0.1, 0.2, 0.3])]})


@pytest.mark.quick
def test_labels_move_apart_as_little_as_possible():
    places = _apart([1.0, 5.0, 5.0, 5.0, 9.0], [1.0] * 5, 0.0, 10.0)
    np.testing.assert_allclose(places, [1, 4, 5, 6, 9])
    # Of unequal sizes, and held inside.
    places = _apart([0.0, 0.0, 10.0], [2.0, 4.0, 2.0], 0.0, 10.0)
    np.testing.assert_allclose(places, [1, 4, 9])
    assert _apart([], [], 0.0, 1.0).size == 0
    draw = np.random.default_rng(0)
    for count in range(1, 12):
        sizes = draw.uniform(0.1, 0.8, count)
        places = _apart(np.sort(draw.uniform(0, 10, count)), sizes, 0.0, 10.0)
        gaps = np.diff(places) - (sizes[1:] + sizes[:-1]) / 2
        assert (gaps > -1e-9).all() and places[0] >= sizes[0] / 2 - 1e-9
        assert places[-1] <= 10 - sizes[-1] / 2 + 1e-9
