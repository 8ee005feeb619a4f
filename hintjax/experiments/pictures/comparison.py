"""The picture of a comparison: curves, accuracies and attention maps, in one figure."""

from collections.abc import Mapping
from typing import SupportsFloat

from matplotlib.figure import Figure

from hintjax.experiments.pictures.histories import Histories, draw_histories
from hintjax.experiments.pictures.maps import Images, Maps, check_maps, draw_maps
from hintjax.experiments.pictures.points import draw_points
from hintjax.experiments.pictures.style import DPI, write
from hintjax.experiments.statistics import Numbers


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
    check_maps("comparison", images, maps)
    figure = Figure(figsize=(16, 9), dpi=DPI)
    top = 0.97
    if title:
        write(figure, 0.015, 0.965, title, fontsize=15, va="center", weight="bold")
        top = 0.93
    left, right = (0.015, 0.535), (0.57, 0.415)
    split = 0.03
    if accuracies is not None:
        # Rows of 36 pixels while the curves keep half of the height.
        split = min(0.13 + 0.04 * len(accuracies), 0.5)
        box = (left[0], 0.02, left[1], split - 0.03)
        draw_points(figure, box, accuracies, f"test {metric}", reference, percent)
    box = (left[0], split + 0.015, left[1], top - split - 0.015)
    draw_histories(figure, box, histories, xlabel, chance, metric, percent)
    draw_maps(figure, (right[0], 0.02, right[1], top - 0.02), images, maps)
    return figure
