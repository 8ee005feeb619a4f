"""Mean and standard deviation of each channel."""

from typing import Any

import numpy as np

from hintjax.data.files import Files, Source
from hintjax.data.images import Standardize
from hintjax.data.records import CHUNK, Records

_CHUNK_BYTES = 2**26  # bytes of decoded images that are counted at a time


def statistics(source: Source, *, sample: int = 4096) -> Standardize:
    """Mean and standard deviation of each channel, of pixels in [0, 1].

    Args:
      source: the training split. Records are sampled; a Split and Files are counted
        whole.
      sample: the number of examples, evenly spaced, that are decoded from Records.

    Returns:
      Standardize. A channel that never changes has 1/255, so that it becomes 0.

    >>> from hintjax.data import Split
    >>> image = np.zeros((2, 1, 1, 1), np.uint8)
    >>> image[1] = 255
    >>> statistics(Split(image, np.zeros(2, np.int32)))
    Standardize(mean=array([0.5], dtype=float32), std=array([0.5], dtype=float32))
    """
    if isinstance(source, Files):
        return _from_sums(source.n * np.prod(source.shape[:2]), *source.sums.sum(0))
    n = min(sample, source.n) if isinstance(source, Records) else source.n
    at = np.linspace(0, source.n - 1, n).astype(int)  # each once, if all are counted
    size = max(1, min(CHUNK, _CHUNK_BYTES // int(np.prod(source.shape))))
    # Counting the 256 values is exact, and four times faster than summing floats.
    counts = np.zeros((source.shape[-1], 256))
    for start in range(0, n, size):
        chunk = source.read(at[start : start + size]).image
        for channel, count in enumerate(counts):
            count += np.bincount(chunk[..., channel].ravel(), minlength=256)
    value = np.arange(256)
    return _from_sums(counts[0].sum(), counts @ value, counts @ value**2)


def _from_sums(n: Any, total: np.ndarray, squares: np.ndarray) -> Standardize:
    """The statistics of n pixels from their sums for each channel, which are exact.

    So images in memory and images in files have the same statistics to the last bit.
    """
    mean = total / n / 255
    std = np.sqrt(np.maximum(squares / n / 255**2 - mean**2, 0.0))
    std = np.where(std > 1e-6, std, 1 / 255)
    return Standardize(mean.astype(np.float32), std.astype(np.float32))


def standardized(xp: Any, image: Any, standardize: Standardize) -> Any:
    """(image / 255 - mean) / std, with jax.numpy and numpy alike."""
    mean, std = (xp.asarray(x, dtype=xp.float32) for x in standardize)
    return (image.astype(xp.float32) / xp.float32(255) - mean) / std
