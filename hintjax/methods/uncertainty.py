"""Uncertainty weighting: a weight that is trained beside the student."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array

from hintjax._checks import instance
from hintjax._numerics import masked_mean
from hintjax.method import Applied, Batch, Context, Data, Method, Reduced, reduced
from hintjax.networks import Features


def uncertain(method: Method) -> Method:
    r"""The same method with a trained weight (uncertainty weighting).

    $$e^{-s} L + s / 2$$

    Here $s$ is the logarithm of a variance, a parameter that starts at 0. The best
    weight $e^{-s}$ of a fixed loss is $1 / 2L$: terms of any scale get contributions of
    one size, 1/2. That says nothing of their gradients; `rebalanced` does. As a loss
    goes to 0, its weight grows without bound, and the value becomes negative. Weight
    decay pulls the weight toward 1.

    Args:
        method: any method. As a term of an objective it needs no other weight::

            objective(task=uncertain(task(...)), hint=uncertain(fitnets(pairs)))

    Returns:
        The method. It reports the loss of the method before the weight as `before`, and
        `weight`, besides the metrics of the method.

    **Convention**. The paper derives 1/2 of this loss for regression, with the factor
    1/2 that a Gaussian gives, and this loss for classification.

    References:
        Kendall et al. 2018, Multi-Task Learning Using Uncertainty to Weigh Losses.

    >>> import jax
    >>> from hintjax.methods import kd
    >>> method = uncertain(kd())
    >>> logits = Features(output=jnp.ones((3, 5)))
    >>> params, memory = method.init(jax.random.key(0), logits, logits, None)
    >>> {name: float(value) for name, value in params.items() if name == "log_variance"}
    {'log_variance': 0.0}
    """
    instance("uncertain", Method, method=method)

    def init(
        key: Array, student: Features, teacher: Features, data: Data | None
    ) -> tuple[dict, dict]:
        params, memory = method.init(key, student, teacher, data)
        return {"method": params, "log_variance": jnp.zeros((), float)}, memory

    def apply(
        params: dict,
        memory: dict,
        student: Features,
        teacher: Features,
        batch: Batch,
        context: Context,
    ) -> Applied:
        values, memory, metrics = method.apply(
            params["method"], memory, student, teacher, batch, context
        )
        log_variance = params["log_variance"].astype(values.dtype)
        weight = jnp.exp(-log_variance)
        before = masked_mean(values, batch.get("where"))
        metrics = {**metrics, "before": before, "weight": weight}
        return weight * values + log_variance / 2, memory, metrics

    def reduction(shapes: Features) -> Reduced:
        found = reduced(method, shapes)
        return Reduced(found.reduce, uncertain(found.method))

    return method._replace(
        init=init,
        apply=apply,
        deploy=_deployed(method),
        reduced=None if method.reduced is None else reduction,
    )


def _deployed(method: Method) -> Callable[..., Array] | None:
    """`Method.deploy` with the parameters of the method inside."""
    shipped = method.deploy
    if shipped is None:
        return None

    def deploy(
        params: dict, memory: dict, student: Features, teacher: Features
    ) -> Array:
        return shipped(params["method"], memory, student, teacher)

    return deploy
