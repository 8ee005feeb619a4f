"""A method: what it wants to see of each network, what it trains, its loss.

A published way to distil is a `Method`, a pair of pure functions. Methods know
nothing of data, optimisers or modules beyond `Features`. They compose: a weighted
sum of methods is an `objective`, which is a method itself.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from hintjax._checks import Refusal, described, function, instance, message
from hintjax.networks import Wants

PREPARED = "prepared"  # the memory that holds what an earlier stage trained
Pairs = Sequence[tuple[str, str]]  # (guided layer, hint layer), as paths


class Context(NamedTuple):
    """Where in the training a method is applied."""

    key: Key[Array, ""]
    step: Int[Array, ""]
    train: bool


class Data(NamedTuple):
    """What a method may know of the training set before the first step."""

    labels: Int[Array | np.ndarray, " size"]

    @property
    def size(self) -> int:
        """How many examples there are."""
        return self.labels.shape[0]


class Method(NamedTuple):
    """A published way to distil.

    Attributes:
        student: what it wants to see of the student.
        teacher: what it wants to see of the teacher.
        init: `(key, student, teacher, data) -> (params, memory)`: what it trains
            beside the student, and what it remembers from step to step. The
            features are shapes (`ShapeDtypeStruct`); both results are dicts.
        apply: `(params, memory, student, teacher, batch, context) -> (values,
            memory, metrics)`: one value per example; the memory, which may differ
            only if `context.train`; scalars to report, by name.
        prepare: the method of a hint stage that comes before, if there must be one
            (FT's paraphraser). What it trains is `memory["prepared"]` here: `init`
            gives it its shape, `carry` of a stage its values.
        deploy: `(params, memory, student, teacher) -> output`: what is shipped, where
            it is not the student alone (SimKD). Of the teacher's features only
            `params` have values: it is not run, and its hints are zeros.
        split: `(memory) -> PartitionSpecs` (a prefix of the tree): how the memory is
            split over a mesh, if it is not whole on every device (CRD's bank).
        select: `(good, memory, before, batch) -> memory`: the memory after a step if
            `good`, else that before it, bit for bit. Only for a method whose step
            changes little of a large memory, where to select between the whole of both
            takes a copy (CRD's bank).
    """

    student: Wants
    teacher: Wants
    init: Callable[..., tuple[dict, dict]]
    apply: Callable[..., tuple[Float[Array, " batch"], dict, dict]]
    prepare: "Method | None" = None
    deploy: Callable[..., Array] | None = None
    split: Callable[[dict], dict] | None = None
    select: Callable[..., dict] | None = None


def nothing(key, student, teacher, data) -> tuple[dict, dict]:
    """The `init` of a method that trains and remembers nothing."""
    return {}, {}


def union(*wants: Wants) -> Wants:
    """All that any of them wants, each thing once.

    >>> union(Wants(hints=("a",)), Wants(output=True, hints=("b", "a")))
    Wants(output=True, hints=('a', 'b'), params=())
    """
    return Wants(
        output=any(w.output for w in wants),
        hints=tuple(dict.fromkeys(itertools.chain(*(w.hints for w in wants)))),
        params=tuple(dict.fromkeys(itertools.chain(*(w.params for w in wants)))),
    )


def one_per_example(caller: str, who: str, values: Array, n: int | None) -> None:
    """Raises unless a loss gave one value for each of the n examples, if n is known."""
    if values.ndim != 1 or n not in (None, values.shape[0]):
        do = "Take no mean inside a loss: the objective divides by the valid examples."
        wanted = f"{who} to give one value per example, ({n or 'batch'},)"
        raise Refusal(message(caller, wanted, f"{values.shape}", do))


def hints_of(caller: str, pairs: Pairs) -> tuple[Wants, Wants]:
    """What a method of pairs wants of the student and of the teacher.

    Raises:
        ValueError: in the caller's name, if there are no pairs.
    """
    do = 'For instance [("group2", "group2")].'
    instance(caller, Sequence, do=do, pairs=pairs)
    if not pairs:
        do = "Find pairs with hintjax.suggest_pairs."
        wanted = "at least one pair (guided layer, hint layer)"
        raise Refusal(message(caller, wanted, "none", do))
    for pair in pairs:
        two = isinstance(pair, Sequence) and not isinstance(pair, str)
        if not two or [type(path) for path in pair] != [str, str]:
            wanted = "each pair to be (guided layer, hint layer), two paths"
            do = 'For instance [("group2", "group2")].'
            raise Refusal(message(caller, wanted, described(pair), do))
    guided, hints = zip(*pairs, strict=True)
    return Wants(hints=guided), Wants(hints=hints)


def over_pairs(
    loss: Callable[[Array, Array], Float[Array, " batch"]],
) -> Callable[[Sequence[Array], Sequence[Array]], Float[Array, " batch"]]:
    """A loss of one pair as the sum over many, by vmap over a leading pair axis.

    Pairs of equal shapes are stacked and evaluated at once. Meant for what is left
    after a reduction (attention maps, FSP matrices); stacking whole feature maps
    copies them.

    Args:
        loss: `(student, teacher) -> one value per example`.

    Returns:
        `(students, teachers) -> the sum over pairs, one value per example`.

    >>> squared = over_pairs(lambda s, t: ((s - t) ** 2).sum(-1))
    >>> ones, zeros = jnp.ones((2, 3)), jnp.zeros((2, 3))
    >>> squared([ones, ones], [zeros, ones]).tolist()
    [3.0, 3.0]
    """
    function("over_pairs", loss=loss)

    def summed(students, teachers):
        groups: dict[tuple, list[tuple[Array, Array]]] = {}
        for pair in zip(students, teachers, strict=True):
            groups.setdefault(tuple((a.shape, a.dtype) for a in pair), []).append(pair)
        return sum(
            jax.vmap(loss)(*map(jnp.stack, zip(*pairs, strict=True))).sum(0)
            for pairs in groups.values()
        )

    return summed
