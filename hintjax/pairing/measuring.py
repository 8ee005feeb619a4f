"""Measurements of two networks before any training: which layers to match.

`measure` runs a teacher and an untrained student over a few hundred examples; what it
finds is the argument `measured` of `suggest_pairs`. `alignment` is CKA of each two
layers. Features are summed batch by batch; only pooled ones are kept.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from hintjax._checks import Refusal, message, positive_int
from hintjax._numerics import as_float, at_smaller_size
from hintjax.networks import Network, Variables, Wants
from hintjax.networks.network import read_variables
from hintjax.pairing.choice import Candidate, Measured
from hintjax.pairing.layers import candidates, nearest_in_depth
from hintjax.probes import linear_scores
from hintjax.regressors import fit, to_grid
from hintjax.similarity import (
    Moments,
    add_minibatch,
    add_moments,
    begin_minibatch,
    begin_moments,
    by_position,
    minibatch_cka,
    pooled,
    regression_score,
)

_RIDGE = 0.01  # of a feature's mean variance: there are few examples
_BACKWARD = 3  # forward passes that a training step costs, by the usual count
Batch = Mapping[str, PyTree]


class Seen(NamedTuple):
    """A network, its variables, and the paths of the layers to look at."""

    network: Network
    variables: Variables
    paths: tuple[str, ...]


def measure(
    student: Network,
    student_variables: Any,
    teacher: Network,
    teacher_variables: Any,
    batches: Sequence[Batch],
    *,
    classes: int | None,
    pairs: Sequence[tuple[str, str]] = (),
    class_tokens: tuple[int, int] = (0, 0),
) -> Measured:
    """Measures every hint layer in reach, and the student's layer of nearest depth.

    The linear probe is ridge regression of one-hot labels on the pooled hint, in closed
    form. R^2 is that of a linear map of the channels, the same at every position, after
    both maps are averaged to the smaller size. Tokens are compared one by one, or as
    maps if the other layer is a map; layers that fit neither way are pooled. Probe and
    map are fitted on the even batches (0, 2, ...) and
    judged on the odd ones. CKA is `minibatch_cka` of whole maps. FLOPs are counted by
    XLA for the forward passes; a training step of the student counts as three of them.

    Args:
        student: the student.
        student_variables: its variables before training.
        teacher: the teacher.
        teacher_variables: its variables, trained.
        batches: two or more batches of one shape with `image`, `label` if there are
            classes, and `where` if some examples do not count; at least 4 examples
            each.
        classes: number of classes; None if there are no labels of classes, and so no
            probe.
        pairs: (guided layer, hint layer) that are measured, too.
        class_tokens: for student and teacher, the number of tokens before the grid.

    Returns:
        The measurements.

    Raises:
        ValueError: if there are fewer than two batches, or a network has no maps.
    """
    if classes is not None:
        positive_int("measure", classes=classes)
    if len(batches) < 2:
        wanted = "two batches or more, to fit on one half and judge on the other"
        raise Refusal(message("measure", wanted, f"{len(batches)}"))
    given = (student, student_variables), (teacher, teacher_variables)
    inputs = jnp.asarray(batches[0]["image"])[:1]
    ours, theirs = (
        _looked_at(whose, network, variables, inputs)
        for whose, (network, variables) in zip(
            ("the student's", "the teacher's"), given, strict=True
        )
    )
    found = [(nearest_in_depth(ours.depths, at), p) for p, at in theirs.depths.items()]
    for pair in pairs:
        for one, path in zip((ours, theirs), pair, strict=True):
            one.depth(path)  # raises
    found = list(dict.fromkeys([*found, *pairs]))
    hints = tuple(dict.fromkeys(hint for _, hint in found))
    probes, chance = {}, None
    if classes is not None:
        probes, chance = _probes(theirs, hints, batches, classes), _chance(batches)
    explained = _explained(ours, theirs, found, batches, class_tokens)
    whole = _BACKWARD * ours.flops(None) + theirs.flops(None)
    rows = []
    for (guided, hint), r2 in zip(found, explained, strict=True):
        cost = _BACKWARD * ours.flops(guided) + theirs.flops(hint)
        layers = ours.shapes[guided], theirs.shapes[hint]
        rows.append(
            Candidate(
                guided,
                hint,
                ours.depth(guided),
                theirs.depth(hint),
                layers[1].shape[1:],
                cost / whole,
                _size(*layers, class_tokens),
                probes.get(hint),
                r2,
            )
        )
    guided = tuple(dict.fromkeys([*ours.depths, *(path for path, _ in pairs)]))
    alike = alignment(theirs.seen(hints), ours.seen(guided), batches=batches)
    return Measured(tuple(rows), chance, hints, guided, alike)


def alignment(*seen: Seen, batches: Sequence[Batch]) -> Float[np.ndarray, "n n"]:
    """CKA of each two layers, of one network or of several.

    Args:
        *seen: the networks with their variables and layers.
        batches: batches of one shape with `image`, of at least 4 examples each, and
            `where` if some examples do not count.

    Returns:
        `minibatch_cka`, in the order of the layers.
    """

    @jax.jit
    def add(sums: Any, variables: Any, image: Array, where: Array) -> Any:
        hints = [
            one.network.apply(*own, image, wants=Wants(hints=one.paths), train=False)
            for one, own in zip(seen, variables, strict=True)
        ]
        features = [
            features.hints[path]
            for one, (features, _) in zip(seen, hints, strict=True)
            for path in one.paths
        ]
        return add_minibatch(sums, features, where=where)

    sums = begin_minibatch(sum(len(one.paths) for one in seen))
    variables = [one.variables for one in seen]
    for batch in batches:
        sums = add(sums, variables, batch["image"], _where(batch))
    return np.asarray(minibatch_cka(sums))


class _Looked(NamedTuple):
    """A network with its variables, the shapes of its layers, and its candidates."""

    network: Network
    variables: Variables
    inputs: Array
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    depths: Mapping[str, float]

    def seen(self, paths: tuple[str, ...]) -> Seen:
        return Seen(self.network, self.variables, paths)

    def depth(self, path: str) -> float:
        """The depth of a layer: that of the last candidate up to it."""
        if path not in self.shapes:
            wanted, got = "a layer of the network", repr(path)
            do = "List the layers with `hintjax layers`."
            raise Refusal(message("measure", wanted, got, do))
        order = [*self.shapes]
        before = order[: order.index(path) + 1]
        return max((self.depths.get(one, 0.0) for one in before), default=0.0)

    def flops(self, path: str | None) -> float:
        """FLOPs of one example's forward pass up to a layer; None is the output."""
        wants = Wants(output=True) if path is None else Wants(hints=(path,))

        def forward(variables: Variables, inputs: Array) -> PyTree:
            how = {"wants": wants, "train": False}
            return self.network.apply(*variables, inputs, **how)[0]

        lowered = jax.jit(forward).lower(self.variables, self.inputs)
        return float((lowered.cost_analysis() or {}).get("flops", float("nan")))


def _looked_at(whose: str, network: Network, variables: Any, inputs: Array) -> _Looked:
    """A network with all that its layers' shapes say."""
    own = read_variables("measure", whose, variables)
    shapes = network.layers(*own, inputs)
    return _Looked(network, own, inputs, shapes, candidates(shapes))


def _probes(
    teacher: _Looked, hints: tuple[str, ...], batches: Sequence[Batch], classes: int
) -> dict[str, float]:
    """The accuracy of a linear probe of each hint, fitted and judged on halves."""

    @jax.jit
    def shown(variables: Variables, image: Array) -> dict[str, Array]:
        wants = Wants(hints=hints)
        features, _ = teacher.network.apply(*variables, image, wants=wants, train=False)
        return {path: pooled(features.hints[path]) for path in hints}

    @jax.jit
    def right(
        sets: tuple, fit_on: tuple[Array, Array], judge_on: tuple[Array, Array]
    ) -> Float[Array, ""]:
        (label, where), (new_label, new_where) = fit_on, judge_on
        rows, new_rows = sets
        how = {"classes": classes, "ridge": _RIDGE, "where": where}
        scores = linear_scores(new_rows, rows, label, **how)
        hit = scores.argmax(-1) == new_label
        return jnp.sum(hit & new_where) / jnp.maximum(jnp.sum(new_where), 1)

    halves = [batches[start::2] for start in (0, 1)]
    found = [[shown(teacher.variables, b["image"]) for b in half] for half in halves]
    told = [
        (
            jnp.concatenate([jnp.asarray(b["label"]) for b in half]),
            jnp.concatenate([_where(b) for b in half]),
        )
        for half in halves
    ]

    def rows(half: list[dict[str, Array]], path: str) -> Array:
        return jnp.concatenate([one[path] for one in half])

    return {
        path: float(right(tuple(rows(half, path) for half in found), *told))
        for path in hints
    }


def _explained(
    student: _Looked,
    teacher: _Looked,
    pairs: Sequence[tuple[str, str]],
    batches: Sequence[Batch],
    class_tokens: tuple[int, int],
) -> list[float]:
    """R^2 of each pair, fitted and judged on halves."""
    ours = Wants(hints=tuple(dict.fromkeys(guided for guided, _ in pairs)))
    theirs = Wants(hints=tuple(dict.fromkeys(hint for _, hint in pairs)))

    @jax.jit
    def add(
        sums: tuple[Moments, ...], variables: Any, image: Array, where: Array
    ) -> tuple[Moments, ...]:
        (own, _), (taught, _) = (
            one.network.apply(*given, image, wants=wants, train=False)
            for one, given, wants in zip(
                (student, teacher), variables, (ours, theirs), strict=True
            )
        )
        return tuple(
            add_moments(one, *rows[:2], where=rows[2])
            for one, (guided, hint) in zip(sums, pairs, strict=True)
            for layers in [(own.hints[guided], taught.hints[hint])]
            for rows in [_compared(*layers, where, class_tokens)]
        )

    def begin() -> tuple[Moments, ...]:
        return tuple(
            begin_moments(student.shapes[g].shape[-1], teacher.shapes[h].shape[-1])
            for g, h in pairs
        )

    halves = [begin(), begin()]
    variables = student.variables, teacher.variables
    for number, batch in enumerate(batches):
        half = number % 2
        halves[half] = add(halves[half], variables, batch["image"], _where(batch))
    score = jax.jit(lambda *sets: regression_score(*sets, ridge=_RIDGE))
    return [float(score(*sets)) for sets in zip(*halves, strict=True)]


def _compared(
    guided: Array,
    hint: Array,
    where: Bool[Array, " batch"],
    class_tokens: tuple[int, int],
) -> tuple[Array, Array, Bool[Array, " rows"]]:
    """Rows of two layers that belong together, and the mask of the valid ones."""
    guided, hint = as_float("measure", guided, hint)
    try:
        guided, hint = _viewed(guided, hint, class_tokens)
    except Refusal:  # the tokens are on no square grid
        return pooled(guided), pooled(hint), where
    if guided.ndim == hint.ndim >= 4:
        guided, hint = at_smaller_size(guided, hint)
    if guided.shape[:-1] != hint.shape[:-1]:
        return pooled(guided), pooled(hint), where
    rows, valid = by_position(guided, where)
    return rows, by_position(hint)[0], valid


def _viewed(
    guided: Array, hint: Array, class_tokens: tuple[int, int]
) -> tuple[Array, Array]:
    """Two layers, the tokens of one of them as a map if the other is a map."""
    ours, theirs = class_tokens
    if (guided.ndim, hint.ndim) == (3, 4):
        return to_grid(guided, drop=ours), hint
    if (guided.ndim, hint.ndim) == (4, 3):
        return guided, to_grid(hint, drop=theirs)
    return guided, hint


def _size(
    guided: jax.ShapeDtypeStruct,
    hint: jax.ShapeDtypeStruct,
    class_tokens: tuple[int, int],
) -> int | None:
    """The number of parameters of the default regressor; None if none fits."""

    def params(guided: Array, hint: Array) -> PyTree:
        guided, hint = _viewed(guided, hint, class_tokens)
        module = fit(guided.shape[1:], hint.shape[1:])
        return module.init(jax.random.key(0), guided)

    try:
        shapes = jax.eval_shape(params, guided, hint)
    except Refusal:
        return None
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))


def _where(batch: Batch) -> Bool[Array, " batch"]:
    """The mask of the examples that count."""
    n = len(jax.tree.leaves(batch["image"])[0])
    return jnp.asarray(batch.get("where", np.ones(n, bool)))


def _chance(batches: Sequence[Batch]) -> float:
    """The accuracy of the most frequent label, on the half that judges."""
    labels: list[Int[np.ndarray, " n"]] = [
        np.asarray(batch["label"])[np.asarray(_where(batch))] for batch in batches[1::2]
    ]
    counts = np.unique(np.concatenate(labels), return_counts=True)[1]
    return float(counts.max() / counts.sum())
