"""An objective: a weighted sum of methods and the task. It is itself a method."""

import math
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, ArrayLike, DTypeLike, ScalarLike

from hintjax._checks import (
    Refusal,
    described,
    instance,
    message,
    scalar,
)
from hintjax._numerics import either, masked_mean
from hintjax.method import (
    PREPARED,
    Applied,
    Batch,
    Context,
    Data,
    Method,
    Reduced,
    one_per_example,
    reduced,
    total,
    union,
)
from hintjax.networks import Features

ADJUSTABLE = "weights"  # the memory of an objective that holds adjustable weights


class Adjustable(NamedTuple):
    """A weight that is stored in the state, not in the compiled program.

    In one program, each student of a population can then have its own weight (see
    `population`), and the weight of one student can change between steps. `reweighted`
    sets it.

    Attributes:
        start: the weight until `reweighted` sets another, a number >= 0.
        schedule: `step -> factor`, such as optax's. The term is multiplied by the
            weight and by this factor. The default factor is 1.
    """

    start: float | int
    schedule: Callable[[Array], Array] | None = None


Weight = float | int | Callable[[Array], Array] | Adjustable


class Weighted(NamedTuple):
    """A method and its weight in an objective."""

    method: Method
    weight: Weight


def weighted(method: Method, weight: Weight) -> Weighted:
    """A method with its weight, as a term of an `objective`.

    Args:
        method: the method.
        weight: a number >= 0, or a schedule `step -> weight`, such as optax's, or an
            `Adjustable`, which is stored in the state.

    Returns:
        The term, for `objective`.

    Raises:
        ValueError: if the weight is negative or not finite.
    """
    instance("weighted", Method, method=method)
    if not callable(weight):
        start = weight.start if isinstance(weight, Adjustable) else weight
        check_weight("weighted", start)
    return Weighted(method, weight)


def check_weight(caller: str, weight: ScalarLike) -> None:
    """Raises unless a number is finite and >= 0."""
    wanted = ">= 0 or a schedule"
    scalar(caller, wanted, lambda w: 0 <= w < math.inf, **{"a finite weight": weight})


def objective(**terms: Weighted | Method) -> Method:
    """A weighted sum of methods: `sum_i w_i(step) L_i`.

    The objective reports, for each term: `name` (the mean of its values before the
    weight), `name/weighted` (the mean after the weight), and the method's own metrics
    as `name/metric`. It reports the total as `loss`. Means are over the valid examples
    (`batch["where"]`).

    Args:
        **terms: the terms by name; a method without a weight has weight 1.

    Returns:
        The method. Its parameters and its memory are dicts by the names of the terms,
        so that two objectives can share a term (see `carry` of a stage). Adjustable
        weights are in the memory under "weights", and `carry` leaves them out.

    Raises:
        ValueError: if there is no term, if all weights are 0, if two terms define
            `deploy`, or if the name of a term is reserved.

    >>> import optax
    >>> import hintjax
    >>> term = hintjax.task(optax.softmax_cross_entropy_with_integer_labels)
    >>> objective(task=weighted(term, 0.5), again=term).student
    Wants(output=True, hints=(), params=())
    """
    return _objective("objective", terms, _summed)


def teacher_dropping(keep: float = 0.5, /, **terms: Weighted | Method) -> Method:
    """Several teachers: each example keeps the worst term, and other terms by chance.

    A student of several teachers learns the easy ones and neglects the others. So each
    example keeps the term of its largest (weighted) value, and every other term with
    the probability `keep`::

        L = sum_i sum_t k_it w_t L_it / sum_i sum_t k_it      k_it in {0, 1}

    over the examples i of the batch and the terms t, usually one term for each teacher
    (see `from_teacher`). In evaluation all terms count, and L is their mean.

    Args:
        keep: the probability, in [0, 1]. With 1 nothing is dropped.
        **terms: the terms by name; a method without a weight has weight 1.

    Returns:
        The method, as `objective` returns it. It also reports `name/kept`, the fraction
        of examples that kept the term.

    Raises:
        ValueError: if the probability is not in [0, 1], if a weight is 0, or as
            `objective` raises.

    Convention:
        The factor is 1 against the code of UNIC, which drops teachers by the mean of
        their two losses: pass one term for each teacher, an `objective` of both.

    References:
        Sariyildiz et al., UNIC: Universal Classification Models via Multi-teacher
        Distillation, 2024. https://github.com/naver/unic
    """
    scalar("teacher_dropping", "in [0, 1]", lambda p: 0 <= p <= 1, keep=keep)
    for name, term in terms.items():
        if isinstance(term, Weighted) and term.weight == 0:
            wanted, do = "weights > 0", "Watch this term in an objective around it."
            got = f"weight 0 of {name!r}"
            raise Refusal(message("teacher_dropping", wanted, got, do))
    return _objective("teacher_dropping", terms, partial(_kept, keep))


Combine = Callable[
    [Mapping[str, Array], Context, Array | None], tuple[Array, dict[str, Array]]
]


def _summed(
    parts: Mapping[str, Array], context: Context, where: Array | None
) -> tuple[Array, dict[str, Array]]:
    """The sum of the weighted terms, one value per example."""
    return total(parts.values()), {}


def _kept(
    keep: float, parts: Mapping[str, Array], context: Context, where: Array | None
) -> tuple[Array, dict[str, Array]]:
    """The weighted terms that each example keeps; their mean over all that are kept.

    The mean of the values over the valid examples is the sum of the kept terms, divided
    by the number of kept terms.
    """
    values = jnp.stack([*parts.values()])
    kept = jnp.ones(values.shape, bool)
    if context.train:
        key = jax.random.fold_in(context.key, len(parts))
        drawn = jax.random.bernoulli(key, keep, values.shape)
        worst = values.max(0, keepdims=True)
        kept = drawn | ~(values < worst)  # so nan is kept, too
    each = masked_mean(kept.sum(0).astype(values.dtype), where)
    shares = {
        f"{name}/kept": masked_mean(one.astype(values.dtype), where)
        for name, one in zip(parts, kept, strict=True)
    }
    return jnp.where(kept, values, 0.0).sum(0) / each, shares


def _objective(
    caller: str, terms: Mapping[str, Weighted | Method], combine: Combine
) -> Method:
    """An objective that combines the weighted values of its terms."""
    named = _named(caller, terms)
    prepared = {
        name: term.method.prepare
        for name, term in named.items()
        if term.method.prepare is not None
    }
    return Method(
        student=union(*(term.method.student for term in named.values())),
        teacher=union(*(term.method.teacher for term in named.values())),
        init=_init(named),
        apply=_apply(caller, named, combine),
        prepare=objective(**prepared) if prepared else None,
        deploy=_deployed(named),
        split=_split(named),
        select=_select(named),
        ignored=tuple(
            dict.fromkeys(i for term in named.values() for i in term.method.ignored)
        ),
        reduced=_reduced(caller, named, combine),
        check=_check(named),
        limits=_limits(named),
        mislabeled=_mislabeled(named),
        silent=_silent(named),
    )


def _named(caller: str, terms: Mapping[str, Weighted | Method]) -> dict[str, Weighted]:
    """The terms with their weights.

    Raises:
        Refusal: if a name is taken, or if all weights are 0.
    """
    instance(caller, (Method, Weighted), **terms)
    named = {
        name: term if isinstance(term, Weighted) else Weighted(term, 1.0)
        for name, term in terms.items()
    }
    # Names that stages report, and names in the memory beside those of the terms.
    taken = ("loss", "norm", "skipped", "spikes", ADJUSTABLE, PREPARED)
    if named.keys() & {*taken}:
        do = "Give the term another name."
        wanted = f"no term with a name among {taken}"
        raise Refusal(message(caller, wanted, f"{list(named)}", do))
    if all(term.weight == 0 for term in named.values()):
        got = f"the terms {list(named)} with weight 0" if named else "no terms"
        raise Refusal(message(caller, "a term with a weight > 0", got))
    return named


def _init(terms: dict[str, Weighted]) -> Callable[..., tuple[dict, dict]]:
    """`Method.init` of an objective; adjustable weights are in the memory."""
    adjustable = {
        name: term.weight.start
        for name, term in terms.items()
        if isinstance(term.weight, Adjustable)
    }

    def init(
        key: Array, student: Features, teacher: Features, data: Data | None
    ) -> tuple[dict, dict]:
        made = {
            name: term.method.init(_fold(key, name), student, teacher, data)
            for name, term in terms.items()
        }
        params = {name: params for name, (params, _) in made.items()}
        memory = {name: memory for name, (_, memory) in made.items()}
        if adjustable:
            memory[ADJUSTABLE] = {
                name: jnp.asarray(start, float) for name, start in adjustable.items()
            }
        return params, memory

    return init


def _apply(
    caller: str, terms: dict[str, Weighted], combine: Combine
) -> Callable[..., Applied]:
    """`Method.apply` of an objective: each term is computed, weighted and reported."""

    def apply(
        params: dict,
        memory: dict,
        student: Features,
        teacher: Features,
        batch: Batch,
        context: Context,
    ) -> Applied:
        parts, metrics, n = {}, {}, None
        _check_terms(terms, params)
        adjusted = memory.get(ADJUSTABLE, {})
        remembered = {ADJUSTABLE: adjusted} if adjusted else {}
        for name, (method, weight) in terms.items():
            own_context = context._replace(key=_fold(context.key, name))
            given = params[name], memory[name], student, teacher, batch, own_context
            values, remembered[name], own = method.apply(*given)
            one_per_example(caller, f"the term {name!r}", values, n)
            n = values.shape[0]
            now = _now(weight, adjusted.get(name), context.step, values.dtype)
            scaled = values * now
            parts[name] = scaled
            metrics[name] = masked_mean(values, batch.get("where"))
            metrics[f"{name}/weighted"] = masked_mean(scaled, batch.get("where"))
            metrics |= {f"{name}/{key}": value for key, value in own.items()}
        values, more = combine(parts, context, batch.get("where"))
        metrics |= more
        metrics["loss"] = masked_mean(values, batch.get("where"))
        return values, remembered, metrics

    return apply


def _check_terms(terms: dict[str, Weighted], params: dict) -> None:
    """Raises if the parameters are those of another objective."""
    if params.keys() != terms.keys():
        wanted = f"the state of a stage with the terms {list(terms)}"
        do = "Pass a state that the init of this stage has made."
        raise Refusal(message("objective", wanted, f"{list(params)}", do))


def _now(
    weight: Weight | None, kept: ArrayLike | None, step: Array, dtype: DTypeLike
) -> Array:
    """The weight of a term at a step.

    Args:
        weight: the weight, as the term has it.
        kept: the value in the state, if the weight is adjustable.
        step: the step.
        dtype: of the result.
    """
    if isinstance(weight, Adjustable):
        kept, weight = jnp.asarray(kept, dtype), weight.schedule
        return kept if weight is None else kept * _now(weight, None, step, dtype)
    now = jnp.asarray(weight(step) if callable(weight) else weight, dtype)
    if now.shape:  # the values of a batch would be weighted one by one
        wanted = "the schedule of a weight to give one number"
        raise Refusal(message("objective", wanted, described(now)))
    return now


def _split(terms: dict[str, Weighted]) -> Callable[[dict], dict] | None:
    """`Method.split` of an objective, from that of each term."""
    own = _own(terms, "split")
    if not own:
        return None

    def split(memory: dict) -> dict:
        return {
            name: own[name](kept) if name in own else PartitionSpec()
            for name, kept in memory.items()
        }

    return split


def _select(terms: dict[str, Weighted]) -> Callable[..., dict] | None:
    """`Method.select` of an objective, from that of each term."""
    own = _own(terms, "select")
    if not own:
        return None

    def select(good: Array, memory: dict, before: dict, batch: Batch) -> dict:
        return {
            name: own[name](good, kept, before[name], batch)
            if name in own
            else either(good, kept, before[name])
            for name, kept in memory.items()
        }

    return select


def _reduced(
    caller: str, terms: dict[str, Weighted], combine: Combine
) -> Callable[[Features], Reduced] | None:
    """`Method.reduced` of an objective, from that of each term."""
    if not _own(terms, "reduced"):
        return None

    def made(student: Features) -> Reduced:
        found = {name: reduced(term.method, student) for name, term in terms.items()}

        def reduce(teacher: Features) -> Features:
            hints = {}
            for name, term in terms.items():
                own = {path: teacher.hints[path] for path in term.method.teacher.hints}
                hints |= found[name].reduce(teacher._replace(hints=own)).hints
            return teacher._replace(hints=hints)

        read = {
            name: Weighted(found[name].method, term.weight)
            for name, term in terms.items()
        }
        return Reduced(reduce, _objective(caller, read, combine))

    return made


def _check(terms: dict[str, Weighted]) -> Callable[[Data], None] | None:
    """`Method.check` of an objective, from that of each term that teaches."""
    own = _own({n: term for n, term in terms.items() if term.weight != 0}, "check")
    if not own:
        return None

    def check(data):
        for one in own.values():
            one(data)

    return check


def _limits(terms: dict[str, Weighted]) -> Callable[[dict], dict[str, int]] | None:
    """`Method.limits` of an objective: the lowest of all terms."""
    own = _own(terms, "limits")
    if not own:
        return None

    def limits(memory: dict) -> dict[str, int]:
        found: dict[str, int] = {}
        for term, one in own.items():
            for name, n in one(memory[term]).items():
                found[name] = min(n, found[name]) if name in found else n
        return found

    return limits


def _mislabeled(terms: dict[str, Weighted]) -> Callable[[dict, Batch], Array] | None:
    """`Method.mislabeled` of an objective: an example that any term finds."""
    own = _own(terms, "mislabeled")
    if not own:
        return None

    def mislabeled(memory: dict, batch: Batch) -> Array:
        found = [one(memory[term], batch) for term, one in own.items()]
        return jnp.any(jnp.stack(found), 0)

    return mislabeled


def _silent(terms: dict[str, Weighted]) -> tuple[str, ...]:
    """`Method.silent` of an objective: its own terms, and those of its terms."""
    own = [name for name, term in terms.items() if term.weight == 0]
    inner = [
        f"{n}/{inside}" for n, term in terms.items() for inside in term.method.silent
    ]
    return *own, *inner


def _own(terms: dict[str, Weighted], field: str) -> dict[str, Callable]:
    """The values of an optional field of the methods, by term, without None."""
    found = {name: getattr(term.method, field) for name, term in terms.items()}
    return {name: has for name, has in found.items() if has is not None}


def _deployed(terms: dict[str, Weighted]) -> Callable[..., Array] | None:
    """`Method.deploy` of an objective: that of the only term that defines it."""
    found = _own(terms, "deploy")
    if len(found) > 1:
        wanted = "at most one term whose method defines deploy"
        raise Refusal(message("objective", wanted, f"{list(found)}"))
    if not found:
        return None
    ((name, shipped),) = found.items()

    def deploy(
        params: dict, memory: dict, student: Features, teacher: Features
    ) -> Array:
        return shipped(params[name], memory[name], student, teacher)

    return deploy


def _fold(key: Array, name: str) -> Array:
    """A key for each name that does not depend on the other names."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))
