"""Pairs of layers: by depth or by measurement; how well one layer explains another."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hintjax._checks import (
    Refusal,
    WrongType,
    described,
    instance,
    message,
    positive_int,
    rank,
    same_leading,
)
from hintjax._numerics import adaptive_average_pool, as_float
from hintjax.methods import explained_variance
from hintjax.networks.paths import outermost

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
        probe: accuracy of a linear probe of the hint layer for the labels.
        explained: R^2 with which an untrained guided layer explains the hint linearly.
    """

    guided: str
    hint: str
    guided_depth: float
    depth: float
    shape: tuple[int, ...]
    cost: float
    regressor: int | None
    probe: float
    explained: float


class Measured(NamedTuple):
    """What was measured of two networks; see `hintjax.measuring.measure`.

    Attributes:
        candidates: one for each hint layer in reach, from shallow to deep, and then the
            pairs that the user named.
        chance: accuracy of the most frequent label.
        teacher: paths of the teacher's layers in `alike`.
        student: paths of the student's layers in `alike`.
        alike: CKA of each two layers, those of the teacher first.
    """

    candidates: tuple[Candidate, ...]
    chance: float
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
        measured: the result of `hintjax.measuring.measure`; then the pairs are those
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
    guided, hints = _depths("student", student), _depths("teacher", teacher)
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
       hint stage trains. If two are equal, the cheaper one comes first.
    3. The first `count` are chosen that differ from those before: by another guided
       layer, and by a hint layer whose CKA to theirs is below 0.98.

    The rule is a plain one, which no benchmark has tuned: read the table, too.

    Args:
        measured: the result of `hintjax.measuring.measure`.
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
        knows = one.probe - measured.chance
        return knows * lacking * one.guided_depth, -one.cost

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
        measured: the result of `hintjax.measuring.measure`.
        pairs: the pairs that will be used; pairs that were not measured are passed
            over.

    Returns:
        One sentence or two for each warning; none if there is nothing to say.
    """
    said = []
    if all(one.probe <= measured.chance for one in measured.candidates):
        said.append(
            "No layer of the teacher knows more of the labels than chance. Check that "
            "the teacher is trained, and on images like these."
        )
    for one in measured.candidates:
        if (one.guided, one.hint) in pairs:
            said += [f"{one.guided}={one.hint}: {doubt}" for doubt in _doubts(one)]
    return tuple(dict.fromkeys(said))


def candidates(
    layers: Mapping[str, jax.ShapeDtypeStruct], *, enough: int = 6
) -> dict[str, float]:
    """The layers that are worth measuring, with their depths.

    They are feature maps or tokens: the layers at the outermost level, and inside them
    those that contain layers (blocks), down to the level that has at least `enough`
    of them. A block that ends a block of the same shape is left out.

    Args:
        layers: `Network.layers`.
        enough: number of layers from which on no deeper level is looked at.

    Returns:
        The depth of each layer, its place in the order of execution, up to 1.

    Raises:
        ValueError: if the network has no feature maps.

    >>> layer = jax.ShapeDtypeStruct((1, 8, 8, 4), "float32")
    >>> inside = [f"group1/block{i}{part}" for i in (1, 2) for part in ("/conv", "")]
    >>> list(candidates(dict.fromkeys(["stem", *inside, "group1"], layer)))
    ['stem', 'group1/block1', 'group1']
    """
    positive_int("candidates", enough=enough)
    outer = found = [*_depths("network", layers)]
    maps = [path for path, one in _inside(layers).items() if len(one.shape) >= 3]
    blocks = {path for path in maps if any(q.startswith(f"{path}/") for q in maps)}
    for level in range(1, 1 + max(path.count("/") for path in maps)):
        if len(found) >= enough:
            break
        inside = {path for path in blocks if path.count("/") <= level}
        found = [path for path in maps if path in inside or path in outer]
    ends = itertools.pairwise(found)
    same = {
        path
        for path, after in ends
        if path.startswith(f"{after}/") and layers[path].shape == layers[after].shape
    }
    return _evenly([path for path in found if path not in same])


def nearest_in_depth(depths: Mapping[str, float], depth: float) -> str:
    """The path whose depth is nearest.

    >>> nearest_in_depth({"conv1": 0.5, "conv2": 1.0}, 0.6)
    'conv1'
    """
    return min(depths, key=lambda path: abs(depths[path] - depth))


def _doubts(one: Candidate) -> list[str]:
    """The reasons against a pair, as warnings."""
    found = []
    deepest = max(one.depth, one.guided_depth)
    if deepest > DEEPEST:
        which = "guided" if one.guided_depth > DEEPEST else "hint"
        found.append(
            f"the {which} layer is at {deepest:.0%} of the depth of its network. "
            f"FitNets takes both layers from the middle, since a deep guided layer "
            f"leaves the student little freedom. Choose one at {DEEPEST:.0%} or less."
        )
    if one.explained >= EXPLAINED:
        found.append(
            f"a linear map of the untrained guided layer explains {one.explained:.0%} "
            f"of the hint, so the regressor can learn the hint without the student. "
            f"Choose a deeper hint layer, or a shallower guided layer."
        )
    return found


def _choice(one: Candidate, measured: Measured) -> Choice:
    """A candidate with the reason for it."""
    reason = (
        f"a linear probe of the hint is right for {one.probe:.0%} of the images "
        f"(chance {measured.chance:.0%}), an untrained guided layer explains "
        f"{max(one.explained, 0):.0%} of the hint, and the hint stage trains "
        f"{one.guided_depth:.0%} of the student for {one.cost:.0%} of the FLOPs"
    )
    return Choice(one.guided, one.hint, reason)


def _alike(measured: Measured, one: Candidate, other: Candidate) -> float:
    """CKA of the hint layers of two candidates."""
    row, column = (measured.teacher.index(c.hint) for c in (one, other))
    return float(measured.alike[row, column])


def stage_pairs(
    student: Mapping[str, jax.ShapeDtypeStruct],
    teacher: Mapping[str, jax.ShapeDtypeStruct],
) -> tuple[tuple[str, str], ...]:
    """Pairs of the last layers of stages, from shallow to deep.

    A stage is a run of consecutive layers with one resolution, and its end is its last
    layer. The layers are the outermost feature maps or tokens; if some of them contain
    other layers, only these are used. If both networks have the same number of stages,
    their ends are paired in order. Otherwise, each end of the teacher is paired with
    the student's layer of nearest depth. A teacher of one resolution (a plain network,
    a transformer) is cut into thirds.

    Args:
        student: `Network.layers` of the student.
        teacher: `Network.layers` of the teacher.

    Returns:
        (guided layer, hint layer) for each stage of the teacher.

    Raises:
        ValueError: if a network has no feature maps.

    >>> def layer(side):
    ...     return jax.ShapeDtypeStruct((1, side, side, 4), "float32")
    >>> student = {f"conv{i}": layer(8) for i in range(1, 11)}
    >>> stage_pairs(student, {"one": layer(8), "two": layer(8), "three": layer(4)})
    (('conv7', 'two'), ('conv10', 'three'))
    """
    guided, hints = _blocks("student", student), _blocks("teacher", teacher)
    ours, theirs = _ends(student, guided), _ends(teacher, hints)
    if len(theirs) == 1:
        theirs = list(
            dict.fromkeys(nearest_in_depth(hints, third / 3) for third in (1, 2, 3))
        )
    if len(ours) == len(theirs):
        return tuple(zip(ours, theirs, strict=True))
    return tuple((nearest_in_depth(guided, hints[hint]), hint) for hint in theirs)


def first_pair(
    student: Mapping[str, jax.ShapeDtypeStruct],
    teacher: Mapping[str, jax.ShapeDtypeStruct],
) -> tuple[str, str]:
    """The first layers of both networks, where FSP begins.

    Args:
        student: `Network.layers` of the student.
        teacher: `Network.layers` of the teacher.

    Returns:
        (guided layer, hint layer).
    """
    return next(iter(_depths("student", student))), next(
        iter(_depths("teacher", teacher))
    )


def head(layers: Mapping[str, jax.ShapeDtypeStruct]) -> tuple[str, str]:
    """The pooled vector and the classifier of a network: its last two vectors.

    Args:
        layers: `Network.layers`.

    Returns:
        The paths of the pooled vector and of the classifier.

    Raises:
        ValueError: if the network has fewer than two vectors.

    >>> layer = jax.ShapeDtypeStruct((1, 8), "float32")
    >>> head({"pool": layer, "classifier": layer})
    ('pool', 'classifier')
    """
    _check("head", layers=layers)
    layers = _inside(layers)
    vectors = [path for path, layer in layers.items() if len(layer.shape) == 2]
    if len(vectors) < 2:
        got = f"the vectors {vectors} among {list(layers)[-4:]}"
        do = "Pass the paths of both layers explicitly."
        raise Refusal(message("head", "a pooled vector and a classifier", got, do))
    return vectors[-2], vectors[-1]


def _blocks(which: str, layers: Mapping[str, Any]) -> dict[str, float]:
    """Depths of the outermost maps that contain layers; of all, if none does."""
    outermost = list(_depths(which, layers))
    inside = [p for p in outermost if any(q.startswith(f"{p}/") for q in layers)]
    return _evenly(inside or outermost)


def _ends(layers: Mapping[str, Any], blocks: dict[str, float]) -> list[str]:
    """The last layer of each resolution."""
    runs = itertools.groupby(blocks, key=lambda path: layers[path].shape[1:-1])
    return [list(run)[-1] for _, run in runs]


def _depths(which: str, layers: Mapping[str, Any]) -> dict[str, float]:
    """Depths of the feature maps at the outermost level that has at least three."""
    _check("pairing", **{which: layers})
    layers = _inside(layers)
    maps = [path for path, layer in layers.items() if len(layer.shape) >= 3]
    if not maps:
        got = f"layers without feature maps, such as {list(layers)[:5]}"
        do = "Pass the pairs of layers explicitly."
        raise Refusal(message("pairing", f"feature maps in the {which}", got, do))
    deepest = max(path.count("/") for path in maps)
    for level in range(deepest + 1):
        outermost = [path for path in maps if path.count("/") <= level]
        if len(outermost) >= 3 or level == deepest:
            break
    return _evenly(outermost)


def _inside(layers: Mapping[str, Any]) -> dict[str, Any]:
    """The layers that may be chosen without a user: not outputs, not entries by name.

    The output of the network, and entries of dicts, are hints only if a user says so.
    """
    return {
        path: layer
        for path, layer in layers.items()
        if not outermost(path) and not re.search(r"\[\D", path)
    }


def _check(caller: str, **networks: Any) -> None:
    """Raise unless every argument maps paths to arrays or shapes."""
    instance(caller, Mapping, **networks)
    for layers in networks.values():
        for path, layer in layers.items():
            if not hasattr(layer, "shape"):
                wanted = f"the shape of layer {path!r}, as Network.layers gives it"
                raise WrongType(message(caller, wanted, described(layer)))


def _evenly(paths: Sequence[str]) -> dict[str, float]:
    """Depths at equal distances, up to 1 for the last path."""
    return {path: (i + 1) / len(paths) for i, path in enumerate(paths)}


def linearly_explained(
    fit: tuple[Float[Array, "n ..."], Float[Array, "n ..."]],
    on: tuple[Float[Array, "m ..."], Float[Array, "m ..."]],
) -> Float[Array, ""]:
    """R^2 of the best linear map from the guided layer's channels to the hint's.

    It measures how much of the hint a student's layer contains, for any training
    method. Least squares finds the map on one set of examples, and R^2 is computed on
    another set. Feature maps of unequal size are average-pooled to the smaller size
    first.

    Args:
        fit: (guided, hint) activations for the least squares.
        on: (guided, hint) activations for R^2.

    Returns:
        `1 - sum (t - p)^2 / sum (t - mean t)^2`; 0 for a hint that does not vary.

    >>> s = jax.random.normal(jax.random.key(0), (8, 3))
    >>> t = s @ jnp.ones((3, 5)) + 1
    >>> round(float(linearly_explained((s, t), (s, t))), 4)
    1.0
    """
    caller = "linearly_explained"
    for name, pair in {"fit": fit, "on": on}.items():
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            wanted = f"{name} to be (guided, hint) activations"
            raise WrongType(message(caller, wanted, described(pair)))
    pairs = [as_float(caller, *pair) for pair in (fit, on)]
    for guided, hint in pairs:
        rank(caller, 2, "n ...", guided=guided, hint=hint)
    (guided, hint), (new_guided, new_hint) = (_rows(*pair) for pair in pairs)
    same_leading(caller, 1, guided=guided, hint=hint)
    same_leading(caller, 1, guided=new_guided, hint=new_hint)
    if guided.shape[-1] != new_guided.shape[-1] or hint.shape[-1] != new_hint.shape[-1]:
        got = f"{[tuple(x.shape for x in pair) for pair in (fit, on)]}"
        raise Refusal(message(caller, "the same channels in both sets", got))
    solution, *_ = jnp.linalg.lstsq(guided, hint)
    return explained_variance(new_guided @ solution, new_hint)


def _rows(guided: Array, hint: Array) -> tuple[Array, Array]:
    """Positions as rows, at one resolution; guided rows get a column of ones."""
    if guided.ndim == hint.ndim == 4:
        height, width = map(min, guided.shape[1:3], hint.shape[1:3])
        size = height, width
        guided, hint = (adaptive_average_pool(x, size) for x in (guided, hint))
    guided = guided.reshape(-1, guided.shape[-1])
    ones = jnp.ones_like(guided[:, :1])
    return jnp.concatenate([guided, ones], 1), hint.reshape(-1, hint.shape[-1])
