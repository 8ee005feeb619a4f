"""Which terms can teach the student, read off the traced program before a step.

A loss may depend on the student and still not teach it: behind `stop_gradient`, behind
a rounding to integers, or at the input of the first layer, where there is no parameter
yet. Then a regressor learns, the loss falls, and the student never moves. The
derivative of the traced program tells; no value is computed, and nothing is compiled.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from hintjax._checks import Refusal, message
from hintjax.method import Context, pairs_apart
from hintjax.networks import Features, Variables
from hintjax.stages import entering
from hintjax.stages.dependency import Program, differentiated
from hintjax.stages.forward import Plan
from hintjax.stages.stage import Batch, Parts

Leaves = dict[str, PyTree]  # the arrays of `Features` or their shapes, by name

_DO = (
    "Choose a layer that has parameters below it, and a loss, without stop_gradient, "
    "rounding or argmax between them; or give the term the weight 0."
)


class Shown(NamedTuple):
    """What a method sees of the student.

    Attributes:
        features: the shapes of the student's features.
        moved: the names of the features that have a derivative by a parameter.
    """

    features: Features
    moved: frozenset[str]


def shown(plan: Plan, student: Variables, batch: Batch, key: Key[Array, ""]) -> Shown:
    """Returns what the method sees of the student in a training step.

    Args:
        plan: the stage's settings.
        student: the student's variables, or their shapes.
        batch: the batch, or its shapes.
        key: the key of the student's randomness, or its shape.
    """

    def shown_by(params: PyTree, others: tuple) -> Features:
        state, batch, key = others
        return features(plan, Variables(params, state), batch, key)

    params, state = student
    program = differentiated(shown_by, params, (state, batch, key))
    paths = jax.tree_util.tree_leaves_with_path(program.shapes)
    found = {
        name: program.changes(lambda path, own=own: path == own).changes
        for name, (own, _) in zip(_named(program.shapes), paths, strict=True)
    }
    moved = {name for name, params in found.items() if any(jax.tree.leaves(params))}
    return Shown(program.shapes, frozenset(moved))


def features(
    plan: Plan, student: Variables, batch: Batch, key: Key[Array, ""]
) -> Features:
    """Returns the features of the student that the method sees in a training step.

    Args:
        plan: the stage's settings.
        student: the student's variables.
        batch: the batch.
        key: the key of the student's randomness.
    """
    how = {"wants": plan.method.student, "train": True, "key": key}
    inputs = entering.selected("inputs", plan.inputs, batch)
    return plan.student.apply(*student, inputs, **how)[0]


def check(plan: Plan, parts: Parts, shown: Shown) -> None:
    """Raises if a term of the objective cannot teach the student.

    A term that does not read the student is left alone if it trains parameters beside
    the student: the paraphraser of `factor_transfer` learns from the teacher alone. A
    term whose weight is the number 0 is left alone, too.

    Args:
        plan: the stage's settings.
        parts: the arguments of the loss, or their shapes.
        shown: what the method sees of the student.

    Raises:
        ValueError: if no gradient of a term reaches a parameter of the student, or if a
            guided layer of a term has no part in these gradients.
    """
    program = judged(plan, parts, shown)
    guided = _named(Features(hints=shown.features.hints))
    for term in program.shapes:
        if any(f"{term}/".startswith(f"{name}/") for name in plan.method.silent):
            continue
        own = (jax.tree_util.DictKey(term),)
        value, change = (
            ask(lambda path, own=own: path == own)
            for ask in (program.values, program.changes)
        )
        seen = _those({**value.moving, **value.fixed["features"]})
        who = "the method" if term == "loss" else f"the term {term!r}"
        if not any(change.changes.values()):
            beside = any(jax.tree.leaves(value.fixed["parts"].params["regressors"]))
            if beside and not seen:
                continue
            wanted = f"{who} to have a gradient for the student's parameters"
            got = f"none through {', '.join(seen)}" if seen else "none"
            raise Refusal(message("stage", wanted, got, _DO))
        heeded = _those(change.fixed["features"])
        dead = [n for n in seen if n in guided and n not in {*shown.moved, *heeded}]
        if dead:
            wanted = f"{who} to teach the student through every guided layer"
            got = f"no gradient through {', '.join(dead)}"
            raise Refusal(message("stage", wanted, got, _DO))


def judged(plan: Plan, parts: Parts, shown: Shown) -> Program:
    """Returns the program of all losses by term, differentiated by what is moved.

    Args:
        plan: the stage's settings.
        parts: the arguments of the loss, or their shapes.
        shown: what the method sees of the student.
    """
    tree, named = jax.tree.structure(shown.features), _named(shown.features)

    def losses(moving: Leaves, fixed: dict[str, PyTree]) -> dict[str, Array]:
        parts, features = fixed["parts"], {**moving, **fixed["features"]}
        with pairs_apart():
            values, _, metrics = plan.method.apply(
                parts.params["regressors"],
                parts.memory,
                tree.unflatten(features[name] for name in named),
                parts.taught,
                parts.batch,
                Context(parts.key, parts.step, True),
            )
        return _by_term({**metrics, "loss": jnp.sum(values)})

    moving, rest = (
        {name: leaf for name, leaf in named.items() if (name in shown.moved) == moved}
        for moved in (True, False)
    )
    return differentiated(losses, moving, {"parts": parts, "features": rest})


def _by_term(metrics: Mapping[str, Array]) -> dict[str, Array]:
    """The losses of all terms before their weights; "loss", if there are no terms.

    In an objective of objectives these are the innermost terms.
    """
    terms = [name for name in metrics if f"{name}/weighted" in metrics]
    outer = {name.rpartition("/")[0] for name in terms}
    return {n: metrics[n] for n in terms if n not in outer} or {"loss": metrics["loss"]}


def _named(features: Features) -> Leaves:
    """The arrays of features, by a name for messages, in the order of the tree."""
    found = {}
    for (field, *path), leaf in jax.tree_util.tree_leaves_with_path(features):
        if field.name == "output":
            name, inside = "the output", path
        else:
            kind = "layer" if field.name == "hints" else "the parameters of"
            name, inside = f"{kind} {path[0].key!r}", path[1:]
        found[f"{name}{jax.tree_util.keystr(tuple(inside))}"] = leaf
    return found


def _those(used: Mapping[str, bool]) -> list[str]:
    """The names whose value is True."""
    return [name for name, yes in used.items() if yes]
