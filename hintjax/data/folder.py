"""A folder of images, as people have them: with a folder for each class, or without.

Every file is decoded once, before training, so a file that is damaged is found there.
"""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from hintjax._checks import FileRefusal, Refusal, message
from hintjax.data.images import UNLABELED, Split
from hintjax.data.records import ONE_SHAPE, cropped, optional_module, pillow

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


class _Decoded(NamedTuple):
    """The images of a split, and for each damaged file the reason by its position."""

    image: UInt8[np.ndarray, "n h w 3"]
    damaged: Mapping[int, str]


def image_folder(
    root: Path, size: int | None, most: int
) -> tuple[dict[str, Split], list[str]]:
    """The splits and class names of a folder of images, decoded to RGB.

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
        most: bytes that all decoded images may take together.

    Returns:
        The splits by name, and the names of the classes; none if there are no labels.

    Raises:
        Refusal: if there are no images, if images are found both beside the folders of
            classes and in them, if sizes differ, if the images take too many bytes, or
            if more than one file in a hundred (and more than one) is damaged.
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
        key: [root.joinpath(*file.path) for file in files]
        for key, files in found.items()
    }
    shape = (size, size, 3) if size is not None else _shape(paths["train"])
    total = sum(map(len, paths.values()))
    nbytes = total * int(np.prod(shape))
    if nbytes > most:
        wanted = f"images that take up to {most} bytes together"
        got = f"{total} images of {shape}, {nbytes} bytes, in {root}"
        do = "Give a smaller size (--size), or prepare them with TensorFlow Datasets."
        raise Refusal(message("load", wanted, got, do))
    decoded = {key: _decoded(root, each, size, shape) for key, each in paths.items()}
    _check_damaged(root, paths, decoded)
    return {key: _split(decoded[key], labels[key]) for key in found}, names


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


def _shape(paths: Sequence[Path]) -> tuple[int, ...]:
    """The shape of the first image that can be read."""
    for path in paths:
        pixels = _pixels(path, None)
        if not isinstance(pixels, str):
            return pixels.shape
    wanted = f"an image ({_KINDS}) that can be read"
    raise Refusal(message("load", wanted, f"{len(paths)} damaged files"))


def _decoded(
    root: Path, paths: Sequence[Path], size: int | None, shape: tuple[int, ...]
) -> _Decoded:
    """Decodes files on all cores; the result does not depend on their number."""
    image = np.zeros((len(paths), *shape), np.uint8)

    def read(at: int) -> str | tuple[int, ...] | None:
        pixels = _pixels(paths[at], size)
        if isinstance(pixels, str) or pixels.shape != shape:
            return pixels if isinstance(pixels, str) else pixels.shape
        image[at] = pixels
        return None

    damaged = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for at, found in enumerate(pool.map(read, range(len(paths)))):
            if isinstance(found, tuple):
                pool.shutdown(wait=False, cancel_futures=True)
                name = _shown(paths[at].relative_to(root).parts)
                got = f"{shape} and {found} ({name}) in {root}"
                do = "Give the size to which all are scaled, e.g. size=224 (--size)."
                raise Refusal(message("load", ONE_SHAPE, got, do))
            if found is not None:
                damaged[at] = found
    return _Decoded(image, damaged)


def _pixels(path: Path, size: int | None) -> np.ndarray | str:
    """The pixels of a file, (h, w, 3); or the reason why it cannot be read."""
    try:
        with pillow().open(path) as image:
            turned = _rgb(_turned(image))
        return np.asarray(turned if size is None else cropped(turned, size))
    except ImportError:
        raise
    except Exception as error:  # noqa: BLE001 (decoders raise anything on damaged bytes)
        if path.is_file() and path.stat().st_size == 0:
            return "an empty file"
        if isinstance(error, pillow().UnidentifiedImageError):
            return "no image"
        return f"{error}" or type(error).__name__


def _turned(image: Any) -> Any:
    """An image as its EXIF entry says; as it is, if the entry is damaged."""
    image.load()
    try:
        return optional_module("PIL.ImageOps").exif_transpose(image)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, ArithmeticError):
        return image


def _rgb(image: Any) -> Any:
    """An image in RGB, transparent pixels over white."""
    if image.mode.startswith("I"):  # Pillow would cut numbers above 255
        numbers = np.asarray(image).astype(np.int32) // 257
        image = pillow().fromarray(numbers.clip(0, 255).astype(np.uint8))
    if image.mode == "F":
        raise Refusal(message("load", "integers as pixels", "floats"))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or (
        "transparency" in image.info
    ):
        image = image.convert("RGBA")
        white = pillow().new("RGBA", image.size, (255, 255, 255, 255))
        image = pillow().alpha_composite(white, image)
    return image.convert("RGB")


def _check_damaged(
    root: Path,
    paths: Mapping[str, Sequence[Path]],
    decoded: Mapping[str, _Decoded],
) -> None:
    """Warns of damaged files, which are left out; refuses many."""
    damaged = [
        f"{_shown(paths[key][at].relative_to(root).parts)} ({reason})"
        for key, one in decoded.items()
        for at, reason in one.damaged.items()
    ]
    if not damaged:
        return
    total = sum(map(len, paths.values()))
    some = ", ".join(damaged[:_NAMED]) + (", ..." if len(damaged) > _NAMED else "")
    got = f"{len(damaged)} of {total}: {some}"
    allowed = max(1, total // _DAMAGED)
    if len(damaged) > allowed or len(damaged) == total:
        wanted = f"at most {allowed} damaged files in {root}"
        raise FileRefusal(message("load", wanted, got, "Mend or remove them."))
    warnings.warn(f"damaged files of {root} are left out, {got}", stacklevel=4)


def _split(decoded: _Decoded, label: np.ndarray) -> Split:
    """The split of the files that could be read."""
    if not decoded.damaged:
        return Split(decoded.image, label)
    good = np.setdiff1d(np.arange(len(label)), list(decoded.damaged))
    return Split(decoded.image[good], label[good])


def _shown(path: Parts) -> str:
    """A path for a message, with control characters escaped."""
    return repr("/".join(path))
