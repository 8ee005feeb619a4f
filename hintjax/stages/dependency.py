"""Which arguments a result depends on, read off the traced program."""

from collections.abc import Callable

import jax
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import PyTree


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
