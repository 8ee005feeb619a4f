"""Checks of images and labels, and splits cut by class."""

import numpy as np

from hintjax._checks import Refusal, WrongType, message
from hintjax.data.images import AnyArray, Split


def checked_split(
    where: str, image: np.ndarray, label: np.ndarray, classes: int
) -> Split:
    """A Split of arrays that are checked first."""
    if image.dtype != np.uint8:
        do = "Scale them to 0..255, round them and convert them."
        wanted = f"uint8 pixels in {where}"
        raise WrongType(message("load", wanted, str(image.dtype), do))
    if image.ndim not in (3, 4) or label.shape != image.shape[:1]:
        wanted = f"images [n h w] or [n h w c] and labels [n] in {where}"
        got = f"{image.shape} and {label.shape}"
        raise Refusal(message("load", wanted, got, "Reshape them."))
    if not label.size:
        wanted = f"at least one example in {where}"
        raise Refusal(message("load", wanted, "an empty split"))
    check_labels(where, label, classes)
    image = image[..., None] if image.ndim == 3 else image
    return Split(image, label.astype(np.int32))


def check_labels(where: str, label: np.ndarray, classes: int) -> None:
    """Raises unless the labels are integers in 0..classes - 1."""
    if not np.issubdtype(label.dtype, np.integer):
        wanted = f"integer labels in {where}"
        raise WrongType(message("load", wanted, str(label.dtype), "Convert them."))
    wrong = np.flatnonzero((label < 0) | (label >= classes))
    if wrong.size:
        wanted = f"labels in 0..{classes - 1} in {where}"
        got = (
            f"{label[wrong[0]]} at {wrong[0]} ({wrong.size} of {label.size} are wrong)"
        )
        raise Refusal(message("load", wanted, got, "Correct them."))


def stratified(label: AnyArray, count: int, seed: int) -> np.ndarray:
    """Sorted positions of `count` examples, each class by its share, rounded."""
    # RandomState, not Generator: its numbers are the same in every release of numpy.
    shuffled = np.random.RandomState(seed).permutation(len(label))
    # The k-th example of a class of m comes at (k + 1/2) / m. The first `count` of all
    # then hold round(m * share) of each class, and contain those of any smaller count.
    at = np.empty(len(label))
    for one in np.unique(label):
        members = np.flatnonzero(label[shuffled] == one)
        at[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.sort(shuffled[np.argsort(at, kind="stable")[:count]])


def carved(name: str, split: Split, count: int, seed: int) -> tuple[Split, Split]:
    """Holds out `count` examples as the split `name`; returns it and the rest."""
    if not 0 < count < split.n:
        wanted = f"at least one example in {name} and in train"
        got = f"{count} and {split.n - count}"
        raise Refusal(message("load", wanted, got, "The set is too small to cut."))
    chosen = stratified(split.label, count, seed)
    rest = np.setdiff1d(np.arange(split.n), chosen)
    return split.read(chosen), split.read(rest)
