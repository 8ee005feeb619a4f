"""The picture of the similarity of two networks, layer by layer."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Num
from matplotlib.figure import Figure

from hintjax._checks import Refusal, message
from hintjax.experiments.pictures.style import (
    DPI,
    GRAY,
    INK,
    SMALL,
    TITLE,
    short,
    width_of,
    write,
)


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
    cell, names = 34, [[short(name, 40) for name in some] for some in (rows, columns)]
    left, bottom = (width_of(some) + 52 for some in names)
    inner = max(len(columns) * cell, 240), max(len(rows) * cell, 160)
    width, height = left + inner[0] + 90, bottom + inner[1] + 60
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    box = (left / width, bottom / height, inner[0] / width, inner[1] / height)
    axes = figure.add_axes(box)
    shown = axes.imshow(
        values, cmap="magma", vmin=0, vmax=1, origin="lower", aspect="auto"
    )
    axes.set_yticks(range(len(rows)), names[0], parse_math=False)
    axes.set_xticks(range(len(columns)), names[1], parse_math=False, rotation=90)
    axes.tick_params(labelsize=SMALL, color=GRAY, labelcolor=INK)
    axes.set_ylabel("teacher", fontsize=SMALL, color=INK)
    axes.set_xlabel("student", fontsize=SMALL, color=INK)
    for row, column in marked:
        edges = [column - 0.5, column + 0.5], [row - 0.5, row + 0.5]
        (x0, x1), (y0, y1) = edges
        axes.plot([x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0], color="#56B4E9", lw=2.5)
    write(figure, 12 / width, 1 - 14 / height, title, fontsize=TITLE, va="top")
    place = ((left + inner[0] + 14) / width, box[1], 12 / width, box[3])
    scale = figure.colorbar(shown, cax=figure.add_axes(place))
    scale.outline.set_visible(False)
    scale.ax.tick_params(labelsize=8, length=2, colors=INK)
    return figure
