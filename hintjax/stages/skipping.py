"""Which updates are skipped: a number is not finite, or the gradient is a spike."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from hintjax._checks import positive_int, scalar
from hintjax.stages import report


class Skipped(NamedTuple):
    """Number of skipped steps: those with a number that is not finite, and spikes."""

    total: Int[Array, ""]
    in_a_row: Int[Array, ""]  # up to now; 0 after a step that was not skipped


class SpikeGuard(NamedTuple):
    """Skips a step whose gradient is many times longer than usual.

    A skipped step changes nothing, like a step with a number that is not finite, and
    its gradient does not count as usual. A gradient of 0 does not count either. If
    gradients stay long for good, all later steps are skipped:
    `State.skipped.in_a_row` grows, and `fit` gives up.

    Attributes:
        factor: a gradient longer than this many mean norms is a spike, > 1.
        window: number of steps that the running mean covers, roughly. No step is
            skipped before so many were made.
    """

    factor: float = 10.0
    window: int = 100


class Norms(NamedTuple):
    """The gradient norms that a guard remembers."""

    mean: Float[Array, ""]  # running mean over the steps that were made
    count: Int[Array, ""]  # steps in it, at most the window
    spikes: Int[Array, ""]  # steps that the guard has skipped


def check(caller: str, guard: SpikeGuard) -> None:
    """Raises, in the caller's name, unless a guard lets usual steps through."""
    long = {"a SpikeGuard with factor": guard.factor}
    scalar(caller, "> 1", lambda factor: factor > 1, **long)
    positive_int(caller, window=guard.window)


def begin() -> Norms:
    """Returns what a guard remembers before the first step."""
    return Norms(jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def guard(
    spikes: SpikeGuard | None,
    norms: Norms | tuple[()],
    loss: Float[Array, ""],
    grads: PyTree,
) -> tuple[Bool[Array, ""], Norms | tuple[()], dict[str, Float[Array, ""]]]:
    """Says whether a step is made.

    Args:
        spikes: the guard against spikes, or None.
        norms: what the guard remembers; empty without one.
        loss: the step's loss.
        grads: its gradient.

    Returns:
        Whether loss and gradient are finite and the gradient is no spike; what the
        guard remembers after the step; and, with a guard, the metrics `norm` and
        `spikes`.
    """
    good = _all_finite((loss, grads))
    if spikes is None or not isinstance(norms, Norms):
        return good, norms, {}
    length = report.norm(grads)
    good, norms = judge(spikes, norms, length, good)
    total = norms.spikes.astype(length.dtype)
    return good, norms, {"norm": length, "spikes": total}


def judge(
    guard: SpikeGuard, norms: Norms, norm: Float[Array, ""], finite: Bool[Array, ""]
) -> tuple[Bool[Array, ""], Norms]:
    """Says whether a step is made, and what the guard remembers after it.

    Args:
        guard: the guard.
        norms: what it remembers.
        norm: length of the step's gradient.
        finite: whether loss and gradient are finite.
    """
    norm = norm.astype(norms.mean.dtype)
    long = (norms.count >= guard.window) & (norm > guard.factor * norms.mean)
    made = finite & ~long
    usual = made & (norm > 0)  # beside a mean of 0 every later gradient is a spike
    count = jnp.minimum(norms.count + 1, guard.window)
    # The mean of all steps at first, and a mean that forgets after `window` steps.
    mean = norms.mean + (norm - norms.mean) / count.astype(norm.dtype)
    return made, Norms(
        mean=jnp.where(usual, mean, norms.mean),
        count=jnp.where(usual, count, norms.count),
        spikes=norms.spikes + jnp.where(finite & long, 1, 0),
    )


def nothing_skipped() -> Skipped:
    """Returns the counts before the first step."""
    # Arrays of their own, since one buffer cannot be donated twice.
    return Skipped(*(jnp.zeros((), jnp.int32) for _ in Skipped._fields))


def counted(before: Skipped, good: Bool[Array, ""]) -> Skipped:
    """Returns the counts after a step that was made if `good`, and else skipped."""
    return Skipped(
        before.total + jnp.where(good, 0, 1),
        jnp.where(good, 0, before.in_a_row + 1),
    )


def _all_finite(tree: PyTree) -> Bool[Array, ""]:
    every = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(every))
