"""A tree as named arrays on the host, and back."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from hintjax._checks import Refusal, WrongType, message
from hintjax.processes import gather
from hintjax.sharding import spread


class Leaf(NamedTuple):
    """What is known of an array before its values."""

    path: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    key: str  # the implementation, if it holds typed PRNG keys


# Trees and arrays.


def flatten(caller: str, tree: PyTree) -> tuple[list[Leaf], list[Any]]:
    """The arrays of a tree by path; None and empty containers are structure only."""
    leaves, arrays, taken = [], [], {}
    for keys, array in jax.tree_util.tree_flatten_with_path(tree)[0]:
        path = names_of(keys)
        kinds = (np.number, np.bool_, jax.dtypes.prng_key)
        dtype = getattr(array, "dtype", None)
        if dtype is None or not any(jnp.issubdtype(dtype, kind) for kind in kinds):
            wanted = f"{'/'.join(path)} to be an array of numbers"
            do = "Make it one (jnp.asarray), or keep it in extra."
            raise WrongType(message(caller, wanted, f"{type(array).__name__}", do))
        # Orbax joins keys with dots and writes {"a.b": x} over {"a": {"b": y}}.
        other = taken.setdefault("/".join(path).replace(".", "/"), path)
        if other is not path:
            wanted = "paths that differ when their keys are joined with dots"
            raise Refusal(message(caller, wanted, f"{path} and {other}"))
        key = isinstance(array, jax.Array) and _is_key(array)
        key = str(jax.random.key_impl(array)) if key else ""
        leaves.append(Leaf(path, str(dtype), tuple(array.shape), key))
        arrays.append(array)
    return leaves, arrays


def names_of(keys: Sequence[Any]) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)


def _is_key(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


def fetch(arrays: Sequence[Any]) -> list[np.ndarray]:
    """On the host, keys as their data. All transfers start before the first ends."""
    data = [jax.random.key_data(x) if _is_key(x) else x for x in arrays]
    data = [gather(x) if _is_apart(x) else x for x in data]
    return [np.asarray(array) for array in jax.device_get(data)]


def _is_apart(array: Any) -> bool:
    """Whether no process has all of it."""
    return isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    )


def bytes_of(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def kind_of(dtype: str, shape: Sequence[int]) -> str:
    return f"{dtype} {tuple(shape)}"


def entries(leaves: list[Leaf], host: list[np.ndarray]) -> list[dict[str, Any]]:
    """The leaves as the record has them: `data` is what lies on disk."""
    return [
        leaf._asdict() | {"data": [str(array.dtype), array.shape]}
        for leaf, array in zip(leaves, host, strict=True)
    ]


def nest(leaves: list[Leaf], host: list[np.ndarray]) -> dict[str, Any]:
    """Nested dicts by path, less arrays of size 0, which Orbax cannot write."""
    tree: dict[str, Any] = {}
    for leaf, array in zip(leaves, host, strict=True):
        node = tree
        for key in leaf.path[:-1]:
            node = node.setdefault(key, {})
        if array.size:
            node[leaf.path[-1]] = array
    return tree


def placed_like(path: tuple[str, ...], value: np.ndarray, key: str, like: Any) -> Any:
    """The value as an array of the kind of `like`, where `like` lies."""
    if isinstance(like, np.ndarray | np.generic):
        return value if isinstance(like, np.ndarray) else value[()]
    placed: Any = value
    if key:
        placed = jax.random.wrap_key_data(value, impl=key)
    elif like.weak_type:
        # A strong type here would promote otherwise than the run that saved it.
        placed = jnp.full(value.shape, value.dtype.type(0).item()).at[...].set(value)
    # An array that was free to join any mesh stays free.
    if like.sharding is not None and getattr(like, "committed", True):
        placed = spread(placed, like.sharding)
    else:
        placed = jnp.asarray(placed)
    if placed.dtype != like.dtype:
        wanted = f"{'/'.join(path)} as {like.dtype}"
        do = "Set jax_enable_x64, as the run that saved it had."
        raise Refusal(message("checkpoint", wanted, str(placed.dtype), do))
    return placed
