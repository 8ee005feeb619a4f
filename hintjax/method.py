"""A method: what it wants to see of each network, what it trains, its loss.

A published way to distil is a `Method`, a pair of pure functions. Methods know
nothing of data, optimisers or modules beyond `Features`. They compose: a weighted
sum of methods is an `objective`, which is a method itself.
"""

import itertools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Key, Num, ScalarLike

from hintjax._checks import described, function, instance, message, scalar
from hintjax._numerics import as_float, either, masked_mean
from hintjax.networks import Wants

PREPARED = "prepared"  # the memory that holds what an earlier stage trained
ADJUSTABLE = "weights"  # the memory of an objective that holds adjustable weights
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


class Adjustable(NamedTuple):
    """A weight that lives in the state, not in the program.

    Many students can then have each their own in one program (see `population`), and
    one student another from some step on; `reweighted` sets it.

    Attributes:
        start: the weight until it is set, a number >= 0.
        schedule: `step -> factor`, such as optax's: the term is weighted by their
            product. By default 1.
    """

    start: float | int
    schedule: Callable[[Array], Array] | None = None


Weight = float | int | Callable[[Array], Array] | Adjustable


class Weighted(NamedTuple):
    """A method and its weight in an objective."""

    method: Method
    weight: Weight


def nothing(key, student, teacher, data) -> tuple[dict, dict]:
    """The `init` of a method that trains and remembers nothing."""
    return {}, {}


def weighted(method: Method, weight: Weight) -> Weighted:
    """A method with its weight, as a term of an `objective`.

    Args:
        method: the method.
        weight: a number >= 0, or a schedule `step -> weight`, such as optax's, or an
            `Adjustable`, which lives in the state.

    Returns:
        The term.

    Raises:
        ValueError: if the number is negative or not finite.
    """
    instance("weighted", Method, method=method)
    if not callable(weight):
        start = weight.start if isinstance(weight, Adjustable) else weight
        check_weight("weighted", start)
    return Weighted(method, weight)


def check_weight(caller: str, weight: ScalarLike) -> None:
    """Raises unless a number can be a weight."""
    wanted = ">= 0 or a schedule"
    scalar(caller, wanted, lambda w: 0 <= w < math.inf, **{"a finite weight": weight})


def objective(**terms: Weighted | Method) -> Method:
    """A weighted sum of methods: `sum_i w_i(step) L_i`.

    Reported are, by the names of the terms: `name` (the mean of its raw values),
    `name/weighted`, and the method's own metrics as `name/metric`; and the total as
    `loss`. Means are over the examples that `batch["where"]` leaves valid.

    Args:
        **terms: the terms by name; a method alone has the weight 1.

    Returns:
        The method; what it trains and remembers is kept under the terms' names, so
        that two objectives can share a term (see `carry` of a stage). Adjustable
        weights are remembered beside the terms, as "weights", and not carried.

    Raises:
        ValueError: if there is no term, if all weights are 0, if two terms say what
            is deployed, or if a term has a name that is taken.

    >>> import optax
    >>> term = task(optax.softmax_cross_entropy_with_integer_labels)
    >>> objective(task=weighted(term, 0.5), again=term).student
    Wants(output=True, hints=(), params=())
    """
    instance("objective", (Method, Weighted), **terms)
    named = {
        name: term if isinstance(term, Weighted) else Weighted(term, 1.0)
        for name, term in terms.items()
    }
    # What stages report, and what is kept beside the terms' memories.
    taken = ("loss", "norm", "skipped", "spikes", ADJUSTABLE, PREPARED)
    if named.keys() & {*taken}:
        do = "Give the term another name."
        wanted = f"no term with a name among {taken}"
        raise ValueError(message("objective", wanted, f"{list(named)}", do))
    adjustable = {
        name: term.weight.start
        for name, term in named.items()
        if isinstance(term.weight, Adjustable)
    }
    if all(term.weight == 0 for term in named.values()):
        got = f"the terms {list(named)} with weight 0" if named else "no terms"
        raise ValueError(message("objective", "a term with a weight > 0", got))

    def init(key, student, teacher, data):
        made = {
            name: term.method.init(_fold(key, name), student, teacher, data)
            for name, term in named.items()
        }
        params = {name: params for name, (params, _) in made.items()}
        memory = {name: memory for name, (_, memory) in made.items()}
        if adjustable:
            memory[ADJUSTABLE] = {
                name: jnp.asarray(start, float) for name, start in adjustable.items()
            }
        return params, memory

    def apply(params, memory, student, teacher, batch, context):
        total, metrics = 0.0, {}
        remembered = {ADJUSTABLE: memory[ADJUSTABLE]} if adjustable else {}
        n = None
        for name, (method, weight) in named.items():
            values, remembered[name], own = method.apply(
                params[name],
                memory[name],
                student,
                teacher,
                batch,
                context._replace(key=_fold(context.key, name)),
            )
            one_per_example("objective", f"the term {name!r}", values, n)
            n = values.shape[0]
            kept = memory[ADJUSTABLE][name] if name in adjustable else None
            scaled = values * _now(weight, kept, context.step, values.dtype)
            total = total + scaled
            metrics[name] = masked_mean(values, batch.get("where"))
            metrics[f"{name}/weighted"] = masked_mean(scaled, batch.get("where"))
            metrics |= {f"{name}/{key}": value for key, value in own.items()}
        metrics["loss"] = masked_mean(total, batch.get("where"))
        return total, remembered, metrics

    prepared = {
        name: term.method.prepare
        for name, term in named.items()
        if term.method.prepare is not None
    }
    return Method(
        student=union(*(term.method.student for term in named.values())),
        teacher=union(*(term.method.teacher for term in named.values())),
        init=init,
        apply=apply,
        prepare=objective(**prepared) if prepared else None,
        deploy=_deployed(named),
        split=_split(named),
        select=_select(named),
    )


def _now(weight, kept, step, dtype):
    """A term's weight at a step; `kept` is what the state has of it."""
    if isinstance(weight, Adjustable):
        kept, weight = jnp.asarray(kept, dtype), weight.schedule
        return kept if weight is None else kept * _now(weight, None, step, dtype)
    return jnp.asarray(weight(step) if callable(weight) else weight, dtype)


def _split(terms):
    """`Method.split` of an objective: those of its terms."""
    own = _own(terms, "split")
    if not own:
        return None

    def split(memory):
        return {
            name: own[name](kept) if name in own else PartitionSpec()
            for name, kept in memory.items()
        }

    return split


def _select(terms):
    """`Method.select` of an objective: those of its terms."""
    own = _own(terms, "select")
    if not own:
        return None

    def select(good, memory, before, batch):
        return {
            name: own[name](good, kept, before[name], batch)
            if name in own
            else either(good, kept, before[name])
            for name, kept in memory.items()
        }

    return select


def _own(terms, field):
    """What terms have in a field of their methods that may be None."""
    found = {name: getattr(term.method, field) for name, term in terms.items()}
    return {name: has for name, has in found.items() if has is not None}


def _deployed(terms):
    """`Method.deploy` of an objective: that of its one term that has it."""
    found = [name for name, term in terms.items() if term.method.deploy is not None]
    if len(found) > 1:
        wanted = "at most one term that says what is deployed"
        raise ValueError(message("objective", wanted, f"{found}"))
    if not found:
        return None
    (name,) = found

    def deploy(params, memory, student, teacher):
        return terms[name].method.deploy(params[name], memory[name], student, teacher)

    return deploy


def task(
    loss: Callable[[Float[Array, "batch ..."], Num[Array, "batch ..."]], Array],
    label: str = "label",
) -> Method:
    """The task itself as a method: the student's output against the labels.

    Args:
        loss: `(output, labels) -> one value per example`, for instance
            `optax.softmax_cross_entropy_with_integer_labels`.
        label: the name of the labels in the batch.

    Returns:
        The method. For integer labels it also reports `accuracy`.
    """
    function("task", loss=loss)
    instance("task", str, label=label)

    def apply(params, memory, student, teacher, batch, context):
        if label not in batch:
            got, do = f"{sorted(batch)}", "Name the labels with label=."
            raise ValueError(message("task", f"{label!r} in the batch", got, do))
        output, labels = as_float("task", student.output), batch[label]
        metrics = {}
        if jnp.issubdtype(labels.dtype, jnp.integer):
            right = (output.argmax(-1) == labels).astype(output.dtype)
            metrics["accuracy"] = masked_mean(right, batch.get("where"))
        return loss(output, labels), memory, metrics

    return Method(Wants(output=True), Wants(), nothing, apply)


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
        raise ValueError(message(caller, wanted, f"{values.shape}", do))


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
        raise ValueError(message(caller, wanted, "none", do))
    for pair in pairs:
        two = isinstance(pair, Sequence) and not isinstance(pair, str)
        if not two or [type(path) for path in pair] != [str, str]:
            wanted = "each pair to be (guided layer, hint layer), two paths"
            do = 'For instance [("group2", "group2")].'
            raise ValueError(message(caller, wanted, described(pair), do))
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


def _fold(key, name):
    """A key of its own for each name, whatever the other names are."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))
