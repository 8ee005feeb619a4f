"""The validated metric of candidates against one of their settings."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from hintjax.experiments.pictures.small import legend, small_figure
from hintjax.experiments.pictures.style import color_of, percent_tick


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
    figure, axes = small_figure(title, xlabel, len(points))
    for number, (name, some) in enumerate(points.items()):
        color = color_of(number)
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
        axes.yaxis.set_major_formatter(FuncFormatter(percent_tick))
    legend(figure, 1)
    return figure
