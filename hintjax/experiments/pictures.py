"""The picture of a comparison: curves, accuracies and attention maps, in one figure.

`heat_map` is the picture of the similarity of two networks, layer by layer. `curves`,
`sizes` and `attention` are the small pictures of a report. Each function returns a new
`matplotlib.figure.Figure` and touches no global state: no pyplot, no window.
`figure.savefig("name.png")` writes it; a notebook shows it.
"""

import colorsys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, SupportsFloat

import matplotlib.colors
import numpy as np
from jaxtyping import Array, Num
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.textpath import TextPath
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from hintjax._checks import Refusal, message
from hintjax.experiments.statistics import Numbers, summary

# Okabe and Ito's colors and Tol's, told apart with any color vision; the line style
# changes every five arms, so that no two arms differ by hue alone.
_COLORS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"),
    *("#332288", "#56B4E9", "#882255", "#999933", "#777777"),
)
_STYLES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))
_DPI = 100
_INK, _GRAY, _PALE = "#222222", "#777777", "#DDDDDD"
_SMALL, _TITLE = 9, 11  # font sizes, in points
_POINTS = "(dot: one seed, tick: mean, bar: its 95 % interval)"
_LARGEST = 180  # the side of an attention map, in pixels
_DOTTED = 12  # reports, up to which each is a dot on its curve
_BRIGHTEST = 3.0  # the end of the color scale, in root mean squares of a map

Side = float | int
Box = tuple[float, float, float, float]  # left, bottom, width, height of the figure


class History(NamedTuple):
    """The validation accuracy of one run (one arm, one seed).

    `at` holds the steps or epochs of the measurements, `accuracy` is between 0 and 1,
    and `boundary` is where the hint stage ended, None when there was none.
    """

    at: Numbers
    accuracy: Numbers
    boundary: SupportsFloat | None = None


Histories = Mapping[str, Sequence[History]]
Images = Num[Array | np.ndarray, "n h w c"]
Maps = Mapping[str, Num[Array | np.ndarray, "n _ _"]]


def comparison(
    histories: Histories,
    images: Images,
    maps: Maps,
    *,
    accuracies: Mapping[str, Numbers] | None = None,
    reference: tuple[str, SupportsFloat] | None = None,
    title: str = "",
    xlabel: str = "epoch",
    chance: float | None = None,
    metric: str = "accuracy",
    percent: bool = True,
) -> Figure:
    """The one picture of a comparison: curves, accuracies and attention maps.

    Args:
      histories: one `History` per seed, by the name of the arm.
      images: input images, uint8 or float of any scale, with 1 or 3 channels; six to
        eight images fill the picture.
      maps: non-negative attention maps of these images by the network's name, in the
        order to show. Sizes may differ; maps are enlarged by nearest neighbor. Each map
        is divided by its own root mean square (a flat map is 1 everywhere), and all
        maps share one color scale. Up to six networks are columns; more networks, or
        long names, are rows.
      accuracies: one accuracy (0 to 1) per seed, by the name of the arm; None leaves
        this panel out.
      reference: a name and an accuracy to compare with, such as ("teacher", 0.99).
      title: line above the panels.
      xlabel: unit of `History.at`.
      chance: accuracy of guessing, drawn as a dotted line.
      metric: name of the metric, if the values are not accuracies.
      percent: whether the values are between 0 and 1, and are shown in percent.

    Returns:
      A figure of 1600 x 900 pixels.
    """
    _check_maps("comparison", images, maps)
    figure = Figure(figsize=(16, 9), dpi=_DPI)
    top = 0.97
    if title:
        _write(figure, 0.015, 0.965, title, fontsize=15, va="center", weight="bold")
        top = 0.93
    left, right = (0.015, 0.535), (0.57, 0.415)
    split = 0.03
    if accuracies is not None:
        # Rows of 36 pixels while the curves keep half of the height.
        split = min(0.13 + 0.04 * len(accuracies), 0.5)
        box = (left[0], 0.02, left[1], split - 0.03)
        _draw_points(figure, box, accuracies, f"test {metric}", reference, percent)
    box = (left[0], split + 0.015, left[1], top - split - 0.015)
    _draw_curves(figure, box, histories, xlabel, chance, metric, percent)
    _draw_maps(figure, (right[0], 0.02, right[1], top - 0.02), images, maps)
    return figure


def heat_map(
    values: Num[np.ndarray, "rows columns"],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    marked: Sequence[tuple[int, int]] = (),
    title: str = "",
) -> Figure:
    """The similarity of each layer of the teacher with each layer of the student.

    Args:
      values: similarities; the color scale goes from 0 to 1.
      rows: names of the teacher's layers, the first at the bottom.
      columns: names of the student's layers.
      marked: (row, column) of the pairs to frame.
      title: line above the picture.

    Returns:
      A figure; its size follows the number of layers.
    """
    if np.shape(values) != (len(rows), len(columns)):
        wanted = f"values of {len(rows)} rows and {len(columns)} columns"
        raise Refusal(message("heat_map", wanted, f"shape {np.shape(values)}"))
    cell, names = 34, [[_short(name, 40) for name in some] for some in (rows, columns)]
    left, bottom = (_pixels_of(some) + 52 for some in names)
    inner = max(len(columns) * cell, 240), max(len(rows) * cell, 160)
    width, height = left + inner[0] + 90, bottom + inner[1] + 60
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
    box = (left / width, bottom / height, inner[0] / width, inner[1] / height)
    axes = figure.add_axes(box)
    shown = axes.imshow(
        values, cmap="magma", vmin=0, vmax=1, origin="lower", aspect="auto"
    )
    axes.set_yticks(range(len(rows)), names[0], parse_math=False)
    axes.set_xticks(range(len(columns)), names[1], parse_math=False, rotation=90)
    axes.tick_params(labelsize=_SMALL, color=_GRAY, labelcolor=_INK)
    axes.set_ylabel("teacher", fontsize=_SMALL, color=_INK)
    axes.set_xlabel("student", fontsize=_SMALL, color=_INK)
    for row, column in marked:
        edges = [column - 0.5, column + 0.5], [row - 0.5, row + 0.5]
        (x0, x1), (y0, y1) = edges
        axes.plot([x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0], color="#56B4E9", lw=2.5)
    _write(figure, 12 / width, 1 - 14 / height, title, fontsize=_TITLE, va="top")
    place = ((left + inner[0] + 14) / width, box[1], 12 / width, box[3])
    scale = figure.colorbar(shown, cax=figure.add_axes(place))
    scale.outline.set_visible(False)
    scale.ax.tick_params(labelsize=8, length=2, colors=_INK)
    return figure


Curve = tuple[Numbers, Numbers]  # steps, and the values at these steps


def curves(
    lines: Mapping[str, Curve],
    *,
    title: str,
    xlabel: str = "step",
    boundaries: Numbers = (),
    logarithmic: bool = False,
) -> Figure:
    """Curves over the steps of a run, in a small figure for a narrow page.

    Args:
      lines: steps and values by name. A curve is interrupted by nan.
      title: line above the curves.
      xlabel: unit of the steps.
      boundaries: steps at which a phase ended, drawn as dashed lines.
      logarithmic: whether the vertical axis is logarithmic, if all values are > 0.

    Returns:
      A figure of 440 pixels in width; its height follows the number of names.
    """
    figure, axes = _small(title, xlabel, -(-len(lines) // 2))
    lowest = np.inf
    for number, (name, (at, values)) in enumerate(lines.items()):
        values = np.asarray(values, float)
        kept = values[np.isfinite(values)]
        lowest = min(lowest, kept.min(initial=np.inf))
        style = {"color": _color(number), "linestyle": _style(number), "linewidth": 1.6}
        mark = "." if len(kept) <= _DOTTED else None
        # A label that begins with _ would be left out.
        axes.plot(np.asarray(at, float), values, marker=mark, label=f" {name}", **style)
    if logarithmic and 0 < lowest < np.inf:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(_general))
        axes.yaxis.set_minor_formatter(NullFormatter())
    for at in boundaries:
        axes.axvline(float(at), color=_GRAY, linewidth=1, linestyle=(0, (4, 3)))
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    _legend(figure, min(2, len(lines)))
    return figure


def sizes(
    points: Mapping[str, tuple[SupportsFloat, SupportsFloat]],
    *,
    metric: str,
    percent: bool = True,
) -> Figure:
    """A metric against the number of parameters, in a small figure.

    Args:
      points: number of parameters and metric, by the name of the network.
      metric: name of the metric.
      percent: whether the metric is between 0 and 1, and is shown in percent.

    Returns:
      A figure of 440 pixels in width; its height follows the number of names.
    """
    title = f"Test {metric} against parameters"
    figure, axes = _small(title, "parameters", len(points))
    marks = "osD^vP*X"
    for number, (name, (parameters, value)) in enumerate(points.items()):
        label = f" {name}: {_number(float(value), percent)}{' %' if percent else ''}"
        axes.plot(
            [float(parameters)],
            [float(value)],
            color=_color(number),
            marker=marks[number % len(marks)],
            linestyle="",
            markersize=7,
            label=label,
            alpha=0.85,
        )
    axes.set_xscale("log")
    axes.margins(0.12)
    if percent:
        axes.yaxis.set_major_formatter(FuncFormatter(_percent))
    _legend(figure, 1)
    return figure


class Tried(NamedTuple):
    """One candidate of a tuning.

    `value` is its setting, `metric` its last validated metric, and `whole` says whether
    it was trained to the end.
    """

    value: float
    metric: float
    whole: bool


def tried(
    points: Mapping[str, Sequence[Tried]],
    *,
    xlabel: str,
    metric: str,
    percent: bool = True,
) -> Figure:
    """The validated metric of candidates against one setting, in a small figure.

    Args:
      points: candidates by the name of the method. A filled mark was trained to the
        end, a hollow one was stopped before.
      xlabel: name of the setting. Its axis is logarithmic; a value of 0 is at its left
        end.
      metric: name of the metric.
      percent: whether the metric is between 0 and 1, and is shown in percent.

    Returns:
      A figure of 440 pixels in width; its height follows the number of names.
    """
    title = f"Validation {metric} (hollow: stopped early)"
    figure, axes = _small(title, xlabel, len(points))
    for number, (name, some) in enumerate(points.items()):
        color = _color(number)
        for whole in (False, True):
            chosen = [one for one in some if one.whole == whole]
            axes.plot(
                [one.value for one in chosen],
                [one.metric for one in chosen],
                color=color,
                marker="osD^vP*X"[number % 8],
                markerfacecolor=color if whole else "white",
                linestyle="",
                label=f" {name}" if whole else None,
            )
    values = [one.value for some in points.values() for one in some]
    least = min((value for value in values if value > 0), default=1.0)
    if min(values, default=1.0) > 0:
        axes.set_xscale("log")
    else:
        axes.set_xscale("symlog", linthresh=least)
    axes.margins(0.08)
    if percent:
        axes.yaxis.set_major_formatter(FuncFormatter(_percent))
    _legend(figure, 1)
    return figure


def _small(title: str, xlabel: str, rows: int) -> tuple[Figure, Axes]:
    """A small figure for a narrow page, with room for rows of a legend below."""
    below, width, height = 56 + 16 * rows, 440, 262 + 16 * rows
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
    box = (66 / width, below / height, 358 / width, (height - below - 34) / height)
    axes = _axes(figure, box)
    axes.grid(axis="y", color=_PALE, linewidth=0.7)
    axes.set_xlabel(xlabel, fontsize=_SMALL, color=_INK)
    _write(figure, 8 / width, 1 - 8 / height, title, fontsize=_SMALL + 1, va="top")
    return figure, axes


def _legend(figure: Figure, columns: int) -> None:
    """The names below a small figure; a dollar sign in them starts no formula."""
    width, height = _pixels(figure)
    place = {"loc": "lower left", "bbox_to_anchor": (4 / width, 2 / height)}
    shown = figure.legend(ncols=max(1, columns), fontsize=8, frameon=False, **place)
    for text in shown.get_texts():
        text.set_parse_math(False)


def _general(value: Side, position: int | None = None) -> str:
    return f"{value:.4g}"


def attention(
    images: Images,
    teacher: Num[Array | np.ndarray, "n _ _"],
    student: Num[Array | np.ndarray, "n _ _"],
) -> Figure:
    """Attention maps of teacher and student, and their difference.

    Each map is divided by its own root mean square (a flat map is 1 everywhere). The
    difference is the student's map minus the teacher's map: red where the student looks
    more, blue where it looks less. The smaller map is enlarged by nearest neighbor.

    Args:
      images: input images, uint8 or float of any scale, with 1 or 3 channels.
      teacher: non-negative attention maps of these images.
      student: likewise, of the student.

    Returns:
      A figure of 440 pixels in width, with one row for each image.
    """
    found = {"teacher": teacher, "student": student}
    _check_maps("attention", images, found)
    images = np.asarray(images)
    columns = ("input", "teacher", "student", "difference")
    width, cell, top, n = 440, 106, 28, len(images)
    height = top + cell * n + 6
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
    for row in range(n):
        ours, theirs = (
            _unit(np.asarray(found[x][row])) for x in ("student", "teacher")
        )
        difference = _enlarged(ours, theirs) - _enlarged(theirs, ours)
        magma = {"cmap": "magma", "vmin": 0, "vmax": _BRIGHTEST}
        signed = {"cmap": "RdBu_r", "vmin": -2, "vmax": 2}
        tiles = (
            (_picture(images[row]), {"cmap": "gray", "vmin": 0, "vmax": 1}),
            *((theirs, magma), (ours, magma), (difference, signed)),
        )
        for column, (tile, how) in enumerate(tiles):
            left, bottom = 8 + cell * column, height - top - cell * (row + 1)
            size = cell - 6
            box = (left / width, bottom / height, size / width, size / height)
            axes = figure.add_axes(box)
            axes.set_axis_off()
            axes.imshow(tile, interpolation="nearest", aspect="auto", **how)
    for column, name in enumerate(columns):
        x = (8 + cell * (column + 0.5) - 3) / width
        place = {"ha": "center", "va": "top", "fontsize": _SMALL}
        _write(figure, x, 1 - 7 / height, name, **place)
    return figure


def _enlarged(tile: np.ndarray, other: np.ndarray) -> np.ndarray:
    """A map at the size of another map, if that is larger, by nearest neighbor."""
    for axis in (0, 1):
        size, wanted = tile.shape[axis], max(tile.shape[axis], other.shape[axis])
        tile = np.take(tile, np.arange(wanted) * size // wanted, axis)
    return tile


def _draw_curves(
    figure: Figure,
    box: Box,
    histories: Histories,
    xlabel: str,
    chance: float | None,
    metric: str = "accuracy",
    percent: bool = True,
) -> None:
    names = {arm: _short(arm, 28) for arm in histories}
    right = _pixels_of(names.values()) + 34
    axes = _axes(figure, _inside(figure, box, 62, 52, right, 50))
    _heading(figure, box, f"Validation {metric} (thin: each seed, thick: their mean)")
    if chance is not None:
        axes.axhline(chance, color=_GRAY, linewidth=1, linestyle=":", zorder=1)
    ends = {}
    for number, (arm, runs) in enumerate(histories.items()):
        curves = [_finite(run) for run in runs]
        curves = [curve for curve in curves if len(curve.at)]
        if not curves:
            continue
        line = {"color": _color(number), "linestyle": _style(number)}
        for curve in curves:
            axes.plot(curve.at, curve.accuracy, **line, linewidth=0.8, alpha=0.35)
        at, mean = _mean(curves)
        axes.plot(at, mean, **line, linewidth=2.2, zorder=3)
        ends[arm] = (at[-1], mean[-1], number)
        own = [curve.boundary for curve in curves if curve.boundary is not None]
        if own:
            where = float(np.median(own))
            height = np.interp(where, at, mean)
            # Accuracy is often first measured after the hint stage, which trains none.
            joined = {"color": line["color"], "linestyle": ":", "zorder": 4}
            axes.plot([where, max(where, at[0])], [height] * 2, **joined)
            axes.plot(where, height, "o", color=line["color"], markersize=6, zorder=4)
    axes.margins(x=0.0, y=0.05)
    axes.set_xlabel(xlabel, fontsize=_SMALL, color=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    if percent:
        axes.yaxis.set_major_formatter(FuncFormatter(_percent))
    axes.grid(axis="y", color=_PALE, linewidth=0.7)
    boundaries = [
        [float(run.boundary) for run in runs if run.boundary is not None]
        for runs in histories.values()
    ]
    if any(boundaries):
        _mark_boundaries(axes, [own for own in boundaries if own])
    if chance is not None:
        offset = {"xytext": (4, 2), "textcoords": "offset points"}
        spot = axes.get_yaxis_transform()
        _note(axes, "chance", (0.0, chance), spot, ha="left", va="bottom", **offset)
    _label_ends(figure, axes, ends, names)


def _mark_boundaries(axes: Axes, boundaries: Sequence[list[float]]) -> None:
    """A line between the stages of each arm; a pale span where its runs disagree."""
    lines = sorted({float(np.median(own)) for own in boundaries})
    for own in boundaries:
        axes.axvspan(min(own), max(own), color=_PALE, alpha=0.6, linewidth=0)
    for at in lines:
        axes.axvline(at, color=_INK, linewidth=1, linestyle=(0, (4, 3)), zorder=2)
    low, high = axes.get_xlim()
    part = (lines[0] - low) / (high - low)
    side = "left" if part < 0.3 else "right" if part > 0.7 else "center"
    text = "● the hint stage ends, the distillation stage begins"
    place = {"xytext": (0, 4), "textcoords": "offset points"}
    spot = axes.get_xaxis_transform()
    _note(axes, text, (lines[0], 1.0), spot, ha=side, va="bottom", **place)


def _label_ends(figure: Figure, axes: Axes, ends: Mapping, names: Mapping) -> None:
    """Names every line at its right end; labels that would overlap move apart."""
    arms = sorted(ends, key=lambda arm: ends[arm][1])
    (low, high), bounds = axes.get_ylim(), axes.get_position()
    per_pixel = (high - low) / (bounds.height * _pixels(figure)[1])
    right = axes.get_xlim()[1]
    sizes = [(13.5 * (names[arm].count("\n") + 1) + 2) * per_pixel for arm in arms]
    places = _apart([ends[arm][1] for arm in arms], sizes, low, high)
    for arm, place in zip(arms, places, strict=True):
        x, y, number = ends[arm]
        # In three pieces: along the curve's height, to the label's, along the label.
        edge = bounds.width * _pixels(figure)[0]
        steps = [x, right, right + (right - axes.get_xlim()[0]) * 22 / edge]
        axes.plot(
            *(steps, [y, y, place]),
            color=_color(number),
            linewidth=1,
            alpha=0.7,
            clip_on=False,
        )
        axes.annotate(
            names[arm],
            (steps[-1], place),
            xytext=(4, 0),
            textcoords="offset points",
            color=_darker(_color(number)),
            fontsize=_SMALL,
            va="center",
            linespacing=1.05,
            annotation_clip=False,
            parse_math=False,
        )
    axes.set_xlim(axes.get_xlim()[0], right)
    axes.set_ylim(low, high)


def _draw_points(
    figure: Figure,
    box: Box,
    accuracies: Mapping[str, Numbers],
    xlabel: str,
    reference: tuple[str, SupportsFloat] | None,
    percent: bool = True,
) -> None:
    names = [_short(arm, 40) for arm in accuracies]
    left = _pixels_of(names) + 16
    axes = _axes(figure, _inside(figure, box, left, 44, 104, 44))
    _heading(figure, box, f"{xlabel.capitalize()} {_POINTS}")
    low, high = (1.0, 0.0) if percent else (np.inf, -np.inf)
    top = 1 if percent else np.inf
    for row, values in enumerate(accuracies.values()):
        values = np.asarray(values, float)
        color, result = _color(row), summary(values)
        ends = np.clip([result.low, result.high], 0, top)
        if np.isfinite(result.low):
            axes.plot(ends, [row, row], color=color, linewidth=5, alpha=0.3, zorder=2)
        axes.plot(result.mean, row, "|", color=color, markersize=15, mew=2.6)
        axes.plot(values, np.full(values.shape, row), "o", color=color, markersize=5)
        spread = f" ± {_number(result.std, percent)}" if result.count > 1 else ""
        text = f"{_number(result.mean, percent)}{spread}{' %' if percent else ''}"
        place = {"xytext": (10, 0), "textcoords": "offset points"}
        spot = axes.get_yaxis_transform()
        _note(axes, text, (1.0, row), spot, va="center", **place)
        low, high = min(low, *values), max(high, *values)
    if reference is not None:
        name, value = reference[0], float(reference[1])
        axes.axvline(value, color=_INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        low, high = min(low, value), max(high, value)
        side = "right" if value > (low + high) / 2 else "left"
        place = {"xytext": (0, 4), "textcoords": "offset points"}
        text = f"{name} {_number(value, percent)}{' %' if percent else ''}"
        spot = axes.get_xaxis_transform()
        _note(axes, text, (value, 1.0), spot, ha=side, va="bottom", **place)
    place = {"xytext": (10, 4), "textcoords": "offset points"}
    _note(axes, "mean ± std", (1.0, 1.0), "axes fraction", va="bottom", **place)
    room = max(0.06 * (high - low), 0.01 if percent else 0.01 * high + 1e-9)
    axes.set_xlim(low - room, high + room)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_yticks(range(len(names)), names, parse_math=False, linespacing=1.0)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    if percent:
        axes.xaxis.set_major_formatter(FuncFormatter(_percent))
    axes.grid(axis="x", color=_PALE, linewidth=0.7)
    axes.spines["left"].set_visible(False)


def _draw_maps(figure: Figure, box: Box, images: Images, maps: Mapping) -> None:
    images = np.asarray(images)
    width, height = _pixels(figure)
    room = (box[2] * width, box[3] * height - 120)
    stacked = _stacked(maps, room[0])
    if stacked:
        names = [_short(name, 24) for name in ("input", *maps)]
        left, top = _pixels_of(names) + 16, 34
        across, down = len(images), len(names)
    else:
        names = _headers(maps)
        left, top = 0, 36 + 13.5 * max(name.count("\n") + 1 for name in names)
        across, down = len(names), len(images)
    size = min((room[0] - left) / across, room[1] / down, _LARGEST)
    # A column is at least as wide as its header.
    step = size if stacked else max(size, _pixels_of(names) + 8)
    # One axes for the whole grid, in pixels, its origin at the top left.
    area = (
        box[0] + left / width,
        box[1] + box[3] - (top + size * down) / height,
        step * across / width,
        size * down / height,
    )
    axes = figure.add_axes(area)
    axes.set_axis_off()
    gap = 3
    for column, row, name, image in _tiles(images, maps, stacked):
        x, y = column * step + (step - size) / 2, row * size
        where = (x, x + size - gap, y + size - gap, y)
        if name is None:
            shown = axes.imshow(_picture(images[image]), extent=where, cmap="gray")
        else:
            tile = _unit(np.asarray(maps[name][image], float))
            shown = axes.imshow(
                tile, extent=where, cmap="magma", vmin=0, vmax=_BRIGHTEST
            )
        shown.set_interpolation("nearest")
    axes.set_aspect("equal")
    axes.set_xlim(0, step * across)
    axes.set_ylim(size * down, 0)
    for number, name in enumerate(names):
        middle = (number + 0.5) * (size if stacked else step) - gap / 2
        spot = (-8, middle) if stacked else (middle, -6)
        side = {"ha": "right", "va": "center"} if stacked else {"ha": "center"}
        _note(axes, name, spot, axes.transData, linespacing=1.05, **side)
    _heading(figure, box, "Attention maps")
    # The last map made the scale, and every map has the same one.
    bar = figure.add_axes(
        (area[0], area[1] - 28 / height, min(area[2], 300 / width), 9 / height)
    )
    scale = figure.colorbar(shown, cax=bar, orientation="horizontal")
    scale.outline.set_visible(False)
    scale.set_ticks([0, 1, 2, _BRIGHTEST], labels=["0", "1", "2", f"≥ {_BRIGHTEST:g}"])
    scale.ax.tick_params(labelsize=8, length=2, colors=_INK)
    scale.set_label("attention / its root mean square", fontsize=8, color=_INK)


def _headers(maps: Mapping) -> list[str]:
    return [_short(name, 16, lines=4) for name in ("input", *maps)]


def _stacked(maps: Mapping, room: Side) -> bool:
    """Whether the networks are rows, as they are too many or too long for columns."""
    names = _headers(maps)
    return len(names) > 7 or (_pixels_of(names) + 8) * len(names) > room


def _tiles(
    images: np.ndarray, maps: Mapping, stacked: bool
) -> Iterator[tuple[int, int, str | None, int]]:
    """Column, row, network (None for the input) and image of every tile."""
    for number, name in enumerate([None, *maps]):
        for image in range(len(images)):
            column, row = (image, number) if stacked else (number, image)
            yield column, row, name, image


def _check_maps(where: str, images: Any, maps: Mapping) -> None:
    shape = np.shape(images)
    if len(shape) != 4 or shape[0] == 0 or not maps:
        raise Refusal(
            message(
                where,
                "images [n, h, w, c] and at least one network's maps",
                f"images {shape} and {len(maps)} networks",
                "Pass a batch of images.",
            )
        )
    for name, value in maps.items():
        if np.ndim(value) != 3 or np.shape(value)[0] != shape[0]:
            raise Refusal(
                message(
                    where,
                    f"maps [n, h, w] of the same {shape[0]} images",
                    f"shape {np.shape(value)} for {name!r}",
                    "Sum over channels, for these images only.",
                )
            )


def _picture(image: np.ndarray) -> np.ndarray:
    """An image as matplotlib wants it: [h w] or [h w 3], between 0 and 1."""
    if image.dtype == np.uint8:
        image = image / 255.0
    else:
        image = image.astype(float)
        low, high = np.nanmin(image), np.nanmax(image)
        image = (image - low) / max(high - low, 1e-12)
    return image if image.shape[-1] == 3 else image.mean(-1)


def _unit(tile: np.ndarray) -> np.ndarray:
    return tile / max(float(np.sqrt(np.mean(np.square(tile)))), 1e-12)


class _Curve(NamedTuple):
    """A `History` as arrays, without the values that are not finite."""

    at: np.ndarray
    accuracy: np.ndarray
    boundary: float | None


def _finite(run: History) -> _Curve:
    at, accuracy = np.asarray(run.at, float), np.asarray(run.accuracy, float)
    if at.shape != accuracy.shape or at.ndim != 1:
        raise Refusal(
            message(
                "comparison",
                "as many accuracies as steps",
                f"shapes {at.shape} and {accuracy.shape}",
                "Give History(at, accuracy) two lists of one length.",
            )
        )
    keep = np.isfinite(accuracy)
    boundary = None if run.boundary is None else float(run.boundary)
    return _Curve(at[keep], accuracy[keep], boundary)


def _mean(runs: Sequence[_Curve]) -> tuple[np.ndarray, np.ndarray]:
    """The mean over the steps that all seeds have reached."""
    at = np.unique(np.concatenate([run.at for run in runs]))
    at = at[(at >= max(r.at[0] for r in runs)) & (at <= min(r.at[-1] for r in runs))]
    if not len(at):
        return runs[0].at, runs[0].accuracy
    return at, np.mean([np.interp(at, run.at, run.accuracy) for run in runs], 0)


def _apart(wanted: Numbers, sizes: Numbers, low: Side, high: Side) -> np.ndarray:
    """The places nearest to the wanted places (ascending) that leave each its size.

    Least squares under "each at least so far above the one before": after taking the
    distances off, that is isotonic regression, solved by pooling neighbors.
    """
    sizes = np.asarray(sizes, float)
    shift = np.concatenate([[0.0], np.cumsum((sizes[1:] + sizes[:-1]) / 2)])[
        : len(sizes)
    ]
    pools: list[list[float]] = []
    for value in np.asarray(wanted, float) - shift:
        pools.append([value])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    places = np.array([np.mean(pool) for pool in pools for _ in pool])
    if len(places):
        top = high - shift[-1] - sizes[-1] / 2
        places = np.clip(places, min(low + sizes[0] / 2, top), top)
    return places + shift


def _axes(figure: Figure, box: Box) -> Axes:
    axes = figure.add_axes(box)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GRAY)
    axes.tick_params(labelsize=_SMALL, color=_GRAY, labelcolor=_INK)
    axes.set_axisbelow(True)
    return axes


def _inside(
    figure: Figure, box: Box, left: Side, bottom: Side, right: Side, top: Side
) -> Box:
    """The box without margins, given in pixels."""
    width, height = _pixels(figure)
    return (
        box[0] + left / width,
        box[1] + bottom / height,
        box[2] - (left + right) / width,
        box[3] - (bottom + top) / height,
    )


def _pixels(figure: Figure) -> tuple[float, float]:
    width, height = figure.get_size_inches() * _DPI
    return float(width), float(height)


def _heading(figure: Figure, box: Box, text: str) -> None:
    top = box[1] + box[3]
    _write(figure, box[0], top, text, fontsize=_TITLE, va="top", weight="bold")


def _write(figure: Figure, x: Side, y: Side, text: str, **style: Any) -> None:
    figure.text(x, y, text, color=_INK, parse_math=False, **style)


def _note(axes: Axes, text: str, spot: tuple, coordinates: Any, **style: Any) -> None:
    axes.annotate(
        text,
        spot,
        xycoords=coordinates,
        color=_INK,
        fontsize=_SMALL,
        annotation_clip=False,
        parse_math=False,
        # Readable where it crosses a line.
        path_effects=[withStroke(linewidth=2.5, foreground="white")],
        **style,
    )


def _short(name: str, width: int, lines: int = 2) -> str:
    wrapped = textwrap.wrap(str(name), width, max_lines=lines, placeholder="…")
    return "\n".join(wrapped)


def _pixels_of(names: Iterable[str]) -> float:
    """The width of the longest line among the names."""
    # A dollar sign would start a formula.
    lines = [line.replace("$", "S") for name in names for line in name.split("\n")]
    size = _SMALL * _DPI / 72
    widths = [TextPath((0, 0), line, size=size).get_extents().width for line in lines]
    return float(max(widths, default=0.0))


def _color(number: int) -> str:
    return _COLORS[number % len(_COLORS)]


def _style(number: int) -> Any:
    return _STYLES[number // 5 % len(_STYLES)]


def _darker(color: str) -> tuple[float, float, float]:
    """The color as text: dark enough to read on white."""
    hue, light, saturation = colorsys.rgb_to_hls(*matplotlib.colors.to_rgb(color))
    return colorsys.hls_to_rgb(hue, min(light, 0.32), saturation)


def _number(value: Side, percent: bool) -> str:
    """A value as text: in percent, without the sign, or with three digits."""
    return f"{100 * value:.1f}" if percent else f"{value:.3g}"


def _percent(value: Side, position: int | None = None) -> str:
    return f"{100 * value:.4g} %"
