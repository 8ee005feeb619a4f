"""Which arguments a result depends on, read off the traced program."""

from collections.abc import Callable

import jax
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import PyTree


def reads(function: Callable, position: int, arguments: tuple) -> PyTree:
    """For each leaf of one argument, whether the function's result depends on it.

    Read off the traced program after the elimination of dead code, so that a leaf
    which only feeds something beside the result does not count.

    >>> reads(lambda params: params["a"], 0, ({"a": 1.0, "b": 2.0},))
    {'a': True, 'b': False}
    """
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    _, used = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    tree = jax.tree.structure(arguments)
    return jax.tree.unflatten(tree, used)[position]
