"""A tree as named arrays on the host, its fingerprint, and the way back."""

import hashlib
import json
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
    """The name and kind of one array of a tree, without its values."""

    path: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    key: str  # the implementation of typed PRNG keys; "" for other arrays


def flatten(caller: str, tree: PyTree) -> tuple[list[Leaf], list[Any]]:
    """Lists the arrays of a tree, with their paths.

    None and empty containers belong to the structure of the tree and are not listed.

    Args:
        caller: the function that the user called, for the message of an error.
        tree: arrays in any pytree.

    Returns:
        The names and kinds of the arrays, and the arrays, in the same order.
    """
    leaves, arrays, taken = [], [], {}
    for keys, array in jax.tree_util.tree_flatten_with_path(tree)[0]:
        path = names_of(keys)
        kinds = (np.number, np.bool_, jax.dtypes.prng_key)
        dtype = getattr(array, "dtype", None)
        if dtype is None or not any(jnp.issubdtype(dtype, kind) for kind in kinds):
            wanted = f"{'/'.join(path)} to be an array of numbers"
            do = "Make it an array (jnp.asarray), or keep it in extra."
            raise WrongType(message(caller, wanted, f"{type(array).__name__}", do))
        # Orbax joins keys with dots and writes {"a.b": x} over {"a": {"b": y}}.
        other = taken.setdefault("/".join(path).replace(".", "/"), path)
        if other is not path:
            wanted = "paths that differ when their keys are joined with dots"
            raise Refusal(message(caller, wanted, f"{path} and {other}"))
        typed = isinstance(array, jax.Array) and _is_key(array)
        key = str(jax.random.key_impl(array)) if typed else ""
        leaves.append(Leaf(path, str(dtype), tuple(array.shape), key))
        arrays.append(array)
    return leaves, arrays


def names_of(keys: Sequence[Any]) -> tuple[str, ...]:
    """The keys of a path in a tree, as strings."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)


def _is_key(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


def fetch(arrays: Sequence[Any]) -> list[np.ndarray]:
    """Copies arrays to the host, typed keys as their data, in one go."""
    data = [jax.random.key_data(x) if _is_key(x) else x for x in arrays]
    data = [gather(x) if _is_apart(x) else x for x in data]
    # All transfers start before the first one ends.
    return [np.asarray(array) for array in jax.device_get(data)]


def _is_apart(array: Any) -> bool:
    """Whether the array is split so that no process has all of it."""
    return isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    )


def fingerprint(tree: PyTree) -> str:
    """SHA-256 over the sorted paths, dtypes, shapes and bytes of a tree.

    Containers and devices do not count: a dict, a NamedTuple of the same fields and
    sharded copies of either have the same fingerprint.

    >>> fingerprint({"w": np.zeros(2, np.float32)})[:12]
    'bdce4ce55dfb'
    """
    leaves, arrays = flatten("fingerprint", tree)
    digest = hashlib.sha256()
    for leaf, array in sorted(zip(leaves, fetch(arrays), strict=True)):
        digest.update(json.dumps([leaf.path, leaf.dtype, leaf.shape]).encode())
        digest.update(_bytes_of(array).data)
    return digest.hexdigest()


def _bytes_of(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def kind_of(dtype: str, shape: Sequence[int]) -> str:
    """The dtype and shape of an array, as messages show them."""
    return f"{dtype} {tuple(shape)}"


def entries(leaves: list[Leaf], host: list[np.ndarray]) -> list[dict[str, Any]]:
    """The leaves as a record lists them; `data` is the dtype and shape on disk."""
    return [
        leaf._asdict() | {"data": [str(array.dtype), array.shape]}
        for leaf, array in zip(leaves, host, strict=True)
    ]


def nest(leaves: list[Leaf], host: list[np.ndarray]) -> dict[str, Any]:
    """Nested dicts by path, without arrays of size 0, which Orbax cannot write."""
    tree: dict[str, Any] = {}
    for leaf, array in zip(leaves, host, strict=True):
        node = tree
        for key in leaf.path[:-1]:
            node = node.setdefault(key, {})
        if array.size:
            node[leaf.path[-1]] = array
    return tree


def placed_like(path: tuple[str, ...], value: np.ndarray, key: str, like: Any) -> Any:
    """Makes an array of the kind and in the place of `like`.

    Args:
        path: the path of the array, for the message of an error.
        value: the values.
        key: the implementation of typed PRNG keys; "" for other arrays.
        like: an array or `jax.ShapeDtypeStruct`.

    Returns:
        A NumPy array if `like` is one, and a JAX array otherwise.
    """
    if isinstance(like, np.ndarray | np.generic):
        return value if isinstance(like, np.ndarray) else value[()]
    placed: Any = value
    if key:
        placed = jax.random.wrap_key_data(jnp.asarray(value), impl=key)
    elif like.weak_type:
        # With a strong type, later operations would promote to other dtypes.
        placed = jnp.full(value.shape, value.dtype.type(0).item()).at[...].set(value)
    # An array that was not committed to a device stays free to join any mesh.
    if like.sharding is not None and getattr(like, "committed", True):
        placed = spread(placed, like.sharding)
    else:
        placed = jnp.asarray(placed)
    if placed.dtype != like.dtype:
        wanted = f"{'/'.join(path)} as {like.dtype}"
        do = "Set jax_enable_x64, as the run that saved it had."
        raise Refusal(message("checkpoint", wanted, str(placed.dtype), do))
    return placed
