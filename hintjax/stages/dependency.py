"""Which arguments a result depends on, read off the traced program."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import PyTree

from hintjax.stages.rules import with_rules


class Needs(NamedTuple):
    """What some results of a function, or their changes, depend on.

    Attributes:
        moving: for every array of the first argument, whether its value is read.
        changes: for every array of the first argument, whether a small change of it
            can change the results: whether they have a derivative by it.
        fixed: for every array of the second argument, whether its value is read.
    """

    moving: PyTree
    changes: PyTree
    fixed: PyTree


class Program(NamedTuple):
    """A function that was traced once, together with its derivative.

    Attributes:
        shapes: the shapes of the results.
        values: `(wanted) -> Needs` of the results themselves.
        changes: `(wanted) -> Needs` of the changes of the results. `wanted` takes the
            path of a result, as `jax.tree_util` has it.
    """

    shapes: PyTree
    values: Callable[[Callable[[tuple], bool]], Needs]
    changes: Callable[[Callable[[tuple], bool]], Needs]


def reads(function: Callable[[PyTree], PyTree], argument: PyTree) -> PyTree:
    """Returns, for every array of the argument, whether the result depends on it.

    Dead code is eliminated from the traced program first. So an array does not count if
    it only feeds values that are not returned.

    Args:
        function: of one argument.
        argument: a pytree of arrays or their shapes.

    >>> reads(lambda params: params["a"], {"a": 1.0, "b": 2.0})
    {'a': True, 'b': False}
    """
    jaxpr = jax.make_jaxpr(function)(argument).jaxpr
    _, used = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return jax.tree.unflatten(jax.tree.structure(argument), used)


def differentiated(
    function: Callable[[PyTree, PyTree], PyTree], moving: PyTree, fixed: PyTree
) -> Program:
    """Traces a function of two arguments and its derivative by the first.

    Dependence alone does not say whether a gradient passes: `stop_gradient`, a rounding
    or an `argmax` reads its argument, and passes no change of it on. The derivative of
    the traced program says so without any number. The rules of `custom_jvp` and
    `custom_vjp` are a part of it: a rule of zeros passes no change on.

    Args:
        function: `(moving, fixed) -> results`.
        moving: a pytree of arrays or their shapes; integers have no derivative.
        fixed: a pytree of arrays or their shapes.

    >>> shape = jax.ShapeDtypeStruct((), "float32")
    >>> traced = differentiated(lambda x, y: x["a"] * jnp.round(x["b"]),
    ...     {"a": shape, "b": shape}, ())
    >>> traced.changes(lambda path: True).changes
    {'a': True, 'b': False}
    """
    moving, fixed = jax.tree.map(_shape, (moving, fixed))
    leaves, tree = jax.tree.flatten(moving)
    floats = {i: leaf for i, leaf in enumerate(leaves) if _has_derivative(leaf)}

    def both(given: Needs) -> tuple[PyTree, PyTree]:
        values = dict(enumerate(jax.tree.leaves(given.moving)))

        def of(some: dict) -> PyTree:
            every = {**values, **some}
            return function(tree.unflatten(every[i] for i in values), given.fixed)

        at = {i: values[i] for i in floats}
        results, changes = jax.jvp(of, (at,), (given.changes,))
        return results, jax.tree.map(_number, changes)

    given = Needs(moving, floats, fixed)
    closed, shapes = jax.make_jaxpr(both, return_shape=True)(given)
    jaxpr = with_rules(closed.jaxpr)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]

    def needs(number: int, wanted: Callable[[tuple], bool]) -> Needs:
        marked = [path[0].idx == number and wanted(path[1:]) for path in paths]
        _, used = dce_jaxpr(jaxpr, marked)
        found = jax.tree.unflatten(jax.tree.structure(given), used)
        change = [found.changes.get(i, False) for i in range(len(leaves))]
        return found._replace(changes=tree.unflatten(change))

    return Program(shapes[0], partial(needs, 0), partial(needs, 1))


def _has_derivative(leaf: jax.ShapeDtypeStruct) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _shape(leaf: PyTree) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))


def _number(change: PyTree) -> PyTree:
    """A change as a number: that of an integer has no type of JAX."""
    return 0.0 if change.dtype == jax.dtypes.float0 else change
