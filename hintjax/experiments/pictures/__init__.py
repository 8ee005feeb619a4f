"""Pictures of runs and comparisons, one file for each kind.

`comparison` has three panels: `histories`, `points` and `maps`. `heat_map` is the
similarity of two networks, layer by layer. `curves`, `sizes` and `attention` are the
small pictures of a report, `tried` that of a tuning. All share one `style`.

Each function returns a new `matplotlib.figure.Figure` and touches no global state: no
pyplot, no window. `figure.savefig("name.png")` writes it; a notebook shows it.
"""

from hintjax.experiments.pictures.attention import attention
from hintjax.experiments.pictures.comparison import comparison
from hintjax.experiments.pictures.curves import curves
from hintjax.experiments.pictures.heat_map import heat_map
from hintjax.experiments.pictures.histories import History
from hintjax.experiments.pictures.sizes import sizes
from hintjax.experiments.pictures.tried import Tried, tried

__all__ = [
    "History",
    "Tried",
    "attention",
    "comparison",
    "curves",
    "heat_map",
    "sizes",
    "tried",
]
