"""Folding leaves the function as it is, and BatchNorm out of the program."""

from collections import Counter

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from hintjax import models
from hintjax.export import folded
from hintjax.export.tflite import INTEGER
from hintjax.models.blocks import batch_norm

pytestmark = pytest.mark.quick

KEY = jax.random.key(0)


def random(shapes):
    """Variables of all sizes; variances are above 0."""
    draws = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: draws.uniform(0.1, 0.4, leaf.shape).astype(np.float32), shapes
    )


def of(module, images):
    variables = random(jax.eval_shape(module.init, KEY, images))
    return lambda images: module.apply(variables, images)


def primitives(function, *inputs):
    return Counter(eqn.primitive.name for eqn in jax.make_jaxpr(function)(*inputs).eqns)


MODELS = {
    "resnet8": (models.resnet8, {"conv_general_dilated": 9, "mul": 0, "add": 13}),
    "wrn_16_1": (models.wrn_16_1, {"rsqrt": 0, "mul": 7}),
    "vit_micro": (models.vit_micro, {"conv_general_dilated": 1}),
    "fitnet1": (models.fitnet1, {"conv_general_dilated": 9, "add": 11}),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_is_folded_for_any_batch(name):
    factory, counts = MODELS[name]
    function = of(factory(classes=4), jnp.zeros((1, 32, 32, 3)))
    (batch,) = jax.export.symbolic_shape("batch")
    image = jax.ShapeDtypeStruct((batch, 32, 32, 3), np.float32)
    found = primitives(folded(function), image)
    assert {name: found[name] for name in counts} == counts
    made = jax.eval_shape(folded(function), image)
    assert made == jax.eval_shape(function, image)


class ConvNorm(nn.Module):
    """Two convolutions with BatchNorm; the first is grouped, the second shared."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), feature_group_count=2, name="conv1")(x)
        x = nn.relu(batch_norm(False, name="norm1")(x))
        y = nn.Conv(6, (2, 2), padding="VALID", name="conv2")(x)
        return batch_norm(False, name="norm2")(y) + y


def test_the_folded_function_has_the_same_values():
    images = jax.random.normal(KEY, (2, 4, 4, 2))
    function = of(ConvNorm(), images)
    wanted, found = function(images), folded(function)(images)
    assert found.dtype == wanted.dtype
    np.testing.assert_allclose(found, wanted, rtol=2e-6)
    counts = primitives(folded(function), images)
    # The second BatchNorm stays: its convolution has another reader.
    assert counts["conv_general_dilated"] == 2 and counts["rsqrt"] == 0
    assert counts["sub"] == 1 and counts["mul"] == 1


STEPS = {
    "x - c": (lambda x, c: x - c, {"sub": 0, "add": 1}),
    "c - x": (lambda x, c: c - x, {"sub": 0, "add": 1}),
    "x / c": (lambda x, c: x / c, {"div": 0, "mul": 0, "add": 0}),
    "numbers": (lambda x, c: 3.0 * x + 1.0 - c, {"mul": 0, "sub": 0, "add": 1}),
    "c / x": (lambda x, c: c / x, {"div": 1}),
    "rows": (lambda x, c: x * jnp.array([[2.0], [3.0]]), {"mul": 1}),
    "larger": (lambda x, c: x[None] * jnp.ones((5, 1, 3)), {"mul": 1}),
    "twice": (lambda x, c: x * x, {"mul": 1}),
    "itself": (lambda x, c: (x - c) * 2 + x, {"sub": 1, "mul": 1, "add": 1}),
    "nan": (lambda x, c: x * jnp.array([1.0, jnp.inf, 1.0]), {"mul": 1}),
}


@pytest.mark.parametrize("name", STEPS)
def test_only_steps_of_each_channel_are_folded(name):
    step, counts = STEPS[name]
    kernel, c = jnp.arange(6.0).reshape(2, 3) + 1, jnp.array([2.0, 3.0, 5.0])
    x = jnp.array([[1.0, 2.0], [3.0, -1.0]])

    def function(x):
        return step(x @ kernel, c)

    np.testing.assert_allclose(folded(function)(x), function(x), rtol=1e-6)
    found = primitives(folded(function), x)
    assert {name: found[name] for name in counts} == counts


def test_a_negated_layer_has_negated_weights():
    kernel, image = jnp.ones((2, 3)), jnp.ones((1, 2))

    def negated(x):
        return -(x @ kernel + 1.0)

    assert primitives(folded(negated), image) == {"dot_general": 1, "add": 1}
    np.testing.assert_array_equal(folded(negated)(image), negated(image))


def test_operations_are_replaced_inside_calls_too():
    def gelu(x):
        return jax.jit(lambda x: nn.gelu(x, approximate=False))(x)

    x = jnp.linspace(-6.0, 6.0, 1001)
    assert primitives(folded(gelu), x)["erfc"] == 1
    found = primitives(folded(gelu, INTEGER), x)
    assert found["logistic"] == 1 and not {"erfc", "erf", "neg"} & set(found)
    np.testing.assert_allclose(folded(gelu, INTEGER)(x), gelu(x), atol=0.021)
    np.testing.assert_allclose(INTEGER["erf"](x), jax.lax.erf(x), atol=0.02)


def test_a_kernel_that_is_no_constant_is_left_alone():
    x, w = jnp.ones((2, 3)), jnp.full((3, 3), 2.0)
    function = folded(lambda x, w: (x @ w) * 2.0 + x @ x.T @ x)
    np.testing.assert_allclose(function(x, w), (x @ w) * 2.0 + x @ x.T @ x)


def test_large_constants_are_not_computed():
    def function(x):
        return x + jnp.broadcast_to(jnp.float32(1), (1000, 1000)).sum()

    assert "broadcast_in_dim" in primitives(folded(function), 1.0)
