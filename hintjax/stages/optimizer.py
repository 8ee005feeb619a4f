"""The call of an optimizer, with the arguments that some need beside the gradient."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jaxtyping import Array, Float, PyTree

from hintjax._checks import Refusal, WrongType, message


def begun(transform: optax.GradientTransformation, params: PyTree) -> optax.OptState:
    """Returns the state of an optimizer before the first step.

    Args:
        transform: the optimizer.
        params: the parameters.

    Raises:
        ValueError: if the optimizer keeps two trees of parameters (`optax.lookahead`),
            or is made for another tree, such as the student's parameters alone.
    """
    try:
        state = transform.init(params)
    except (TypeError, ValueError, KeyError) as error:
        if isinstance(error, Refusal):
            raise
        first = str(error).partition("\n")[0]
        wanted = f"an optimizer of a tree with the entries {sorted(params)}"
        do = (
            "Give labels and masks as functions of the parameters, or as trees below "
            "{'student': ..., 'regressors': ...}."
        )
        got = f"a {type(error).__name__} of its init: {first.rstrip('.')}"
        raise Refusal(message("stage", wanted, got, do)) from error
    if any(isinstance(one, optax.LookaheadState) for one in _lookaheads(state)):
        wanted = "an optimizer of one tree of parameters"
        got = "optax.lookahead, which has two"
        do = (
            "Use its fast optimizer alone, and hintjax.moving_average for slow weights."
        )
        raise Refusal(message("stage", wanted, got, do))
    return state


def updates(
    transform: optax.GradientTransformation,
    grads: PyTree,
    state: optax.OptState,
    params: PyTree,
    value: Float[Array, ""],
    value_fn: Callable[[PyTree], Float[Array, ""]],
    grad_of_term: Callable[[str], PyTree],
) -> tuple[PyTree, optax.OptState]:
    """Returns the updates of the parameters, and the optimizer's new state.

    An optimizer that needs more than the gradient gets the extra arguments of optax:
    `value`, `grad` and `value_fn` (`optax.contrib.reduce_on_plateau`, `optax.lbfgs`),
    and `grad_of_term` (`distillation_oriented`).

    Args:
        transform: the optimizer.
        grads: the gradients.
        state: the optimizer's state.
        params: the parameters.
        value: the loss of the batch.
        value_fn: the loss of the same batch as a function of the parameters.
        grad_of_term: the gradient of a term of the objective, by its name.

    Raises:
        TypeError: if the optimizer needs another argument, or another type.
        ValueError: if it leaves a gradient as it is.
    """

    def of_all(some: PyTree) -> Float[Array, ""]:
        # An optimizer of a part of the parameters sees only this part.
        return value_fn(jax.tree.map(_filled, some, params, is_leaf=_is_masked))

    extra = {"value": value, "grad": grads, "value_fn": of_all}
    call = optax.with_extra_args_support(transform).update
    errors = []
    # Some take no other extra argument than their own, or than those of optax.
    for given in ({**extra, "grad_of_term": grad_of_term}, extra, {}):
        try:
            found = call(grads, state, params, **given)
        except (TypeError, ValueError, AttributeError) as error:
            if isinstance(error, Refusal):
                raise
            errors.append(error)
        else:
            _check_moved(grads, found[0])
            return found
    fresh = jax.eval_shape(transform.init, params)
    if jax.tree.structure(fresh) != jax.tree.structure(state):
        wanted, got = "the state of this stage's optimizer", "that of another one"
        do = "Pass a state that the init of this stage has made."
        raise Refusal(message("stage", wanted, got, do)) from errors[0]
    wanted = f"an optimizer that needs at most {', '.join(extra)} beside gradients"
    got = f"a {type(errors[0]).__name__}: {errors[0]}"
    raise WrongType(message("stage", wanted, got)) from errors[0]


def _check_moved(grads: PyTree, found: PyTree) -> None:
    """Raises if an update is the gradient itself, and would climb the loss."""
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    for (path, gradient), moved in zip(leaves, jax.tree.leaves(found), strict=True):
        if moved is gradient:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            wanted = "an optimizer that makes updates of all gradients"
            got = f"the gradient of {name!r} itself, which climbs the loss"
            do = (
                "optax.masked leaves such gradients: freeze parameters with "
                "optax.partition and optax.set_to_zero."
            )
            raise Refusal(message("stage", wanted, got, do))


def _lookaheads(state: optax.OptState) -> list[Any]:
    return jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, optax.LookaheadState))


def _filled(some: Any, whole: Any) -> Any:
    return whole if _is_masked(some) else some


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)
