"""The stored features of the teacher as runs read them, and the crops of its views."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, UInt8

from hintjax.cache import ROWS, Contents, Rows, variables_of
from hintjax.data import Augment, fixed_views
from hintjax.experiments.config import Config
from hintjax.method import Method
from hintjax.networks import Variables, Wants

_VIEWS = 4  # with a cache, if images are cropped or flipped


class CachedTeacher(NamedTuple):
    """A cache and the place of its rows.

    Attributes:
        contents: the features that a row holds.
        rows: all rows, in memory or on disk.
        on_device: all rows on the device, or None if batches bring their rows.
    """

    contents: Contents
    rows: Rows
    on_device: Mapping[str, Array | np.ndarray] | None

    def serves(self, method: Method) -> bool:
        """Whether a method reads features of the teacher that depend on the inputs."""
        return method.teacher._replace(params=()) != Wants()

    def variables(self, teacher: Variables) -> Variables:
        """The variables of the cached teacher, from those of the live teacher."""
        return variables_of(teacher, self.on_device)

    def with_rows(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch with the rows of its examples."""
        return {**batch, ROWS: self.rows.read(batch["index"], batch["view"])}


def crops_of(config: Config, n: int) -> UInt8[np.ndarray, "views n 3"] | None:
    """The crops and flips of all views; None if every epoch draws new ones.

    They are the same for every seed.

    Args:
        config: config of the run.
        n: number of training examples.
    """
    if config.views is None and not config.cache:
        return None
    return cached_crops(config, n)


def cached_crops(config: Config, n: int) -> UInt8[np.ndarray, "views n 3"]:
    """The crops and flips of all views of a run with a cache.

    Args:
        config: config of the run.
        n: number of training examples.
    """
    augment = Augment(pad=config.pad, flip=config.flip)
    views = _VIEWS if config.pad or config.flip else 1
    return fixed_views(n, config.views or views, augment)
