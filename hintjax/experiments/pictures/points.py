"""The panel of one metric per arm: each seed, the mean, and its interval."""

from collections.abc import Mapping
from typing import SupportsFloat

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hintjax.experiments.pictures.style import (
    INK,
    PALE,
    Box,
    color_of,
    heading,
    inside,
    note,
    number_text,
    percent_tick,
    plain_axes,
    short,
    width_of,
)
from hintjax.experiments.statistics import Numbers, summary

_POINTS = "(dot: one seed, tick: mean, bar: its 95 % interval)"


def draw_points(
    figure: Figure,
    box: Box,
    accuracies: Mapping[str, Numbers],
    xlabel: str,
    reference: tuple[str, SupportsFloat] | None,
    percent: bool = True,
) -> None:
    """Draws the panel: a dot for each seed, a tick for their mean, and its interval.

    Args:
      figure: figure to draw on.
      box: box of the panel.
      accuracies: one value per seed, by the name of the arm.
      xlabel: name of the metric.
      reference: a name and a value to compare with, drawn as a dashed line.
      percent: whether the values are between 0 and 1, and are shown in percent.
    """
    names = [short(arm, 40) for arm in accuracies]
    left = width_of(names) + 16
    axes = plain_axes(figure, inside(figure, box, left, 44, 104, 44))
    heading(figure, box, f"{xlabel.capitalize()} {_POINTS}")
    low, high = (1.0, 0.0) if percent else (np.inf, -np.inf)
    top = 1 if percent else np.inf
    for row, values in enumerate(accuracies.values()):
        values = np.asarray(values, float)
        color, result = color_of(row), summary(values)
        ends = np.clip([result.low, result.high], 0, top)
        if np.isfinite(result.low):
            axes.plot(ends, [row, row], color=color, linewidth=5, alpha=0.3, zorder=2)
        axes.plot(result.mean, row, "|", color=color, markersize=15, mew=2.6)
        axes.plot(values, np.full(values.shape, row), "o", color=color, markersize=5)
        spread = f" ± {number_text(result.std, percent)}" if result.count > 1 else ""
        text = f"{number_text(result.mean, percent)}{spread}{' %' if percent else ''}"
        place = {"xytext": (10, 0), "textcoords": "offset points"}
        spot = axes.get_yaxis_transform()
        note(axes, text, (1.0, row), spot, va="center", **place)
        low, high = min(low, *values), max(high, *values)
    if reference is not None:
        name, value = reference[0], float(reference[1])
        axes.axvline(value, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        low, high = min(low, value), max(high, value)
        side = "right" if value > (low + high) / 2 else "left"
        place = {"xytext": (0, 4), "textcoords": "offset points"}
        text = f"{name} {number_text(value, percent)}{' %' if percent else ''}"
        spot = axes.get_xaxis_transform()
        note(axes, text, (value, 1.0), spot, ha=side, va="bottom", **place)
    place = {"xytext": (10, 4), "textcoords": "offset points"}
    note(axes, "mean ± std", (1.0, 1.0), "axes fraction", va="bottom", **place)
    room = max(0.06 * (high - low), 0.01 if percent else 0.01 * high + 1e-9)
    axes.set_xlim(low - room, high + room)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_yticks(range(len(names)), names, parse_math=False, linespacing=1.0)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    if percent:
        axes.xaxis.set_major_formatter(FuncFormatter(percent_tick))
    axes.grid(axis="x", color=PALE, linewidth=0.7)
    axes.spines["left"].set_visible(False)
