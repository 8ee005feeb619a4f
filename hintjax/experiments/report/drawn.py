"""Pictures as parts of the page; a report without matplotlib has none, and says so."""

import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hintjax.experiments.report import page
from hintjax.experiments.report.page import Html

_NO_PICTURES = (
    "This report has no pictures, because matplotlib is not installed. Install it with "
    "`pip install hintjax[viz]`, and make the report again with `hintjax report`."
)


def drawing() -> bool:
    """Whether pictures can be drawn: matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def drawn(words: str, draw: Callable[[Any], Any]) -> list[Html]:
    """A picture as a part of the page; none without matplotlib.

    Args:
        words: the picture in words.
        draw: makes the figure, from the module of the pictures.
    """
    if not drawing():
        return []
    from hintjax.experiments import pictures

    file = io.BytesIO()
    draw(pictures).savefig(file, format="svg", metadata={"Date": None})
    return [page.image(file.getvalue(), "svg+xml", words)]


def from_file(path: Path, words: str) -> Html:
    """A picture in the run directory; nothing if there is none."""
    if not path.exists():
        return Html("")
    return page.image(path.read_bytes(), "png", words)


def without_pictures() -> Html:
    """A sentence that says why there are no pictures; nothing if there are some."""
    return Html("") if drawing() else page.paragraph(_NO_PICTURES, "doubt")
