"""The rows of a memory bank, restored on another number of devices.

A bank that is sharded by rows ends with rows of zeros, which make the number of rows a
multiple of the number of devices. So the banks of one run differ in these rows alone
when the run goes on with other devices.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from hintjax._checks import Refusal, message
from hintjax.memory import MemoryBank
from hintjax.training.arrays import Leaf, flatten, names_of


def resized(
    stored: Sequence[dict[str, Any]], like: PyTree
) -> frozenset[tuple[str, ...]]:
    """The paths of the banks' rows that were stored for another number of devices.

    Args:
        stored: the leaves that the record of a checkpoint lists.
        like: the tree that is wanted.
    """
    shapes = {tuple(leaf["path"]): (leaf["dtype"], leaf["shape"]) for leaf in stored}
    banks = _banks(like)
    return frozenset(
        leaf.path
        for leaf, target in zip(*flatten("restore", like), strict=True)
        if leaf.path in banks & shapes.keys()
        and leaf.dtype == shapes[leaf.path][0]
        and _fits(shapes[leaf.path][1], leaf, target)
    )


def with_rows(path: tuple[str, ...], value: np.ndarray, rows: int) -> np.ndarray:
    """The rows of a bank, with rows of zeros at the end added or left out.

    Args:
        path: the path of the array, for the message of an error.
        value: the stored rows.
        rows: the number of rows that are wanted.

    Raises:
        Refusal: if a row that would be left out is not zero.
    """
    if value[rows:].any():
        wanted = f"{'/'.join(path)} with {rows} rows, and zeros after them"
        do = "Restore with the training set of the run."
        raise Refusal(message("restore", wanted, "other numbers after them", do))
    return np.pad(value[:rows], ((0, max(rows - value.shape[0], 0)), (0, 0)))


def _banks(tree: PyTree) -> frozenset[tuple[str, ...]]:
    """The paths of the rows of all banks in a tree."""
    nodes, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: isinstance(node, MemoryBank)
    )
    return frozenset(
        (*names_of(keys), rows)
        for keys, node in nodes
        if isinstance(node, MemoryBank)
        for rows in ("student", "teacher")
    )


def _fits(stored: Sequence[int], leaf: Leaf, like: Any) -> bool:
    """Whether stored rows can be the wanted rows, for another number of devices."""
    if not len(stored) == len(leaf.shape) == 2:
        return False
    (there, features), (here, wanted) = stored, leaf.shape
    if there == here or features != wanted or not (there and here):
        return False
    sharding = getattr(like, "sharding", None)
    devices = 1 if sharding is None else here // sharding.shard_shape(leaf.shape)[0]
    return here < there + devices  # fewer rows of zeros than devices are appended
