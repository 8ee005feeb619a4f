"""The loop: batches through phases, with reports, validation, checkpoints and resume.

A run is a list of phases, each a stage with its number of steps; the next phase
starts from the student of the phase before. Where a run stands is its global step,
its phase, and the state of the stage. One checkpoint holds all three, so that a run
that was killed goes on to the same bits. SIGTERM and SIGINT save the run before they
end it. One process owns the run directory as long as it trains.

Several processes train one student on one mesh, and each of them runs this loop.
Whatever depends on a clock, a signal or the disk, they decide together
(`hintjax.processes`). Only the first process writes.
"""

import contextlib
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import chex
import jax
import numpy as np
from jaxtyping import Array, ArrayLike, Key

from hintjax._checks import Refusal, message
from hintjax.networks import Variables
from hintjax.objective import ADJUSTABLE
from hintjax.processes import agree, told
from hintjax.stages import State, student_variables
from hintjax.stages.balance import rebalanced
from hintjax.stages.report import not_finite, silent_terms
from hintjax.training.arrays import fingerprint
from hintjax.training.checkpoints import open_checkpoints
from hintjax.training.dispatch import Every, Pace
from hintjax.training.evaluation import evaluate
from hintjax.training.feeds import Batch, Feed
from hintjax.training.keeping import Keeper
from hintjax.training.ledger import Fitted, Now
from hintjax.training.metrics import MetricsWriter, open_metrics, read_metrics
from hintjax.training.phase import (
    Phase,
    begin,
    placed_as_before,
    template,
    with_checks,
)
from hintjax.training.remarks import TASK, Stillness, lopsided, remark
from hintjax.training.run_directory import owned
from hintjax.training.signals import stoppable

_TASK = f"{TASK}/weighted"


class NothingLearned(FloatingPointError):
    """A run that ended because its updates were skipped; one sentence says why.

    The command then exits with code 3.
    """


def fit(
    run_dir: str | os.PathLike[str],
    phases: Sequence[Phase],
    feed: Feed,
    student: Variables,
    *,
    key: Key[Array, ""],
    validation: Callable[[], Iterable[Batch]] | None = None,
    evaluate_every: int = 1,
    checkpoint_every: int = 1,
    checkpoint_seconds: float | None = None,
    report_every: int | None = None,
    resume: bool = False,
    identity: Mapping[str, Any] | None = None,
    harmless: Collection[str] = (),
    dispatch: int | None = None,
    debug: bool = False,
    give_up: int = 20,
    compare_gradients: bool = False,
    show: Callable[[int, Mapping[str, Any], str], None] | None = None,
) -> Fitted:
    """Trains a student through its phases, and leaves everything in the run directory.

    In the main thread SIGTERM and SIGINT end the run after the step at hand, once that
    step is saved: with SystemExit(143), or with KeyboardInterrupt as at any other time.
    If one of several processes is told to end, all of them end, within about a second
    of steps.

    Args:
        run_dir: the directory of metrics and checkpoints.
        phases: the phases, in their order.
        feed: the batches.
        student: the variables that the first phase starts from.
        key: the key of the run.
        validation: gives the batches to evaluate; they are never trained on.
        evaluate_every: epochs between evaluations.
        checkpoint_every: epochs between checkpoints; each phase also ends with one.
        checkpoint_seconds: a report also saves a checkpoint if the last one is older
            than this many seconds; None means never.
        report_every: steps between reports; by default an epoch, at most 100 steps.
        resume: whether to go on from the newest checkpoint that is whole, if there is
            one.
        identity: settings that must be equal when the run is resumed; JSON. The key,
            the teachers, the labels, the steps in an epoch and the names of the phases
            are always among them.
        harmless: names in `identity` that may differ; a warning then shows the
            difference.
        dispatch: steps in one dispatch; by default 1 on a CPU, and on an accelerator
            as many as take about a second.
        debug: whether to check every step by itself, and every evaluation
            (`hintjax.checked`), and at every report that parameters and metrics are
            finite.
        give_up: the number of updates skipped in a row, because a number was not
            finite or for a spike, after which the run ends with an error. It is
            checked at reports.
        compare_gradients: whether the first report of each phase with a term named
            "task" also compares the gradients of its terms. It compiles one more
            program; a term whose gradient is 100 times as long as the task's is told.
        show: `(steps done, metrics, name of the phase)`, called at every report.

    Returns:
        The final state and how it was reached.

    Raises:
        ValueError: if a resumed run has another identity, with all differences; if
            another process owns the run directory; if several processes were given
            different settings; or, with debug, for a value that is wrong.
        OSError: if a checkpoint could not be written; raised at the next step.
        NothingLearned: if it gave up, or if all updates of a phase were skipped. The
            message says which terms and layers are not finite on the first batch of the
            run. It is a FloatingPointError.
    """
    identity = _identity(identity or {}, phases, feed, key)
    agree("settings", identity)
    if debug:
        phases = [with_checks(phase) for phase in phases]
    every = Every(
        report=report_every or min(feed.per_epoch, 100),
        evaluation=evaluate_every * feed.per_epoch,
        checkpoint=checkpoint_every * feed.per_epoch,
    )
    with (
        owned(run_dir),
        stoppable() as request,
        open_checkpoints(Path(run_dir) / "checkpoints") as checkpoints,
    ):
        keeper = Keeper(run_dir, checkpoints, request, identity, checkpoint_seconds)
        if resume and checkpoints.latest() is not None:
            like = partial(template, phases, feed, key, student)
            state, now, metrics = keeper.restore(like, harmless)
        else:
            on_cpu = jax.default_backend() == "cpu"
            now = Now(dispatch=dispatch or (1 if on_cpu else None))
            state, metrics = begin(phases, feed, key, 0, student), None
        _check_devices(state)
        # Restored metrics are metrics that a signal kept from their line.
        written = now.at - (metrics is not None)
        with open_metrics(run_dir, resume=written if resume else None) as lines:
            reports = _Reports(
                lines=lines,
                keeper=keeper,
                feed=feed,
                validation=validation,
                evaluate_every=every.evaluation,
                debug=debug,
                give_up=give_up,
                compare_gradients=compare_gradients,
                stillness=Stillness(read_metrics(run_dir)),
                show=show,
            )
            while now.phase < len(phases):
                balance = phases[now.phase].balance
                own = every._replace(balance=balance and balance.every)
                pace = Pace(phases[now.phase], feed, keeper, own, single=debug)
                state, now = _train(pace, reports, state, now, metrics)
                now, metrics = now.next_phase(), None
                if now.phase < len(phases):
                    start = student_variables(state)
                    state = begin(phases, feed, key, now.phase, start, state)
        checkpoints.wait()
    return Fitted(state, now.at, now.seconds, tuple(now.ended), now.spent)


def _train(
    pace: Pace,
    reports: "_Reports",
    state: State,
    now: Now,
    metrics: Mapping[str, ArrayLike] | None,
) -> tuple[State, Now]:
    """Trains one phase to its end.

    Args:
        pace: makes the steps from one report to the next.
        reports: makes the reports.
        state: the state of the phase; donated.
        now: where the run stands.
        metrics: of the last step, if they still need a report.

    Returns:
        The state and where the run stands at the end of the phase.

    Raises:
        NothingLearned: if all updates of the phase were skipped.
    """
    phase, keeper, first = pace.phase, pace.keeper, True
    while metrics is not None or not now.over(phase):
        if metrics is None:
            state, now, metrics = pace.stride(state, now)
            keeper.heed(state, now, metrics)
        if first:
            reports.warn(phase, silent_terms(metrics))
        if first and now.at - now.began <= pace.every.report:
            reports.weigh(phase, state, now, metrics)
        now, metrics, first = reports.make(phase, state, now, metrics), None, False
        # After the report: what a signal saves during an evaluation is reported again.
        state = _balanced(phase, state, pace.feed, now)
        at_checkpoint = now.at % pace.every.checkpoint == 0
        if now.over(phase) or at_checkpoint or told(keeper.late):
            now = keeper.save(state, now)
        keeper.heed(state, now)
    steps = now.at - now.began
    if 0 < steps == int(state.skipped.total):
        _give_up(phase, state, pace.feed.example, now.at, steps)
    return state, now


def _balanced(phase: Phase, state: State, feed: Feed, now: Now) -> State:
    """The state with moved weights, if that is due before the next step."""
    balance = phase.balance
    if balance is None or now.over(phase) or now.at % balance.every:
        return state
    batch = feed.upcoming(phase.program, now.at)
    report = phase.program.stage.report(state, phase.teacher, batch)
    return placed_as_before(rebalanced(state, report, balance), state)


class _Reports(NamedTuple):
    """Makes the reports of a run: validation, the line of metrics, and what is shown.

    Attributes:
        lines: the open metrics.
        keeper: is asked between the batches of an evaluation whether a signal ends the
            run.
        feed: its example is looked into when a run gives up.
        validation: gives the batches to evaluate.
        evaluate_every: steps between evaluations.
        debug: whether parameters and metrics must be finite.
        give_up: the number of updates skipped in a row that ends the run.
        compare_gradients: whether the gradients of the terms are compared.
        stillness: tells terms that do not move.
        show: is called with every report.
    """

    lines: MetricsWriter
    keeper: Keeper
    feed: Feed
    validation: Callable[[], Iterable[Batch]] | None
    evaluate_every: int
    debug: bool
    give_up: int
    compare_gradients: bool
    stillness: Stillness
    show: Callable[[int, Mapping[str, Any], str], None] | None

    def make(
        self, phase: Phase, state: State, now: Now, metrics: Mapping[str, ArrayLike]
    ) -> Now:
        """Reports the last step of a stride, evaluated if that is due."""
        due = now.at == now.end(phase) or now.at % self.evaluate_every == 0
        found: Mapping[str, float] = {}
        if self.validation is not None and due:
            start = time.perf_counter()
            batches = self._heeded(self.validation(), state, now, metrics)
            found = evaluate(phase.program.stage, state, phase.teacher, batches)
            now = now.spend("evaluation", time.perf_counter() - start)
            now = now.validated(found["loss"])
        validated = {f"validation/{name}": value for name, value in found.items()}
        shown = {**metrics, **_weights(phase, state), **validated}
        if self.debug:
            chex.assert_tree_all_finite((shown, state.params, state.state))
        self.lines.write(now.at, phase.name, shown)
        self.warn(phase, self.stillness.see(phase.name, metrics))
        in_a_row = int(state.skipped.in_a_row)
        if in_a_row >= self.give_up:
            _give_up(phase, state, self.feed.example, now.at, in_a_row)
        if self.show is not None:
            self.show(now.at, shown, phase.name)
        return now

    def weigh(
        self, phase: Phase, state: State, now: Now, names: Collection[str]
    ) -> None:
        """Compares the gradients of a phase's terms, if that was asked for.

        A device without room for the report goes on without it.
        """
        terms = [name for name in names if name.endswith("/weighted")]
        if not self.compare_gradients or len(terms) < 2 or _TASK not in terms:
            return
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            batch = self.feed.upcoming(phase.program, now.at)
            report = phase.program.stage.report(state, phase.teacher, batch)
            self.warn(phase, lopsided(report))

    def warn(self, phase: Phase, sentences: Sequence[str]) -> None:
        """Warns once in the life of a run; the run directory keeps the sentences."""
        remark(self.keeper.run_dir, [f"phase {phase.name}: {one}" for one in sentences])

    def _heeded(
        self,
        batches: Iterable[Batch],
        state: State,
        now: Now,
        metrics: Mapping[str, ArrayLike],
    ) -> Iterator[Batch]:
        """The validation batches; before each of them a signal may end the run."""
        for batch in batches:
            self.keeper.heed(state, now, metrics, meet=False)
            yield batch


def _weights(phase: Phase, state: State) -> dict[str, ArrayLike]:
    """The weights that a balanced phase moves, as metrics."""
    if phase.balance is None:
        return {}
    kept = jax.device_get(state.memory[ADJUSTABLE])
    return {f"{name}/weight": kept[name] for name in phase.balance.target}


def _identity(
    settings: Mapping[str, Any],
    phases: Sequence[Phase],
    feed: Feed,
    key: Key[Array, ""],
) -> dict[str, Any]:
    """All that must be equal when a run is resumed; JSON."""
    return {
        **settings,
        "key": np.ravel(jax.random.key_data(key)).tolist(),
        "labels": fingerprint({"labels": feed.data.labels}),
        "phases": [phase.name for phase in phases],
        "steps_per_epoch": feed.per_epoch,
        "teachers": [fingerprint(phase.teacher) for phase in phases],
    }


def _check_devices(state: State) -> None:
    """Refuses stages on the devices of one process where several train."""
    if jax.process_count() > 1 and state.step.is_fully_addressable:
        wanted = "stages on the devices of all processes"
        do = "Make them with mesh=hintjax.make_mesh()."
        raise Refusal(message("fit", wanted, "stages on this process' own", do))


def _give_up(
    phase: Phase, state: State, batch: Batch, at: int, in_a_row: int
) -> NoReturn:
    """Raises an error that names what is not finite in the loss of a batch."""
    report = phase.program.stage.report(state, phase.teacher, batch)
    terms, layers = not_finite(report)
    found = f"On the run's first batch terms {terms} and layers {layers} are not finite"
    if not terms and not layers:
        found = "On the run's first batch all is finite: look at later batches"
    if state.norms and state.norms.spikes > 0:
        found += f"; {state.norms.spikes} updates were too long for the SpikeGuard"
    wanted = f"finite losses and gradients in phase {phase.name!r}"
    got = f"{in_a_row} skipped updates in a row at step {at}"
    raise NothingLearned(message("fit", wanted, got, f"{found}."))
