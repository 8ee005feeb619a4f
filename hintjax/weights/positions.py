"""Position embeddings of vision transformers at another resolution."""

import math

import numpy as np

from hintjax._checks import Refusal, described, message, sizes


def resample_positions(
    positions: np.ndarray, grid: tuple[int, int], class_tokens: int = 1
) -> np.ndarray:
    """Resamples learned positions of patches to another grid, by bicubic interpolation.

    The positions of the class tokens come first, and stay as they are. The positions of
    the patches are a square map, whose axes are resampled one after the other. Along an
    axis, m positions p become n positions q:

    q_i = sum_j w_ij p_j / sum_j w_ij,  w_ij = k((x_i - j) / s)
    x_i = (i + 1/2) m / n - 1/2,  s = max(1, m / n)

    with the cubic kernel of Keys for a = -1/2,

    k(t) = (3 |t|^3 - 5 |t|^2 + 2) / 2            for |t| <= 1
    k(t) = (-|t|^3 + 5 |t|^2 - 8 |t| + 4) / 2     for 1 < |t| < 2
    k(t) = 0                                      elsewhere

    This is torch's `interpolate(mode="bicubic", antialias=True)`, as timm resamples
    positions. torchvision's `interpolate_embeddings` aligns the corners instead.

    Args:
        positions: learned positions as [1, class tokens + m * m, width].
        grid: height and width of the new grid, in patches.
        class_tokens: number of tokens before the patches; 2 for DeiT.

    Returns:
        Positions as [1, class tokens + height * width, width], of the same dtype.

    Raises:
        Refusal: if the positions of the patches are not a square map.

    >>> resample_positions(np.ones((1, 1 + 14 * 14, 192), np.float32), (24, 16)).shape
    (1, 385, 192)

    References:
        Keys, Cubic convolution interpolation for digital image processing, 1981.
        huggingface/pytorch-image-models, timm/layers/pos_embed.py.
    """
    sizes("resample_positions", 2, grid=grid)
    known = positions.ndim == 3 and len(positions) == 1
    side = side_of(positions.shape[1], class_tokens) if known else None
    if side is None:
        wanted = f"positions [1, {class_tokens} + m * m, width]"
        raise Refusal(message("resample_positions", wanted, described(positions)))
    first, patches = np.split(positions[0].astype(np.float64), [class_tokens])
    rows, columns = (_weights(side, new) for new in grid)
    square = patches.reshape(side, side, -1)
    patches = np.einsum("hm,wn,mnc->hwc", rows, columns, square, optimize=True)
    found = np.concatenate([first, patches.reshape(-1, first.shape[-1])])
    return found[None].astype(positions.dtype)


def side_of(tokens: int, class_tokens: int) -> int | None:
    """The side of a square grid of patches; None if the tokens are no square grid."""
    patches = tokens - class_tokens
    side = math.isqrt(max(0, patches))
    return side if side and side * side == patches else None


def _weights(old: int, new: int) -> np.ndarray:
    """The weights of the old positions along an axis, [new old]; each row sums to 1."""
    center = (np.arange(new)[:, None] + 0.5) * old / new - 0.5
    t = np.abs(center - np.arange(old)) / max(1.0, old / new)
    near = (3 * t**3 - 5 * t**2 + 2) / 2
    far = (-(t**3) + 5 * t**2 - 8 * t + 4) / 2
    weights = np.where(t <= 1, near, np.where(t < 2, far, 0.0))
    return weights / weights.sum(axis=1, keepdims=True)
