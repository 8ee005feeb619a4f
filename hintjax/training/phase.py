"""A phase of a run: a stage, how long it trains, and the state that it starts from."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.core import Tracer
from jaxtyping import Array, Key, PyTree

from hintjax.networks import Variables
from hintjax.sharding import spread
from hintjax.stages import State, checked
from hintjax.stages.balance import Balance, check_balance
from hintjax.stages.debugging import raising
from hintjax.training.feeds import Feed, Program


class Phase(NamedTuple):
    """A stage and the number of steps that it trains.

    Attributes:
        name: the name of the phase in the metrics.
        program: the compiled stage.
        steps: the largest number of steps.
        teacher: the teacher's variables. Checkpoints hold only their fingerprint.
        carry: whether terms of the same name take over the regressors and the memory
            of the phase before.
        patience: the phase ends after this many evaluations without a lower
            validation loss; None means never.
        adjust: is applied to the fresh state, e.g. to set a learning rate in it.
        balance: shares of the gradient to which the weights of terms are moved; see
            `hintjax.rebalanced`. None leaves the weights as they are.
    """

    name: str
    program: Program
    steps: int
    teacher: Variables | None = None
    carry: bool = False
    patience: int | None = None
    adjust: Callable[[State], State] = lambda state: state
    balance: Balance | None = None


def begin(
    phases: Sequence[Phase],
    feed: Feed,
    key: Key[Array, ""],
    number: int,
    student: Variables,
    earlier: State | None = None,
) -> State:
    """Makes the state that a phase starts from.

    Args:
        phases: all phases of the run.
        feed: the batches.
        key: the key of the run.
        number: the position of this phase among the phases.
        student: the student's variables at the start of this phase.
        earlier: the last state of the phase before.

    Returns:
        The adjusted state.
    """
    phase = phases[number]
    state = phase.program.stage.init(
        jax.random.fold_in(key, number),
        student,
        phase.teacher,
        feed.example,
        feed.data,
        earlier if phase.carry else None,
    )
    if phase.balance is not None:
        check_balance("fit", phase.balance, state)
    return placed_as_before(phase.adjust(state), state)


def template(
    phases: Sequence[Phase],
    feed: Feed,
    key: Key[Array, ""],
    student: Variables,
    number: int,
) -> State:
    """Makes a state with the shapes and places of a phase, to restore values into."""
    earlier = None
    if phases[number].carry:
        earlier = template(phases, feed, key, student, number - 1)
    return begin(phases, feed, key, number, student, earlier)


def with_checks(phase: Phase) -> Phase:
    """Returns the same phase with `hintjax.checked` steps, dispatched one by one."""
    program = phase.program
    one = raising(program.one.__wrapped__)
    stage = checked(program.stage)
    return phase._replace(program=program._replace(stage=stage, one=one))


def placed_as_before(new: State, old: State) -> State:
    """Returns a state whose arrays are where those of an earlier state were.

    Elsewhere the program would compile again.
    """
    return jax.tree.map(_placed, new, old)


def _placed(new: PyTree, old: Any) -> PyTree:
    """Places a new array like the old one, if the old one was placed on purpose."""
    traced = isinstance(old, Tracer)  # which has no place yet
    placed = not traced and getattr(old, "committed", False)
    return spread(new, old.sharding) if placed else new
