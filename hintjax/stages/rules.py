"""The gradient rules of `jax.custom_vjp`, opened in a traced program.

In the derivative of a program, JAX keeps a `custom_vjp` as one closed operation
(`custom_lin`), which seems to pass every change on. Its rule is known, though: the
gradients of the inputs as a function of those of the results. An input has a part in a
change of a result only if the gradient of this input depends on that of the result.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import Array

Shapes = Sequence[jax.ShapeDtypeStruct]


def with_rules(jaxpr: Jaxpr) -> Jaxpr:
    """Returns a program with the dependencies of its `custom_vjp` rules.

    Only its dependencies are right: its values are not.

    Args:
        jaxpr: the derivative of a program.
    """
    return jaxpr.replace(eqns=[_with_rules(one) for one in jaxpr.eqns])


def _with_rules(eqn: JaxprEqn) -> JaxprEqn:
    if eqn.primitive.name == "custom_lin":
        shapes = [_shape(variable.aval) for variable in eqn.invars]
        results = [_shape(variable.aval) for variable in eqn.outvars]
        used = _used(eqn, shapes, results)
        standing = jax.jit(partial(_sums, used, results))
        made = jax.make_jaxpr(standing)(*shapes).jaxpr.eqns[0]
        return made.replace(invars=eqn.invars, outvars=eqn.outvars)
    return eqn.replace(params={n: _inside(x) for n, x in eqn.params.items()})


def _inside(value: Any) -> Any:
    """The same parameter of an operation; programs in it have their rules."""
    if isinstance(value, Jaxpr):
        return with_rules(value)
    if isinstance(value, ClosedJaxpr):
        return value.replace(jaxpr=with_rules(value.jaxpr))
    if type(value) in (tuple, list):
        return type(value)(map(_inside, value))
    return value


def _used(eqn: JaxprEqn, shapes: Shapes, results: Shapes) -> list[list[bool]]:
    """For every result of a rule, which arguments have a part in its changes."""
    count = eqn.params["num_res"]
    kept, moved = shapes[:count], shapes[count:]

    def gradients(kept: Sequence[Array], given: Sequence[Array]) -> Any:
        change: Callable[..., Any] = partial(eqn.primitive.bind, *kept, **eqn.params)
        return jax.linear_transpose(change, *moved)(list(given))

    rule = jax.make_jaxpr(gradients)(kept, results).jaxpr
    # Argument by argument: the gradients read of the rule's own, and of the results.
    read = [
        dce_jaxpr(rule, [i == n for n in range(len(moved))])[1]
        for i in range(len(moved))
    ]
    found = []
    for number in range(len(results)):
        passed = [one[count + number] for one in read]
        own = [
            any(p and one[k] for p, one in zip(passed, read, strict=True))
            for k in range(count)
        ]
        found.append([*own, *passed])
    return found


def _sums(used: list[list[bool]], results: Shapes, *arguments: Array) -> list[Array]:
    """Results that depend on those arguments, and on no others."""
    return [
        sum(
            (
                jnp.sum(_numbers(x)).astype(result.dtype)
                for x, read in zip(arguments, one, strict=True)
                if read
            ),
            start=jnp.zeros(result.shape, result.dtype),
        )
        for one, result in zip(used, results, strict=True)
    ]


def _numbers(x: Array) -> Array:
    key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(x) if key else x


def _shape(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)
