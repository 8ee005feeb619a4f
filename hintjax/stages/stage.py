"""The shapes of a stage: `State`, `Stage`, batches and metrics."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from hintjax.networks import Features, Variables
from hintjax.stages.report import Report
from hintjax.stages.skipping import Norms

Batch = Mapping[str, Array]
Metrics = dict[str, Float[Array, ""]]


class Skipped(NamedTuple):
    """How many updates were skipped: a number was not finite, or they were spikes."""

    total: Int[Array, ""]
    in_a_row: Int[Array, ""]  # up to now; 0 after a step that was not skipped


class State(NamedTuple):
    """All that a stage changes; a pytree of arrays.

    Attributes:
        params: `{"student": ..., "regressors": ...}`.
        state: the student's other collections (BatchNorm statistics).
        memory: what the method remembers.
        opt_state: the optimiser's state.
        step: updates made or skipped.
        key: the key that every update's randomness is folded from.
        skipped: how many of them were skipped.
        norms: what a guard against spikes knows; nothing without one.
    """

    params: dict[str, PyTree]
    state: PyTree
    memory: PyTree
    opt_state: optax.OptState
    step: Int[Array, ""]
    key: Key[Array, ""]
    skipped: Skipped
    norms: Norms | tuple[()] = ()


class Stage(NamedTuple):
    """An optax update step for one objective.

    Attributes:
        init: `(key, student, teacher, batch, data=None, carry=None) -> State`, from
            `Variables`. Everything is copied, so that donation never deletes the
            caller's arrays. `data` (`Data`) is for methods that need the training
            set's size and labels; `carry`, the `State` of an earlier stage, gives
            its regressors and memory to the terms of the same name; a method that has
            a `prepare` needs that of its stage.
        teach: `(state, teacher, batch) -> Features` of the teacher, with
            `stop_gradient`.
        step: `(state, taught, batch) -> (state, metrics)`; pure and not jitted. The
            metrics are the objective's, and `skipped`: the updates skipped so far;
            with a guard, of these the `spikes`, and the `norm` of the gradient.
        update: `(state, teacher, batch) -> (state, metrics)`: the jit of `teach`,
            then `step`. The state is donated.
        evaluate: `(state, teacher, batch) -> metrics`: the objective with
            `train=False`; nothing moves.
        report: `(state, teacher, batch) -> {"terms": ..., "layers": ...}`: what the
            next update of this batch would be made of; nothing moves. It costs a
            backward pass for every term, so ask now and then. "terms" has for each
            term of the objective (or for "loss", if the method is none) its weighted
            `loss`, the `norm` of that loss' gradient, and its `share` in the sum of
            these norms. "layers" has the norm of the total gradient for each outermost
            layer of the student ("student/name") and each regressor
            ("regressors/term/pair"). A norm is finite where the gradient is; shares
            are numbers where all norms are.
    """

    init: Callable[..., State]
    teach: Callable[[State, Variables | None, Batch], Features]
    step: Callable[[State, Features, Batch], tuple[State, Metrics]]
    update: Callable[[State, Variables | None, Batch], tuple[State, Metrics]]
    evaluate: Callable[[State, Variables | None, Batch], Metrics]
    report: Callable[[State, Variables | None, Batch], Report]


def image(batch: Batch) -> Float[Array, "batch h w c"]:
    """The default inputs of a network: the batch's "image", as floats.

    Raises:
        ValueError: if there is none, or it has other axes.
        TypeError: if it holds integers.
    """
    if "image" not in batch:
        raise ValueError(
            f'batch: expected an entry "image", got {sorted(batch)}. Select the '
            f"inputs with inputs= and teacher_inputs=."
        )
    if not jnp.issubdtype(batch["image"].dtype, jnp.floating):
        raise TypeError(
            f'batch: expected "image" to be floating point, got '
            f"{batch['image'].dtype}. Scale and standardise the images first."
        )
    if batch["image"].ndim != 4:
        raise ValueError(
            f'batch: expected "image" to be (batch, h, w, c), got '
            f"{batch['image'].shape}. Add the axis, or select other inputs with inputs=."
        )
    return batch["image"]


def student_variables(state: State) -> Variables:
    """The student alone: what is shipped, or where the next stage starts."""
    return Variables(state.params["student"], state.state)
