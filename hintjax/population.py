"""Populations: many students under one teacher, which is computed once for all."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, ScalarLike

from hintjax._checks import Refusal, message, nearest, positive_int
from hintjax.networks import Variables
from hintjax.objective import ADJUSTABLE, check_weight
from hintjax.sharding import check_batch, over_batch, replicated, shares, spread
from hintjax.stages import Stage, State

Members = State | tuple[State, ...]


class Population(NamedTuple):
    """n students of one stage.

    Attributes:
        init: `(keys, students, teacher, batch, data=None, adjust=None) -> members`:
            n keys, and n `Variables` or one for all. `adjust(number, state)` may
            change a fresh state: the learning rate in it, or the weights of terms
            (see `reweighted`).
        update: `(members, teacher, batch) -> (members, metrics)`: one step of all on
            the same batch; each metric has a value for each member. Members are
            donated. They are a pytree of arrays, as a `State` is, for checkpoints.
        states: `(members) -> list of n State`.
    """

    init: Callable[..., Members]
    update: Callable[..., tuple[Members, dict[str, Float[Array, " n"]]]]
    states: Callable[[Members], list[State]]


def population(
    stage: Stage, n: int, *, together: bool | None = None, mesh: Mesh | None = None
) -> Population:
    """n students that differ in seed, weights or what is in their state.

    What each comes to is what `stage.update` would have made of it alone. A learning
    rate that differs is one in the optimizer's state (`optax.inject_hyperparams`), a
    weight of a term that differs is `Adjustable`::

        hint = weighted(fitnets(pairs), Adjustable(100.0))
        stage = distillation_stage(student, teacher, objective(task=..., hint=hint), ...)
        crowd = population(stage, 3)
        members = crowd.init(
            keys, variables, theirs, batch,
            adjust=lambda number, state: reweighted(state, hint=(10, 100, 1000)[number]),
        )

    What is spared is the teacher: for 8 students 0.44 to 0.48 of the operations of
    separate runs of resnet8 under resnet20, or vit_micro under vit_mini. In time a
    student among 8 costs, over a separate run on two CPU cores, with 95 % intervals
    (`benchmarks/population.py`, `benchmarks/results/population_cpu.json`):

    | | in turn | together |
    |---|---|---|
    | CNN | 0.68 [0.61, 1.03] | 3.5 [2.7, 4.3] |
    | ViT | 0.73 [0.61, 0.83] | 0.93 [0.80, 1.70] |

    So `jax.vmap` over students does not pay on CPUs, least of all for convolutions, and
    is not the default there. A population of one pays nowhere.

    On a mesh, features are gathered. At batch 64 these are 4.2 MB where resnet20 makes
    4.9 GFLOP for them, 1,160 operations a byte; 2,100 for vit_mini; 440 where a hint
    stage stops resnet20 at `group1`. Where a device could do more in the time in which a
    byte arrives, gathering costs more than it spares.

    Args:
        stage: the stage of one student, on one device if there is a mesh here. Its
            teacher must not depend on the student.
        n: how many students.
        together: all in one program (`jax.vmap`); or one program for the teacher and
            one that takes each student in turn. By default apart on CPUs, and together
            elsewhere.
        mesh: the students are shared out over its devices (its axes `data` and
            `fsdp`), n a multiple of them; those of one device are together or in turn.
            The teacher sees a share of the batch on each device, and its features are
            gathered, which is all that devices tell each other. One device by default.

    Returns:
        The population.

    Raises:
        ValueError: if n < 1, there are not as many keys or students, devices cannot
            share them evenly, or the stage has a mesh, too.
    """
    positive_int("population", n=n)
    if together is None:
        together = jax.default_backend() != "cpu"
    if mesh is not None and n % shares(mesh):
        parts = shares(mesh)
        wanted = f"n to be a multiple of the {parts} devices"
        do = f"Use {n + -n % parts}, or fewer devices."
        raise Refusal(message("population", wanted, f"{n}", do))
    stacked = together or mesh is not None

    def init(keys, students, teacher, batch, data=None, adjust=None):
        alike = isinstance(students, Variables)
        each = [students] * n if alike else list(students)
        if len(keys) != n or len(each) != n:
            got = f"{len(keys)} keys and {len(each)} students"
            raise Refusal(message("population", f"{n} of each", got))
        members = [
            stage.init(key, variables, teacher, batch, data)
            for key, variables in zip(keys, each, strict=True)
        ]
        devices = len(members[0].step.sharding.device_set)
        if mesh is not None and devices > 1:
            do = "Leave out its mesh=: each device has whole students."
            wanted, got = "a stage on one device", f"one on {devices}"
            raise Refusal(message("population", wanted, got, do))
        if adjust is not None:
            members = [adjust(number, state) for number, state in enumerate(members)]
        if not stacked:
            return tuple(members)
        members = jax.tree.map(_stacked, *members)
        return members if mesh is None else spread(members, over_batch(mesh))

    def states(members):
        return _unstacked(members, n) if stacked else list(members)

    if mesh is not None:
        update = _on_mesh(stage, mesh, together)
    else:
        update = _together(stage) if together else _in_turn(stage)
    return Population(init, update, states)


def reweighted(state: State, /, **weights: ScalarLike) -> State:
    """The same state, with other weights of terms.

    Args:
        state: of a stage whose method is an objective.
        **weights: by name of the term, each >= 0; of terms whose weight is `Adjustable`.

    Returns:
        The state.

    Raises:
        ValueError: for a term without such a weight; if a weight is negative or not
            finite.
    """
    kept = state.memory.get(ADJUSTABLE, {})
    for name, weight in weights.items():
        check_weight("reweighted", weight)
        if name not in kept:
            near = ", ".join(nearest(name, kept)) or "none"
            do = f"Nearest: {near}; give its weight as hintjax.Adjustable(start)."
            wanted = "terms whose weight is adjustable"
            raise Refusal(message("reweighted", wanted, repr(name), do))
    new = {name: jnp.asarray(x, kept[name].dtype) for name, x in weights.items()}
    return state._replace(memory={**state.memory, ADJUSTABLE: {**kept, **new}})


def _together(stage):
    """One program, in which students are a leading axis."""

    @partial(jax.jit, donate_argnums=0)
    def update(members, teacher, batch):
        taught = stage.teach(_first(members), teacher, batch)
        return jax.vmap(stage.step, (0, None, None))(members, taught, batch)

    return update


def _in_turn(stage):
    """A program for the teacher, and one that runs for each student."""
    teach = jax.jit(stage.teach)
    step = jax.jit(stage.step, donate_argnums=0)

    def update(members, teacher, batch):
        taught = teach(members[0], teacher, batch)
        made = [step(state, taught, batch) for state in members]
        states, metrics = zip(*made, strict=True)
        return tuple(states), jax.tree.map(_stacked, *metrics)

    return update


def _on_mesh(stage, mesh, together):
    """One program for all devices, each with some of the students."""
    everywhere, split = replicated(mesh), over_batch(mesh)

    # By hand: the partitioner would not know that students have nothing to do with
    # each other. Nothing is differentiated through it, so that what varies between
    # devices need not be tracked.
    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(split.spec, PartitionSpec(), PartitionSpec()),
        out_specs=split.spec,
        check_vma=False,
    )
    def step(members, taught, batch):
        here = members.step.shape[0]
        if together and here > 1:
            return jax.vmap(stage.step, (0, None, None))(members, taught, batch)
        made = [stage.step(state, taught, batch) for state in _unstacked(members, here)]
        return jax.tree.map(_stacked, *made)

    @partial(
        jax.jit,
        donate_argnums=0,
        in_shardings=(split, everywhere, everywhere),
        out_shardings=split,
    )
    def update(members, teacher, batch):
        check_batch(batch, mesh)
        examples = jax.tree.leaves(batch)[0].shape[0]

        def gathered(leaf):
            # First as it was computed: left to itself, the partitioner may gather one
            # layer, and compute those above it on every device.
            if leaf.shape[:1] == (examples,):
                leaf = jax.lax.with_sharding_constraint(leaf, split)
            return jax.lax.with_sharding_constraint(leaf, everywhere)

        shared = jax.lax.with_sharding_constraint(batch, split)
        taught = stage.teach(_first(members), teacher, shared)
        return step(members, jax.tree.map(gathered, taught), batch)

    return update


def _stacked(*leaves):
    return jnp.stack(leaves)


def _unstacked(tree, n):
    return [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(n)]


def _first(tree):
    return jax.tree.map(lambda leaf: leaf[0], tree)
