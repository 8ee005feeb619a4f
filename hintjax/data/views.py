"""Fixed views: a finite number of crops and flips of each example.

A run with k views shows view `e % k` of every example in epoch e. Student and teacher
see the same view, so the teacher's features of all views are a finite number of arrays,
which can be computed once.
"""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int32, UInt8

from hintjax._checks import Refusal, message, positive_int
from hintjax.data.images import AnyArray, Augment


class View(NamedTuple):
    """One view of all examples of a split.

    Attributes:
        crops: for each example the shift of the rows, the shift of the columns, and
            whether the image is flipped (0 or 1).
        number: the number of the view.
    """

    crops: UInt8[AnyArray, "n 3"]
    number: Int32[AnyArray, ""]


def fixed_views(
    n: int, count: int, augment: Augment, *, seed: int = 0
) -> UInt8[np.ndarray, "views n 3"]:
    """Draws the crops and flips of a fixed number of views.

    The shifts are uniform in 0..2 pad, and a flip has probability 1/2, as for batches
    with a key. The draws of a view do not depend on the number of views.

    Args:
        n: the number of examples.
        count: the number of views of each example.
        augment: the crops and flips. Without any, all views are equal.
        seed: the seed of the draws.

    Returns:
        For each view and example the shift of the rows, the shift of the columns, and
        whether the image is flipped.

    Raises:
        ValueError: if the count is not an integer >= 1, or the pad is above 127.

    >>> fixed_views(5, 2, Augment(pad=4, flip=True)).shape
    (2, 5, 3)
    """
    positive_int("views", count=count)
    if augment.pad > 127:
        do = "Lower it, or train without fixed views."
        raise Refusal(message("views", "a pad of at most 127", str(augment.pad), do))
    ends = (2 * augment.pad + 1, 2 * augment.pad + 1, 2 if augment.flip else 1)
    return np.stack(
        [
            np.random.default_rng((seed, view)).integers(0, ends, (n, 3), np.uint8)
            for view in range(count)
        ]
    )


def view_of(crops: UInt8[AnyArray, "views n 3"], epoch: int) -> View:
    """The view of an epoch.

    Args:
        crops: the result of `fixed_views`.
        epoch: the number of the epoch, from 0.
    """
    number = epoch % crops.shape[0]
    return View(crops[number], jax.numpy.asarray(number, jax.numpy.int32))
