"""CAT-KD against its formula and the authors' code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax.losses import class_activation_map, class_attention_loss

pytestmark = pytest.mark.usefixtures("strict")


def test_the_loss_is_the_formula():
    generator = np.random.default_rng(0)
    student = generator.normal(size=(3, 4, 6, 5)).astype(np.float32)
    teacher = generator.normal(size=(3, 8, 2, 5)).astype(np.float32)
    pooled = [
        x.reshape(3, 2, x.shape[1] // 2, 2, x.shape[2] // 2, 5).mean((2, 4))
        for x in (student, teacher)
    ]
    units = [x / np.linalg.norm(x, axis=(1, 2), keepdims=True) for x in pooled]
    want = ((units[0] - units[1]) ** 2).mean((1, 2, 3))
    got = class_attention_loss(jnp.array(student), jnp.array(teacher))
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_the_loss_is_the_code(golden):
    case = golden("catkd/normalized_res2")
    value, gradient = jax.jit(
        jax.value_and_grad(lambda s, t: class_attention_loss(s, t).mean())
    )(case["in.f_s"], case["in.f_t"])
    assert case.error("out.loss", value) < 1e-5
    assert case.error("grad.in.f_s", gradient) < 1e-5


def test_the_mean_of_the_map_is_the_logit():
    generator = np.random.default_rng(0)
    features = jnp.array(generator.normal(size=(3, 4, 6, 7)), jnp.float32)
    kernel = jnp.array(generator.normal(size=(7, 10)), jnp.float32)
    got = class_activation_map(features, kernel).mean((1, 2))
    np.testing.assert_allclose(got, features.mean((1, 2)) @ kernel, atol=1e-5)


def test_shapes_that_do_not_fit_are_refused(unchecked):
    x = jnp.ones((2, 4, 4, 3))
    with pytest.raises(ValueError, match=r"class_activation_map: .*kernel \(4, 10\)"):
        class_activation_map(x, jnp.ones((4, 10)))
    with pytest.raises(ValueError, match="class_attention_loss: .*size.*integer >= 1"):
        class_attention_loss(x, x, size=0)
