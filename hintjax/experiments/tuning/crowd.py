"""A crowd: candidates of `hintjax tune` that share a compiled program and a teacher.

They differ only in numbers of the state (learning rate, weight), so they train as one
population, on the same batches, from the same initial student. A checkpoint holds all
of them, so that a tuning that was killed goes on.
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

from hintjax.experiments.tuning.candidates import Candidate
from hintjax.method import Method
from hintjax.networks import Variables
from hintjax.objective import ADJUSTABLE
from hintjax.population import Population, population, reweighted
from hintjax.stages import State, student_variables
from hintjax.training import Feed, Phase, Program
from hintjax.training.checkpoints import Checkpoints
from hintjax.training.phase import begin, template
from hintjax.training.signals import Request

Show = Callable[[int], None]  # is called with the steps of one candidate so far


class Shared(NamedTuple):
    """The parts that all crowds of a tuning share.

    Attributes:
        feed: the batches.
        student: the student's variables at the first step.
        key: key of the training.
        seconds: age of a checkpoint after which a new one is saved; None for any age.
        request: says whether a signal asks for the end.
        spent: seconds by kind of work; filled during the training.
    """

    feed: Feed
    student: Variables
    key: Key[Array, ""]
    seconds: float | None
    request: Request
    spent: dict[str, float]

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Notes the seconds that a block takes."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self.spent[name] = self.spent.get(name, 0.0) + seconds


class Crowd(NamedTuple):
    """Candidates that differ in numbers of the state.

    Attributes:
        shared: parts that all crowds share.
        phases: phases of each candidate.
        method: method of the last phase.
        candidates: settings by the number of the candidate.
        checkpoints: open checkpoints of the crowd.
    """

    shared: Shared
    phases: Sequence[Phase]
    method: Method
    candidates: Mapping[int, Candidate]
    checkpoints: Checkpoints


class Standing(NamedTuple):
    """Where the candidates of a crowd stand.

    Attributes:
        phase: position of the phase.
        at: steps so far, over all phases.
        states: states by the number of the candidate.
    """

    phase: int
    at: int
    states: Mapping[int, State]


def train(
    crowd: Crowd,
    alive: Sequence[int],
    end: int,
    show: Show,
    now: Standing | None = None,
) -> Standing:
    """Trains some candidates of a crowd, from where they stand up to a step.

    Args:
        crowd: the crowd.
        alive: numbers of the candidates.
        end: the step.
        show: is called with the steps of one candidate so far.
        now: where they stand, if no other crowd has trained since then; by default they
            are read from the checkpoint, or begin.

    Returns:
        Where the candidates stand, at the step `end`.
    """
    now = now or _restored(crowd)
    if now is None:
        now = _begun(crowd, 0, 0, {number: None for number in alive})
    else:
        now = now._replace(states={number: now.states[number] for number in alive})
    while now.at < end:
        last = sum(phase.steps for phase in crowd.phases[: now.phase + 1])
        if now.at == last:
            now = _begun(crowd, now.phase + 1, now.at, now.states)
        else:
            now = _stepped(crowd, now, min(end, last), show)
    return now


def _begun(
    crowd: Crowd, phase: int, at: int, before: Mapping[int, State | None]
) -> Standing:
    """The candidates at the first step of a phase."""

    def one(number: int, earlier: State | None) -> State:
        adjust = functools.partial(_adjusted, crowd.candidates[number])
        phases = [each._replace(adjust=adjust) for each in crowd.phases]
        start = crowd.shared.student if earlier is None else student_variables(earlier)
        return begin(phases, crowd.shared.feed, crowd.shared.key, phase, start, earlier)

    with crowd.shared.timed("start"):
        states = {number: one(number, earlier) for number, earlier in before.items()}
    return Standing(phase, at, states)


def _adjusted(candidate: Candidate, state: State) -> State:
    """A fresh state with the numbers of a candidate."""
    rate = jnp.asarray(candidate["learning_rate"], jnp.float32)
    opt_state = optax.tree.set(state.opt_state, learning_rate=rate)
    state = state._replace(opt_state=opt_state)
    terms = state.memory.get(ADJUSTABLE)
    if "weight" not in candidate or terms is None:  # as in a hint stage before
        return state
    return reweighted(state, **{name: candidate["weight"] for name in terms})


def _stepped(crowd: Crowd, now: Standing, end: int, show: Show) -> Standing:
    """The candidates at a later step of the same phase, which is saved."""
    shared, phase = crowd.shared, crowd.phases[now.phase]
    some = population(phase.program.stage, len(now.states))
    program = _program(phase.program, some)
    members = some.members(list(now.states.values()))
    before, saved = None, time.perf_counter()

    def standing(at: int) -> Standing:
        states = zip(now.states, some.states(members), strict=True)
        return Standing(now.phase, at, dict(states))

    for at in range(now.at, end):
        # The first step compiles. Later, the host is one step ahead of the device, so
        # that a signal does not wait long.
        with shared.timed("steps" if before else "compilation"):
            members, metrics = shared.feed.advance(
                program, members, phase.teacher, at, 1
            )
            jax.block_until_ready(before or metrics)
            before = metrics
        show(at + 1)
        asked = shared.request.signal is not None
        old = time.perf_counter() - saved
        if asked or at + 1 == end or (shared.seconds or math.inf) < old:
            with shared.timed("steps"):
                jax.block_until_ready(metrics)
            with shared.timed("checkpoints"):
                _save(crowd, standing(at + 1))
            saved = time.perf_counter()
        if asked:
            crowd.checkpoints.wait()
            shared.request.obey(f"step {at + 1} of all candidates is saved")
    return standing(end)


def _program(program: Program, some: Population) -> Program:
    """The program of one student as that of a population, for a feed."""

    def one(members, teacher, *where):
        return some.update(members, teacher, program.batch(*where))

    return program._replace(one=one)


def _save(crowd: Crowd, now: Standing) -> None:
    """Saves the candidates."""
    extra = {
        "phase": now.phase,
        "at": now.at,
        "candidates": list(now.states),
    }
    states = {str(number): state for number, state in now.states.items()}
    crowd.checkpoints.save(now.at, states, extra)


def _restored(crowd: Crowd) -> Standing | None:
    """The candidates where they were saved; None if there is no checkpoint."""
    if crowd.checkpoints.latest() is None:
        return None

    def like(extra: dict) -> dict[str, State]:
        shared = crowd.shared
        where = shared.feed, shared.key, shared.student
        one = template(crowd.phases, *where, extra["phase"])
        return {str(number): one for number in extra["candidates"]}

    with crowd.shared.timed("checkpoints"):
        states, extra = crowd.checkpoints.restore(like)
    kept = {int(number): state for number, state in states.items()}
    return Standing(extra["phase"], extra["at"], kept)
