"""Reports of an update: losses and gradients by term, and gradients by layer."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree

from hintjax._checks import Refusal, message
from hintjax._numerics import as_float

Report = dict[str, dict]  # see Stage.report
_LOOK = (
    "Look for features that are all 0, for labels of one class, and for a student that "
    "is a copy of the teacher; hintjax.checked names the layer whose features are 0."
)
_COUNTED = {
    "outside": 'an "index" outside of the training set, and are not remembered',
    "mislabeled": 'another "label" than Data(labels) has at their "index"',
}


def losses_by_term(metrics: Mapping[str, Array]) -> dict[str, Array]:
    """Returns the weighted loss of each term of the outermost objective, and "loss"."""
    terms = {
        name.partition("/")[0]: value
        for name, value in metrics.items()
        if name.endswith("/weighted") and name.count("/") == 1
    }
    return {**terms, "loss": metrics["loss"]}


def loss_of_term(metrics: Mapping[str, Array], term: str) -> Array:
    """Returns the weighted loss of one term of the outermost objective.

    Raises:
        ValueError: if there is no such term.
    """
    found = losses_by_term(metrics)
    del found["loss"]
    if term not in found:
        wanted = f"an objective with the term {term!r}"
        got = f"the terms {list(found)}" if found else "a method without terms"
        raise Refusal(message("stage", wanted, got))
    return found[term]


def report(found: Mapping[str, tuple[Array, PyTree]]) -> Report:
    """Returns the result of `Stage.report`.

    Args:
        found: loss and gradient by name of the term; the whole objective's is "loss".
    """
    terms = [name for name in found if name != "loss"]
    norms = {name: norm(found[name][1]) for name in terms or ["loss"]}
    shared = shared_norms({name: found[name][1]["student"] for name in norms})
    total = sum(norms.values())
    return {
        "terms": {
            name: {
                "loss": found[name][0],
                "norm": length,
                "shared": shared[name],
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
    """Returns the terms and the layers whose loss or gradient is not finite.

    Args:
        report: the result of `Stage.report`.

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


def silent_terms(metrics: Mapping[str, ArrayLike]) -> list[str]:
    """Returns a sentence for each term that teaches nothing, as far as metrics tell.

    A layer of dead units, outputs that do not vary or labels of one class give a loss
    or a gradient of exactly 0 in a program that could teach. Only values tell it. Call
    this function once, with the metrics of an early step: later, a loss of 0 may mean
    that all is learned. `hintjax.checked` names the layer and the example.

    Args:
        metrics: the metrics of `Stage.update`. This function waits for them.

    Returns:
        No sentences, if each loss is finite and not 0, the gradient is not 0 (a stage
        with a `SpikeGuard` reports its `norm`), and each index and label is that of a
        training example (CRD reports `outside` and `mislabeled`).

    >>> silent_terms({"loss": 0.5, "kd": 0.0, "kd/weighted": 0.0})[0][:46]
    "The loss of the term 'kd' is exactly 0: it tea"
    """
    values = jax.device_get(list(metrics.values()))  # a dict would be sorted
    found = dict(zip(metrics, map(float, values), strict=True))
    terms = [name for name in found if f"{name}/weighted" in found]
    said = []
    for name in terms or ["loss"]:
        value = found.get(name, math.nan)
        who = f"the term {name!r}" if terms else "the method"
        if value == 0:
            said.append(f"The loss of {who} is exactly 0: it teaches nothing. {_LOOK}")
        elif not math.isfinite(value):
            do = "stage.report names the layers whose gradients are not finite."
            said.append(f"The loss of {who} is not finite: the step is skipped. {do}")
    if found.get("norm") == 0:
        said.append(f"The gradient is exactly 0: the student does not move. {_LOOK}")
    for name, value in found.items():
        last = name.rpartition("/")[2]
        if last in _COUNTED and value > 0:
            said.append(f"{value:.0%} of the examples have {_COUNTED[last]} ({name}).")
    return said


def norm(tree: PyTree) -> Float[Array, ""]:
    """Returns the Euclidean norm of a tree; no square in it overflows."""
    leaves = [jnp.abs(as_float("report", leaf)) for leaf in jax.tree.leaves(tree)]
    largest = jnp.max(jnp.stack([jnp.max(leaf, initial=0) for leaf in leaves]))
    scale = jnp.where(largest == 0, 1, largest)
    return scale * jnp.sqrt(sum(jnp.sum(jnp.square(leaf / scale)) for leaf in leaves))


def shared_norms(grads: Mapping[str, PyTree]) -> dict[str, Float[Array, ""]]:
    """Returns the norms of gradients by the arrays that every term moves.

    Args:
        grads: gradient by the student's parameters, by name of the term. A term whose
            gradient is 0 everywhere does not restrict the arrays.
    """
    lengths = {
        name: jnp.stack([norm(leaf) for leaf in jax.tree.leaves(tree)])
        for name, tree in grads.items()
    }
    moved = [(one != 0) | jnp.all(one == 0) for one in lengths.values()]
    every = jnp.all(jnp.stack(moved), 0)
    return {name: norm(jnp.where(every, one, 0)) for name, one in lengths.items()}


def by_layer(params: dict[str, PyTree], named: bool) -> dict[str, list[Array]]:
    """Returns the arrays by outermost layer of the student and by regressor.

    Args:
        params: `{"student": ..., "regressors": ...}`, or their gradients.
        named: whether regressors are grouped by the terms of an objective.
    """
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        depth = 3 if named and path[0].key == "regressors" else 2
        name = jax.tree_util.keystr(path[:depth], simple=True, separator="/")
        found.setdefault(name, []).append(leaf)
    return found
