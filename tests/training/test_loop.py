"""The loop: resume to the same bits, reports, early stop, dispatch."""

import errno
import functools
import itertools
import math
import os
import signal
import threading
import time
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import hintjax as hj
from hintjax.data import Augment, Dataset, Split, evaluation_batches, statistics
from hintjax.data.stream import read_ahead
from hintjax.training import (
    DamageError,
    Fitted,
    NothingLearned,
    Phase,
    dispatch,
    evaluate,
    feeds,
    fingerprint,
    fit,
    keeping,
    loop,
    metrics,
    on_device,
    open_checkpoints,
    program,
    read_metrics,
    streamed,
)

BATCH, EPOCH = 8, 4  # examples in a step, steps in an epoch


class Net(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, train=False):
        for layer in range(3):
            x = nn.Dense(self.width, name=f"dense{layer}")(x)
            x = nn.BatchNorm(not train, momentum=0.9, name=f"norm{layer}")(x)
            x = nn.relu(x)
        x = nn.Dropout(0.1, deterministic=not train)(x.mean((1, 2)))
        return nn.Dense(3)(x)


def make_split(seed, n):
    random = np.random.default_rng(seed)
    image = random.integers(0, 256, (n, 4, 4, 1), dtype=np.uint8)
    return Split(image, random.integers(0, 3, n, dtype=np.int32))


@pytest.fixture(scope="module")
def world():
    """Data, networks and the compiled programs of two stages, shared by all tests."""
    train = make_split(0, BATCH * EPOCH + 3)
    splits = (train, make_split(1, 10), make_split(2, 10))
    dataset = Dataset("noise", 3, *splits, statistics(train), ("a", "b", "c"))
    student, teacher = hj.linen(Net(4)), hj.linen(Net(6))
    image = jnp.zeros((1, 4, 4, 1))
    hint = hj.objective(hint=hj.fitnets([("dense1", "dense1")]))
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    both = hj.objective(
        task=hj.task(cross_entropy),
        hint=hj.weighted(
            hj.fitnets([("dense1", "dense1")]), optax.linear_schedule(1.0, 0.0, 9)
        ),
    )
    augment = Augment(pad=1, flip=True)
    stages = {
        "hint": hj.hint_stage(student, teacher, hint, optax.adamw(1e-2)),
        "distillation": hj.distillation_stage(student, teacher, both, optax.adam(1e-2)),
    }
    return {
        "dataset": dataset,
        "programs": {name: program(s, BATCH, augment) for name, s in stages.items()},
        "student": student.init(jax.random.key(1), image),
        "teacher": teacher.init(jax.random.key(2), image),
        "validation": list(
            evaluation_batches(dataset.validation, 8, dataset.standardize)
        ),
    }


def train(world, run_dir, *, feed=None, phases=None, evaluated=None, **options):
    phases = phases or [
        Phase("hint", world["programs"]["hint"], 8, world["teacher"]),
        Phase(
            "distillation",
            world["programs"]["distillation"],
            8,
            world["teacher"],
            carry=True,
        ),
    ]
    feed = feed or on_device(world["dataset"], BATCH, jax.random.key(3))
    return fit(
        run_dir,
        phases,
        feed,
        world["student"],
        key=jax.random.key(4),
        validation=evaluated or (lambda: world["validation"]),
        **options,
    )


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole")
    return run_dir, train(world, run_dir)


class Killed(Exception):
    pass


def killer(at):
    def show(step, metrics, phase):
        if step == at:
            raise Killed

    return show


def without_time(run_dir):
    return [{**line, "time": 0} for line in read_metrics(run_dir)]


def test_a_run_stopped_anywhere_resumes_to_the_same_bits(world, whole, tmp_path):
    run_dir, expected = whole
    for at in (2, 5, 8, 9, 14, 16):
        stopped = tmp_path / str(at)
        with pytest.raises(Killed):
            train(world, stopped, report_every=1, show=killer(at))
        fitted = train(world, stopped, resume=True)
        assert fingerprint(fitted.state) == fingerprint(expected.state)
        assert fitted.boundaries == expected.boundaries == (8, 16)
    # Reports of the resumed part are those of the run that was not stopped.
    assert without_time(stopped)[-1] == without_time(run_dir)[-1]


def test_a_finished_run_resumes_to_where_it_ended(world, whole):
    run_dir, expected = whole
    again = train(world, run_dir, resume=True)
    assert fingerprint(again.state) == fingerprint(expected.state)


@pytest.mark.quick
def test_every_term_is_reported_by_name_in_both_stages(whole):
    lines = read_metrics(whole[0])
    first, last = lines[0], lines[-1]
    assert [line["step"] for line in lines] == [4, 8, 12, 16]
    assert first["stage"] == "hint" and last["stage"] == "distillation"
    assert {"hint", "hint/r2", "hint/weighted", "loss"} <= set(first)
    assert {"task", "task/accuracy", "hint", "validation/task/accuracy"} <= set(last)
    np.testing.assert_allclose(
        last["loss"], last["task/weighted"] + last["hint/weighted"], rtol=1e-5
    )
    assert not any("task" in name for name in first)


def test_the_regressors_are_carried_into_the_second_stage(world, tmp_path):
    programs = world["programs"]
    hint = Phase("hint", programs["hint"], 4, world["teacher"])
    distill = Phase("distillation", programs["distillation"], 1, world["teacher"])
    with_carry = distill._replace(carry=True)
    ended = train(world, tmp_path / "0", phases=[hint])
    kept = train(world, tmp_path / "1", phases=[hint, with_carry])
    fresh = train(world, tmp_path / "2", phases=[hint, distill])
    kernel = [
        run.state.params["regressors"]["hint"]["dense1->dense1"]["layers_0"]["kernel"]
        for run in (ended, kept, fresh)
    ]
    # One Adam step moves by about the learning rate, 0.01.
    assert abs(kernel[1] - kernel[0]).max() < 0.02
    assert abs(kernel[2] - kernel[0]).max() > 0.1


def test_the_hint_stage_ends_early_without_progress_and_resume_knows(
    world, tmp_path, monkeypatch
):
    broken = Phase("hint", world["programs"]["hint"], 40, world["teacher"], patience=2)
    after = Phase(
        "distillation", world["programs"]["distillation"], 4, world["teacher"]
    )
    monkeypatch.setattr(loop, "evaluate", lambda *arguments: {"loss": math.inf})
    fitted = train(world, tmp_path / "a", phases=[broken, after])
    # The loss is never lower: the second evaluation ends the stage.
    assert fitted.boundaries == (8, 12)
    with pytest.raises(Killed):
        train(world, tmp_path / "b", phases=[broken, after], show=killer(12))
    resumed = train(world, tmp_path / "b", phases=[broken, after], resume=True)
    assert resumed.boundaries == (8, 12)


def test_another_teacher_or_identity_is_refused_on_resume(world, tmp_path):
    train(world, tmp_path, identity={"config": 1})
    with pytest.raises(ValueError, match="config: 1 before, 2 now"):
        train(world, tmp_path, resume=True, identity={"config": 2})
    other = jax.tree.map(lambda leaf: leaf + 1, world["teacher"])
    phases = [Phase("hint", world["programs"]["hint"], 8, other)]
    with pytest.raises(ValueError, match="(?s)resume: .* teachers"):
        train(world, tmp_path, resume=True, phases=phases, identity={"config": 1})


def test_scanned_dispatch_trains_like_single_steps_and_resumes_exactly(world, tmp_path):
    single = train(world, tmp_path / "1", dispatch=1)
    scanned = train(world, tmp_path / "3", dispatch=3)
    assert single.steps == scanned.steps
    # After few steps, and not the parameters: biases in front of a BatchNorm have a
    # gradient of rounding noise, which Adam makes steps of.
    one, three = (read_metrics(tmp_path / name)[0] for name in "13")
    assert one["step"] == three["step"] == EPOCH
    for name in ("loss", "hint/r2", "validation/loss", "validation/hint"):
        np.testing.assert_allclose(one[name], three[name], rtol=1e-2)
    with pytest.raises(Killed):
        train(world, tmp_path / "x", dispatch=3, show=killer(12))
    resumed = train(world, tmp_path / "x", dispatch=3, resume=True)
    assert fingerprint(resumed.state) == fingerprint(scanned.state)


@pytest.mark.bits
def test_streamed_batches_train_and_resume_to_the_bits_of_the_device(
    world, whole, tmp_path
):
    def feed():
        return streamed(world["dataset"], BATCH, jax.random.key(3))

    expected = whole[1]
    with pytest.raises(Killed):
        train(world, tmp_path / "killed", feed=feed(), show=killer(12))
    resumed = train(world, tmp_path / "killed", feed=feed(), resume=True)
    assert fingerprint(resumed.state) == fingerprint(expected.state)


@pytest.fixture(scope="module")
def adjustable():
    """A program whose hint has a weight in the state."""
    method = hj.objective(
        task=hj.task(optax.softmax_cross_entropy_with_integer_labels),
        hint=hj.weighted(hj.fitnets([("dense1", "dense1")]), hj.Adjustable(100.0)),
    )
    student, teacher = hj.linen(Net(4)), hj.linen(Net(6))
    stage = hj.distillation_stage(student, teacher, method, optax.adam(1e-2))
    return program(stage, BATCH, Augment(pad=1))


@pytest.mark.parametrize("source", ["on_device", "streamed"])
def test_a_balanced_run_keeps_the_shares_and_resumes_to_the_same_bits(
    world, adjustable, tmp_path, source
):
    balance = hj.Balance({"hint": 0.5}, every=3)
    phases = [Phase("both", adjustable, 11, world["teacher"], balance=balance)]

    def run(name, **how):
        feed = None
        if source == "streamed":
            feed = streamed(world["dataset"], BATCH, jax.random.key(3))
        return train(world, tmp_path / name, feed=feed, phases=phases, **how)

    expected = run("whole", checkpoint_seconds=1e-9)
    lines = read_metrics(tmp_path / "whole")
    weights = {line["step"]: line["hint/weight"] for line in lines}
    assert [*weights] == [3, 4, 6, 8, 9, 11]  # reports, and the pauses for the balance
    # A report comes before the move of its step.
    assert weights[3] == 100 != weights[4] == weights[6] != weights[8]
    for at in (4, 8):
        with pytest.raises(Killed):
            run(str(at), show=killer(at), checkpoint_seconds=1e-9)
        resumed = run(str(at), resume=True)
        assert fingerprint(resumed.state) == fingerprint(expected.state)


def test_a_gradient_that_drowns_the_task_is_told_once(
    world, adjustable, tmp_path, capsys
):
    def heavy(state):
        return hj.reweighted(state, hint=1e6)

    phases = [Phase("both", adjustable, 6, world["teacher"], adjust=heavy)]
    how = {"phases": phases, "report_every": 2, "compare_gradients": True}
    with pytest.raises(Killed):
        train(world, tmp_path, show=killer(4), checkpoint_seconds=1e-9, **how)
    train(world, tmp_path, resume=True, **how)
    (said,) = (tmp_path / "warnings.txt").read_text().splitlines()
    assert said.startswith("phase both: The gradient of the term 'hint' is ")
    assert capsys.readouterr().err.count(said) == 1


@pytest.mark.quick
def test_a_balance_of_a_fixed_weight_is_refused_before_the_first_step(world, tmp_path):
    balance = hj.Balance({"hint": 0.5})
    distill = world["programs"]["distillation"]
    phases = [Phase("both", distill, 4, world["teacher"], balance=balance)]
    with pytest.raises(hj.Refusal, match="fit: expected terms whose weight is adj"):
        train(world, tmp_path, phases=phases)


def test_evaluation_counts_every_example_once(world):
    stage = world["programs"]["distillation"].stage
    dataset = world["dataset"]
    shape = {"image": jnp.zeros((2, 4, 4, 1)), "label": jnp.zeros(2, jnp.int32)}
    state = stage.init(jax.random.key(0), world["student"], world["teacher"], shape)
    found = [
        evaluate(
            stage,
            state,
            world["teacher"],
            evaluation_batches(dataset.test, size, dataset.standardize),
        )
        for size in (3, 10, 16)
    ]
    for one, other in itertools.pairwise(found):
        for name in ("task", "task/accuracy", "hint", "loss"):
            np.testing.assert_allclose(one[name], other[name], rtol=1e-5)
    with pytest.raises(ValueError, match="evaluate: expected batches"):
        evaluate(stage, state, world["teacher"], [])


def test_an_old_checkpoint_is_followed_by_one_at_the_next_report(world, tmp_path):
    """However long an epoch is; and what is trained are the same bits."""
    often, seldom = (
        train(
            world,
            tmp_path / name,
            checkpoint_every=1000,
            checkpoint_seconds=seconds,
            report_every=1,
        )
        for name, seconds in (("often", 1e-9), ("seldom", 1e9))
    )
    assert fingerprint(often.state) == fingerprint(seldom.state)
    found = []
    for name in ("often", "seldom"):
        with open_checkpoints(tmp_path / name / "checkpoints") as checkpoints:
            found.append(checkpoints.steps())
    assert found[0][-2:] == [15, 16]
    assert found[1][-2:] == [8, 16]


def test_debug_names_what_is_not_finite(world, tmp_path):
    phase = Phase(
        "hint",
        world["programs"]["hint"],
        4,
        world["teacher"],
        adjust=lambda state: state._replace(
            params=jax.tree.map(lambda p: p * jnp.inf, state.params)
        ),
    )
    with pytest.raises(ValueError, match="step 0: expected finite parameters in regr"):
        train(world, tmp_path, phases=[phase], debug=True)


@pytest.mark.bits
def test_debug_changes_no_bit_of_a_run_that_is_right(world, whole, tmp_path):
    fitted = train(world, tmp_path, debug=True)
    for one, other in zip(
        *(jax.tree.leaves(f.state._replace(key=None)) for f in (fitted, whole[1])),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_debug_names_a_label_that_is_no_class(world, tmp_path):
    dataset = world["dataset"]
    wrong = np.where(np.arange(dataset.train.n) == 5, 7, dataset.train.label)
    split = Split(dataset.train.image, wrong.astype(np.int32))
    feed = on_device(dataset._replace(train=split), BATCH, jax.random.key(3))
    phase = Phase("kd", world["programs"]["distillation"], EPOCH + 1, world["teacher"])
    with pytest.raises(
        ValueError, match=r"expected labels in 0\.\.2, got 7 at example"
    ):
        train(world, tmp_path, phases=[phase, phase], feed=feed, debug=True)


def test_a_run_of_spikes_alone_gives_up_and_says_so(world, tmp_path):
    def lower(state):
        norms = state.norms._replace(mean=jnp.float32(1e-9), count=jnp.int32(100))
        return state._replace(norms=norms)

    student = hj.linen(Net(4))
    method = hj.objective(task=hj.task(optax.softmax_cross_entropy_with_integer_labels))
    stage = hj.distillation_stage(
        student, None, method, optax.sgd(0.1), spikes=hj.SpikeGuard()
    )
    phase = Phase("task", program(stage, BATCH), 8, adjust=lower)
    with pytest.raises(FloatingPointError, match="4 updates were too long for the Spi"):
        train(world, tmp_path, phases=[phase], report_every=2, give_up=3)


@pytest.mark.filterwarnings("ignore:phase .* is not finite")
def test_a_run_gives_up_after_updates_skipped_in_a_row_and_says_why(world, tmp_path):
    def broken(state):
        regressors = jax.tree.map(lambda p: p * jnp.nan, state.params["regressors"])
        return state._replace(params={**state.params, "regressors": regressors})

    program = world["programs"]["distillation"]
    phase = Phase("distillation", program, 8, world["teacher"], adjust=broken)
    with pytest.raises(FloatingPointError) as raised:
        train(world, tmp_path, phases=[phase], report_every=2, give_up=3)
    said = str(raised.value)
    assert "in phase 'distillation', got 4 skipped updates in a row at step 4" in said
    assert "terms ['hint'] and layers ['regressors/hint/dense1->dense1', " in said
    assert "student/dense1" in said
    assert "Dense_0" not in said
    last = read_metrics(tmp_path)[-1]
    assert (last["step"], last["skipped"]) == (4, 4)


@pytest.mark.filterwarnings("ignore:phase .* is not finite")
def test_a_phase_whose_updates_were_all_skipped_is_a_failure(world, tmp_path):
    """However short it is; and a run that is resumed fails in the same way."""

    def broken(state):
        student = jax.tree.map(lambda p: p * jnp.nan, state.params["student"])
        return state._replace(params={**state.params, "student": student})

    program, teacher = world["programs"]["distillation"], world["teacher"]
    phases = [
        Phase("good", program, 2, teacher),
        Phase("bad", program, 3, teacher, adjust=broken),
    ]
    for resume in (False, True):
        with pytest.raises(NothingLearned, match="in phase 'bad', got 3 skipped"):
            train(world, tmp_path, phases=phases, report_every=2, resume=resume)


def test_a_term_that_teaches_nothing_is_told_with_the_first_report(
    world, tmp_path, capsys
):
    """Once, as a warning, and in a file of the run; a later 0 may be all learned."""

    def agreed(output, label):
        return jnp.square(output - output).sum(-1) + 0 * label

    student = hj.linen(Net(4))
    cross_entropy = hj.task(optax.softmax_cross_entropy_with_integer_labels)
    method = hj.objective(task=cross_entropy, same=hj.task(agreed))
    stage = hj.distillation_stage(student, None, method, optax.sgd(0.1))
    phase = Phase("task", program(stage, BATCH), 4)
    said = "phase task: The loss of the term 'same' is exactly 0: it teaches nothing"
    train(world, tmp_path, phases=[phase], report_every=1)
    (kept,) = (tmp_path / "warnings.txt").read_text(encoding="utf-8").splitlines()
    assert kept.startswith(said)
    assert capsys.readouterr().err.count(kept) == 1


def test_a_run_without_doubts_keeps_no_warnings(whole):
    run_dir, _ = whole
    assert not (run_dir / "warnings.txt").exists()


# Dying well


def signaled(at, number):
    """A `show` that sends a signal when the run is there."""

    def show(step, metrics, phase):
        if step == at:
            signal.raise_signal(number)

    return show


def saved(run_dir):
    return open_checkpoints(run_dir / "checkpoints").latest()


def lines_of(run_dir):
    return [(line["step"], line["stage"]) for line in read_metrics(run_dir)]


def test_sigint_at_every_step_in_turn_changes_nothing(world, whole, tmp_path):
    """Sixteen interruptions of one run: each resumes, makes a step, and is saved."""
    run_dir = tmp_path / "run"
    for at in range(1, 17):
        feed = on_device(world["dataset"], BATCH, jax.random.key(3))

        def advance(*where, feed=feed, at=at):
            state, metrics = feed.advance(*where)
            if where[-2] + 1 == at:
                os.kill(os.getpid(), signal.SIGINT)
            return state, metrics

        with pytest.raises(KeyboardInterrupt, match=f"step {at} is saved"):
            train(world, run_dir, feed=feed._replace(advance=advance), resume=True)
        assert saved(run_dir) == at
    again = train(world, run_dir, resume=True)
    assert fingerprint(again.state) == fingerprint(whole[1].state)
    assert without_time(run_dir) == without_time(whole[0])


@pytest.mark.parametrize("at", [4, 8, 16])
def test_sigterm_in_an_evaluation_saves_and_evaluates_on_resume(
    world, whole, tmp_path, at
):
    run_dir, count = tmp_path / "run", itertools.count(1)

    def validation():
        for batch in world["validation"]:
            yield batch
            if 4 * next(count) == 2 * at - 4:  # two batches, every four steps
                signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        train(world, run_dir, evaluated=validation)
    assert ended.value.code == 143 and saved(run_dir) == at
    assert signal.getsignal(signal.SIGTERM) == before
    assert not any(step == at for step, _ in lines_of(run_dir))  # it was not finished
    with pytest.raises(Killed):  # its line is written, and once more after that
        train(world, run_dir, resume=True, show=killer(at))
    again = train(world, run_dir, resume=True)
    assert fingerprint(again.state) == fingerprint(whole[1].state)
    assert without_time(run_dir) == without_time(whole[0])


@pytest.mark.parametrize("at", [2, 4, 8, 12, 16])
def test_sigterm_from_outside_the_step_saves_and_resumes(world, whole, tmp_path, at):
    run_dir = tmp_path / "run"
    with pytest.raises(SystemExit):
        train(world, run_dir, report_every=2, show=signaled(at, signal.SIGTERM))
    assert saved(run_dir) == at and lines_of(run_dir)[-1][0] == at
    again = train(world, run_dir, report_every=2, resume=True)
    assert fingerprint(again.state) == fingerprint(whole[1].state)
    assert [step for step, _ in lines_of(run_dir)] == [*range(2, 17, 2)]


def test_sigterm_during_a_save_waits_for_it(world, tmp_path, monkeypatch):
    save = ocp.Checkpointer.save

    def slow(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
        return save(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ocp.Checkpointer, "save", slow)
        with pytest.raises(SystemExit):
            train(world, tmp_path)
    assert saved(tmp_path) >= 4


def test_a_failed_save_ends_the_run_at_the_next_step(world, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.EIO, "the disk is gone")

    monkeypatch.setattr(ocp.Checkpointer, "save", fail)
    steps = []

    def show(step, metrics, phase):
        steps.append(step)
        time.sleep(0.2)  # by then the save has failed

    with pytest.raises(OSError, match="nothing was written, .*the disk is gone"):
        train(world, tmp_path, report_every=1, show=show)
    assert steps[-1] in (4, 5)  # the first save is that of step 4


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_what_ends_the_loop_waits_for_the_save(world, tmp_path, monkeypatch, error):
    save = ocp.Checkpointer.save

    def slow(*args, **kwargs):
        time.sleep(0.3)
        return save(*args, **kwargs)

    monkeypatch.setattr(ocp.Checkpointer, "save", slow)

    def show(step, metrics, phase):
        if step == 5:
            raise error(0)

    with pytest.raises(error):
        train(world, tmp_path, report_every=1, show=show)
    records = (tmp_path / "checkpoints").glob("*/hintjax.json")
    assert [record.parent.name for record in records] == ["4"]


def test_a_second_run_is_refused_while_the_first_trains(world, tmp_path):
    refused = []

    def second():
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()}"):
            train(world, tmp_path, resume=True)
        refused.append(True)

    def show(step, metrics, phase):
        if step == 4:
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()

    fitted = train(world, tmp_path, show=show)
    assert refused and fitted.steps == 16
    train(world, tmp_path, resume=True)


# Damage and retention


def test_a_run_goes_on_from_the_newest_checkpoint_that_is_whole(world, whole, tmp_path):
    with pytest.raises(Killed):
        train(world, tmp_path, show=killer(12))
    for path in (tmp_path / "checkpoints" / "8").rglob("*/d/*"):
        path.write_bytes(b"")
    with pytest.warns(UserWarning, match="(?s)/8/.* went back to step 4"):
        again = train(world, tmp_path, resume=True)
    assert fingerprint(again.state) == fingerprint(whole[1].state)
    assert without_time(tmp_path) == without_time(whole[0])
    for path in (tmp_path / "checkpoints").glob("*/hintjax.json"):
        path.write_text("")
    with pytest.raises(DamageError, match="that is whole, got none"):
        train(world, tmp_path, resume=True)


def test_the_step_with_the_lowest_validation_loss_is_kept(world, tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, math.nan, 2.0, 1.5])
    monkeypatch.setattr(loop, "evaluate", lambda *_: {"loss": next(losses)})
    hint = Phase("hint", world["programs"]["hint"], 20, world["teacher"])
    train(world, tmp_path, phases=[hint])
    checkpoints = open_checkpoints(tmp_path / "checkpoints")
    assert checkpoints.best() == 8
    assert checkpoints.steps() == [8, 16, 20]


@pytest.mark.filterwarnings("default:resume")
def test_a_changed_setting_is_shown_and_refused_if_it_matters(world, tmp_path):
    identity = {"epochs": 4, "debug": False, "rates": (1, 2)}
    with pytest.raises(Killed):
        train(world, tmp_path, identity=identity, show=killer(12))
    go_on = functools.partial(train, world, tmp_path, resume=True, harmless=("debug",))
    with pytest.raises(ValueError) as refused:
        go_on(identity={**identity, "epochs": 5, "debug": True, "pad": 1})
    for line in ("epochs: 4 before, 5 now", "debug: False", "pad: None before, 1 now"):
        assert f"\n  {line}" in str(refused.value)
    other = on_device(world["dataset"], BATCH // 2, jax.random.key(3))
    with pytest.raises(ValueError, match="steps_per_epoch: 4 before, 8 now"):
        go_on(identity=identity, feed=other)
    with pytest.warns(UserWarning, match="goes on with changes:\n  debug: False"):
        go_on(identity={**identity, "debug": True})


def test_where_the_time_went_is_told_over_all_attempts(world, tmp_path, monkeypatch):
    ticks = itertools.count(1000.0, 10.0)
    clock = types.SimpleNamespace(
        time=lambda: next(ticks), perf_counter=time.perf_counter
    )
    with monkeypatch.context() as patch:
        patch.setattr(keeping, "time", clock)
        patch.setattr(metrics, "time", clock)
        with pytest.raises(Killed):
            train(world, tmp_path, report_every=1, show=killer(7))
        # The save of step 4, the lines of steps 5, 6 and 7: thirty seconds for naught.
        fitted = train(world, tmp_path, resume=True)
    assert fitted.spent["lost"] == 30.0
    assert fitted.spent.pop("data") == 0  # all of it is on the device
    assert {*fitted.spent} == {"checkpoints", "compilation", "evaluation", "lost"}
    assert min(fitted.spent.values()) > 0 and fitted.seconds > 0
    again = train(world, tmp_path, resume=True)
    assert again.spent["evaluation"] == fitted.spent["evaluation"]


def test_what_trains_nobody_counts_against_goodput():
    spent = {"evaluation": 5.0, "checkpoints": 1.0, "data": 1.5, "lost": 2.5}
    fitted = Fitted(None, 10, 90.0, (10,), spent | {"compilation": 60.0})
    assert fitted.goodput == 0.95
    assert fitted.account() == (
        "goodput 95.0%, less compilation (checkpoints 1.0 s, compilation 60.0 s, "
        "data 1.5 s, evaluation 5.0 s, lost 2.5 s, steps 90.0 s)"
    )


def test_steps_that_wait_for_data_are_told(world, tmp_path, monkeypatch):
    class Slow:
        def __init__(self, batches):
            self.batches, self.close = batches, batches.close

        def __next__(self):
            time.sleep(0.04)
            return next(self.batches)

    monkeypatch.setattr(feeds, "read_ahead", lambda *a: Slow(read_ahead(*a)))
    key = jax.random.key(3)
    fitted = train(world, tmp_path, feed=streamed(world["dataset"], BATCH, key))
    # Of sixteen steps, the first of each phase waits among its compilation.
    assert fitted.spent["data"] >= 14 * 0.04 and fitted.goodput < 1
    # While an earlier step still runs, its successor's batch may be late.
    busy = types.SimpleNamespace(is_ready=lambda: False)
    runs = types.SimpleNamespace(one=lambda state, *rest: (state, {"loss": busy}))
    feed = streamed(world["dataset"], BATCH, key)
    feed.waited()
    feed.advance(runs, None, None, 0, 1)
    assert feed.waited() >= 0.04
    feed.advance(runs, None, None, 1, 2)
    assert feed.waited() == 0


def test_long_steps_do_not_queue_up_before_a_signal(world, tmp_path, monkeypatch):
    """The device is at most two steps behind when a step takes long."""
    made = on_device(world["dataset"], BATCH, jax.random.key(3))
    ready, waited = jax.block_until_ready, []

    def block(tree):
        waited.append(len(dispatched))
        return ready(tree)

    dispatched = []

    def advance(*where):
        dispatched.append(where[-2])
        return made.advance(*where)

    monkeypatch.setattr(dispatch, "BEHIND", 0.0)  # then every step is long
    monkeypatch.setattr(jax, "block_until_ready", block)
    hint = Phase("hint", world["programs"]["hint"], 8, world["teacher"])
    feed = made._replace(advance=advance)
    train(world, tmp_path / "long", feed=feed, phases=[hint], report_every=8)
    # The first two are measured; reports, at 4 and 8, wait for all.
    assert waited == [1, 2, 3, 4, 7, 8]
    monkeypatch.setattr(dispatch, "BEHIND", 1e9)
    waited.clear(), dispatched.clear()
    train(world, tmp_path / "short", feed=feed, phases=[hint], report_every=8)
    assert waited == [1, 2]
