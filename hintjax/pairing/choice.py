"""Pairs of layers: by depth, or by measurement with the reason for each."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from hintjax._checks import instance, positive_int
from hintjax.pairing.layers import map_depths, nearest_in_depth

DEEPEST = 2 / 3  # the end of the middle third, where FitNets takes its layers
EXPLAINED = 0.9  # R^2 from which on a regressor needs no student to explain the hint
ALIKE = 0.98  # CKA from which on two layers say the same


class Candidate(NamedTuple):
    """What was measured of one pair.

    Attributes:
        guided: path of the guided layer, the student's layer of nearest depth.
        hint: path of the hint layer.
        guided_depth: depth of the guided layer, in (0, 1].
        depth: depth of the hint layer, in (0, 1].
        shape: shape of one example of the hint.
        cost: FLOPs of a step of the hint stage, as a part of the FLOPs of a step of
            both whole networks.
        regressor: number of parameters of the default regressor; None if none fits.
        probe: accuracy of a linear probe of the hint layer for the labels; None without
            labels.
        explained: R^2 with which an untrained guided layer explains the hint linearly.
    """

    guided: str
    hint: str
    guided_depth: float
    depth: float
    shape: tuple[int, ...]
    cost: float
    regressor: int | None
    probe: float | None
    explained: float


class Measured(NamedTuple):
    """What was measured of two networks; see `hintjax.pairing.measure`.

    Attributes:
        candidates: one for each hint layer in reach, from shallow to deep, and then the
            pairs that the user named.
        chance: accuracy of the most frequent label; None without labels.
        teacher: paths of the teacher's layers in `alike`.
        student: paths of the student's layers in `alike`.
        alike: CKA of each two layers, the layers of the teacher first.
    """

    candidates: tuple[Candidate, ...]
    chance: float | None
    teacher: tuple[str, ...]
    student: tuple[str, ...]
    alike: Float[np.ndarray, "layers layers"]


class Choice(NamedTuple):
    """A pair that was chosen, and the reason in one line."""

    guided: str
    hint: str
    reason: str


def suggest_pairs(
    student: Mapping[str, jax.ShapeDtypeStruct],
    teacher: Mapping[str, jax.ShapeDtypeStruct],
    *,
    count: int = 1,
    measured: Measured | None = None,
) -> tuple[tuple[str, str], ...]:
    """Pairs by depth: hints from the teacher's middle third; or pairs by measurement.

    Candidates are the feature maps (or tokens) at the outermost level of scopes
    that has at least three. A candidate's depth is its place among the candidates in
    the order of execution, from 0 (excluded) to 1 (the last). Hint layers are the
    teacher's candidates with a depth in (1/3, 2/3], the nearest to the middle first.
    Each guided layer is the student's candidate of nearest depth. FitNets uses one
    pair, in the middle.

    Args:
        student: `Network.layers` of the student.
        teacher: `Network.layers` of the teacher.
        count: the largest number of pairs.
        measured: the result of `hintjax.pairing.measure`; then the pairs are those
            of `choose`.

    Returns:
        (guided layer, hint layer) for each pair, from shallow to deep.

    Raises:
        ValueError: if a network has no feature maps, or `count` is below 1.

    >>> layer = jax.ShapeDtypeStruct((1, 8, 8, 4), "float32")
    >>> student = {f"conv{i}": layer for i in range(1, 21)}
    >>> teacher = {f"group{i}": layer for i in range(1, 4)}
    >>> suggest_pairs(student, teacher)
    (('conv13', 'group2'),)

    References:
        Romero et al. 2015, section 2.2: the middle layers.
    """
    positive_int("suggest_pairs", count=count)
    if measured is not None:
        instance("suggest_pairs", Measured, measured=measured)
        if chosen := choose(measured, count=count):
            return tuple((choice.guided, choice.hint) for choice in chosen)
    guided, hints = map_depths("student", student), map_depths("teacher", teacher)
    middle = {path: at for path, at in hints.items() if 1 / 3 < at <= DEEPEST}
    middle = middle or hints  # fewer than three maps may have no middle third
    nearest = sorted(middle, key=lambda path: abs(middle[path] - 0.5))[:count]
    ordered = sorted(nearest, key=lambda path: hints[path])
    return tuple(
        dict.fromkeys((nearest_in_depth(guided, hints[hint]), hint) for hint in ordered)
    )


def choose(measured: Measured, *, count: int = 1) -> tuple[Choice, ...]:
    """Chooses pairs by what was measured, by a plain rule.

    1. A candidate is left out if its hint or its guided layer is deeper than 2/3 of its
       network, if no default regressor fits, or if an untrained guided layer explains
       the hint with an R^2 of 0.9 or more (a regressor alone does that).
    2. The others are ordered by (probe - chance) (1 - R^2) d, with R^2 in [0, 1] and
       the depth d of the guided layer: the knowledge of the labels in the hint, the
       part of the hint that the student lacks, and the part of the student that the
       hint stage trains. Without labels, the first factor is 1. If two are equal, the
       cheaper one comes first.
    3. The first `count` are chosen that differ from the pairs before: by another guided
       layer, and by a hint layer whose CKA to theirs is below 0.98.

    The rule is a plain one, which no benchmark has tuned. Its pair could not be told
    apart from the middle third (`benchmarks/suggestion.py`): read the table, too.

    Args:
        measured: the result of `hintjax.pairing.measure`.
        count: the largest number of pairs.

    Returns:
        The pairs, from shallow to deep; none if every candidate is left out.
    """
    positive_int("choose", count=count)
    kept = [
        one
        for one in measured.candidates
        if one.regressor is not None and not _doubts(one)
    ]

    def worth(one: Candidate) -> tuple[float, float]:
        lacking = 1 - min(max(one.explained, 0.0), 1.0)
        return _knows(one, measured) * lacking * one.guided_depth, -one.cost

    chosen: list[Candidate] = []
    for one in sorted(kept, key=worth, reverse=True):
        new = all(
            one.guided != other.guided and _alike(measured, one, other) < ALIKE
            for other in chosen
        )
        if new and len(chosen) < count:
            chosen.append(one)
    ordered = sorted(chosen, key=lambda one: one.depth)
    return tuple(_choice(one, measured) for one in ordered)


def remarks(
    measured: Measured, pairs: Sequence[tuple[str, str]] = ()
) -> tuple[str, ...]:
    """Warnings about pairs, each with what to do, by what was measured.

    Args:
        measured: the result of `hintjax.pairing.measure`.
        pairs: the pairs that will be used; pairs that were not measured are passed
            over.

    Returns:
        One sentence or two for each warning; none if there is nothing to say.
    """
    said = []
    if all(_knows(one, measured) <= 0 for one in measured.candidates):
        said.append(
            "No layer of the teacher knows more of the labels than chance. Check that "
            "the teacher is trained, and on images like these."
        )
    for one in measured.candidates:
        if (one.guided, one.hint) in pairs:
            said += [f"{one.guided}={one.hint}: {doubt}" for doubt in _doubts(one)]
    return tuple(dict.fromkeys(said))


def _doubts(one: Candidate) -> list[str]:
    """The reasons against a pair, as warnings."""
    return [
        *doubts_of_depth(one.guided_depth, one.depth),
        *doubts_of_explained(one.explained),
    ]


def doubts_of_depth(guided: float, hint: float) -> list[str]:
    """Warnings about the depths of a pair for a hint stage.

    Args:
        guided: depth of the guided layer in the student, in (0, 1].
        hint: depth of the hint layer in the teacher, in (0, 1].
    """
    deepest = max(guided, hint)
    if deepest <= DEEPEST:
        return []
    which = "guided" if guided > DEEPEST else "hint"
    said = (
        f"the {which} layer is at {deepest:.0%} of the depth of its network. "
        f"FitNets takes both layers from the middle, since a deep guided layer "
        f"leaves the student little freedom. Choose one at {DEEPEST:.0%} or less."
    )
    return [said]


def doubts_of_explained(explained: float) -> list[str]:
    """Warnings about a hint that an untrained guided layer explains.

    Args:
        explained: R^2 of the best linear map.
    """
    if explained < EXPLAINED:
        return []
    said = (
        f"a linear map of the untrained guided layer explains {explained:.0%} "
        f"of the hint, so the regressor can learn the hint without the student. "
        f"Choose a deeper hint layer, or a shallower guided layer."
    )
    return [said]


def _knows(one: Candidate, measured: Measured) -> float:
    """The accuracy of the hint's probe above chance; 1 without labels."""
    if one.probe is None or measured.chance is None:
        return 1.0
    return one.probe - measured.chance


def _choice(one: Candidate, measured: Measured) -> Choice:
    """A candidate with the reason for it."""
    known = ""
    if one.probe is not None and measured.chance is not None:
        known = (
            f"a linear probe of the hint is right for {one.probe:.0%} of the images "
            f"(chance {measured.chance:.0%}), "
        )
    reason = (
        f"{known}an untrained guided layer explains "
        f"{max(one.explained, 0):.0%} of the hint, and the hint stage trains "
        f"{one.guided_depth:.0%} of the student for {one.cost:.0%} of the FLOPs"
    )
    return Choice(one.guided, one.hint, reason)


def _alike(measured: Measured, one: Candidate, other: Candidate) -> float:
    """CKA of the hint layers of two candidates."""
    row, column = (measured.teacher.index(c.hint) for c in (one, other))
    return float(measured.alike[row, column])
