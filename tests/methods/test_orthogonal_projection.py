"""VkD as a method: the authors' code, and a projector that stays orthogonal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import orthogonal_projection, regressors
from hintjax.method import Context
from hintjax.networks import Features

pytestmark = pytest.mark.usefixtures("strict")

KEY = jax.random.key(0)
CONTEXT = Context(KEY, jnp.int32(0), True)


def test_the_method_is_the_code(golden):
    """The free matrix of an orthonormal matrix is the matrix itself."""
    case = golden("vkd/tall_12_to_20")
    method = orthogonal_projection([("a", "x")])
    student = Features(hints={"a": case["in.z_s"]})
    teacher = Features(hints={"x": case["in.f_t"]})
    made, memory = jax.eval_shape(lambda: method.init(KEY, student, teacher, None))
    params = {"a->x": {"free": case["out.weight"]}}
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, params)

    def run(student):
        values, *_ = method.apply(params, memory, student, teacher, {}, CONTEXT)
        return values.mean()

    value, gradient = jax.jit(jax.value_and_grad(run))(student)
    assert case.error("out.loss", value) < 1e-5
    assert case.error("grad.in.z_s", gradient.hints["a"]) < 1e-5


@pytest.mark.parametrize(("c", "features"), [(3, 5), (5, 3), (4, 4)])
def test_the_projector_is_orthogonal_whatever_the_size_of_its_free_matrix(c, features):
    module = regressors.orthogonal((7, c), (7, features))
    params, state = regressors.init(module, KEY, (2, 7, c))
    params = jax.device_get(params)

    @jax.jit
    def apply(params):
        return regressors.apply(module, params, state, jnp.eye(c), True)[0]

    kernel = np.asarray(apply(params))
    gram = kernel @ kernel.T if c < features else kernel.T @ kernel
    np.testing.assert_allclose(gram, np.eye(min(c, features)), atol=1e-6)
    decayed = jax.tree.map(lambda w: 0.01 * w, params)
    same = apply(decayed)
    np.testing.assert_allclose(same, kernel, atol=1e-6)
    moved = jax.jit(jax.grad(lambda params: apply(params)[0, 0]))(params)
    free = params["free"] - np.float32(0.5) * np.asarray(moved["free"])
    assert np.asarray(apply({"free": free}))[0, 0] < kernel[0, 0]


def test_the_projector_does_not_move_positions():
    with pytest.raises(ValueError, match="regressors.orthogonal: .*same positions"):
        regressors.orthogonal((7, 3), (8, 3))
