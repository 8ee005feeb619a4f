"""The panel of attention maps: each network beside the input images."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Array, Num
from matplotlib.figure import Figure

from hintjax._checks import Refusal, message
from hintjax.experiments.pictures.style import (
    INK,
    Box,
    Side,
    heading,
    note,
    pixels,
    short,
    width_of,
)

_LARGEST = 180  # the side of an attention map, in pixels
BRIGHTEST = 3.0  # the end of the color scale, in root mean squares of a map
Images = Num[Array | np.ndarray, "n h w c"]
Maps = Mapping[str, Num[Array | np.ndarray, "n _ _"]]


def draw_maps(figure: Figure, box: Box, images: Images, maps: Mapping) -> None:
    """Draws the panel: networks are columns, or rows if they are many or named long.

    Args:
      figure: figure to draw on.
      box: box of the panel.
      images: input images.
      maps: attention maps of these images, by the name of the network.
    """
    images = np.asarray(images)
    width, height = pixels(figure)
    room = (box[2] * width, box[3] * height - 120)
    stacked = _stacked(maps, room[0])
    if stacked:
        names = [short(name, 24) for name in ("input", *maps)]
        left, top = width_of(names) + 16, 34
        across, down = len(images), len(names)
    else:
        names = _headers(maps)
        left, top = 0, 36 + 13.5 * max(name.count("\n") + 1 for name in names)
        across, down = len(names), len(images)
    size = min((room[0] - left) / across, room[1] / down, _LARGEST)
    # A column is at least as wide as its header.
    step = size if stacked else max(size, width_of(names) + 8)
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
            shown = axes.imshow(as_shown(images[image]), extent=where, cmap="gray")
        else:
            tile = unit(np.asarray(maps[name][image], float))
            shown = axes.imshow(
                tile, extent=where, cmap="magma", vmin=0, vmax=BRIGHTEST
            )
        shown.set_interpolation("nearest")
    axes.set_aspect("equal")
    axes.set_xlim(0, step * across)
    axes.set_ylim(size * down, 0)
    for number, name in enumerate(names):
        middle = (number + 0.5) * (size if stacked else step) - gap / 2
        spot = (-8, middle) if stacked else (middle, -6)
        side = {"ha": "right", "va": "center"} if stacked else {"ha": "center"}
        note(axes, name, spot, axes.transData, linespacing=1.05, **side)
    heading(figure, box, "Attention maps")
    # The last map made the scale, and every map has the same one.
    bar = figure.add_axes(
        (area[0], area[1] - 28 / height, min(area[2], 300 / width), 9 / height)
    )
    scale = figure.colorbar(shown, cax=bar, orientation="horizontal")
    scale.outline.set_visible(False)
    scale.set_ticks([0, 1, 2, BRIGHTEST], labels=["0", "1", "2", f"≥ {BRIGHTEST:g}"])
    scale.ax.tick_params(labelsize=8, length=2, colors=INK)
    scale.set_label("attention / its root mean square", fontsize=8, color=INK)


def _headers(maps: Mapping) -> list[str]:
    return [short(name, 16, lines=4) for name in ("input", *maps)]


def _stacked(maps: Mapping, room: Side) -> bool:
    """Whether the networks are rows, as they are too many or too long for columns."""
    names = _headers(maps)
    return len(names) > 7 or (width_of(names) + 8) * len(names) > room


def _tiles(
    images: np.ndarray, maps: Mapping, stacked: bool
) -> Iterator[tuple[int, int, str | None, int]]:
    """Column, row, network (None for the input) and image of every tile."""
    for number, name in enumerate([None, *maps]):
        for image in range(len(images)):
            column, row = (image, number) if stacked else (number, image)
            yield column, row, name, image


def check_maps(where: str, images: Any, maps: Mapping) -> None:
    """Raises unless every network has one map for each image.

    Args:
      where: name of the function that is named in the error.
      images: input images.
      maps: attention maps, by the name of the network.

    Raises:
      Refusal: if shapes do not fit, or if there are no images or networks.
    """
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


def as_shown(image: np.ndarray) -> np.ndarray:
    """An image as matplotlib wants it: [h w] or [h w 3], between 0 and 1."""
    if image.dtype == np.uint8:
        image = image / 255.0
    else:
        image = image.astype(float)
        low, high = np.nanmin(image), np.nanmax(image)
        image = (image - low) / max(high - low, 1e-12)
    return image if image.shape[-1] == 3 else image.mean(-1)


def unit(tile: np.ndarray) -> np.ndarray:
    """A map divided by its root mean square; a map of zeros stays zero."""
    return tile / max(float(np.sqrt(np.mean(np.square(tile)))), 1e-12)
