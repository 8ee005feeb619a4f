"""Checks of images and labels, and splits cut by class."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from hintjax._checks import Refusal, WrongType, message
from hintjax.data.images import AnyArray, Split

Range = Literal["0..1", "0..255"]
_TOPS = {"0..1": 1, "0..255": 255}


def checked_split(
    where: str,
    image: np.ndarray,
    label: np.ndarray,
    classes: int,
    range: Range | None = None,
) -> Split:
    """A Split of arrays that are checked first."""
    _check_shapes(where, image, label)
    image = _pixels(where, image, range)
    check_labels(where, label, classes)
    image = image[..., None] if image.ndim == 3 else image
    return Split(image, label.astype(np.int32))


def _check_shapes(where: str, image: np.ndarray, label: np.ndarray) -> None:
    """Raises unless there are images, channels last, and one label for each."""
    check_label_shape(where, label)
    n = len(label)
    got = f"{image.shape} and {label.shape}"
    if image.ndim not in (3, 4) or len(image) != n:
        do = "Save the images and their labels in the same order."
        if image.ndim in (3, 4) and image.shape[-1] == n:
            do = "Save np.moveaxis(image, -1, 0) instead."
        elif image.ndim == 2 and len(image) == n:
            do = "Save image.reshape(n, height, width, channels) instead."
        elif image.ndim > 4 and len(image) == n:
            do = "Only images are read: save one slice or frame for each example."
        wanted = f"images [n h w] or [n h w c] and labels [n] in {where}"
        raise Refusal(message("load", wanted, got, do))
    if not n:
        wanted = f"at least one example in {where}"
        raise Refusal(message("load", wanted, "an empty split"))
    if not image.size:
        wanted = f"images of one pixel or more in {where}"
        raise Refusal(message("load", wanted, f"{image.shape}"))
    # No image is 1 or 3 pixels high and wider, with more than four channels.
    if image.ndim == 4 and image.shape[1] in (1, 3) and min(image.shape[2:]) > 4:
        wanted = f"images [n h w c], with channels last, in {where}"
        do = "Save image.transpose(0, 2, 3, 1) instead."
        raise Refusal(message("load", wanted, f"{image.shape}", do))


def check_label_shape(where: str, label: np.ndarray) -> None:
    """Raises unless there is one number for each image."""
    if label.ndim == 1:
        return
    got, do = f"{label.shape}", "Save one class for each image."
    if label.ndim == 2 and label.shape[1] == 1:
        do = "Save label[:, 0] instead."
    elif label.ndim == 2 and ((label != 0).sum(-1) == 1).all():
        got, do = f"one-hot labels {label.shape}", "Save label.argmax(-1) instead."
    elif label.ndim == 2 and label.dtype.kind == "f":
        do = "If they are probabilities, save label.argmax(-1) instead."
    raise Refusal(message("load", f"labels [n] in {where}", got, do))


def _pixels(where: str, image: np.ndarray, range: Range | None) -> np.ndarray:
    """Images as uint8; numbers of another type are converted from their range."""
    if image.dtype == np.uint8 and range in (None, "0..255"):
        return image
    if image.dtype.kind not in "buif":
        wanted = f"uint8 pixels in {where}"
        raise WrongType(message("load", wanted, str(image.dtype), "Convert them."))
    low, high = image.min(), image.max()
    if not np.isfinite([low, high]).all():
        wanted = f"finite pixels in {where}"
        do = "Leave these images out, or replace the numbers."
        raise Refusal(message("load", wanted, f"{image.dtype} with NaN or inf", do))
    fits = [name for name, top in _TOPS.items() if low >= 0 and high <= top]
    seen = f"{image.dtype} between {low:g} and {high:g}"
    do = "Undo the standardization, so that they lie in 0..1 or 0..255."
    if image.dtype.kind in "ui":
        do = "Scale them, e.g. 16 bits with (image // 257).astype(np.uint8)."
    if range is None:
        if fits:
            by = "255 * image" if fits[0] == "0..1" else "image"
            do = (
                f"Save np.round({by}).astype(np.uint8) instead, or pass "
                f"range={fits[0]!r} (--range {fits[0]})."
            )
        raise WrongType(message("load", f"uint8 pixels in {where}", seen, do))
    # Rounded from 0..255, fractions of 1 would leave two values: black, and 1 of 255.
    fractions = range == "0..255" and 0 < high <= 1 and image.dtype.kind == "f"
    if range not in fits or fractions:
        wanted = f"pixels in {range} in {where}"
        do = f"Pass range={fits[0]!r} (--range {fits[0]})." if fits else do
        raise Refusal(message("load", wanted, seen, do))
    scale = 255 // _TOPS[range]
    return np.round(image.astype(np.float32) * scale).astype(np.uint8)


def check_labels(where: str, label: np.ndarray, classes: int) -> None:
    """Raises unless the labels are integers in 0..classes - 1."""
    if not np.issubdtype(label.dtype, np.integer):
        wanted, got = f"integer labels in {where}", str(label.dtype)
        do = "Save label.astype(int) instead."
        if label.dtype.kind not in "bf":
            do = "Save np.unique(label, return_inverse=True)[1] instead."
        elif (odd := label[label != np.trunc(label)]).size:  # also NaN and fractions
            got = f"{got} with {odd[0]:g}"
            do = "The command trains classifiers: save one class for each image."
        raise WrongType(message("load", wanted, got, do))
    wrong = np.flatnonzero((label < 0) | (label >= classes))
    if wrong.size:
        wanted = f"labels in 0..{classes - 1} in {where}"
        got = (
            f"{label[wrong[0]]} at {wrong[0]} ({wrong.size} of {label.size} are wrong)"
        )
        raise Refusal(message("load", wanted, got, "Correct them."))


def numbered(
    where: str, labels: Sequence[np.ndarray]
) -> tuple[list[np.ndarray], list[int]]:
    """Numbers the classes that occur in the labels from 0.

    The ids 0, 1, ..., k - 1 stay as they are. Other ids, such as 3, 10, 57 and 200, get
    the numbers 0, 1, ..., k - 1 in their order.

    Args:
        where: place of the labels, for a message.
        labels: labels of each split, as integers.

    Returns:
        The numbers of each split, and the id of each class.

    Raises:
        Refusal: if an id is negative, also if it was saved as unsigned.
    """
    signed = [one.astype(np.int64) for one in labels]
    ids = np.unique(np.concatenate([one.ravel() for one in signed]))
    if np.array_equal(ids, np.arange(len(ids))):
        return list(labels), ids.tolist()
    unsigned = [
        f"{one.max()}, which is -1 as {one.dtype}"
        for one in labels
        if one.dtype.kind == "u" and (one == np.iinfo(one.dtype).max).any()
    ]
    if unsigned or ids[0] < 0:
        wanted, got = f"labels >= 0 in {where}", [*unsigned, f"{ids[0]}"][0]
        do = "Leave out the examples without a class, or give them a class."
        raise Refusal(message("load", wanted, got, do))
    return [np.asarray(np.searchsorted(ids, one)) for one in signed], ids.tolist()


def stratified(label: AnyArray, count: int, seed: int) -> np.ndarray:
    """Sorted positions of `count` examples, each class by its share, rounded.

    Examples whose label is not one class are drawn as if they were of one class.
    """
    one_class = label.dtype.kind in "ui" and label.size == len(label)
    label = label.reshape(-1) if one_class else np.zeros(len(label), np.int32)
    # RandomState, not Generator: its numbers are the same in every release of numpy.
    shuffled = np.random.RandomState(seed).permutation(len(label))
    # The k-th example of a class of m comes at (k + 1/2) / m. The first `count` of all
    # then hold round(m * share) of each class, and contain those of any smaller count.
    at = np.empty(len(label))
    for one in np.unique(label):
        members = np.flatnonzero(label[shuffled] == one)
        at[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.sort(shuffled[np.argsort(at, kind="stable")[:count]])


def carved(
    name: str, label: AnyArray, count: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of `count` examples that are held out, and of the rest.

    Args:
        name: the name of the new split, for a message.
        label: the labels of all examples.
        count: the number of examples to hold out.
        seed: the seed of the draw.
    """
    n = len(label)
    if not 0 < count < n:
        wanted = f"at least one example in {name} and in train"
        got = f"{count} and {n - count}"
        raise Refusal(message("load", wanted, got, "The set is too small to cut."))
    chosen = stratified(label, count, seed)
    return chosen, np.setdiff1d(np.arange(n), chosen)
