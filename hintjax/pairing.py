"""Suggesting pairs: which layer of the student follows which of the teacher."""

from collections.abc import Mapping

import jax


def suggest_pairs(
    student: Mapping[str, jax.ShapeDtypeStruct],
    teacher: Mapping[str, jax.ShapeDtypeStruct],
    *,
    count: int = 1,
) -> tuple[tuple[str, str], ...]:
    """Pairs by depth: hints from the teacher's middle third.

    Candidates are the feature maps (or tokens) at the outermost level of scopes
    that has at least three; a candidate's depth is its place among them in the
    order of execution, from 0 (excluded) to 1, the last. The hint layers are those
    of the teacher with depth in (1/3, 2/3], nearest the middle first; each guided
    layer is the student's of nearest depth. FitNets takes one pair, in the middle.

    Args:
        student: `Network.layers` of the student.
        teacher: `Network.layers` of the teacher.
        count: how many pairs at most.

    Returns:
        (guided layer, hint layer) for each pair, from shallow to deep.

    Raises:
        ValueError: if a network shows no feature maps.

    >>> layer = jax.ShapeDtypeStruct((1, 8, 8, 4), "float32")
    >>> student = {f"conv{i}": layer for i in range(1, 21)}
    >>> teacher = {f"group{i}": layer for i in range(1, 4)}
    >>> suggest_pairs(student, teacher)
    (('conv13', 'group2'),)

    References:
        Romero et al. 2015, section 2.2: the middle layers.
    """
    guided, hints = _depths("student", student), _depths("teacher", teacher)
    middle = {path: at for path, at in hints.items() if 1 / 3 < at <= 2 / 3}
    nearest = sorted(middle, key=lambda path: abs(middle[path] - 0.5))[:count]
    pairs = []
    for hint in sorted(nearest, key=hints.get):
        pairs.append(
            (min(guided, key=lambda path: abs(guided[path] - hints[hint])), hint)
        )
    return tuple(dict.fromkeys(pairs))


def _depths(which, layers):
    maps = [path for path, layer in layers.items() if len(layer.shape) >= 3]
    if not maps:
        raise ValueError(
            f"suggest_pairs: expected feature maps in the {which}, got layers "
            f"{list(layers)[:5]} with none of them. Name the pairs by hand."
        )
    deepest = max(path.count("/") for path in maps)
    for level in range(deepest + 1):
        outermost = [path for path in maps if path.count("/") <= level]
        if len(outermost) >= 3 or level == deepest:
            break
    return {path: (i + 1) / len(outermost) for i, path in enumerate(outermost)}
