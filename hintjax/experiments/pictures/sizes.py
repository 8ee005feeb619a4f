"""The picture of a metric against the number of parameters."""

from collections.abc import Mapping
from typing import SupportsFloat

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from hintjax.experiments.pictures.small import legend, small_figure
from hintjax.experiments.pictures.style import color_of, number_text, percent_tick


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
    figure, axes = small_figure(title, "parameters", len(points))
    marks = "osD^vP*X"
    for number, (name, (parameters, value)) in enumerate(points.items()):
        label = (
            f" {name}: {number_text(float(value), percent)}{' %' if percent else ''}"
        )
        axes.plot(
            [float(parameters)],
            [float(value)],
            color=color_of(number),
            marker=marks[number % len(marks)],
            linestyle="",
            markersize=7,
            label=label,
            alpha=0.85,
        )
    axes.set_xscale("log")
    axes.margins(0.12)
    if percent:
        axes.yaxis.set_major_formatter(FuncFormatter(percent_tick))
    legend(figure, 1)
    return figure
