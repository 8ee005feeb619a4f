"""The loop: batches through stages, with reports, validation, checkpoints, resume.

A run is a list of phases, each a stage with its number of steps; the next phase
starts from the student of the one before. Where a run stands is its global step,
the phase, and the stage's state: all in one checkpoint, so that a run that was
killed goes on to the same bits. SIGTERM and SIGINT save where the run stands before
they end it; one process owns the run directory as long as it trains.

On a CPU every step is its own asynchronous dispatch (convolutions inside a scan are
many times slower there); on an accelerator one dispatch is a scan of about a second
of steps. The host waits for the device once per report, never per step, unless steps
are so long that a signal would wait behind seconds of them.

Several processes train one student on one mesh. Each runs this loop; what depends on
a clock, a signal or the disk they decide together (`hintjax.processes`), and the first
alone writes.
"""

import collections
import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import numpy as np
from jaxtyping import Array, Key

from hintjax._checks import Refusal, message
from hintjax.networks import Variables
from hintjax.processes import agree, largest, told
from hintjax.sharding import spread
from hintjax.stages import State, checked, student_variables
from hintjax.stages.debugging import raising
from hintjax.stages.report import not_finite
from hintjax.training.checkpoints import open_checkpoints
from hintjax.training.dispatch import BEHIND, MEASURED, Timer
from hintjax.training.evaluation import evaluate
from hintjax.training.feeds import Batch, Feed, Program
from hintjax.training.ledger import Fitted, Now, check_identity, packed, unpacked
from hintjax.training.metrics import open_metrics, read_metrics
from hintjax.training.run_directory import owned
from hintjax.training.signals import stoppable
from hintjax.training.trees import fingerprint


class Phase(NamedTuple):
    """A stage with its budget.

    Attributes:
        name: of the stage, in the metrics.
        program: the compiled stage.
        steps: how many, at most.
        teacher: its teacher's variables; checkpoints hold their fingerprint only.
        carry: take over regressors and memory of the same terms from the phase before.
        patience: end after so many evaluations without a lower validation loss.
        adjust: applied to the fresh state, e.g. to set a learning rate in it.
    """

    name: str
    program: Program
    steps: int
    teacher: Variables | None = None
    carry: bool = False
    patience: int | None = None
    adjust: Callable[[State], State] = lambda state: state


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
    show: Callable[[int, Mapping[str, Any], str], None] | None = None,
) -> Fitted:
    """Trains a student through its phases, and leaves all in the run directory.

    In the main thread SIGTERM and SIGINT end it after the step at hand, once that is
    saved: with SystemExit(143), or with KeyboardInterrupt as at any other time. If one
    of several processes is told to end, all do, within about a second of steps.

    Args:
        run_dir: metrics and checkpoints go here.
        phases: the stages, in their order.
        feed: the batches.
        student: where the first phase starts.
        key: of the run.
        validation: gives the batches that are evaluated, never trained on.
        evaluate_every: epochs between evaluations.
        checkpoint_every: epochs between checkpoints; each phase also ends with one.
        checkpoint_seconds: if the last one is so old at a report, one is saved, too.
        report_every: steps between reports; by default an epoch, at most 100 steps.
        resume: go on from the newest checkpoint that is whole, if there is one.
        identity: what must be equal for a resume to make sense; JSON. Key, teachers,
            labels, steps in an epoch and names of phases are in any case.
        harmless: names in `identity` of what may differ; it is said, not refused.
        dispatch: steps in one dispatch; by default 1 on a CPU, about a second's on an
            accelerator.
        debug: check every step by itself, and every evaluation (`hintjax.checked`), and
            at every report that parameters and metrics are finite.
        give_up: after so many updates in a row that were skipped, because a number was
            not finite or for a spike; looked at when reports are due.
        show: `(steps done, metrics, phase)`, called at every report.

    Returns:
        The final state and how it was reached.

    Raises:
        ValueError: if a resumed run has another identity, with all differences; or if
            another process owns the run directory, or several processes train it that
            were not told the same; or, with debug, for a value that is wrong.
        OSError: if a checkpoint could not be written, at the next step.
        FloatingPointError: if it gave up; the first batch of the run says which terms
            and layers are not finite.
    """
    identity = {
        **(identity or {}),
        "key": np.ravel(jax.random.key_data(key)).tolist(),
        "labels": fingerprint({"labels": feed.data.labels}),
        "phases": [phase.name for phase in phases],
        "steps_per_epoch": feed.per_epoch,
        "teachers": [fingerprint(phase.teacher) for phase in phases],
    }
    agree("settings", identity)
    if debug:
        phases = [phase._replace(program=_checked(phase.program)) for phase in phases]
    several = jax.process_count() > 1
    report_every = report_every or min(feed.per_epoch, 100)
    evaluate_every, checkpoint_every = (
        epochs * feed.per_epoch for epochs in (evaluate_every, checkpoint_every)
    )
    pauses = (report_every, evaluate_every, checkpoint_every)

    def begin(number, variables, earlier):
        phase = phases[number]
        state = phase.program.stage.init(
            jax.random.fold_in(key, number),
            variables,
            phase.teacher,
            feed.example,
            feed.data,
            earlier if phase.carry else None,
        )
        # What is adjusted stays where it was: elsewhere it would be another program.
        return jax.tree.map(_beside, phase.adjust(state), state)

    last = time.perf_counter()  # when something was saved, or nothing yet to lose

    def late():
        age = time.perf_counter() - last
        return checkpoint_seconds is not None and age > checkpoint_seconds

    def save(state, now, owed=None):
        """A step that is there already was saved by the run that this one resumes."""
        nonlocal last
        start = last = time.perf_counter()
        if now.at <= (checkpoints.latest() or 0):  # waits for a save in flight
            return now
        lowest = now.found is not None and (
            now.lowest is None or now.found < now.lowest
        )
        now = now._replace(lowest=now.found if lowest else now.lowest)
        extra = {"now": now._asdict(), "position": feed.position(), "of": identity}
        extra |= {"owed": packed(owed), "time": time.time()}
        checkpoints.save(now.at, state, extra, best=lowest)
        return now.spend("checkpoints", time.perf_counter() - start)

    def heed(state, now, owed=None, *, meet=True):
        """Ends the run if a signal has asked for that, but saves it first.

        Several processes have to `meet` for it, so that all end at the same step.
        """
        asked = request.signal
        if several:
            asked = (largest(asked or 0) or None) if meet else None
        if asked is not None:
            save(state, now, owed)
            checkpoints.wait()
            request.signal = asked
            request.obey(f"step {now.at} is saved, and resuming goes on from there")

    def template(number):
        """A state of the shapes that a phase has."""
        carry = phases[number].carry
        return begin(number, student, template(number - 1) if carry else None)

    def restore():
        start, made = time.perf_counter(), 0.0

        def like(extra):
            nonlocal made
            check_identity(run_dir, extra["of"], identity, harmless)
            begun = time.perf_counter()
            state = template(extra["now"]["phase"])
            made += time.perf_counter() - begun
            return state

        state, extra = checkpoints.restore(like)
        feed.seek(extra["position"])
        now, saved = Now(**extra["now"]), extra["time"]
        now = now.spend("compilation", made)
        now = now.spend("checkpoints", time.perf_counter() - start - made)

        def lost():
            """What it did after this checkpoint, as far as it said, is done again."""
            lines = [line for line in read_metrics(run_dir) if line["step"] > now.at]
            return max((line["time"] for line in lines), default=saved) - saved

        return state, now.spend("lost", max(told(lost), 0.0)), unpacked(extra["owed"])

    def report(lines, state, metrics, now):
        """Says how things are."""
        phase = phases[now.phase]

        def batches():
            for batch in validation():
                heed(state, now, metrics, meet=False)
                yield batch

        found = {}
        ended = now.at == now.began + phase.steps
        if validation is not None and (ended or now.at % evaluate_every == 0):
            start = time.perf_counter()
            found = evaluate(phase.program.stage, state, phase.teacher, batches())
            now = now.spend("evaluation", time.perf_counter() - start)
            loss = found["loss"]
            better = math.isfinite(loss) and (now.best is None or loss < now.best)
            now = now._replace(
                best=loss if better else now.best,
                waited=0 if better else now.waited + 1,
                found=loss if math.isfinite(loss) else None,
            )
        shown = metrics | {f"validation/{name}": value for name, value in found.items()}
        if debug:
            chex.assert_tree_all_finite((shown, state.params, state.state))
        lines.write(now.at, phase.name, shown)
        in_a_row = int(state.skipped.in_a_row)
        if in_a_row >= give_up:
            _give_up(phase, state, feed.example, now.at, in_a_row)
        if show is not None:
            show(now.at, shown, phase.name)
        return now

    def over(now):
        phase = phases[now.phase]
        tired = phase.patience is not None and now.waited >= phase.patience
        return tired or now.at == now.began + phase.steps

    def train(lines, state, now, owed):
        """One phase, to its end. `owed` are metrics that a signal kept from a report."""
        phase = phases[now.phase]
        end, timer = now.began + phase.steps, None
        ahead, most = collections.deque(), None  # dispatched and not waited for
        calls = 0
        periods = (*pauses, feed.per_epoch)  # no dispatch reaches over one of these
        while owed is not None or not over(now):
            if owed is None:
                stop = min(end, *(now.at - now.at % every + every for every in periods))
                while now.at < stop:
                    heed(state, now, meet=most is not None and calls % most == 0)
                    start = time.perf_counter()
                    count = 1 if debug else now.dispatch or 1
                    count = count if now.at + count <= stop else 1
                    state, metrics = feed.advance(
                        phase.program, state, phase.teacher, now.at, count
                    )
                    checkpoints.poll()
                    calls += 1
                    now = now._replace(at=now.at + count, found=None)
                    ahead.append(metrics)
                    if most is not None and len(ahead) > most:
                        jax.block_until_ready(ahead.popleft())
                    if timer is None:  # that was compilation
                        jax.block_until_ready(metrics)
                        feed.waited()  # for its batch, in the same seconds
                        timer = Timer()
                        now = now.spend("compilation", time.perf_counter() - start)
                    elif most is None:
                        jax.block_until_ready(metrics)
                        rate = timer.calls() / max(timer.seconds(), 1e-9)
                        most = told(partial(max, 2, int(BEHIND * rate)))
                    elif now.dispatch is None and timer.calls() == MEASURED:
                        jax.block_until_ready(metrics)
                        now = now._replace(dispatch=told(timer.steps_in_a_second))
                if now.at < end and all(now.at % every for every in pauses):
                    continue
                owed = jax.device_get(metrics)
                ahead.clear()
                waited = feed.waited()
                seconds = now.seconds + timer.seconds() - waited
                now = now._replace(seconds=seconds).spend("data", waited)
                heed(state, now, owed)
            now, owed = report(lines, state, owed, now), None
            if over(now) or now.at % checkpoint_every == 0 or told(late):
                now = save(state, now)
            heed(state, now)
            timer = timer and Timer()
        return state, now

    with (
        owned(run_dir),
        stoppable() as request,
        open_checkpoints(Path(run_dir) / "checkpoints") as checkpoints,
    ):
        if resume and checkpoints.latest() is not None:
            state, now, owed = restore()
        else:
            on_cpu = jax.default_backend() == "cpu"
            now = Now(dispatch=dispatch or (1 if on_cpu else None))
            state, owed = begin(0, student, None), None
        if several and state.step.is_fully_addressable:
            wanted = "stages on the devices of all processes"
            do = "Make them with mesh=hintjax.make_mesh()."
            raise Refusal(message("fit", wanted, "this process' own", do))
        # What is owed a report has not had its line yet.
        written = now.at - (owed is not None)
        with open_metrics(run_dir, resume=written if resume else None) as lines:
            while True:
                state, now = train(lines, state, now, owed)
                now, owed = now._replace(ended=[*now.ended, now.at]), None
                if now.phase + 1 == len(phases):
                    break
                now = now._replace(
                    phase=now.phase + 1, began=now.at, best=None, waited=0, lowest=None
                )
                state = begin(now.phase, student_variables(state), state)
        checkpoints.wait()
    return Fitted(state, now.at, now.seconds, tuple(now.ended), now.spent)


def _beside(new, old):
    """A new array where the old one is, if that has been said."""
    return spread(new, old.sharding) if getattr(old, "committed", False) else new


def _checked(program):
    """The same program, with checks; one step at a time."""
    one = raising(program.one.__wrapped__)
    return program._replace(stage=checked(program.stage), one=one)


def _give_up(phase, state, batch, at, in_a_row):
    """Raises, with what is not finite in the loss of a batch."""
    report = phase.program.stage.report(state, phase.teacher, batch)
    terms, layers = not_finite(report)
    found = f"On the run's first batch the terms {terms} and layers {layers} are not"
    if not terms and not layers:
        found = "On the run's first batch all is finite: look at the later ones"
    if state.norms and state.norms.spikes > 0:
        found += f"; {state.norms.spikes} updates were too long for the SpikeGuard"
    wanted = f"finite losses and gradients in phase {phase.name!r}"
    got = f"{in_a_row} skipped updates in a row at step {at}"
    raise FloatingPointError(message("fit", wanted, got, f"{found}."))
