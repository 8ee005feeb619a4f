"""Which parameters feed what, read off the traced program, and trained accordingly."""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import optax
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import PyTree

from hintjax.networks import Network, Wants


def reads(function: Callable, position: int, arguments: tuple) -> PyTree:
    """For each leaf of one argument, whether the function's result depends on it.

    Read off the traced program after the elimination of dead code, so that a leaf
    which only feeds something beside the result does not count.

    >>> reads(lambda params: params["a"], 0, ({"a": 1.0, "b": 2.0},))
    {'a': True, 'b': False}
    """
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    _, used = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    tree = jax.tree.structure(arguments)
    return jax.tree.unflatten(tree, used)[position]


def only_what_feeds(
    optimizer: optax.GradientTransformation, objective: Callable, *parts: PyTree
) -> tuple[optax.GradientTransformation, PyTree, PyTree]:
    """An optimiser of the parameters that feed an objective; the others are frozen.

    Args:
        optimizer: of what is trained.
        objective: `(*parts, train=) -> (loss, ...)`.
        *parts: its arguments, or their shapes: parameters, the student's state, others.

    Returns:
        The optimiser, which parameters it changes, and which of the state is kept.
    """

    def loss(*parts, train):
        return objective(*parts, train=train)[0]

    learning = partial(loss, train=True)
    trained = reads(learning, 0, parts)
    labels = jax.tree.map(lambda t: "trained" if t else "frozen", trained)
    transforms = {"trained": optimizer, "frozen": optax.set_to_zero()}
    # While training BatchNorm reads no statistics: evaluation says which count.
    kept = jax.tree.map(
        lambda *read: any(read),
        reads(learning, 1, parts),
        reads(partial(loss, train=False), 1, parts),
    )
    return optax.partition(transforms, labels), trained, kept


def multiplied(
    optimizer: optax.GradientTransformation,
    student: Network,
    inputs: Callable[[PyTree], PyTree],
    rates: Mapping[str, float],
    objective: Callable,
    params: PyTree,
    model_state: PyTree,
    memory: PyTree,
    taught: PyTree,
    batch: PyTree,
    *others: PyTree,
) -> tuple[optax.GradientTransformation, PyTree, PyTree]:
    """An optimiser of everything, whose updates of what feeds some layers are scaled.

    Args:
        optimizer: before it is scaled.
        student: the student.
        inputs: what it sees of a batch.
        rates: factors by path of a layer.
        objective: as for `only_what_feeds`; not looked at.
        params, model_state, memory, taught, batch, *others: its arguments.

    Returns:
        As `only_what_feeds`.
    """

    def feeds(path):
        def hint(weights, model_state, batch, key):
            wants = Wants(hints=(path,))
            seen = inputs(batch)
            shown, _ = student.apply(
                weights, model_state, seen, wants=wants, train=True, key=key
            )
            return shown.hints[path]

        parts = (params["student"], model_state, batch, others[0])
        nowhere = jax.tree.map(lambda _: False, params)
        return {**nowhere, "student": reads(hint, 0, parts)}

    multipliers = [
        optax.masked(optax.scale(rate), feeds(path)) for path, rate in rates.items()
    ]
    everything = jax.tree.map(lambda _: True, (params, model_state))
    return optax.chain(optimizer, *multipliers), *everything
