"""Balance: weights that give each term a share of the gradient."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from hintjax._checks import Refusal, instance, message, nearest, positive_int, scalar
from hintjax.objective import ADJUSTABLE
from hintjax.stages.report import Report
from hintjax.stages.stage import State


class Balance(NamedTuple):
    """The shares of the gradient that the terms of an objective should have.

    Attributes:
        target: share of each balanced term, by its name; each is in (0, 1), and their
            sum is below 1. The terms that are not named have the rest together. The
            weight of a named term must be `Adjustable`.
        every: number of steps between two moves of the weights. Each move costs one
            backward pass per term, and the other steps cost nothing.
        decay: part of its old weight that a term keeps at a move, in [0, 1). The
            first moves keep less: none, then 1/2, then 2/3.
    """

    target: Mapping[str, float | int]
    every: int = 100
    decay: float | int = 0.9


def check_balance(caller: str, balance: Balance, state: State) -> None:
    """Raises unless a balance makes sense for the state of an objective."""
    instance(caller, Balance, balance=balance)
    instance(caller, Mapping, target=balance.target)
    for name, share in balance.target.items():
        wanted = f"of {name!r} to be between 0 and 1"
        scalar(caller, wanted, lambda x: 0 < x < 1, share=share)
    total = math.fsum(float(share) for share in balance.target.values())
    if not 0 < total < 1:
        do = "The terms that are not named need the rest."
        wanted = "shares of at least one term, with a sum below 1"
        raise Refusal(message(caller, wanted, f"{dict(balance.target)}", do))
    positive_int(caller, every=balance.every)
    scalar(caller, "to be in [0, 1)", lambda x: 0 <= x < 1, decay=balance.decay)
    instance(caller, State, state=state)
    kept = state.memory.get(ADJUSTABLE, {})
    for name in balance.target:
        if name not in kept:
            near = ", ".join(nearest(name, kept)) or "none"
            do = f"Nearest: {near}; give its weight as hintjax.Adjustable(start)."
            wanted = "terms whose weight is adjustable"
            raise Refusal(message(caller, wanted, repr(name), do))


def rebalanced(state: State, report: Report, balance: Balance) -> State:
    r"""Returns the state with weights that bring the gradients nearer to their shares.

    $$w_i \leftarrow w_i \left(\frac{t_i}{1 - \sum_k t_k}
    \frac{\sum_{j \notin t} g_j}{g_i}\right)^{1 - d}, \quad
    g_i = \left\lVert \nabla_S\, w_i L_i \right\rVert$$

    Here $t_i$ is the share of a balanced term, and $d$ is `decay`, but at most
    $n / (n + 1)$ after $n$ moves, so that the logarithm of a weight is an exponential
    mean, and the first move goes all the way. $S$ are the parameters of the student
    that all terms move: below the guided layer for a hint, without the regressors. If
    the losses did not change, the shares $g_i / \sum_j g_j$ would reach $t_i$. The
    terms that are not balanced keep their weights, so that the learning rate keeps its
    meaning. A weight stays as it is if a gradient is 0 or not finite.

    The weights are in the state, so checkpoints hold them, and each student of a
    population has its own. In a training loop::

        balance = Balance({"hint": 0.5}, every=100)
        for step, batch in enumerate(batches):
            if step % balance.every == 0:
                report = stage.report(state, teacher, batch)
                state = rebalanced(state, report, balance)
            state, metrics = stage.update(state, teacher, batch)

    `hintjax.training.Phase` has a field for it.

    Args:
        state: state of a stage whose method is an objective.
        report: result of `stage.report` for this state.
        balance: shares of the terms.

    Returns:
        The state.

    Raises:
        Refusal: if the shares make no sense, if the weight of a balanced term is not
            `Adjustable`, or if all terms are balanced.

    References:
        Chen et al. 2018, GradNorm, which also balances the lengths of gradients, but
        trains the weights and balances the rates at which losses fall.
    """
    check_balance("rebalanced", balance, state)
    kept, terms = state.memory[ADJUSTABLE], report["terms"]
    others = [name for name in terms if name not in balance.target]
    if not others:
        wanted = "a term that is not balanced"
        do = "Leave out the task: its weight sets the scale."
        raise Refusal(message("rebalanced", wanted, f"{list(terms)}", do))
    rest = sum(terms[name]["shared"] for name in others)
    scale = rest / (1 - math.fsum(float(t) for t in balance.target.values()))
    moves = jnp.maximum(state.step // balance.every - 1, 0)
    decay = jnp.minimum(moves / (moves + 1), balance.decay)

    def moved(weight: Array, factor: Array) -> Array:
        good = jnp.isfinite(factor) & (factor > 0)
        factor = jnp.where(good, factor, 1) ** (1 - decay)
        return weight * factor.astype(weight.dtype)

    new = {
        name: moved(kept[name], share * scale / terms[name]["shared"])
        for name, share in balance.target.items()
    }
    return state._replace(memory={**state.memory, ADJUSTABLE: {**kept, **new}})
