"""The layers of a network by depth, and pairs of layers by depth."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from hintjax._checks import (
    Refusal,
    WrongType,
    described,
    instance,
    message,
    positive_int,
)
from hintjax.networks.paths import outermost


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
    outer = found = [*map_depths("network", layers)]
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


def depth_of(layers: Mapping[str, jax.ShapeDtypeStruct], path: str) -> float | None:
    """The depth of a layer: that of the last candidate up to it.

    Args:
        layers: `Network.layers`.
        path: path of the layer.

    Returns:
        The depth, in [0, 1]; None if there is no such layer, as for values by name.

    >>> layer = jax.ShapeDtypeStruct((1, 8, 8, 4), "float32")
    >>> depth_of(dict.fromkeys(["a", "b", "c", "d"], layer), "c")
    0.75
    """
    if path not in layers:
        return None
    order, depths = [*layers], candidates(layers)
    before = order[: order.index(path) + 1]
    return max((depths.get(one, 0.0) for one in before), default=0.0)


def nearest_in_depth(depths: Mapping[str, float], depth: float) -> str:
    """The path whose depth is nearest.

    >>> nearest_in_depth({"conv1": 0.5, "conv2": 1.0}, 0.6)
    'conv1'
    """
    return min(depths, key=lambda path: abs(depths[path] - depth))


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
    return next(iter(map_depths("student", student))), next(
        iter(map_depths("teacher", teacher))
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
    outermost = list(map_depths(which, layers))
    inside = [p for p in outermost if any(q.startswith(f"{p}/") for q in layers)]
    return _evenly(inside or outermost)


def _ends(layers: Mapping[str, Any], blocks: dict[str, float]) -> list[str]:
    """The last layer of each resolution."""
    runs = itertools.groupby(blocks, key=lambda path: layers[path].shape[1:-1])
    return [list(run)[-1] for _, run in runs]


def map_depths(which: str, layers: Mapping[str, Any]) -> dict[str, float]:
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
