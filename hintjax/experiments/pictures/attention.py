"""The picture of the attention maps of a pair, and of their difference."""

import numpy as np
from jaxtyping import Array, Num
from matplotlib.figure import Figure

from hintjax.experiments.pictures.maps import (
    BRIGHTEST,
    Images,
    as_shown,
    check_maps,
    unit,
)
from hintjax.experiments.pictures.style import DPI, SMALL, write


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
    check_maps("attention", images, found)
    images = np.asarray(images)
    columns = ("input", "teacher", "student", "difference")
    width, cell, top, n = 440, 106, 28, len(images)
    height = top + cell * n + 6
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    for row in range(n):
        ours, theirs = (unit(np.asarray(found[x][row])) for x in ("student", "teacher"))
        difference = _enlarged(ours, theirs) - _enlarged(theirs, ours)
        magma = {"cmap": "magma", "vmin": 0, "vmax": BRIGHTEST}
        signed = {"cmap": "RdBu_r", "vmin": -2, "vmax": 2}
        tiles = (
            (as_shown(images[row]), {"cmap": "gray", "vmin": 0, "vmax": 1}),
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
        place = {"ha": "center", "va": "top", "fontsize": SMALL}
        write(figure, x, 1 - 7 / height, name, **place)
    return figure


def _enlarged(tile: np.ndarray, other: np.ndarray) -> np.ndarray:
    """A map at the size of another map, if that is larger, by nearest neighbor."""
    for axis in (0, 1):
        size, wanted = tile.shape[axis], max(tile.shape[axis], other.shape[axis])
        tile = np.take(tile, np.arange(wanted) * size // wanted, axis)
    return tile
