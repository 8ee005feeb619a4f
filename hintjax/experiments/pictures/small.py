"""The frame of a small picture for a narrow page: its axes, and its legend below."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hintjax.experiments.pictures.style import (
    DPI,
    INK,
    PALE,
    SMALL,
    pixels,
    plain_axes,
    write,
)


def small_figure(title: str, xlabel: str, rows: int) -> tuple[Figure, Axes]:
    """A small figure for a narrow page, with room for rows of a legend below."""
    below, width, height = 56 + 16 * rows, 440, 262 + 16 * rows
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    box = (66 / width, below / height, 358 / width, (height - below - 34) / height)
    axes = plain_axes(figure, box)
    axes.grid(axis="y", color=PALE, linewidth=0.7)
    axes.set_xlabel(xlabel, fontsize=SMALL, color=INK)
    write(figure, 8 / width, 1 - 8 / height, title, fontsize=SMALL + 1, va="top")
    return figure, axes


def legend(figure: Figure, columns: int) -> None:
    """The names below a small figure; a dollar sign in them starts no formula."""
    width, height = pixels(figure)
    place = {"loc": "lower left", "bbox_to_anchor": (4 / width, 2 / height)}
    shown = figure.legend(ncols=max(1, columns), fontsize=8, frameon=False, **place)
    for text in shown.get_texts():
        text.set_parse_math(False)
