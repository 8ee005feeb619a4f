"""A gradient far longer than those before it is skipped, and nothing else is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hintjax as hj
from hintjax.networks import Features
from hintjax.stages import skipping

KEY = jax.random.key(0)
GUARD = hj.SpikeGuard(factor=5.0, window=4)
SPIKE = 6  # the step with the exploding batch


def line():
    """One layer, with a state that counts its batches."""

    def apply(params, state, inputs, *, wants, train, key=None):
        y = inputs @ params["kernel"]
        return Features(y if wants.output else None, {"line": y}, {}), {
            "batches": state["batches"] + 1.0
        }

    kernel = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)
    variables = hj.Variables({"kernel": kernel}, {"batches": np.zeros((), np.float32)})
    return hj.Network(None, apply, None), variables


def batch(step, scale=1.0):
    """The gradient of a mean square error is linear in its targets."""
    generator = np.random.default_rng(step)
    return {
        "x": generator.normal(size=(8, 3)).astype(np.float32),
        "label": scale * generator.normal(size=(8, 2)).astype(np.float32),
    }


def exploding(step):
    return batch(step, 1e3 if step == SPIKE else 1.0)


def begun(guard, **how):
    network, variables = line()
    method = hj.objective(task=hj.task(lambda y, to: jnp.square(y - to).sum(-1)))
    stage = hj.distillation_stage(
        network,
        None,
        method,
        optax.adam(0.01),
        inputs=lambda batch: batch["x"],
        spikes=guard,
        **how,
    )
    return stage, stage.init(KEY, variables, None, batch(0))


def ran(guard, steps, batches=batch, **how):
    stage, state = begun(guard, **how)
    reported = []
    for step in steps:
        state, metrics = stage.update(state, None, batches(step))
        reported.append(jax.device_get(metrics))
    return jax.device_get(state._replace(key=None)), reported


def equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("count", [1, 2], ids=["whole", "accumulated"])
def test_an_exploding_batch_changes_nothing_at_all(count):
    got, reported = ran(GUARD, range(10), exploding, accumulate=count)
    without, _ = ran(GUARD, [i for i in range(10) if i != SPIKE], accumulate=count)
    assert [metrics["spikes"] for metrics in reported] == 6 * [0] + 4 * [1]
    assert reported[SPIKE]["norm"] > 100 * reported[SPIKE - 1]["norm"]
    assert got.skipped == (1, 0)
    assert got.step == 10
    still = {"step": without.step, "skipped": without.skipped}
    equal(got._replace(**still, norms=got.norms._replace(spikes=0)), without)
    _, unguarded = ran(None, range(10), exploding, accumulate=count)
    assert unguarded[-1]["loss"] != reported[-1]["loss"]


@pytest.mark.parametrize("mesh", [None, hj.data_mesh], ids=["alone", "mesh"])
@pytest.mark.bits
def test_without_spikes_a_guard_changes_no_bit(mesh):
    mesh = mesh and mesh()
    (got, _), (want, _) = (ran(g, range(8), mesh=mesh) for g in (GUARD, None))
    equal(got._replace(norms=()), want)
    assert want.norms == ()
    assert got.norms.spikes == 0


def test_what_is_usual_is_the_mean_of_so_many_steps():
    state, reported = ran(GUARD, range(8))
    norms = [float(metrics["norm"]) for metrics in reported]
    mean = np.mean(norms[:4])
    for norm in norms[4:]:
        mean += (norm - mean) / 4
    np.testing.assert_allclose(state.norms.mean, mean, rtol=1e-5)


def test_before_there_are_so_many_steps_none_is_skipped():
    state, _ = ran(GUARD, range(6), lambda step: batch(step, 1e3 if step == 3 else 1.0))
    assert state.skipped == (0, 0)


def test_steps_without_a_gradient_are_not_what_is_usual():
    norms = skipping.begin()
    for norm in [0.0] * 6 + [1.0] * 6:
        made, norms = skipping.judge(GUARD, norms, jnp.asarray(norm), jnp.asarray(True))
        assert made
    assert norms == (1, 4, 0)
    assert not skipping.judge(GUARD, norms, jnp.asarray(6.0), jnp.asarray(True))[0]


def test_what_is_not_finite_is_no_spike():
    def broken(step):
        return batch(step, np.nan if step == SPIKE else 1.0)

    got, _ = ran(GUARD, range(8), broken)
    want, _ = ran(GUARD, [i for i in range(8) if i != SPIKE])
    assert (got.skipped.total, got.norms.spikes) == (1, 0)
    equal(got.norms, want.norms)


def test_where_the_level_has_risen_every_step_is_counted_in_a_row():
    state, _ = ran(GUARD, range(12), lambda step: batch(step, 1 if step < 5 else 1e3))
    assert state.skipped == (7, 7)
    assert state.norms.spikes == 7


@pytest.mark.parametrize(
    "guard, sentence",
    [
        (hj.SpikeGuard(factor=1.0), "a SpikeGuard with factor > 1, got 1.0"),
        (hj.SpikeGuard(factor=np.nan), "a SpikeGuard with factor > 1, got nan"),
        (hj.SpikeGuard(window=0), "window to be an integer >= 1, got 0"),
    ],
)
def test_a_guard_that_lets_nothing_through_is_refused(guard, sentence):
    with pytest.raises(ValueError, match=f"stage: expected {sentence}"):
        begun(guard)


def test_a_guard_judges_by_its_factor():
    norms = skipping.Norms(*map(jnp.asarray, (2.0, 4, 0)))
    for norm, made in ((10.0, True), (10.1, False), (np.inf, False)):
        assert (
            skipping.judge(GUARD, norms, jnp.asarray(norm), jnp.asarray(True))[0]
            == made
        )
