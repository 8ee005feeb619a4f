"""Mean, spread and paired differences over seeds, with their intervals."""

import math
from collections.abc import Sequence
from typing import NamedTuple, SupportsFloat

import numpy as np

from hintjax._checks import Refusal, message

Numbers = Sequence[SupportsFloat] | np.ndarray


class Summary(NamedTuple):
    """The mean of one value per seed, with its 95 % t-interval."""

    count: int
    mean: float
    std: float
    low: float
    high: float


class Paired(NamedTuple):
    """The mean of the differences a - b over the same seeds, with its 95 % t-interval.

    `told_apart` is whether the interval leaves out 0, and `verdict` says it in words.
    """

    count: int
    mean: float
    std: float
    low: float
    high: float
    told_apart: bool
    verdict: str


def summary(values: Numbers) -> Summary:
    r"""Mean, sample standard deviation and 95 % t-interval of one value per seed.

    $$\bar x \pm t_{0.975,\,n-1}\, s / \sqrt{n}$$

    Args:
      values: one finite number per seed, at least one.

    Returns:
      A `Summary`. The spread of one value is unknown: std is nan, and the interval is
      the whole line.

    >>> [round(x, 3) for x in summary([0.90, 0.92, 0.94])]
    [3, 0.92, 0.02, 0.87, 0.97]
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or values.size == 0:
        raise Refusal(
            message(
                "summary",
                "one number per seed",
                f"shape {values.shape}",
                "Pass a non-empty list of numbers.",
            )
        )
    count, mean = values.size, float(values.mean())
    if count == 1:
        return Summary(1, mean, math.nan, -math.inf, math.inf)
    std = float(values.std(ddof=1))
    half = _t_quantile(count - 1) * std / math.sqrt(count)
    return Summary(count, mean, std, mean - half, mean + half)


def paired(a: Numbers, b: Numbers) -> Paired:
    """Compares two arms by their differences over the same seeds.

    The effect of a seed on both arms cancels, so fewer seeds tell two arms apart.

    Args:
      a: one number per seed.
      b: the numbers of the other arm, for the same seeds in the same order.

    Returns:
      A `Paired`; its verdict is "higher", "lower" or "cannot be told apart" (the
      interval contains 0, as it always does with one seed).

    >>> paired([0.95, 0.96, 0.94], [0.90, 0.92, 0.88]).verdict
    'higher'
    >>> paired([0.95, 0.91, 0.94], [0.90, 0.92, 0.95]).verdict
    'cannot be told apart'
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise Refusal(
            message(
                "paired",
                "the same seeds in both arms",
                f"shapes {a.shape} and {b.shape}",
                "Compare the seeds that both arms have.",
            )
        )
    result = summary(a - b)
    # Written so that nan falls on the careful side.
    told_apart = result.low > 0 or result.high < 0
    verdict = "higher" if result.mean > 0 else "lower"
    return Paired(*result, told_apart, verdict if told_apart else _UNDECIDED)


def proportion(right: int, count: int) -> tuple[float, float]:
    r"""Wilson's 95 % interval of a proportion, such as an accuracy.

    $$\frac{p + z^2/2n \pm z\sqrt{p(1-p)/n + z^2/4n^2}}{1 + z^2/n}$$

    It says how far the accuracy on other examples may be from this one. It does not
    say how much another seed would change it.

    Args:
      right: number of examples that are right.
      count: number of examples, at least one.

    Returns:
      The ends of the interval, in [0, 1].

    >>> [round(end, 3) for end in proportion(90, 100)]
    [0.826, 0.945]

    References:
        Wilson 1927, Probable Inference, the Law of Succession, and Statistical
        Inference.
    """
    if not 0 <= right <= count or count < 1:
        wanted = "right examples among at least one example"
        raise Refusal(message("proportion", wanted, f"{right} of {count}"))
    z, p = 1.959964, right / count
    middle, scale = p + z**2 / (2 * count), 1 + z**2 / count
    half = z * math.sqrt(p * (1 - p) / count + z**2 / (4 * count**2))
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


_UNDECIDED = "cannot be told apart"
# Student's t at 0.975 for 1 to 9 degrees of freedom.
_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)


def _t_quantile(freedom: int) -> float:
    """Student's t at 0.975: a table, then Cornish and Fisher's expansion (to 1e-4)."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = 1.959964
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
