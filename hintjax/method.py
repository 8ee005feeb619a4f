"""A method: the features that it reads, the parameters that it trains, its loss.

A published way to distill is a `Method`, a pair of pure functions. Methods know
nothing of data, optimizers or modules beyond `Features`. They compose: a weighted
sum of methods is an `objective`, which is a method itself.
"""

import contextlib
import contextvars
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Num, PyTree

from hintjax._checks import (
    Refusal,
    WrongType,
    described,
    form,
    function,
    instance,
    is_array,
    message,
)
from hintjax.networks import Features, Wants

PREPARED = "prepared"  # the memory with the parameters that an earlier stage trained
Pairs = Sequence[tuple[str, str]]  # (guided layer, hint layer), as paths
Batch = Mapping[str, PyTree]  # of arrays of JAX or NumPy
Applied = tuple[Array, dict, dict]  # values, memory, metrics
_apart = contextvars.ContextVar("apart", default=False)


class Context(NamedTuple):
    """The random key, the step and the mode in which a method is applied."""

    key: Key[Array, ""]
    step: Int[Array, ""]
    train: bool


class Data(NamedTuple):
    """The facts about the training set that a method may use before the first step."""

    labels: Num[Array | np.ndarray, "size ..."]

    @property
    def size(self) -> int:
        """The number of training examples."""
        return self.labels.shape[0]


class Method(NamedTuple):
    """A published way to distill.

    Attributes:
        student: the features of the student that the method reads.
        teacher: the features of the teacher that the method reads.
        init: `(key, student, teacher, data) -> (params, memory)`: the parameters that
            are trained beside the student, and the values that the method keeps from
            step to step. The features are shapes (`ShapeDtypeStruct`); both results
            are dicts.
        apply: `(params, memory, student, teacher, batch, context) -> (values,
            memory, metrics)`: one value per example; the memory, which may change
            only if `context.train`; scalars to report, by name.
        prepare: the method of an earlier hint stage, if this method needs one (FT's
            paraphraser). The parameters that `prepare` trains are
            `memory["prepared"]` here: `init` sets their shapes, and `carry` of a stage
            sets their values.
        deploy: `(params, memory, student, teacher) -> output`: the deployed model, if
            it is not the student alone (SimKD). The teacher is not run: only `params`
            of its features have values, and its hints are zeros.
        split: `(memory) -> PartitionSpecs` (a prefix of the tree): how the memory is
            sharded over a mesh, if it is not replicated on every device (CRD's bank).
        select: `(good, memory, before, batch) -> memory`: the memory after a step if
            `good`, else the memory before the step, bit for bit. It is only for a
            method whose step changes a small part of a large memory (CRD's bank):
            selecting between two whole memories would take a copy.
        reduced: `(shapes of the student's features) -> Reduced`: the method on reduced
            features of the teacher, if its loss needs only a reduction of them that
            does not depend on parameters (AT's attention maps, FSP's matrices).
        check: `(data) -> None`: raises if the method cannot learn from this training
            set. It is called on the host, before `init`, with the labels themselves.
        limits: `(memory) -> {name: n}`: the entries of a training batch whose numbers
            must be in 0..n - 1, such as "index".
        mislabeled: `(memory, batch) -> one bool per example`: whether the label of a
            training example is not the label of its "index" in the training set.
        silent: the names of the terms, as the metrics have them, whose weight is the
            number 0: an objective only watches them.
        ignored: integer labels that the method leaves out (255 of `task(ignore=255)`),
            so that the debug mode lets them pass.
    """

    student: Wants
    teacher: Wants
    init: Callable[..., tuple[dict, dict]]
    apply: Callable[..., tuple[Float[Array, " batch"], dict, dict]]
    prepare: "Method | None" = None
    deploy: Callable[..., Array] | None = None
    split: Callable[[dict], dict] | None = None
    select: Callable[..., dict] | None = None
    reduced: "Callable[[Features], Reduced] | None" = None
    check: Callable[[Data], None] | None = None
    limits: Callable[[dict], dict[str, int]] | None = None
    mislabeled: Callable[[dict, Batch], Array] | None = None
    silent: tuple[str, ...] = ()
    ignored: tuple[int, ...] = ()


class Reduced(NamedTuple):
    """A method that reads fewer numbers of the teacher, and the function to get them.

    `method.apply` gives the values that the full method gives, up to rounding. A cache
    of the teacher's features stores the reduced features.

    Attributes:
        reduce: `features of the teacher -> features` with hints by new names; output
            and parameters stay.
        method: the method that reads them; all else is as in the full method.
    """

    reduce: Callable[[Features], Features]
    method: Method


def reduced(method: Method, student: Features) -> Reduced:
    """The reduction of a method; a method without one is returned unchanged.

    Args:
        method: the method.
        student: the shapes of the student's features.
    """
    if method.reduced is None:
        return Reduced(lambda teacher: teacher, method)
    return method.reduced(student)


def nothing(
    key: Array, student: Features, teacher: Features, data: Data | None
) -> tuple[dict, dict]:
    """The `init` of a method without parameters and without memory."""
    return {}, {}


def union(*wants: Wants) -> Wants:
    """Merges several wants, without duplicates.

    >>> union(Wants(hints=("a",)), Wants(output=True, hints=("b", "a")))
    Wants(output=True, hints=('a', 'b'), params=())
    """
    return Wants(
        output=any(w.output for w in wants),
        hints=tuple(dict.fromkeys(itertools.chain(*(w.hints for w in wants)))),
        params=tuple(dict.fromkeys(itertools.chain(*(w.params for w in wants)))),
    )


def one_per_example(caller: str, who: str, values: Array, n: int | None) -> None:
    """Raises unless a loss gave one value per example, n values if n is known."""
    if values.ndim != 1 or n not in (None, values.shape[0]):
        do = "Take no mean inside a loss: the objective divides by the valid examples."
        wanted = f"{who} to give one value per example, ({n or 'batch'},)"
        raise Refusal(message(caller, wanted, f"{values.shape}", do))


def output_of(caller: str, whose: str, features: Features) -> Any:
    """The output of a network, for a method that reads it as one array.

    Args:
        caller: the name of the method, for messages.
        whose: "student" or "teacher".
        features: the features of that network, or their shapes.

    Returns:
        The output, an array or its shape.

    Raises:
        WrongType: if the output is a tuple, a dict or another container.
    """
    output = features.output
    if is_array(output) or isinstance(output, jax.ShapeDtypeStruct):
        return output
    do = (
        f"Choose one with at_head(method, {whose}=':out[0]'), by position or by name, "
        f"or let call= of hintjax.linen or hintjax.nnx return it alone."
    )
    if whose == "teacher" and isinstance(output, dict):
        do += " For a teacher of together(), say from_teacher(method, name)."
    wanted = f"the output of the {whose} to be one array"
    raise WrongType(message(caller, wanted, form(output), do))


def hints_of(caller: str, pairs: Pairs) -> tuple[Wants, Wants]:
    """The features that a method of pairs reads of the student and of the teacher.

    Raises:
        ValueError: if there are no pairs. The message names the caller.
    """
    do = 'For instance [("group2", "group2")].'
    instance(caller, Sequence, do, pairs=pairs)
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
    """Turns a loss of one pair into the sum over many pairs, by vmap.

    Pairs of equal shapes are stacked along a new first axis and evaluated at once. Use
    it for small arrays that a reduction gives (attention maps, FSP matrices): stacking
    copies its arrays, and whole feature maps are large.

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

    def summed(students: Sequence[Array], teachers: Sequence[Array]) -> Array:
        if _apart.get():
            return total(map(loss, students, teachers))
        groups: dict[tuple, list[tuple[Array, Array]]] = {}
        for pair in zip(students, teachers, strict=True):
            groups.setdefault(tuple((a.shape, a.dtype) for a in pair), []).append(pair)
        return total(
            jax.vmap(loss)(*map(jnp.stack, zip(*pairs, strict=True))).sum(0)
            for pairs in groups.values()
        )

    return summed


@contextlib.contextmanager
def pairs_apart() -> Iterator[None]:
    """While open, `over_pairs` stacks no pairs.

    A traced program then shows which pair reads which layer. It gives the same values,
    up to rounding.
    """
    before = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(before)


def total(values: Iterable[Float[Array, "..."]]) -> Float[Array, "..."]:
    """The sum of at least one array, as an array: `sum` alone may return its start, 0.

    >>> total([jnp.ones(2), jnp.ones(2)]).tolist()
    [2.0, 2.0]
    """
    first, *rest = values
    return sum(rest, start=first)
