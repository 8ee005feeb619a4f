"""Image files: their pixels in RGB, and a split that decodes them when it is read."""

import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, Int64, Integer, UInt32

from hintjax._checks import FileRefusal, Refusal, message
from hintjax.data.images import AnyArray, Split
from hintjax.data.records import Records, cropped, optional_module, pillow

_AT_A_TIME = 256  # files that are given to the threads


class Files(NamedTuple):
    """The images of one split in files, decoded when they are read. Made by `load`.

    `load` has decoded every file once. So the sums of the pixels are exact, a damaged
    file is not among them, and a file that has changed since then is refused.

    Attributes:
        root: the folder.
        path: the path of each file below the folder.
        label: the class of each image, or -1.
        shape: the shape of every image, [h w 3].
        size: images are scaled and cropped at the center to size x size. None keeps
            them.
        sums: for each image and channel, the sum of the pixels and of their squares.
        checksum: the CRC-32 of the pixels of each image.
    """

    root: Path
    path: np.ndarray
    label: Int32[np.ndarray, " n"]
    shape: tuple[int, ...]
    size: int | None
    sums: Int64[np.ndarray, "n 2 3"]
    checksum: UInt32[np.ndarray, " n"]

    @property
    def n(self) -> int:
        """The number of examples."""
        return len(self.label)

    def part(self, index: Sequence[int] | Integer[AnyArray, " batch"]) -> "Files":
        """The split of the examples at these positions."""
        at = np.asarray(index)
        path, label = self.path[at], self.label[at]
        sums, checksum = self.sums[at], self.checksum[at]
        return self._replace(path=path, label=label, sums=sums, checksum=checksum)

    def labels(
        self, index: Sequence[int] | Integer[AnyArray, " batch"]
    ) -> Int32[np.ndarray, " batch"]:
        """The labels at these positions, without decoding an image."""
        return self.label[np.asarray(index)]

    def read(self, index: Sequence[int] | Integer[AnyArray, " batch"]) -> Split:
        """The examples at these positions, decoded on all cores.

        Raises:
            FileRefusal: if a file cannot be read any more, or has other pixels.
        """
        some = self.part(index)
        image = np.zeros((some.n, *self.shape), np.uint8)

        def keep(at: int, pixels: np.ndarray) -> str | None:
            if pixels.shape != self.shape or _checksum(pixels) != some.checksum[at]:
                return "other pixels"
            image[at] = pixels
            return None

        for at, reason in decode(self.root, some.path, self.size, keep).items():
            wanted = f"the file {some.path[at]!r} of {self.root} as it was at the start"
            do = "Restore it; or leave it out, and start again."
            raise FileRefusal(message("load", wanted, reason, do))
        return Split(image, some.label)


Source = Split | Records | Files
"""A split in memory or on disk, with `n`, `shape`, `read(index)`, `labels(index)`."""

See = Callable[[int, np.ndarray], str | None]


def noted(
    root: Path,
    path: np.ndarray,
    label: Int32[np.ndarray, " n"],
    shape: tuple[int, ...],
    size: int | None,
) -> tuple[Files, See]:
    """A split whose sums and checksums are 0, and the function that notes them.

    Args:
        root: the folder.
        path: the path of each file below the folder.
        label: the class of each image.
        shape: the shape of every image.
        size: the height and width to which images are scaled, or None.
    """
    sums = np.zeros((len(path), 2, 3), np.int64)
    checksum = np.zeros(len(path), np.uint32)

    def note(at: int, pixels: np.ndarray) -> None:
        values = pixels.reshape(-1, 3).astype(np.int64)
        sums[at] = values.sum(0), (values * values).sum(0)
        checksum[at] = _checksum(pixels)

    return Files(root, path, label, shape, size, sums, checksum), note


def _checksum(pixels: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(pixels).data)


def decode(root: Path, path: np.ndarray, size: int | None, see: See) -> dict[int, str]:
    """Decodes files on all cores; the result does not depend on their number.

    Args:
        root: the folder.
        path: the path of each file below the folder.
        size: the height and width to which images are scaled, or None.
        see: `(position, pixels) -> problem or None`, called by threads in any order.

    Returns:
        For the position of each file with a problem, or that cannot be read, the
        reason.
    """

    def one(at: int) -> str | None:
        found = pixels(root / path[at], size)
        return found if isinstance(found, str) else see(at, found)

    problems = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(path), _AT_A_TIME):
            part = range(start, min(start + _AT_A_TIME, len(path)))
            for at, problem in zip(part, pool.map(one, part), strict=True):
                if problem is not None:
                    problems[at] = problem
    return problems


def pixels(path: Path, size: int | None) -> np.ndarray | str:
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
