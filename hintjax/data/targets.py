"""Labels of tasks other than classification, from the arrays of an .npz file."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from hintjax._checks import Refusal, message

IGNORED = 255  # label of a position that does not count


class Targets(NamedTuple):
    """How the labels of a task are read.

    Attributes:
        wanted: the labels of an .npz file, in words.
        fits: `(labels, shape of the images) -> whether they are such labels`.
        dtype: of the labels in batches.
        outputs: `(labels of all splits) -> number of outputs of a network`.
        positions: whether each position of an image has a label.
    """

    wanted: str
    fits: Callable[[np.ndarray, tuple[int, ...]], bool]
    dtype: type
    outputs: Callable[[Sequence[np.ndarray]], int]
    positions: bool = False

    def read(self, where: str, label: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The labels of one split, checked; numbers [n] become [n 1].

        Args:
            where: place of the labels, for a message.
            label: labels as they are stored.
            shape: shape of the images, [n h w ...].

        Raises:
            Refusal: if they are other labels.
        """
        if label.ndim == 1 and not self.positions:
            label = label[:, None]
        if label.shape[:1] != shape[:1] or not self.fits(label, shape):
            got = f"{label.dtype} {label.shape} for images {shape}"
            if label.dtype.kind in "buif" and label.size:
                got += f", between {label.min():g} and {label.max():g}"
            do = "Save such labels, or choose another --task."
            raise Refusal(message("load", f"{self.wanted} in {where}", got, do))
        return label.astype(self.dtype)


def _zeros_and_ones(label: np.ndarray) -> bool:
    return label.dtype.kind in "buif" and bool(np.isin(label, (0, 1)).all())


def _classes_of_positions(label: np.ndarray, shape: tuple[int, ...]) -> bool:
    if label.dtype.kind not in "ui" or label.shape != shape[:3]:
        return False
    valid = label[label != IGNORED]
    return bool(valid.size) and int(valid.min()) >= 0 and int(valid.max()) < IGNORED


def _width(labels: Sequence[np.ndarray]) -> int:
    return labels[0].shape[1]


BINARY = Targets(
    "labels [n] of 0 and 1",
    lambda label, shape: label.shape[1:] == (1,) and _zeros_and_ones(label),
    np.int32,
    _width,
)
MULTI_LABEL = Targets(
    "labels [n k] of 0 and 1, one for each class,",
    lambda label, shape: label.ndim == 2 and _zeros_and_ones(label),
    np.int32,
    _width,
)
NUMBERS = Targets(
    "finite numbers [n] or [n k] as labels",
    lambda label, shape: (
        label.ndim == 2
        and label.dtype.kind in "uif"
        and bool(np.isfinite(label.astype(np.float32)).all())
    ),
    np.float32,
    _width,
)
DENSE = Targets(
    f"labels [n h w] of classes from 0, or {IGNORED} where none counts,",
    _classes_of_positions,
    np.int32,
    lambda labels: 1 + max(int(one[one != IGNORED].max()) for one in labels),
    positions=True,
)
