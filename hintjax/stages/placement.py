"""Where the arrays of a step live: on one device, or on the devices of a mesh.

A step asks its `Placement` and never whether there is a mesh.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

from hintjax.method import Method
from hintjax.networks import Variables
from hintjax.sharding import (
    Layout,
    alike,
    automatic,
    check_batch,
    check_rules,
    check_spans,
    in_automatic_mesh,
    on_automatic,
    over_batch,
    replicated,
    shares,
    spread,
    stored,
    whole,
)
from hintjax.stages import entering
from hintjax.stages.stage import Batch, Given, State


class Placement(NamedTuple):
    """Where the arrays of a step live.

    Attributes:
        layout: the mesh and its rules; None for one device.
        parts: number of devices that share a batch.
        batch: `(batch) -> batch`, shared out evenly over the devices.
        params: `(params) -> params` as a step computes with them: gathered, if they
            are stored in shares.
        grads: `(grads) -> grads`, stored as their parameters are.
        state: `(state) -> state`, stored as the next step expects it.
        begin: `(state, teacher_params) -> state`: a new state, sent to its devices.
        jit: `(function, moves) -> function`: the jit of a function of `(state, teacher,
            batch)`. If it `moves` the state, it returns `(state, ...)`, and the old
            state is donated.
    """

    layout: Layout | None
    parts: int
    batch: Callable[[Batch], Batch]
    params: Callable[[PyTree], PyTree]
    grads: Callable[[PyTree], PyTree]
    state: Callable[[State], State]
    begin: Callable[[State, PyTree], State]
    jit: Callable[[Callable[..., Any], bool], Callable[..., Any]]


def placement(mesh: Mesh | Layout | None, method: Method) -> Placement:
    """Returns where a stage's arrays live.

    Args:
        mesh: a mesh, which has the default layout; a layout; or None for one device.
        method: its memory may be split over the mesh.
    """
    if mesh is None:
        return one_device()
    layout = Layout(mesh) if isinstance(mesh, Mesh) else mesh
    return on_mesh(layout._replace(mesh=automatic(layout.mesh)), method)


def one_device() -> Placement:
    """Returns the placement of all arrays on one device."""

    def same(tree: PyTree) -> PyTree:
        return tree

    def begin(state: State, teacher_params: PyTree) -> State:
        return state

    def jit(function: Callable[..., Any], moves: bool) -> Callable[..., Any]:
        return jax.jit(function, donate_argnums=0 if moves else ())

    return Placement(None, 1, same, same, same, same, begin, jit)


def on_mesh(layout: Layout, method: Method) -> Placement:
    """Returns the placement of a stage on a mesh.

    Batches are split over `data` and `fsdp`. Parameters and the optimizer's state are
    stored as the layout says, the method's memory as the method says, and all other
    arrays on every device.

    Args:
        layout: the mesh and its rules.
        method: its memory may be split.
    """
    constrain = jax.lax.with_sharding_constraint

    def batch(batch: Batch) -> Batch:
        check_batch(batch, layout.mesh)
        return constrain(batch, over_batch(layout.mesh))

    def params(params: PyTree) -> PyTree:
        return constrain(params, whole(stored(layout, params)))

    def grads(grads: PyTree) -> PyTree:
        # The gradients are summed first where they were computed: otherwise the
        # partitioner may gather activations to compute each device's share.
        grads = params(grads)
        return constrain(grads, stored(layout, grads))

    def state(state: State) -> State:
        return constrain(state, _homes(layout, method, state))

    def begin(state: State, teacher_params: PyTree) -> State:
        check_rules(layout, {**state.params, "teacher": teacher_params})
        return spread(state, _homes(layout, method, state))

    homes = partial(_homes, layout, method)
    jit = partial(_Sharded, layout, homes)
    return Placement(
        layout, shares(layout.mesh), batch, params, grads, state, begin, jit
    )


def _homes(layout: Layout, method: Method, state: State) -> State:
    """The sharding of every array of a state."""
    params = stored(layout, state.params)
    everywhere: Any = replicated(layout.mesh)
    memory = everywhere
    if method.split is not None:
        specs = method.split(state.memory)
        memory = jax.tree.map(partial(NamedSharding, layout.mesh), specs)
    return State(
        params=params,
        state=everywhere,
        memory=memory,
        opt_state=alike(params, state.params, state.opt_state, layout.mesh),
        step=everywhere,
        key=everywhere,
        skipped=everywhere,
        norms=everywhere,
    )


class _Sharded:
    """`jax.jit` of a function of (state, teacher, batch) on a mesh.

    The shardings follow from the shapes of the state, so they are known at the first
    call.
    """

    def __init__(
        self,
        layout: Layout,
        homes: Callable[[State], State],
        function: Callable[..., Any],
        moves: bool,
    ):
        self.__wrapped__, self._moves = function, moves
        self._layout, self._homes = layout, homes
        self._made: dict[Any, Callable[..., Any]] = {}

    def __call__(self, state: State, variables: Given | None, batch: Batch) -> Any:
        with in_automatic_mesh():
            jitted, arguments = self._prepared(state, variables, batch)
            return jitted(*arguments)

    def lower(self, state: State, variables: Given | None, batch: Batch) -> Any:
        """Lowers the function for these arguments, as `jax.jit(...).lower` does."""
        with in_automatic_mesh():
            jitted, arguments = self._prepared(state, variables, batch)
            return jitted.lower(*arguments)

    def _prepared(
        self, state: State, variables: Given | None, batch: Batch
    ) -> tuple[Any, tuple[State, Variables | None, Batch]]:
        # These checks come before those of jit, whose messages say less.
        entering.check_state(state)
        variables = entering.teacher(variables)
        entering.check_batch(batch)
        check_batch(batch, self._layout.mesh)
        check_spans(batch, self._layout.mesh)
        variables, batch = on_automatic((variables, batch))
        variables = None if variables is None else Variables(*variables)
        structure = jax.tree.structure((state, variables))
        if structure not in self._made:
            shardings = self._shardings(state, variables)
            donated = 0 if self._moves else ()
            self._made[structure] = jax.jit(
                self.__wrapped__, donate_argnums=donated, **shardings
            )
        return self._made[structure], (state, variables, batch)

    def _shardings(self, state: State, variables: Variables | None) -> dict[str, Any]:
        everywhere = replicated(self._layout.mesh)
        ours, theirs = self._homes(state), None
        if variables is not None:
            params = stored(self._layout, {"teacher": variables[0]})["teacher"]
            theirs = Variables(params, everywhere)
        return {
            "in_shardings": (ours, theirs, over_batch(self._layout.mesh)),
            "out_shardings": (ours, everywhere) if self._moves else everywhere,
        }
