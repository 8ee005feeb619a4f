"""FitNets as a method: regressors, metrics, the decay of lambda."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hintjax
from hintjax import fitnets, lambda_decay, regressors
from hintjax.losses import hint_loss, hint_loss_paper
from hintjax.method import Context
from hintjax.networks import Features, Wants

pytestmark = pytest.mark.usefixtures("strict")

KEY = jax.random.key(0)
# One program: without it, every operation would be compiled by itself.
explained_variance = jax.jit(hintjax.explained_variance)


def features(seed=0, **shapes):
    generator = np.random.default_rng(seed)
    draw = {
        name: jnp.array(generator.normal(size=(4, *shape)), jnp.float32)
        for name, shape in shapes.items()
    }
    return Features(hints=draw)


STUDENT = features(a=(4, 4, 3), b=(2, 2, 3), c=(6,), d=(4, 4, 3))
TEACHER = features(1, x=(4, 4, 5), y=(4, 4, 2), z=(3,))
PAIRS = [("a", "x"), ("b", "y"), ("c", "z")]


def shapes_of(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def initialized(method):
    return jax.jit(
        lambda key: method.init(key, shapes_of(STUDENT), shapes_of(TEACHER), None)
    )(KEY)


def built(method):
    """Variables drawn by numpy: to compile an initialization takes longer."""
    shapes = jax.eval_shape(
        lambda key: method.init(key, shapes_of(STUDENT), shapes_of(TEACHER), None), KEY
    )
    generator = np.random.default_rng(2)
    return jax.tree.map(
        lambda x: jnp.array(generator.uniform(0.1, 0.5, x.shape), x.dtype), shapes
    )


def apply(method, params, memory, train=True, **batch):
    context = Context(KEY, jnp.int32(0), train)
    run = jax.jit(lambda p, m, b: method.apply(p, m, STUDENT, TEACHER, b, context))
    return run(params, memory, batch)


@pytest.mark.parametrize("loss", [hint_loss, hint_loss_paper])
def test_the_values_are_the_loss_behind_each_regressor_summed(loss):
    method = fitnets(PAIRS, loss=loss)
    params, memory = built(method)
    assert list(params) == ["a->x", "b->y", "c->z"]
    values, moved, metrics = apply(method, params, memory)
    want, explained = 0, {}
    for (guided, hint), name in zip(PAIRS, params, strict=True):
        student, teacher = STUDENT.hints[guided], TEACHER.hints[hint]
        module = regressors.fit(student.shape[1:], teacher.shape[1:])
        predicted = jax.jit(module.apply)({"params": params[name]}, student)
        want += np.asarray(jax.jit(loss)(predicted, teacher))
        explained[f"{name}/r2"] = explained_variance(predicted, teacher)
    np.testing.assert_allclose(values, want, rtol=1e-5)
    assert moved == memory
    for name, value in explained.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6)
    mean = np.mean([float(v) for v in explained.values()])
    np.testing.assert_allclose(metrics["r2"], mean, rtol=1e-4)


def test_one_pair_reports_one_number():
    method = fitnets(PAIRS[:1])
    assert set(apply(method, *built(method))[2]) == {"r2"}


def test_several_pairs_report_their_losses():
    method = fitnets(PAIRS)
    metrics = apply(method, *built(method))[2]
    assert {f"{g}->{h}/loss" for g, h in PAIRS} <= set(metrics)


def test_only_the_layers_of_the_pairs_are_wanted():
    method = fitnets(PAIRS)
    assert method.student == Wants(hints=("a", "b", "c"))
    assert method.teacher == Wants(hints=("x", "y", "z"))


def test_regressors_of_equal_shape_start_apart_and_from_the_key_alone():
    params, _ = initialized(fitnets([("a", "x"), ("d", "x")]))
    one, two = (params[name]["layers_0"]["kernel"] for name in ("a->x", "d->x"))
    assert np.any(np.asarray(one) != np.asarray(two))
    again, _ = initialized(fitnets([("a", "x"), ("d", "x")]))
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_batch_norm_of_a_regressor_moves_only_in_training():
    method = fitnets(PAIRS, regressor=normed)
    params, memory = built(method)
    _, same, _ = apply(method, params, memory, train=False)
    jax.tree.map(np.testing.assert_array_equal, same, memory)
    _, moved, _ = apply(method, params, memory, train=True)
    assert jax.tree.structure(moved) == jax.tree.structure(memory)
    memory, moved = jax.device_get((memory, moved))
    for old, new in zip(*map(jax.tree.leaves, (memory, moved)), strict=True):
        assert (old != new).all()


def normed(student, teacher):
    sizing = regressors.conv if len(student) == 3 else regressors.linear
    return sizing(student, teacher, batch_norm=True, activation=nn.relu)


def test_options_of_a_regressor_are_bound_with_partial():
    method = fitnets(PAIRS[:1], regressor=partial(regressors.conv, batch_norm=True))
    params, memory = built(method)
    assert set(params["a->x"]) == {"layers_0", "BatchNorm_0"}
    assert "batch_stats" in memory["a->x"]


def test_a_pair_that_no_regressor_fits_is_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"student \(4, 4, 3\) and teacher \(3,\)"):
        built(fitnets([("a", "z")]))
    identity = fitnets([("a", "x")], regressor=regressors.identity)
    with pytest.raises(ValueError, match=r"student \(4, 4, 3\) and teacher \(4, 4, 5"):
        built(identity)


def test_no_pairs_are_refused():
    with pytest.raises(ValueError, match="fitnets: expected at least one pair"):
        fitnets([])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "pairs", [("c1", "c2"), ("group1", "group2"), [("a", "b", "c")]]
)
def test_a_pair_without_its_list_is_refused_with_a_sentence(pairs):
    with pytest.raises((ValueError, TypeError), match="fitnets: expected"):
        fitnets(pairs)


# Explained variance


def r2(predicted, target, where=None):
    """The definition, in double precision."""
    predicted, target = np.float64(predicted), np.float64(target)
    if where is not None:
        predicted, target = predicted[where], target[where]
    mean = target.mean(tuple(range(target.ndim - 1)), keepdims=True)
    return 1 - np.square(target - predicted).sum() / np.square(target - mean).sum()


@pytest.mark.parametrize("shape", [(6, 3), (6, 5, 3), (6, 4, 2, 3)])
@pytest.mark.parametrize("where", [None, [True, False, True, True, False, True]])
def test_explained_variance_is_its_definition(shape, where):
    generator = np.random.default_rng(0)
    # Channels of unlike means: a mean over all of them would explain much more.
    target = generator.normal(size=shape) + 10 * np.arange(3)
    predicted = target + 0.3 * generator.normal(size=shape)
    where = None if where is None else np.array(where)
    got = explained_variance(
        np.float32(predicted),
        np.float32(target),
        None if where is None else jnp.array(where),
    )
    np.testing.assert_allclose(got, r2(predicted, target, where), rtol=1e-4)
    assert 0 < got < 0.95


def test_explained_variance_of_tokens_leaves_out_padding():
    generator = np.random.default_rng(0)
    target = generator.normal(size=(4, 5, 3)) + 10 * np.arange(3)
    predicted = target + 0.3 * generator.normal(size=target.shape)
    where = np.arange(5) < np.array([[5], [3], [1], [4]])
    predicted[~where] = np.nan
    got = explained_variance(np.float32(predicted), np.float32(target), where)
    np.testing.assert_allclose(got, r2(predicted, target, where), rtol=1e-4)


def test_what_explains_nothing_and_what_varies_in_nothing():
    target = np.arange(12, dtype=np.float32).reshape(4, 3)
    mean = np.broadcast_to(target.mean(0), target.shape)
    assert explained_variance(target, target) == 1
    assert abs(explained_variance(mean, target)) < 1e-6
    assert explained_variance(target, np.ones_like(target)) == 0
    nobody = np.zeros(4, bool)
    assert explained_variance(target, 2 * target, nobody) == 0


def test_a_masked_nan_is_not_explained():
    target = np.arange(12, dtype=np.float32).reshape(4, 3)
    predicted, where = target.copy(), np.array([True, True, True, False])
    predicted[3] = np.nan
    assert explained_variance(predicted, target, where) == 1


def test_explained_variance_of_half_precision_is_computed_in_float32():
    target = np.random.default_rng(0).normal(size=(64, 8, 3)).astype(jnp.bfloat16)
    predicted = target * jnp.bfloat16(0.5)
    got = explained_variance(predicted, target)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, r2(predicted, target), rtol=1e-4)


# The decay of lambda


def decay(epoch, initial, final, start, saturate):
    """FitNets' TeacherDecayOverEpoch."""
    step = (initial - final) / (saturate - start + 1)
    if epoch < start:
        return initial
    if epoch < saturate:
        return initial - step * (epoch - start + 1)
    return final


@pytest.mark.parametrize(
    ("initial", "final", "start", "saturate"),
    [(4.0, 1.0, 5, 40), (4.0, 0.0, 0, 3), (4.0, 1.0, 2, 2), (1.0, 4.0, 1, 5)]
    + [(4.0, 1.0, 0, 0)],
)
@pytest.mark.parametrize("steps", [1, 7])
def test_lambda_decays_as_published(initial, final, start, saturate, steps):
    schedule = lambda_decay(initial, final, start, saturate, steps)
    every = np.arange((saturate + 3) * steps)
    got = jax.jit(schedule)(jnp.int32(every))
    want = [decay(s // steps, initial, final, start, saturate) for s in every]
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_a_decay_out_of_order_is_refused():
    with pytest.raises(ValueError, match="lambda_decay: expected start <= saturate"):
        lambda_decay(4.0, 1.0, 5, 4, 1)
    with pytest.raises(ValueError, match="lambda_decay: expected steps_per_epoch to"):
        lambda_decay(4.0, 1.0, 0, 5, 0)


@pytest.mark.parametrize(("initial", "final"), [(-1.0, 1.0), (4.0, -1.0)])
def test_a_negative_lambda_is_refused(initial, final):
    with pytest.raises(ValueError, match="lambda_decay"):
        lambda_decay(initial, final, 0, 5, 1)
