"""The picture of some metrics over the steps of a run."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from hintjax.experiments.pictures.small import legend, small_figure
from hintjax.experiments.pictures.style import GRAY, Side, color_of, line_style
from hintjax.experiments.statistics import Numbers

_DOTTED = 12  # reports, up to which each is a dot on its curve
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
    figure, axes = small_figure(title, xlabel, -(-len(lines) // 2))
    lowest = np.inf
    for number, (name, (at, values)) in enumerate(lines.items()):
        values = np.asarray(values, float)
        kept = values[np.isfinite(values)]
        lowest = min(lowest, kept.min(initial=np.inf))
        style = {
            "color": color_of(number),
            "linestyle": line_style(number),
            "linewidth": 1.6,
        }
        mark = "." if len(kept) <= _DOTTED else None
        # A label that begins with _ would be left out.
        axes.plot(np.asarray(at, float), values, marker=mark, label=f" {name}", **style)
    if logarithmic and 0 < lowest < np.inf:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(_general))
        axes.yaxis.set_minor_formatter(NullFormatter())
    for at in boundaries:
        axes.axvline(float(at), color=GRAY, linewidth=1, linestyle=(0, (4, 3)))
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    legend(figure, min(2, len(lines)))
    return figure


def _general(value: Side, position: int | None = None) -> str:
    return f"{value:.4g}"
