"""What a stage takes over from an earlier one, and the arrays that it calls its own."""

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from hintjax.method import PREPARED


def copied(tree: PyTree) -> PyTree:
    """Arrays of our own, which donation may delete; never weakly typed, since what
    comes out of an update is not, and would be compiled for once more."""

    def one(leaf):
        leaf = jnp.array(leaf)
        return jnp.array(leaf, dtype=leaf.dtype)

    return jax.tree.map(one, tree)


def carried(fresh: tuple[dict, dict], earlier: tuple[dict, dict]) -> list[dict]:
    """The earlier stage's regressors and memory, of the terms that both have."""
    if PREPARED in fresh[1]:  # a method alone, without names of terms
        return list(_term("the method", fresh, earlier))
    names = [name for name in fresh[0] if name in earlier[0]]
    missing = [n for n, own in fresh[1].items() if PREPARED in own and n not in names]
    if not names or missing:
        raise ValueError(
            f"carry: expected a term of both stages, got {list(earlier[0])} in the "
            f"earlier stage and {missing or list(fresh[0])} here. Name the term the "
            f"same in an objective of each stage."
        )
    taken = [dict(part) for part in fresh]
    for name in names:
        ours, theirs = ([part[name] for part in parts] for parts in (fresh, earlier))
        for part, value in zip(taken, _term(repr(name), ours, theirs), strict=True):
            part[name] = value
    return taken


def _term(name, fresh, earlier):
    """The parameters and memory of one term, from the same term of another stage."""
    params, memory = fresh
    if PREPARED in memory and PREPARED not in earlier[1]:  # it was the stage before
        _same(name, memory[PREPARED], earlier[0])
        return params, {**memory, PREPARED: earlier[0]}
    _same(name, fresh, earlier)
    return earlier


def _same(name, fresh, earlier):
    ours, theirs = (
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
        for tree in (fresh, earlier)
    )
    if ours != theirs:
        raise ValueError(
            f"carry: expected the term {name} to be the same in both stages, got "
            f"{theirs} from the earlier stage and {ours} here. Use the same pairs "
            f"and regressors, or another name."
        )
