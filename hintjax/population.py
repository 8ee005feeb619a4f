"""Populations: many students of one teacher, whose forward pass is shared."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree, ScalarLike

from hintjax._checks import (
    Refusal,
    WrongType,
    form,
    instance,
    message,
    nearest,
    positive_int,
)
from hintjax._checks import key as check_key
from hintjax.networks import Variables
from hintjax.objective import ADJUSTABLE, check_weight
from hintjax.sharding import (
    automatic,
    check_batch,
    in_automatic_mesh,
    on_automatic,
    over_batch,
    replicated,
    shares,
    spread,
)
from hintjax.stages import Stage, State
from hintjax.stages.compiled import Compiled

Members = State | tuple[State, ...]


class Population(NamedTuple):
    """Many students of one stage.

    Attributes:
        init: `(keys, students, teacher, batch, data=None, adjust=None) -> members`.
            It takes n keys, and n `Variables` in a list or one `Variables` for all
            students.
            `adjust(number, state)` may change the fresh state of a student: the
            learning rate in it, or the weights of terms (see `reweighted`).
        update: `(members, teacher, batch) -> (members, metrics)`: one step of all
            students on the same batch; each metric has one value per student. Members
            are donated. Like a `State` they are a pytree of arrays, for checkpoints.
        states: `(members) -> list of n State`.
        members: `(n states) -> members`, the inverse of `states`. The states may come
            from another population of this stage, such as its best students.
    """

    init: Callable[..., Members]
    update: Callable[..., tuple[Members, dict[str, Float[Array, " n"]]]]
    states: Callable[[Members], list[State]]
    members: Callable[[Sequence[State]], Members]


def population(
    stage: Stage, n: int, *, together: bool | None = None, mesh: Mesh | None = None
) -> Population:
    """Trains n students that differ in seed, variables or values of their state.

    Each student gets the result that `stage.update` would give it alone. To give
    students different learning rates, keep the rate in the optimizer's state
    (`optax.inject_hyperparams`). To give them different weights of a term, make the
    weight `Adjustable`::

        hint = weighted(fitnets(pairs), Adjustable(100.0))
        method = objective(task=..., hint=hint)
        stage = distillation_stage(student, teacher, method, ...)
        crowd = population(stage, 3)
        members = crowd.init(
            keys, variables, theirs, batch,
            adjust=lambda i, state: reweighted(state, hint=(10, 100, 1000)[i]),
        )

    A population saves forward passes of the teacher: 8 students take 0.44 to 0.48 of
    the operations of separate runs of resnet8 under resnet20, or vit_micro under
    vit_mini. The time of one student among 8, divided by the time of a separate run, on
    two CPU cores, with 95 % intervals (`benchmarks/population.py`,
    `benchmarks/results/population_cpu.json`):

    | | in turn | together |
    |---|---|---|
    | CNN | 0.68 [0.61, 1.03] | 3.5 [2.7, 4.3] |
    | ViT | 0.73 [0.61, 0.83] | 0.93 [0.80, 1.70] |

    So `jax.vmap` over students does not pay on CPUs, least of all for convolutions, and
    is not the default there. A population of one student never pays.

    On a mesh, the teacher's features are gathered. At batch 64 resnet20 takes 4.9 GFLOP
    for 4.2 MB of features: 1,160 operations per byte. For vit_mini the ratio is 2,100;
    for resnet20 in a hint stage that stops at `group1`, 440. A device that does more
    operations than this in the time that one byte takes to arrive loses by gathering.

    Args:
        stage: the stage of one student; with `mesh`, a stage on one device. Its teacher
            must not depend on the student.
        n: number of students.
        together: True to train all students in one program (`jax.vmap`); False to run
            one program for the teacher, then another for each student in turn. The
            default is False on CPUs and True elsewhere.
        mesh: devices over which the students are divided (axes `data` and `fsdp`); n
            must be a multiple of their number. `together` applies to the students of
            one device. Each device runs the teacher on its part of the batch. Then the
            features are gathered; devices exchange nothing else. The default is one
            device.

    Returns:
        The population.

    Raises:
        ValueError: if n < 1, the number of keys or students is not n, n is not a
            multiple of the number of devices, or the stage has a mesh of its own.
    """
    positive_int("population", n=n)
    do = "Make it with hint_stage or distillation_stage."
    instance("population", Stage, do, stage=stage)
    if together is None:
        together = jax.default_backend() != "cpu"
    if mesh is not None and n % shares(mesh):
        parts = shares(mesh)
        wanted = f"n to be a multiple of the {parts} devices"
        do = f"Use {n + -n % parts}, or fewer devices."
        raise Refusal(message("population", wanted, f"{n}", do))
    mesh = mesh and automatic(mesh)
    stacked = together or mesh is not None

    @in_automatic_mesh()
    def init(keys, students, teacher, batch, data=None, adjust=None):
        keys = on_automatic(keys)
        if not isinstance(keys, list | tuple):
            check_key(
                "population", 1, do=f"Pass jax.random.split(key, {n}).", keys=keys
            )
        # Variables are a tuple, too.
        several = isinstance(students, list | tuple)
        several = several and not isinstance(students, Variables | State)
        each = list(students) if several else [students] * n
        if len(keys) != n or len(each) != n:
            got = f"{len(keys)} keys and {len(each)} students"
            raise Refusal(message("population", f"{n} keys and {n} students", got))
        members = [
            stage.init(key, variables, teacher, batch, data)
            for key, variables in zip(keys, each, strict=True)
        ]
        devices = len(members[0].step.sharding.device_set)
        # New arrays are on all devices of an outer mesh (`jax.set_mesh`), and of the
        # mesh on which the user has placed an argument.
        given = jax.tree.leaves((keys, students, teacher, batch))
        outer = not jax.sharding.get_abstract_mesh().empty
        if mesh is not None and devices > 1 and not (outer or any(map(_placed, given))):
            do = "Leave out the stage's mesh=: each device trains whole students."
            wanted, got = "a stage on one device", f"one on {devices}"
            raise Refusal(message("population", wanted, got, do))
        if adjust is not None:
            members = [adjust(number, state) for number, state in enumerate(members)]
        return joined(members)

    @in_automatic_mesh()
    def joined(given):
        if len(given) != n:
            raise Refusal(message("population", f"{n} states", f"{len(given)}"))
        if not stacked:
            return tuple(given)
        members = jax.tree.map(_stacked, *given)
        return members if mesh is None else spread(members, over_batch(mesh))

    @in_automatic_mesh()
    def states(members):
        return _unstacked(members, n) if stacked else list(members)

    if mesh is not None:
        update = _on_mesh(stage, mesh, together)
    else:
        update = _together(stage) if together else _in_turn(stage)
    home = None if mesh is None else replicated(mesh)
    compiled = Compiled(update, check=_check_members, home=home)
    return Population(init, compiled, states, joined)


def reweighted(state: State, /, **weights: ScalarLike) -> State:
    """Returns the state with other weights of terms.

    Args:
        state: state of a stage whose method is an objective.
        **weights: new weights, each >= 0, by the name of the term. The weight of the
            term must be `Adjustable`.

    Returns:
        The state.

    Raises:
        ValueError: if the weight of a term is not `Adjustable`, or if a new weight is
            negative or not finite.
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


def _placed(leaf: Any) -> bool:
    """Whether an array is on a mesh."""
    return isinstance(getattr(leaf, "sharding", None), NamedSharding)


def _check_members(given: Any) -> None:
    """Raises unless it is a state of all students, or a tuple of their states."""
    each = given if type(given) is tuple and given else (given,)
    if not all(isinstance(one, State) for one in each):
        do = "Pass the result of init, or the first result of update."
        wanted = "the members of a population"
        raise WrongType(message("population", wanted, form(given), do))


def _together(stage: Stage) -> Callable:
    """The update as one program, in which students are the leading axis."""

    @partial(jax.jit, donate_argnums=0)
    def update(members, teacher, batch):
        taught = stage.teach(_first(members), teacher, batch)
        return jax.vmap(stage.step, (0, None, None))(members, taught, batch)

    return update


def _in_turn(stage: Stage) -> Callable:
    """The update as a program for the teacher and one that runs for each student."""
    teach = jax.jit(stage.teach)
    step = jax.jit(stage.step, donate_argnums=0)

    def update(members, teacher, batch):
        taught = teach(members[0], teacher, batch)
        made = [step(state, taught, batch) for state in members]
        states, metrics = zip(*made, strict=True)
        return tuple(states), jax.tree.map(_stacked, *metrics)

    return update


def _on_mesh(stage: Stage, mesh: Mesh, together: bool) -> Callable:
    """The update as one program for all devices, each with some of the students."""
    everywhere, split = replicated(mesh), over_batch(mesh)

    # shard_map, because the partitioner does not know that students are independent.
    # Nothing is differentiated through it, so JAX need not track which values vary
    # between devices.
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
            # Sharded first, as it was computed. Otherwise the partitioner may gather a
            # lower layer and compute the layers above it on every device.
            if leaf.shape[:1] == (examples,):
                leaf = jax.lax.with_sharding_constraint(leaf, split)
            return jax.lax.with_sharding_constraint(leaf, everywhere)

        shared = jax.lax.with_sharding_constraint(batch, split)
        taught = stage.teach(_first(members), teacher, shared)
        return step(members, jax.tree.map(gathered, taught), batch)

    return update


def _stacked(*leaves: Array) -> Array:
    """The leaves of all students as one, with students as its leading axis."""
    return jnp.stack(leaves)


def _unstacked(tree: PyTree, n: int) -> list[Any]:
    """The trees of n students from one tree with students as the leading axis."""
    return [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(n)]


def _first(tree: PyTree) -> Any:
    """The tree of the first student."""
    return jax.tree.map(lambda leaf: leaf[0], tree)
