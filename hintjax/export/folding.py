"""Constants are computed, and affine steps are folded into the weights before them.

In evaluation, BatchNorm is an affine map of each channel. Its numbers are constants of
the deployed network, so the kernel and the bias of the preceding convolution or dense
layer can hold them: `(K * x + b) s + t = (K s) * x + (b s + t)`.

The traced program is rewritten, not the model. So any network is folded: a Flax module,
an NNX model, or a plain function.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jaxtyping import Array, PyTree

_CALLS = {"jit", "pjit", "custom_jvp_call", "custom_vjp_call", "closed_call"}
_AFFINE = {"add", "sub", "mul", "div"}

Replaced = Mapping[str, Callable[..., Array]]
NOTHING: Replaced = {}


class _Linear(NamedTuple):
    """The output of a layer that is not computed yet: layer(kernel scale) + shift.

    Attributes:
        eqn: equation of the layer, a convolution or a product of matrices.
        inputs: input of the layer.
        kernel: kernel of the layer.
        axis: axis of the kernel with the channels of the output.
        channel: axis of the output with its channels.
        scale: factor of each channel, in float64.
        shift: number that is added to each channel, in float64; None for none.
    """

    eqn: Any
    inputs: Any
    kernel: np.ndarray
    axis: int
    channel: int
    scale: np.ndarray
    shift: np.ndarray | None


def folded(
    function: Callable[..., PyTree], replaced: Replaced = NOTHING
) -> Callable[..., PyTree]:
    """The same function, with constants computed and affine steps folded.

    The result differs by rounding only. It can be traced for any shape of the inputs
    that the function itself takes, also for symbolic shapes.

    Args:
        function: function of arrays. The arrays in its closure are constants.
        replaced: other forms of some operations, by the names of JAX's primitives; each
            takes the arrays that the operation takes, and returns its one output.

    Returns:
        A function of the same arrays.

    >>> kernel, scale = jnp.ones((2, 3)), jnp.arange(3.0)
    >>> def dense_norm(x):
    ...     return (x @ kernel - 1.0) * scale + 5.0
    >>> x = jnp.ones((1, 2))
    >>> folded(dense_norm)(x).tolist() == dense_norm(x).tolist()
    True
    >>> [str(eqn.primitive) for eqn in jax.make_jaxpr(folded(dense_norm))(x).eqns]
    ['dot_general', 'add']
    """

    def run(*inputs: PyTree) -> PyTree:
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*inputs)
        leaves = jax.tree.leaves(inputs)
        outputs = _run(closed.jaxpr, closed.consts, leaves, replaced)
        return jax.tree.unflatten(jax.tree.structure(shape), map(_computed, outputs))

    return run


def _run(
    jaxpr: Jaxpr, consts: Sequence[Any], inputs: Sequence[Any], replaced: Replaced
) -> list[Any]:
    """The outputs of a program; some may be layers that are not computed yet."""
    values: dict[Any, Any] = dict(zip(jaxpr.invars, inputs, strict=True))
    values |= zip(jaxpr.constvars, map(_constant, consts), strict=True)
    read = [v for eqn in jaxpr.eqns for v in eqn.invars] + list(jaxpr.outvars)
    uses = Counter(v for v in read if not isinstance(v, Literal))

    def value(atom: Any) -> Any:
        if isinstance(atom, Literal):
            return _constant(atom.val)
        # A layer that two equations read is computed once, as it is.
        if uses[atom] > 1:
            values[atom] = _computed(values[atom])
        return values[atom]

    for eqn in jaxpr.eqns:
        outputs = _step(eqn, [value(atom) for atom in eqn.invars], replaced)
        values |= zip(eqn.outvars, outputs, strict=True)
    return [value(atom) for atom in jaxpr.outvars]


def _step(eqn: Any, inputs: list[Any], replaced: Replaced) -> Sequence[Any]:
    """The outputs of one equation."""
    name = eqn.primitive.name
    if name in _CALLS:
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if isinstance(inner, ClosedJaxpr):
            return _run(inner.jaxpr, inner.consts, inputs, replaced)
    if all(isinstance(one, np.ndarray) for one in inputs) and _small(eqn, inputs):
        with jax.ensure_compile_time_eval():
            return [_constant(one) for one in _bound(eqn, inputs)]
    found = _layer(eqn, inputs) or _affine(eqn, inputs)
    if found is not None:
        return [found]
    if name in replaced:
        with _named(eqn):
            return [replaced[name](*map(_computed, inputs))]
    return _bound(eqn, list(map(_computed, inputs)))


def _bound(eqn: Any, inputs: Sequence[Any]) -> Sequence[Any]:
    """The outputs of an equation that stays as it is."""
    with _named(eqn):
        outputs = eqn.primitive.bind(*inputs, **eqn.params)
    return outputs if eqn.primitive.multiple_results else [outputs]


def _named(eqn: Any) -> AbstractContextManager[Any]:
    """The scope of the layer that an equation belongs to; files keep these names."""
    name = str(eqn.source_info.name_stack)
    return jax.named_scope(name) if name else nullcontext()


def _constant(value: Any) -> Any:
    """A constant on the host; random keys stay as they are."""
    keys = hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    return value if keys else np.asarray(value)


def _small(eqn: Any, inputs: Sequence[np.ndarray]) -> bool:
    """Whether the outputs of an equation are constants no larger than its inputs."""
    shapes = [var.aval.shape for var in eqn.outvars]
    if not all(isinstance(side, int) for shape in shapes for side in shape):
        return False  # a symbolic shape
    room = max([1, *(one.size for one in inputs)])
    return all(np.prod(shape, dtype=int) <= room for shape in shapes)


def _layer(eqn: Any, inputs: list[Any]) -> _Linear | None:
    """The output of a layer whose kernel is a constant; None for anything else."""
    name, params = eqn.primitive.name, eqn.params
    if name not in ("conv_general_dilated", "dot_general"):
        return None
    x, kernel = inputs
    if isinstance(x, np.ndarray | _Linear) and not isinstance(kernel, np.ndarray):
        return None
    if not isinstance(kernel, np.ndarray) or kernel.dtype != np.float32:
        return None
    if name == "conv_general_dilated":
        numbers = params["dimension_numbers"]
        axis, channel = numbers.rhs_spec[0], numbers.out_spec[1]
    else:
        (_, contracted), (_, batched) = params["dimension_numbers"]
        free = [n for n in range(kernel.ndim) if n not in (*contracted, *batched)]
        if len(free) != 1 or batched:
            return None
        axis, channel = free[0], len(eqn.outvars[0].aval.shape) - 1
    scale = np.ones(kernel.shape[axis])
    return _Linear(eqn, _computed(x), kernel, axis, channel, scale, None)


def _affine(eqn: Any, inputs: list[Any]) -> _Linear | None:
    """A layer with one more affine step; None for anything else."""
    name = eqn.primitive.name
    if name == "neg" and isinstance(inputs[0], _Linear):
        (line,) = inputs
        shift = None if line.shift is None else -line.shift
        return line._replace(scale=-line.scale, shift=shift)
    if name not in _AFFINE or len(inputs) != 2:
        return None
    left, right = inputs
    if isinstance(left, _Linear):
        line, other, first = left, right, True
    elif isinstance(right, _Linear) and name != "div":
        line, other, first = right, left, False
    else:
        return None
    number = _per_channel(line, other, eqn.outvars[0].aval)
    if number is None:
        return None
    scale, shift = line.scale, line.shift
    if name in ("mul", "div"):
        number = number if name == "mul" else 1 / number
        shift = None if shift is None else shift * number
        return line._replace(scale=scale * number, shift=shift)
    if name == "sub" and first:
        number = -number
    elif name == "sub":
        scale, shift = -scale, None if shift is None else -shift
    return line._replace(scale=scale, shift=number if shift is None else shift + number)


def _per_channel(line: _Linear, other: Any, aval: Any) -> np.ndarray | None:
    """A constant as one number for each channel of a layer; None if it is not one."""
    output = line.eqn.outvars[0].aval
    same = (aval.shape, aval.dtype) == (output.shape, output.dtype)
    if not isinstance(other, np.ndarray) or not same:
        return None
    if other.ndim and other.size > 1:
        shape = list(other.shape)
        shape[line.channel] = 1
        if other.ndim != len(output.shape) or any(side != 1 for side in shape):
            return None
    number = np.broadcast_to(np.float64(other).reshape(-1), line.scale.shape)
    return number if np.isfinite(number).all() else None


def _computed(value: Any) -> Any:
    """A value of the new program; a layer is computed with its folded kernel."""
    if not isinstance(value, _Linear):
        return value
    shape = [1] * value.kernel.ndim
    shape[value.axis] = -1
    kernel = np.float32(value.kernel * value.scale.reshape(shape))
    (output,) = _bound(value.eqn, [value.inputs, kernel])
    if value.shift is None:
        return output
    shape = [1] * output.ndim
    shape[value.channel] = -1
    return jax.lax.add(output, np.float32(value.shift).reshape(shape))
