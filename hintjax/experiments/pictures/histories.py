"""The panel of the validation curves of all arms, and where their hint stages end."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, SupportsFloat

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hintjax._checks import Refusal, message
from hintjax.experiments.pictures.style import (
    GRAY,
    INK,
    PALE,
    SMALL,
    Box,
    Side,
    color_of,
    darker,
    heading,
    inside,
    line_style,
    note,
    percent_tick,
    pixels,
    plain_axes,
    short,
    width_of,
)
from hintjax.experiments.statistics import Numbers


class History(NamedTuple):
    """The validation accuracy of one run (one arm, one seed).

    `at` holds the steps or epochs of the measurements, `accuracy` is between 0 and 1,
    and `boundary` is where the hint stage ended, None when there was none.
    """

    at: Numbers
    accuracy: Numbers
    boundary: SupportsFloat | None = None


Histories = Mapping[str, Sequence[History]]


def draw_histories(
    figure: Figure,
    box: Box,
    histories: Histories,
    xlabel: str,
    chance: float | None,
    metric: str = "accuracy",
    percent: bool = True,
) -> None:
    """Draws the panel: a thin line for each seed, and a thick line for their mean.

    Args:
      figure: figure to draw on.
      box: box of the panel.
      histories: one `History` per seed, by the name of the arm.
      xlabel: unit of `History.at`.
      chance: metric of guessing, drawn as a dotted line.
      metric: name of the metric.
      percent: whether the metric is between 0 and 1, and is shown in percent.
    """
    names = {arm: short(arm, 28) for arm in histories}
    right = width_of(names.values()) + 34
    axes = plain_axes(figure, inside(figure, box, 62, 52, right, 50))
    heading(figure, box, f"Validation {metric} (thin: each seed, thick: their mean)")
    if chance is not None:
        axes.axhline(chance, color=GRAY, linewidth=1, linestyle=":", zorder=1)
    ends = {}
    for number, (arm, runs) in enumerate(histories.items()):
        curves = [_finite(run) for run in runs]
        curves = [curve for curve in curves if len(curve.at)]
        if not curves:
            continue
        line = {"color": color_of(number), "linestyle": line_style(number)}
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
    axes.set_xlabel(xlabel, fontsize=SMALL, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    if percent:
        axes.yaxis.set_major_formatter(FuncFormatter(percent_tick))
    axes.grid(axis="y", color=PALE, linewidth=0.7)
    boundaries = [
        [float(run.boundary) for run in runs if run.boundary is not None]
        for runs in histories.values()
    ]
    if any(boundaries):
        _mark_boundaries(axes, [own for own in boundaries if own])
    if chance is not None:
        offset = {"xytext": (4, 2), "textcoords": "offset points"}
        spot = axes.get_yaxis_transform()
        note(axes, "chance", (0.0, chance), spot, ha="left", va="bottom", **offset)
    _label_ends(figure, axes, ends, names)


def _mark_boundaries(axes: Axes, boundaries: Sequence[list[float]]) -> None:
    """A line between the stages of each arm; a pale span where its runs disagree."""
    lines = sorted({float(np.median(own)) for own in boundaries})
    for own in boundaries:
        axes.axvspan(min(own), max(own), color=PALE, alpha=0.6, linewidth=0)
    for at in lines:
        axes.axvline(at, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=2)
    low, high = axes.get_xlim()
    part = (lines[0] - low) / (high - low)
    side = "left" if part < 0.3 else "right" if part > 0.7 else "center"
    text = "● the hint stage ends, the distillation stage begins"
    place = {"xytext": (0, 4), "textcoords": "offset points"}
    spot = axes.get_xaxis_transform()
    note(axes, text, (lines[0], 1.0), spot, ha=side, va="bottom", **place)


def _label_ends(figure: Figure, axes: Axes, ends: Mapping, names: Mapping) -> None:
    """Names every line at its right end; labels that would overlap move apart."""
    arms = sorted(ends, key=lambda arm: ends[arm][1])
    (low, high), bounds = axes.get_ylim(), axes.get_position()
    per_pixel = (high - low) / (bounds.height * pixels(figure)[1])
    right = axes.get_xlim()[1]
    sizes = [(13.5 * (names[arm].count("\n") + 1) + 2) * per_pixel for arm in arms]
    places = _apart([ends[arm][1] for arm in arms], sizes, low, high)
    for arm, place in zip(arms, places, strict=True):
        x, y, number = ends[arm]
        # In three pieces: along the curve's height, to the label's, along the label.
        edge = bounds.width * pixels(figure)[0]
        steps = [x, right, right + (right - axes.get_xlim()[0]) * 22 / edge]
        axes.plot(
            *(steps, [y, y, place]),
            color=color_of(number),
            linewidth=1,
            alpha=0.7,
            clip_on=False,
        )
        axes.annotate(
            names[arm],
            (steps[-1], place),
            xytext=(4, 0),
            textcoords="offset points",
            color=darker(color_of(number)),
            fontsize=SMALL,
            va="center",
            linespacing=1.05,
            annotation_clip=False,
            parse_math=False,
        )
    axes.set_xlim(axes.get_xlim()[0], right)
    axes.set_ylim(low, high)


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
