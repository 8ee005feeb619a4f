"""A stage's metrics over a whole split."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp

from hintjax.networks import Variables
from hintjax.stages import Stage, State
from hintjax.training.feeds import Batch


def evaluate(
    stage: Stage,
    state: State,
    teacher: Variables | None,
    batches: Iterable[Batch],
) -> dict[str, float]:
    """The objective and its metrics over a whole split, each example counted once.

    Args:
        stage: the stage.
        state: its state; untouched.
        teacher: the teacher's variables.
        batches: with "where", as `data.evaluation_batches` gives them; on the stage's
            mesh, if there are several processes.

    Returns:
        The metrics by name, on the host.
    """
    total, count = None, 0
    for batch in batches:
        valid = jnp.sum(batch["where"])
        metrics = stage.evaluate(state, teacher, batch)
        weighted = jax.tree.map(lambda value, by=valid: value * by, metrics)
        total = weighted if total is None else jax.tree.map(jnp.add, total, weighted)
        count += valid
    if total is None:
        raise ValueError(
            "evaluate: expected batches, got none. Give a split that has examples."
        )
    total, count = jax.device_get((total, count))
    return {name: float(value) / int(count) for name, value in total.items()}
