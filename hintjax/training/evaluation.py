"""Evaluation: the metrics of a stage over a whole split."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp

from hintjax._checks import Refusal, message
from hintjax.networks import Variables
from hintjax.stages import Metrics, Stage, State
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
        state: the state of the stage; it is not changed.
        teacher: the teacher's variables.
        batches: batches with "where", as `data.evaluation_batches` gives them. If there
            are several processes, the batches are on the mesh of the stage.

    Returns:
        The metrics by name, on the host.
    """
    total: Metrics | None = None
    count = 0
    for batch in batches:
        valid = jnp.sum(batch["where"])
        metrics = stage.evaluate(state, teacher, batch)
        weighted = jax.tree.map(lambda value, by=valid: value * by, metrics)
        total = weighted if total is None else jax.tree.map(jnp.add, total, weighted)
        count += valid
    if total is None:
        do = "Give a split that has examples."
        raise Refusal(message("evaluate", "batches", "none", do))
    sums, examples = jax.device_get((total, count))
    return {name: float(value) / int(examples) for name, value in sums.items()}
