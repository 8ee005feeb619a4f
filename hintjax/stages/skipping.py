"""Which updates are skipped: a number is not finite, or the gradient is a spike."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from hintjax._checks import positive_int, scalar


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every number is."""
    every = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(every))


class SpikeGuard(NamedTuple):
    """Skip a step whose gradient is many times as long as usual.

    A skipped step changes nothing, as if its numbers were not finite, and does not
    count as usual either; nor does one whose gradient is 0. If the level has risen for
    good, all that follow are skipped: `State.skipped.in_a_row` says so, and `fit` gives
    up.

    Attributes:
        factor: how many times the mean norm is too long, > 1.
        window: steps; the mean is over so many, roughly, and before there are so many
            none is skipped.
    """

    factor: float = 10.0
    window: int = 100


class Norms(NamedTuple):
    """What a guard knows of the steps that were made."""

    mean: Float[Array, ""]  # of the norm of their gradients
    count: Int[Array, ""]
    spikes: Int[Array, ""]  # skipped so far


def check(caller: str, guard: SpikeGuard) -> None:
    """Raises, in the caller's name, unless a guard lets usual steps through."""
    long = {"a SpikeGuard with factor": guard.factor}
    scalar(caller, "> 1", lambda factor: factor > 1, **long)
    positive_int(caller, window=guard.window)


def begin() -> Norms:
    """Before the first step."""
    return Norms(jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def judge(
    guard: SpikeGuard, norms: Norms, norm: Float[Array, ""], finite: Bool[Array, ""]
) -> tuple[Bool[Array, ""], Norms]:
    """Whether a step is made, and what is known after it.

    Args:
        guard: the guard.
        norms: what is known.
        norm: of the step's gradient.
        finite: whether all its numbers are.
    """
    norm = norm.astype(norms.mean.dtype)
    long = (norms.count >= guard.window) & (norm > guard.factor * norms.mean)
    made = finite & ~long
    usual = made & (norm > 0)  # of a mean of 0 all that follows would be a spike
    count = jnp.minimum(norms.count + 1, guard.window)
    # At first the mean of all, then one that forgets.
    mean = norms.mean + (norm - norms.mean) / count.astype(norm.dtype)
    return made, Norms(
        mean=jnp.where(usual, mean, norms.mean),
        count=jnp.where(usual, count, norms.count),
        spikes=norms.spikes + jnp.where(finite & long, 1, 0),
    )
