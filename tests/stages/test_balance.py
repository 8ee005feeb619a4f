"""Weights that give each term its share of the gradient."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hintjax as hj

BATCH = 8
TARGET = {"hint": 0.75}


class Net(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Conv(self.width, (3, 3), name="conv")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


@pytest.fixture(autouse=True)
def in_double_precision():
    with jax.enable_x64(True):
        yield


def images(step=0):
    generator = np.random.default_rng(step)
    label = np.arange(BATCH, dtype=np.int32) % 3
    image = generator.normal(size=(BATCH, 5, 5, 2)) + label[:, None, None, None]
    return {"image": image, "label": label}


def double(tree):
    def one(x):
        return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(one, tree)


@functools.cache
def begun(devices=1, accumulate=1, weight=50.0):
    student, teacher = hj.linen(Net(4)), hj.linen(Net(6))
    method = hj.objective(
        task=hj.task(optax.softmax_cross_entropy_with_integer_labels),
        hint=hj.weighted(hj.fitnets([("conv", "conv")]), hj.Adjustable(weight)),
    )
    stage = hj.distillation_stage(
        *(student, teacher, method, optax.sgd(0.05)),
        mesh=hj.data_mesh() if devices > 1 else None,
        accumulate=accumulate,
    )
    image = images()["image"]
    ours, theirs = (
        double(jax.jit(network.init)(jax.random.key(i), image))
        for i, network in enumerate((student, teacher))
    )
    return stage, stage.init(jax.random.key(2), ours, theirs, images()), theirs


def shares(report):
    norms = {name: float(term["shared"]) for name, term in report["terms"].items()}
    return {name: norm / sum(norms.values()) for name, norm in norms.items()}


def weight(state):
    return float(state.memory["weights"]["hint"])


def at(state, step):
    return state._replace(step=jnp.asarray(step, state.step.dtype))


@pytest.fixture
def one():
    stage, state, theirs = begun()
    state = jax.tree.map(lambda leaf: leaf.copy(), state)
    return stage, double(state), theirs, stage.report(double(state), theirs, images())


def test_the_first_move_gives_each_term_its_share(one):
    stage, state, theirs, report = one
    assert shares(report)["hint"] > 0.9
    moved = hj.rebalanced(state, report, hj.Balance(TARGET))
    found = shares(stage.report(moved, theirs, images()))
    np.testing.assert_allclose(found["hint"], 0.75, rtol=1e-9)


def test_the_shares_are_those_of_the_arrays_that_all_terms_move(one):
    """The task alone moves the head, and the hint alone its regressor."""
    stage, state, theirs, _ = one

    def conv(name):
        def mean(params):
            params = {**state.params, "student": {**state.params["student"], **params}}
            changed = state._replace(params=params)
            return stage.evaluate(changed, theirs, images())[f"{name}/weighted"]

        grads = jax.grad(mean)({"conv": state.params["student"]["conv"]})
        return float(optax.tree.norm(grads))

    terms = stage.report(state, theirs, images())["terms"]
    np.testing.assert_allclose(terms["task"]["shared"], conv("task"), rtol=1e-9)
    np.testing.assert_allclose(terms["hint"]["shared"], conv("hint"), rtol=1e-9)
    assert terms["hint"]["norm"] > terms["hint"]["shared"]


def test_later_moves_are_an_exponential_mean_of_the_logarithm(one):
    _, state, _, report = one
    whole = weight(hj.rebalanced(state, report, hj.Balance(TARGET))) / 50
    for step, kept in ((10, 0.0), (20, 1 / 2), (30, 2 / 3), (990, 0.9)):
        balance = hj.Balance(TARGET, every=10)
        found = weight(hj.rebalanced(at(state, step), report, balance)) / 50
        np.testing.assert_allclose(found, whole ** (1 - kept), rtol=1e-6)


def test_meshes_and_micro_batches_move_the_weights_alike(one):
    _, state, _, report = one
    want = weight(hj.rebalanced(state, report, hj.Balance(TARGET)))
    for how in ({"devices": 8}, {"accumulate": 2}):
        stage, other, theirs = begun(**how)
        other = double(other)
        report = stage.report(other, theirs, images())
        found = hj.rebalanced(other, report, hj.Balance(TARGET))
        np.testing.assert_allclose(weight(found), want, rtol=1e-9)
        stage.update(found, theirs, images())  # takes the state as it is


@pytest.mark.parametrize("wrong", [0.0, jnp.nan, jnp.inf])
def test_a_gradient_that_is_0_or_not_finite_leaves_the_weight(one, wrong):
    _, state, _, report = one
    for name in ("task", "hint"):
        terms = {**report["terms"]}
        terms[name] = {**terms[name], "shared": jnp.asarray(wrong)}
        moved = hj.rebalanced(state, {**report, "terms": terms}, hj.Balance(TARGET))
        assert weight(moved) == 50


def test_a_balance_that_makes_no_sense_is_refused(one, unchecked):
    _, state, _, report = one
    for balance, words in (
        (hj.Balance({}), "shares of at least one term, with a sum below 1"),
        (hj.Balance({"hint": 0.6, "task": 0.4}), "with a sum below 1"),
        (hj.Balance({"hint": 1.0}), "share of 'hint' to be between 0 and 1"),
        (hj.Balance({"task": 0.5}), "whose weight is adjustable, got 'task'"),
        (hj.Balance({"hints": 0.5}), "Nearest: hint"),
        (hj.Balance(TARGET, every=0), "every"),
        (hj.Balance(TARGET, decay=1.0), "decay to be in"),
    ):
        with pytest.raises(hj.Refusal, match="rebalanced: expected") as error:
            hj.rebalanced(state, report, balance)
        assert words in str(error.value)
    with pytest.raises(hj.Refusal, match="a term that is not balanced"):
        terms = {"hint": report["terms"]["hint"]}
        hj.rebalanced(state, {**report, "terms": terms}, hj.Balance(TARGET))
