"""The state that a stage starts from: fresh arrays, and arrays of an earlier stage."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from hintjax._checks import Refusal, message, on_host
from hintjax.method import PREPARED, Data
from hintjax.networks import Variables
from hintjax.sharding import in_automatic_mesh, on_automatic
from hintjax.stages import entering, optimizer, reach, skipping
from hintjax.stages.forward import Plan, features_of_teacher, loss, parts_of
from hintjax.stages.stage import Batch, Given, State


@in_automatic_mesh()
def init(
    plan: Plan,
    fresh: Callable[..., Any],
    key: Key[Array, ""],
    student: Given,
    teacher: Given | None,
    batch: Batch,
    data: Data | None = None,
    carry: State | None = None,
) -> State:
    """Returns the state before the first step; see `Stage.init`.

    Args:
        plan: the stage's settings.
        fresh: the jit of `fresh` with this plan.
        key: of the stage's randomness.
        student: the student's variables; they are copied.
        teacher: the teacher's variables, or None.
        batch: an example, for its shapes.
        data: the labels of the training set.
        carry: the state of an earlier stage.

    Raises:
        ValueError: if an argument has a wrong form (see `entering`), the method needs
            an earlier stage and `carry` is None, or the stages have no common term.
    """
    entering.check_key(key)
    variables = entering.student(student), entering.teacher(teacher)
    entering.check_arrays("the teacher's", variables[1])
    entering.check_batch(batch)
    entering.check_data(data)
    entering.check_carry(carry)
    if plan.method.prepare is not None and carry is None:
        do = "Train method.prepare in a hint_stage first."
        wanted = "carry=, the state of the stage before"
        raise Refusal(message("stage", wanted, "None", do))
    ours, theirs, batch = on_automatic((*variables, batch))
    key, data, carry = on_automatic((key, data, carry))
    if plan.method.check is not None and data is not None:
        plan.method.check(data)
    variables = Variables(*copied(tuple(ours)))
    earlier = None
    if carry is not None:
        earlier = copied((carry.params["regressors"], carry.memory))
    made: State = fresh(key, variables, theirs, batch, data, earlier)
    if plan.method.limits is not None:
        entering.check_limits(batch, plan.method.limits(made.memory), on_host)
    # Only the new arrays come out of the jit: the student's are the copies above.
    state = made._replace(
        params={"student": variables.params, **made.params},
        state=variables.state,
        skipped=skipping.nothing_skipped(),
        norms=() if plan.spikes is None else skipping.begin(),
    )
    return plan.place.begin(state, None if theirs is None else theirs.params)


def fresh(
    plan: Plan,
    key: Key[Array, ""],
    student: Variables,
    teacher: Variables | None,
    batch: Batch,
    data: Data | None,
    earlier: tuple[dict, dict] | None,
) -> State:
    """Returns the new arrays of a state: regressors, memory, optimizer, step and key.

    Args:
        plan: the stage's settings.
        key: of the stage's randomness.
        student: the student's variables.
        teacher: the teacher's variables, or None.
        batch: an example, for its shapes.
        data: the labels of the training set.
        earlier: regressors and memory of an earlier stage, or None.
    """
    params, state = student
    taught = features_of_teacher(plan, teacher, batch)
    shown = reach.shown(plan, student, batch, key)
    told = jax.eval_shape(lambda features: features, taught)
    own, theirs = jax.random.split(key)
    regressors, memory = copied(plan.method.init(theirs, shown.features, told, data))
    check_micro_batches(plan, theirs, student, teacher, batch, data)
    if earlier is not None:
        regressors, memory = carried((regressors, memory), earlier)
    params = {"student": params, "regressors": regressors}
    zero = jnp.zeros((), jnp.int32)
    skipped = skipping.nothing_skipped()
    made = State(params, state, memory, (), zero, own, skipped)
    parts = parts_of(plan, made, taught, batch)
    reach.check(plan, parts, shown)
    chosen = plan.choose(lambda parts, **how: loss(plan, parts, **how), parts)
    return made._replace(
        params={"regressors": regressors},
        state=None,
        opt_state=optimizer.begun(chosen.transform, params),
    )


def check_micro_batches(
    plan: Plan,
    key: Key[Array, ""],
    student: Variables,
    teacher: Variables | None,
    batch: Batch,
    data: Data | None,
) -> None:
    """Raises if the method can begin with the batch, and not with a micro-batch of it.

    A loss that compares examples is constant if a micro-batch has too few of them.

    Args:
        plan: the stage's settings.
        key: of the method's parameters, or its shape.
        student: the student's variables, or their shapes.
        teacher: the teacher's variables, or None.
        batch: the batch, or its shapes.
        data: the labels of the training set.
    """
    n = jax.tree.leaves(batch)[0].shape[0]

    def begin(few: Batch) -> tuple[dict, dict]:
        shown = reach.features(plan, student, few, key)
        return plan.method.init(
            key, shown, features_of_teacher(plan, teacher, few), data
        )

    def refusal(count: int) -> Refusal | None:
        few = jax.tree.map(lambda leaf: leaf[: n // count], batch)
        try:
            jax.eval_shape(begin, few)
        except Refusal as error:
            return error
        return None

    # A batch that cannot be divided is refused by the step.
    counts = [
        k for k in range(plan.accumulate, 0, -1) if n % (k * plan.place.parts) == 0
    ]
    if plan.accumulate == 1 or plan.accumulate not in counts:
        return
    error = refusal(plan.accumulate)
    if error is not None:
        most = next((count for count in counts if refusal(count) is None), 1)
        wanted = f"at most {most} micro-batches of a batch of {n} examples"
        said = str(error).partition(". ")[0]
        do = f"Each has {n // plan.accumulate} of them. {said}."
        raise Refusal(message("accumulate", wanted, f"{plan.accumulate}", do))


def copied(tree: PyTree) -> PyTree:
    """Returns new arrays, which donation may delete.

    They are never weakly typed: the arrays after an update are not either, and another
    type would be compiled for once more.
    """

    def one(leaf: Any) -> Array:
        leaf = jnp.array(leaf)
        return jnp.array(leaf, dtype=leaf.dtype)

    return jax.tree.map(one, tree)


def carried(fresh: tuple[dict, dict], earlier: tuple[dict, dict]) -> list[dict]:
    """Returns regressors and memory; common terms have the values of the earlier stage.

    Args:
        fresh: regressors and memory of this stage, by term.
        earlier: regressors and memory of the earlier stage, by term.

    Raises:
        ValueError: if the stages have no common term, or a common term has other
            shapes.
    """
    if PREPARED in fresh[1]:  # a method alone, without names of terms
        return list(_term("the method", fresh, earlier))
    names = [name for name in fresh[0] if name in earlier[0]]
    missing = [n for n, own in fresh[1].items() if PREPARED in own and n not in names]
    if not names or missing:
        got = f"{list(earlier[0])} in the earlier stage and {missing or list(fresh[0])}"
        do = "Name the term the same in an objective of each stage."
        raise Refusal(message("carry", "a term of both stages", f"{got} here", do))
    taken = [dict(part) for part in fresh]
    for name in names:
        ours, theirs = ([part[name] for part in parts] for parts in (fresh, earlier))
        for part, value in zip(taken, _term(repr(name), ours, theirs), strict=True):
            part[name] = value
    return taken


def _term(name: str, fresh: Any, earlier: Any) -> Sequence[PyTree]:
    """Returns parameters and memory of a term, from the same term of another stage."""
    params, memory = fresh
    if PREPARED in memory and PREPARED not in earlier[1]:  # it was the stage before
        _check_same(name, memory[PREPARED], earlier[0])
        return params, {**memory, PREPARED: earlier[0]}
    _check_same(name, fresh, earlier)
    return earlier


def _check_same(name: str, fresh: PyTree, earlier: PyTree) -> None:
    ours, theirs = (
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
        for tree in (fresh, earlier)
    )
    if ours != theirs:
        wanted = f"the term {name} to be the same in both stages"
        got = f"{theirs} from the earlier stage and {ours} here"
        do = "Use the same pairs and regressors, or another name."
        raise Refusal(message("carry", wanted, got, do))
