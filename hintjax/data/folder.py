"""A folder of images, as people have them: with a folder for each class, or without.

Every file is decoded once, before training, so a file that is damaged is found there.
The images are kept in memory if they fit; otherwise they are decoded again for every
batch.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hintjax._checks import FileRefusal, Refusal, message
from hintjax.data.files import Files, See, decode, noted, pixels
from hintjax.data.images import UNLABELED, Split
from hintjax.data.records import ONE_SHAPE

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_KINDS = "JPEG, PNG, WebP or BMP"
_DAMAGED = 100  # one file in this many may be unreadable, and one file in any folder
_NAMED = 5  # files that a message names
_SPLITS = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}
Parts = tuple[str, ...]  # of the path of a file, below the folder


def image_folder(
    root: Path, size: int | None, most: int
) -> tuple[dict[str, Split | Files], list[str]]:
    """The splits and class names of a folder of images in RGB.

    Files are taken in the order of their names. Each class has a folder of its own,
    in which files may be nested. Without two such folders there are no labels, and
    every label is -1. If all folders have the names of splits (train, val, test),
    each of them is read like that. A split without labels beside labels is left out,
    and a validation split without a test split becomes the test split.

    Images are turned as their EXIF entry says; of an animation the first frame is read;
    transparent pixels are laid over white; numbers of 16 bits are divided by 257; CMYK
    and palettes become RGB. Files whose names start with a dot are left out.

    Args:
        root: the folder.
        size: images are scaled and cropped at the center to size x size. None keeps
            them, and they must have one shape.
        most: bytes that all decoded images may take together in memory.

    Returns:
        The splits by name, and the names of the classes; none if there are no labels.
        Images that take more bytes than `most` stay in their files.

    Raises:
        Refusal: if there are no images, if images are found both beside the folders of
            classes and in them, if sizes differ, or if more than one file in a hundred
            (and more than one) is damaged.
    """
    found = _by_split(root, [*_files(root)])
    names = _classes(root, found["train"])
    if names:
        found = {
            key: files
            for key, files in found.items()
            if key == "train" or _classes(root, files)
        }
    if "validation" in found and "test" not in found:
        found["test"] = found.pop("validation")
    labels = {key: _labels(root, key, files, names) for key, files in found.items()}
    paths = {
        key: np.array(["/".join(file.path) for file in files], object)
        for key, files in found.items()
    }
    shape = (size, size, 3) if size is not None else _shape(root, paths["train"])
    total = sum(map(len, paths.values()))
    memory = total * int(np.prod(shape)) <= most
    read = {
        key: _read(root, path, labels[key], size, shape, memory=memory)
        for key, path in paths.items()
    }
    _check_damaged(root, [name for one in read.values() for name in one.damaged], total)
    return {key: one.split for key, one in read.items()}, names


class _File(NamedTuple):
    """A file: its path below the root, and the part of it below its split."""

    path: Parts
    within: Parts


def _files(root: Path) -> Iterator[Parts]:
    """The files with images, links followed, without hidden ones."""
    seen = set()
    for folder, inside, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        # A link to a folder above would never end.
        inside[:] = [] if real in seen else [n for n in inside if n[0] != "."]
        if real in seen:
            continue
        seen.add(real)
        below = Path(folder).relative_to(root).parts
        for name in files:
            if name[0] != "." and name.lower().endswith(SUFFIXES):
                yield (*below, name)


def _by_split(root: Path, files: Sequence[Parts]) -> dict[str, list[_File]]:
    """The files of each split in order: of train alone, or as the folders say."""
    if not files:
        wanted = f"images ({_KINDS}) in the folder {root}"
        raise Refusal(message("load", wanted, "none", "Check the path."))
    tops = {path[0] if len(path) > 1 else "" for path in files}
    ordered = sorted(files)
    if not ("train" in tops and tops <= set(_SPLITS)):
        return {"train": [_File(path, path) for path in ordered]}
    named = [_SPLITS[top] for top in sorted(tops)]
    if len(set(named)) < len(named):
        wanted = f"one folder of each split in {root}"
        raise Refusal(message("load", wanted, ", ".join(sorted(tops))))
    splits: dict[str, list[_File]] = {}
    for path in ordered:
        splits.setdefault(_SPLITS[path[0]], []).append(_File(path, path[1:]))
    return splits


def _classes(root: Path, files: Sequence[_File]) -> list[str]:
    """The folders of classes in order; none without two of them."""
    names = sorted({file.within[0] for file in files if len(file.within) > 1})
    if len(names) < 2:
        return []
    alone = [file for file in files if len(file.within) == 1]
    if alone:
        wanted = f"each image of {root} in the folder of its class, or no folders"
        got = f"folders such as {names[0]!r} and, beside them, {_shown(alone[0].path)}"
        raise Refusal(message("load", wanted, got, "Move these images."))
    return names


def _labels(
    root: Path, key: str, files: Sequence[_File], names: Sequence[str]
) -> np.ndarray:
    """The class of each file; -1 without classes."""
    if not names:
        return np.full(len(files), UNLABELED, np.int32)
    number = {name: at for at, name in enumerate(names)}
    unknown = [file for file in files if file.within[0] not in number]
    if unknown:
        wanted = f"in {key} of {root} the classes of train"
        raise Refusal(message("load", wanted, f"{unknown[0].within[0]!r}, too"))
    return np.array([number[file.within[0]] for file in files], np.int32)


def _shape(root: Path, path: np.ndarray) -> tuple[int, ...]:
    """The shape of the first image that can be read."""
    for one in path:
        found = pixels(root / one, None)
        if not isinstance(found, str):
            return found.shape
    wanted = f"an image ({_KINDS}) that can be read"
    raise Refusal(message("load", wanted, f"{len(path)} damaged files"))


class _Read(NamedTuple):
    """A split of the files that could be read, and the other files with reasons."""

    split: Split | Files
    damaged: list[str]


def _read(
    root: Path,
    path: np.ndarray,
    label: np.ndarray,
    size: int | None,
    shape: tuple[int, ...],
    *,
    memory: bool,
) -> _Read:
    """Decodes every file once. The pixels are kept in memory, or noted."""
    if memory:
        image = np.zeros((len(path), *shape), np.uint8)
        split: Split | Files = Split(image, label)
        see: See = image.__setitem__
    else:
        split, see = noted(root, path, label, shape, size)

    def checked(at: int, found: np.ndarray) -> None:
        if found.shape != shape:
            got = f"{shape} and {found.shape} ({path[at]!r}) in {root}"
            do = "Give the size to which all are scaled, e.g. size=224 (--size)."
            raise Refusal(message("load", ONE_SHAPE, got, do))
        see(at, found)

    problems = decode(root, path, size, checked)
    damaged = [f"{path[at]!r} ({reason})" for at, reason in problems.items()]
    if damaged:
        split = split.part(np.setdiff1d(np.arange(len(path)), [*problems]))
    return _Read(split, damaged)


def _check_damaged(root: Path, damaged: Sequence[str], total: int) -> None:
    """Warns of damaged files, which are left out; refuses many."""
    if not damaged:
        return
    some = ", ".join(damaged[:_NAMED]) + (", ..." if len(damaged) > _NAMED else "")
    got = f"{len(damaged)} of {total}: {some}"
    allowed = max(1, total // _DAMAGED)
    if len(damaged) > allowed or len(damaged) == total:
        wanted = f"at most {allowed} damaged files in {root}"
        raise FileRefusal(message("load", wanted, got, "Mend or remove them."))
    warnings.warn(f"damaged files of {root} are left out, {got}", stacklevel=4)


def _shown(path: Parts) -> str:
    """A path for a message, with control characters escaped."""
    return repr("/".join(path))
