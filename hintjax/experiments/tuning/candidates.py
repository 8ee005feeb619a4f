"""Candidates: the settings that `hintjax tune` tries, and how long each one trains.

A name with listed values gives a grid. A name with a range gives random draws. In
successive halving all candidates train for a short time, the better half of them trains
on, and so forth.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from hintjax._checks import Refusal, described, message, positive_int
from hintjax.experiments.config import SETTINGS, parse_setting, setting_text

Candidate = dict[str, Any]  # values by the name of a setting


class Over(NamedTuple):
    """The values of one setting.

    Attributes:
        name: name of the setting; see `config.SETTINGS`.
        values: the values, or the lowest and the highest.
        between: whether values are drawn between the two.
    """

    name: str
    values: tuple[Any, ...]
    between: bool = False


def parse_over(text: str) -> Over:
    """Reads the values of a setting: listed by commas, or as a range.

    >>> parse_over("weight=1..1000")
    Over(name='weight', values=(1.0, 1000.0), between=True)
    >>> parse_over("temperature=2,4")
    Over(name='temperature', values=(2.0, 4.0), between=False)
    """
    name, equal, values = text.partition("=")
    if not (name and equal and values):
        wanted = "name=value,value or name=lowest..highest"
        raise Refusal(message("tune", wanted, described(text)))
    low, dots, high = values.partition("..")
    if not dots or name == "pairs":
        listed = [parse_setting(name, value) for value in values.split(",")]
        return Over(name, tuple(dict.fromkeys(listed)))
    ends = parse_setting(name, low), parse_setting(name, high)
    if SETTINGS[name] is not float:
        do = "List its values, separated by commas."
        raise Refusal(message("tune", f"no range of {name}", described(values), do))
    if not 0 < ends[0] < ends[1]:
        wanted = f"a range of {name} from a number > 0 to a larger number"
        do = "List a 0 as a value of its own."
        raise Refusal(message("tune", wanted, described(values), do))
    return Over(name, ends, between=True)


def candidates(overs: Sequence[Over], number: int, seed: int) -> list[Candidate]:
    """All combinations of listed values; random draws if there is a range.

    A range is drawn evenly in the logarithm, one value in each of `number` equal parts.

    Args:
        overs: the values of each setting.
        number: number of draws.
        seed: seed of the draws.

    Returns:
        The candidates, each of them once.
    """
    positive_int("tune", candidates=number)
    names = [over.name for over in overs]
    if len({*names}) < len(names):
        raise Refusal(message("tune", "each name once", f"{names}"))
    if not any(over.between for over in overs):
        rows = itertools.product(*(over.values for over in overs))
    else:
        random = np.random.default_rng(seed)
        columns = [_drawn(over, number, random) for over in overs]
        rows = zip(*columns, strict=True)
    unique = dict.fromkeys(rows)
    return [dict(zip(names, row, strict=True)) for row in unique]


def _drawn(over: Over, number: int, random: np.random.Generator) -> list[Any]:
    """Values of one setting in random order, evenly spread."""
    order = random.permutation(number)
    if not over.between:
        return [over.values[i % len(over.values)] for i in order]
    low, high = np.log(over.values)
    values = np.exp(low + (high - low) * (order + random.random(number)) / number)
    return [float(f"{value:.3g}") for value in values]  # as they are printed


class Rung(NamedTuple):
    """One part of successive halving.

    Attributes:
        candidates: number of candidates that train up to here.
        part: part of the epochs that they have then.
    """

    candidates: int
    part: float

    def epochs(self, epochs: int) -> int:
        """The epochs at the end of the rung.

        >>> Rung(4, 0.5).epochs(9)
        5
        """
        return max(1, int(np.ceil(self.part * epochs)))


def rungs(number: int, epochs: int, most: int | None = None) -> list[Rung]:
    """Successive halving: each rung has half of the candidates, and twice the epochs.

    Args:
        number: number of candidates.
        epochs: epochs of a candidate that trains to the end.
        most: largest number of rungs; with 1 all candidates train to the end.

    Returns:
        The rungs; the last one has all epochs.

    References:
        Jamieson and Talwalkar 2016, Non-stochastic Best Arm Identification and
        Hyperparameter Optimization.

    >>> [(rung.candidates, rung.epochs(9)) for rung in rungs(16, 9)]
    [(16, 2), (8, 3), (4, 5), (2, 9)]
    """
    if most is not None:
        positive_int("tune", rungs=most)
    halvings = min(number.bit_length(), epochs.bit_length(), most or number) - 1
    return [
        Rung(max(1, number >> rung), 0.5 ** (halvings - rung))
        for rung in range(halvings + 1)
    ]


def text_of(candidate: Candidate) -> str:
    """A candidate as text.

    >>> text_of({"weight": 300.0, "pairs": ("a=b", "c=d")})
    'weight=300 pairs=a=b+c=d'
    """
    return " ".join(setting_text(*one) for one in candidate.items())


def texts_of(candidate: str) -> dict[str, str]:
    """The values of a candidate as texts, by name, from its text.

    >>> texts_of("weight=300 pairs=a=b+c=d")
    {'weight': '300', 'pairs': 'a=b+c=d'}
    """
    parts = (one.partition("=") for one in candidate.split())
    return {name: text for name, _, text in parts}


def candidate_of(text: str) -> Candidate:
    """The candidate of a text; the inverse of `text_of`.

    >>> candidate_of("weight=300 pairs=a=b+c=d")
    {'weight': 300.0, 'pairs': ('a=b', 'c=d')}
    """
    return {name: parse_setting(name, one) for name, one in texts_of(text).items()}
