"""The momentum of DOT: one buffer for the task, and one for the teacher."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree, ScalarLike

from hintjax._checks import WrongType, instance, message, scalar


class OrientedState(NamedTuple):
    """The state of `distillation_oriented`.

    Attributes:
        task: momentum of the task, shaped as the parameters.
        distillation: momentum of the other terms, shaped as the parameters.
        by_task: for each parameter, whether the task has moved it so far.
        by_distillation: for each parameter, whether the other terms have moved it.
    """

    task: PyTree
    distillation: PyTree
    by_task: PyTree
    by_distillation: PyTree


def distillation_oriented(
    momentum: ScalarLike = 0.9, delta: ScalarLike = 0.075, task: str = "task"
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum that is larger for the teacher's gradient than for the task's (DOT).

    $$v_t \leftarrow (\mu - \Delta)\, v_t + \nabla L_t, \qquad
    v_d \leftarrow (\mu + \Delta)\, v_d + \nabla L_d, \qquad
    u = v_t + v_d$$

    Here $L_t$ is the term of the task, and $L_d$ is the rest of the objective, both
    with their weights. A parameter that only one of them has moved, such as a
    regressor's, has the momentum $\mu$. With $\Delta = 0$ the updates are those of SGD
    with momentum.

    It takes the place of `optax.trace` in a chain, before the learning rate::

        optimizer = optax.chain(
            optax.add_decayed_weights(5e-4),
            hintjax.distillation_oriented(),
            optax.scale_by_learning_rate(0.05),
        )
        stage = hintjax.distillation_stage(student, teacher, method, optimizer)

    A step costs one more backward pass of the student, and with micro-batches one more
    forward pass. The buffers are in the optimizer's state, so checkpoints hold them,
    and on a mesh they are stored as the parameters are.

    Args:
        momentum: the momentum $\mu$ of SGD.
        delta: the difference $\Delta$, >= 0. Both $\mu - \Delta$ and $\mu + \Delta$
            must be in [0, 1).
        task: name of the task's term in the objective.

    Returns:
        The transformation, for a stage whose method is an objective with this term. In
        your own loop, pass two more arguments to its `update`: `grad`, the gradient of
        the objective, and `grad_of_term`, a function from the name of a term to its
        gradient.

    Raises:
        ValueError: if a momentum is not in [0, 1). The stage raises it if the objective
            has no such term.

    **Convention**. The authors use $\mu = 0.9$, and $\Delta = 0.075$ on CIFAR-100 and
    Tiny-ImageNet, 0.09 on ImageNet. A transformation before this one may add to the
    gradient, as weight decay does, but must not scale it: the sum goes into the buffer
    of the task, as in the code.

    References:
        Zhao et al. 2023, DOT: A Distillation-Oriented Trainer.
        https://github.com/megvii-research/mdistiller (mdistiller/engine/dot.py)
    """
    caller = "distillation_oriented"
    instance(caller, str, task=task)
    scalar(caller, "to be >= 0", lambda x: x >= 0, delta=delta)
    scalar(caller, "to be in [0, 1)", lambda x: 0 <= x < 1, momentum=momentum)
    if isinstance(momentum, float | int) and isinstance(delta, float | int):
        low, high = f"{momentum} - {delta}", f"{momentum} + {delta}"
        ends = {low: momentum - delta, high: momentum + delta}
        scalar(caller, "to be in [0, 1)", lambda x: 0 <= x < 1, **ends)

    def init(params: PyTree) -> OrientedState:
        buffers = [jax.tree.map(jnp.zeros_like, params) for _ in range(2)]
        moved = [jax.tree.map(lambda _: jnp.bool_(False), params) for _ in range(2)]
        return OrientedState(*buffers, *moved)

    def update(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        *,
        grad: PyTree = None,
        grad_of_term: Callable[[str], PyTree] | None = None,
        **others: Any,
    ) -> tuple[PyTree, OrientedState]:
        if grad_of_term is None:
            wanted = "the arguments grad and grad_of_term beside the gradients"
            do = "A stage whose method is an objective gives them."
            raise WrongType(message(caller, wanted, "no such arguments", do))
        own = _part(updates, grad_of_term(task))
        taught = jax.tree.map(jnp.subtract, _part(updates, grad), own)
        by_task = jax.tree.map(_moved, own, state.by_task)
        by_distillation = jax.tree.map(_moved, taught, state.by_distillation)
        both = jax.tree.map(jnp.logical_and, by_task, by_distillation)
        # The task's buffer also gets what was added before, such as weight decay.
        rest = jax.tree.map(jnp.subtract, updates, taught)
        low, high = (partial(_traced, momentum, sign * delta) for sign in (-1.0, 1.0))
        new = OrientedState(
            jax.tree.map(low, rest, state.task, both),
            jax.tree.map(high, taught, state.distillation, both),
            by_task,
            by_distillation,
        )
        return jax.tree.map(jnp.add, new.task, new.distillation), new

    return optax.GradientTransformationExtraArgs(init, update)


def _traced(
    momentum: ScalarLike, delta: ScalarLike, gradient: Array, buffer: Array, both: Array
) -> Array:
    """A buffer after one step; `delta` counts where both gradients move."""
    decay = jnp.where(both, momentum + delta, momentum).astype(buffer.dtype)
    return gradient + decay * buffer


def _moved(gradient: Array, before: Array) -> Array:
    """Whether a parameter has been moved: a gradient that is 0 everywhere does not."""
    return before | jnp.any(gradient != 0)


def _part(some: PyTree, whole: PyTree) -> PyTree:
    """A tree of all parameters, without those that another optimizer has."""

    def masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    return jax.tree.map(lambda a, b: a if masked(a) else b, some, whole, is_leaf=masked)
