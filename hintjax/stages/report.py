"""What an update is made of: losses and gradients by term, gradients by layer."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from hintjax._numerics import as_float

Report = dict[str, dict]  # see Stage.report


def losses_by_term(metrics: Mapping[str, Array]) -> dict[str, Array]:
    """The weighted loss of each term of the (outermost) objective, and "loss"."""
    terms = {
        name.partition("/")[0]: value
        for name, value in metrics.items()
        if name.endswith("/weighted") and name.count("/") == 1
    }
    return {**terms, "loss": metrics["loss"]}


def report(found: Mapping[str, tuple[Array, PyTree]]) -> Report:
    """What `Stage.report` gives, from the loss and the gradient of each term.

    Args:
        found: by name of the term; that of all is "loss".
    """
    terms = [name for name in found if name != "loss"]
    norms = {name: norm(found[name][1]) for name in terms or ["loss"]}
    total = sum(norms.values())
    return {
        "terms": {
            name: {
                "loss": found[name][0],
                "norm": length,
                "share": length / jnp.where(total == 0, 1, total),
            }
            for name, length in norms.items()
        },
        "layers": {
            name: norm(leaves)
            for name, leaves in by_layer(found["loss"][1], bool(terms)).items()
        },
    }


def not_finite(report: Report) -> tuple[list[str], list[str]]:
    """The terms whose loss or gradient is not finite, and the layers of such gradients.

    Args:
        report: what `Stage.report` gave.

    Returns:
        Names of terms and names of layers.

    >>> terms = {"kd": {"loss": 1.0, "norm": math.inf, "share": math.nan}}
    >>> not_finite({"terms": terms, "layers": {"student/head": 2.0}})
    (['kd'], [])
    """
    report = jax.device_get(report)
    terms = [
        name
        for name, term in report["terms"].items()
        if not (math.isfinite(term["loss"]) and math.isfinite(term["norm"]))
    ]
    layers = report["layers"].items()
    return terms, [name for name, norm in layers if not math.isfinite(norm)]


def norm(tree: PyTree) -> Float[Array, ""]:
    """Euclidean norm of all leaves, finite where they are: squares do not overflow."""
    leaves = [jnp.abs(as_float("report", leaf)) for leaf in jax.tree.leaves(tree)]
    largest = jnp.max(jnp.stack([jnp.max(leaf, initial=0) for leaf in leaves]))
    scale = jnp.where(largest == 0, 1, largest)
    return scale * jnp.sqrt(sum(jnp.sum(jnp.square(leaf / scale)) for leaf in leaves))


def by_layer(params: dict[str, PyTree], named: bool) -> dict[str, list[Array]]:
    """Leaves by outermost layer of the student, or by regressor (of a term)."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        depth = 3 if named and path[0].key == "regressors" else 2
        name = jax.tree_util.keystr(path[:depth], simple=True, separator="/")
        found.setdefault(name, []).append(leaf)
    return found
