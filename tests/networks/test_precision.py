"""A network in another precision: what is cast, and what is not."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hintjax as hj

pytestmark = pytest.mark.quick

KEY = jax.random.key(0)
LOW = jnp.bfloat16


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(3, name="head")(nn.relu(x).mean((1, 2)))


def batch():
    generator = np.random.default_rng(0)
    return {
        "image": generator.normal(size=(4, 6, 6, 2)).astype(np.float32),
        "label": np.arange(4, dtype=np.int32) % 3,
    }


def dtypes(tree):
    return {leaf.dtype for leaf in jax.tree.leaves(tree)}


@pytest.fixture(scope="module")
def networks():
    """The network, in its own precision and in bfloat16, and its variables."""
    network = hj.linen(Net())
    low = hj.computed_in(network, LOW)
    return network, low, low.init(KEY, batch()["image"])


def test_what_a_network_shows_is_computed_in_the_precision(networks):
    network, low, variables = networks
    wants = hj.Wants(output=True, hints=("conv", "norm"))

    def apply(network):
        return jax.jit(
            lambda variables, x: network.apply(*variables, x, wants=wants, train=True)
        )(variables, batch()["image"])

    (shown, after), (want, statistics) = apply(low), apply(network)
    assert dtypes(variables) == {jnp.dtype("float32")}
    assert dtypes(shown) == {jnp.dtype(LOW)}
    assert dtypes(after) == {jnp.dtype("float32")}
    for got, exact in zip(
        jax.tree.leaves((shown, after)),
        jax.tree.leaves((want, statistics)),
        strict=True,
    ):
        np.testing.assert_allclose(got, exact, atol=0.05 * np.abs(exact).max())
    assert low.layers(*variables, batch()["image"])["conv"].dtype == jnp.float32


@pytest.mark.parametrize("which", ["student", "teacher", "both"])
def test_losses_and_what_is_trained_stay_float32(networks, which):
    network, low, variables = networks
    student = low if which != "teacher" else network
    teacher = low if which != "student" else network
    method = hj.objective(
        task=hj.task(optax.softmax_cross_entropy_with_integer_labels),
        kd=hj.kd(),
        at=hj.attention_transfer([("norm", "norm")]),
        hint=hj.fitnets([("norm", "norm")]),
    )
    stage = hj.distillation_stage(student, teacher, method, optax.adam(1e-2))
    state = stage.init(KEY, variables, variables, batch())
    before = jax.tree.map(np.asarray, state.params)
    state, metrics = stage.update(state, variables, batch())
    assert dtypes(metrics) == {jnp.dtype("float32")}
    floating = [
        leaf
        for leaf in jax.tree.leaves(state._replace(key=None))
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    assert dtypes(floating) == {jnp.dtype("float32")}
    kernel = state.params["student"]["conv"]["kernel"]
    assert np.any(kernel != before["student"]["conv"]["kernel"])
    features = jax.eval_shape(stage.teach, state, variables, batch())
    assert dtypes(features) == {jnp.dtype("float32" if which == "student" else LOW)}


def test_a_precision_is_a_floating_dtype(networks):
    with pytest.raises(ValueError, match="computed_in: expected a floating dtype, got"):
        hj.computed_in(networks[0], jnp.int8)
