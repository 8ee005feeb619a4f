"""Populations: many students under one teacher, which is computed once for all."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hintjax._checks import message, positive_int
from hintjax.networks import Variables
from hintjax.stages import Stage, State

Members = State | tuple[State, ...]


class Population(NamedTuple):
    """n students of one stage.

    Attributes:
        init: `(keys, students, teacher, batch, data=None, adjust=None) -> members`:
            n keys, and n `Variables` or one for all. `adjust(number, state)` may
            change a fresh state, for instance the learning rate in it.
        update: `(members, teacher, batch) -> (members, metrics)`: one step of all on
            the same batch; each metric has a value for each member. Members are
            donated.
        states: `(members) -> list of n State`.
    """

    init: Callable[..., Members]
    update: Callable[..., tuple[Members, dict[str, Float[Array, " n"]]]]
    states: Callable[[Members], list[State]]


def population(stage: Stage, n: int, *, together: bool | None = None) -> Population:
    """n students that differ in seed, weights or what is in their state.

    What each comes to is what `stage.update` would have made of it alone. A learning
    rate that differs is one in the optimiser's state (`optax.inject_hyperparams`).

    Args:
        stage: the stage of one student, on one device. Its teacher must not depend on
            the student.
        n: how many students.
        together: all in one program (`jax.vmap`), which suits accelerators; or one
            program for the teacher and one that takes each student in turn, which
            suits CPUs: convolutions of many students at once are slower there than one
            after another. By default apart on CPUs, and together elsewhere.

    Returns:
        The population.

    Raises:
        ValueError: if n < 1, or there are not as many keys or students.
    """
    positive_int("population", n=n)
    if together is None:
        together = jax.default_backend() != "cpu"

    def init(keys, students, teacher, batch, data=None, adjust=None):
        alike = isinstance(students, Variables)
        each = [students] * n if alike else list(students)
        if len(keys) != n or len(each) != n:
            got = f"{len(keys)} keys and {len(each)} students"
            raise ValueError(message("population", f"{n} of each", got))
        members = [
            stage.init(key, variables, teacher, batch, data)
            for key, variables in zip(keys, each, strict=True)
        ]
        if adjust is not None:
            members = [adjust(number, state) for number, state in enumerate(members)]
        return jax.tree.map(_stacked, *members) if together else tuple(members)

    @partial(jax.jit, donate_argnums=0)
    def all_at_once(members, teacher, batch):
        first = jax.tree.map(lambda leaf: leaf[0], members)
        taught = stage.teach(first, teacher, batch)
        return jax.vmap(stage.step, (0, None, None))(members, taught, batch)

    teach = jax.jit(stage.teach)
    step = jax.jit(stage.step, donate_argnums=0)

    def in_turn(members, teacher, batch):
        taught = teach(members[0], teacher, batch)
        made = [step(state, taught, batch) for state in members]
        states, metrics = zip(*made, strict=True)
        return tuple(states), jax.tree.map(_stacked, *metrics)

    def states(members):
        if not together:
            return list(members)
        return [jax.tree.map(lambda leaf, i=i: leaf[i], members) for i in range(n)]

    return Population(init, all_at_once if together else in_turn, states)


def _stacked(*leaves):
    return jnp.stack(leaves)
