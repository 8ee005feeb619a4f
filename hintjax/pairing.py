"""Pairs of layers: suggestions by depth, and how well one layer explains another."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
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


def suggest_pairs(
    student: Mapping[str, jax.ShapeDtypeStruct],
    teacher: Mapping[str, jax.ShapeDtypeStruct],
    *,
    count: int = 1,
) -> tuple[tuple[str, str], ...]:
    """Pairs by depth: hints from the teacher's middle third.

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
    guided, hints = _depths("student", student), _depths("teacher", teacher)
    middle = {path: at for path, at in hints.items() if 1 / 3 < at <= 2 / 3}
    middle = middle or hints  # fewer than three maps may have no middle third
    nearest = sorted(middle, key=lambda path: abs(middle[path] - 0.5))[:count]
    ordered = sorted(nearest, key=lambda path: hints[path])
    return tuple(dict.fromkeys((_at(guided, hints[hint]), hint) for hint in ordered))


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
        theirs = list(dict.fromkeys(_at(hints, third / 3) for third in (1, 2, 3)))
    if len(ours) == len(theirs):
        return tuple(zip(ours, theirs, strict=True))
    return tuple((_at(guided, hints[hint]), hint) for hint in theirs)


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


def _at(depths: dict[str, float], depth: float) -> str:
    """The layer of the nearest depth."""
    return min(depths, key=lambda path: abs(depths[path] - depth))


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
