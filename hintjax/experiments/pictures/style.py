"""The style of all pictures: colors, fonts, axes, and texts that fit.

Places are given as parts of the figure, and margins in pixels.
"""

import colorsys
import textwrap
from collections.abc import Iterable
from typing import Any

import matplotlib.colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.textpath import TextPath

# Okabe and Ito's colors and Tol's, told apart with any color vision; the line style
# changes every five arms, so that no two arms differ by hue alone.
_COLORS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"),
    *("#332288", "#56B4E9", "#882255", "#999933", "#777777"),
)
_STYLES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))
DPI = 100
INK, GRAY, PALE = "#222222", "#777777", "#DDDDDD"
SMALL, TITLE = 9, 11  # font sizes, in points

Side = float | int
Box = tuple[float, float, float, float]  # left, bottom, width, height of the figure


def plain_axes(figure: Figure, box: Box) -> Axes:
    """New axes in a box of the figure, without a frame above and on the right."""
    axes = figure.add_axes(box)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRAY)
    axes.tick_params(labelsize=SMALL, color=GRAY, labelcolor=INK)
    axes.set_axisbelow(True)
    return axes


def inside(
    figure: Figure, box: Box, left: Side, bottom: Side, right: Side, top: Side
) -> Box:
    """The box without margins, given in pixels."""
    width, height = pixels(figure)
    return (
        box[0] + left / width,
        box[1] + bottom / height,
        box[2] - (left + right) / width,
        box[3] - (bottom + top) / height,
    )


def pixels(figure: Figure) -> tuple[float, float]:
    """Width and height of a figure, in pixels."""
    width, height = figure.get_size_inches() * DPI
    return float(width), float(height)


def heading(figure: Figure, box: Box, text: str) -> None:
    """Writes the heading of a panel at the top left of its box."""
    top = box[1] + box[3]
    write(figure, box[0], top, text, fontsize=TITLE, va="top", weight="bold")


def write(figure: Figure, x: Side, y: Side, text: str, **style: Any) -> None:
    """Writes text on a figure; a dollar sign in it starts no formula."""
    figure.text(x, y, text, color=INK, parse_math=False, **style)


def note(axes: Axes, text: str, spot: tuple, coordinates: Any, **style: Any) -> None:
    """Writes text beside a spot of the axes, readable where it crosses a line."""
    axes.annotate(
        text,
        spot,
        xycoords=coordinates,
        color=INK,
        fontsize=SMALL,
        annotation_clip=False,
        parse_math=False,
        path_effects=[withStroke(linewidth=2.5, foreground="white")],
        **style,
    )


def short(name: str, width: int, lines: int = 2) -> str:
    """A name in lines of at most `width` characters, cut after `lines` lines."""
    wrapped = textwrap.wrap(str(name), width, max_lines=lines, placeholder="…")
    return "\n".join(wrapped)


def width_of(names: Iterable[str]) -> float:
    """The width of the longest line among the names, in pixels."""
    # A dollar sign would start a formula.
    lines = [line.replace("$", "S") for name in names for line in name.split("\n")]
    size = SMALL * DPI / 72
    widths = [TextPath((0, 0), line, size=size).get_extents().width for line in lines]
    return float(max(widths, default=0.0))


def color_of(number: int) -> str:
    """The color of an arm, by its number."""
    return _COLORS[number % len(_COLORS)]


def line_style(number: int) -> Any:
    """The line style of an arm, by its number; it changes every five arms."""
    return _STYLES[number // 5 % len(_STYLES)]


def darker(color: str) -> tuple[float, float, float]:
    """The color as text: dark enough to read on white."""
    hue, light, saturation = colorsys.rgb_to_hls(*matplotlib.colors.to_rgb(color))
    return colorsys.hls_to_rgb(hue, min(light, 0.32), saturation)


def number_text(value: Side, percent: bool) -> str:
    """A value as text: in percent, without the sign, or with three digits."""
    return f"{100 * value:.1f}" if percent else f"{value:.3g}"


def percent_tick(value: Side, position: int | None = None) -> str:
    """A value between 0 and 1 as the label of a tick, in percent."""
    return f"{100 * value:.4g} %"
