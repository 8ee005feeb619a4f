"""Exports: trees of arrays on disk that need nothing else to be read."""

import os
import shutil
from collections.abc import Mapping
from typing import Any

import jax

from hintjax._checks import Refusal, WrongType, message
from hintjax.processes import told
from hintjax.training.arrays import (
    entries,
    fetch,
    flatten,
    kind_of,
    names_of,
    placed_like,
)
from hintjax.training.sealed import (
    STAGING,
    DamageError,
    commit,
    is_export,
    make_staging,
    read_arrays,
    read_record,
    resolve,
)


def save_tree(path: str | os.PathLike, tree: Mapping[str, Any]) -> None:
    """Writes nested dicts of arrays as one Orbax directory.

    The directory is complete when the function returns. Plain Orbax reads it as well:
    ``StandardCheckpointer().restore(path)``.

    Args:
      path: a new or empty directory, or an earlier export, which is replaced.
      tree: variables for ``module.apply``: ``{"params": ..., "batch_stats": ...}``.
    """
    target = resolve("save_tree", path)

    def refuse_other_content() -> None:
        empty = target.is_dir() and not any(target.iterdir())
        if target.exists() and not empty and not is_export(target):
            wanted = "a new or empty directory or an earlier export"
            do = "Choose another path: only exports are overwritten."
            raise Refusal(message("save_tree", wanted, str(target), do))

    told(refuse_other_content)
    tree = _plain(tree, ())
    leaves, arrays = flatten("save_tree", tree)
    host = fetch(arrays)
    for leaf, array in zip(leaves, host, strict=True):
        if leaf.key or not array.size:
            wanted = f"{'/'.join(leaf.path)} to be a plain array, and not empty"
            raise Refusal(message("save_tree", wanted, kind_of(leaf.dtype, leaf.shape)))
    staging = target.with_name(f".{target.name}{STAGING}")
    tree = jax.tree.unflatten(jax.tree.structure(tree), host)

    def write() -> None:
        make_staging("save_tree", staging, target, host)
        try:
            record: dict[str, Any] = {"export": True, "leaves": entries(leaves, host)}
            commit("save_tree", staging, target, tree, record)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    told(write)


def load_tree(path: str | os.PathLike) -> dict[str, Any]:
    """Reads the nested dicts of arrays that `save_tree` wrote.

    >>> import jax.numpy as jnp
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as directory:
    ...     save_tree(f"{directory}/student", {"params": {"bias": jnp.ones(2)}})
    ...     load_tree(f"{directory}/student")
    {'params': {'bias': Array([1., 1.], dtype=float32)}}
    """
    source = resolve("load_tree", path)

    def record() -> dict[str, Any]:
        if not is_export(source):
            wanted = "a directory that save_tree wrote"
            raise Refusal(message("load_tree", wanted, str(source)))
        return read_record(source)

    stored, outline = read_arrays(source, told(record, DamageError))

    def place(path: Any, _: int) -> jax.Array:
        names = names_of(path)
        array, key = stored[names]
        like = jax.ShapeDtypeStruct(array.shape, array.dtype)
        return placed_like(names, array, key, like)

    return jax.tree_util.tree_map_with_path(place, outline)


def _plain(node: Any, path: tuple[str, ...]) -> Any:
    """Copies dicts to plain dicts; other containers could not be read back."""
    if isinstance(node, Mapping) and all(isinstance(key, str) for key in node):
        return {key: _plain(child, (*path, key)) for key, child in node.items()}
    if path and hasattr(node, "dtype"):
        return node
    wanted = f"{'/'.join(path) or 'tree'} to be a dict with strings as keys"
    raise WrongType(message("save_tree", wanted, type(node).__name__))
