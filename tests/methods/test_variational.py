"""VID as a method: the benchmark's code, and what it trains."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import regressors, variational
from hintjax.method import Context
from hintjax.networks import Features

pytestmark = pytest.mark.usefixtures("strict")

KEY = jax.random.key(0)
CONTEXT = Context(KEY, jnp.int32(0), True)
# Our names of the mean's kernels, and the code's.
KERNELS = {
    ("layers_0", "layers_0"): "regressor.0.weight",
    ("layers_1", "layers_0"): "regressor.2.weight",
    ("layers_2",): "regressor.4.weight",
}


def test_the_method_is_the_code(golden):
    case = golden("vid/rep_equal")
    method = variational([("a", "x")])
    student = Features(hints={"a": case["in.f_s"]})
    teacher = Features(hints={"x": case["in.f_t"]})
    shapes = jax.eval_shape(lambda: (student, teacher))
    made, memory = jax.eval_shape(lambda key: method.init(key, *shapes, None), KEY)
    params = {"a->x": {"mean": {}, "scale": case["param.log_scale"]}}
    for path, name in KERNELS.items():
        node = params["a->x"]["mean"]
        for part in path:
            node = node.setdefault(part, {})
        node["kernel"] = case[f"param.{name}"][0, 0]
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, params)

    @functools.partial(jax.jit)
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def run(params, student):
        values, _, _ = method.apply(params, memory, student, teacher, {}, CONTEXT)
        return values.mean()

    value, (by_params, by_student) = run(params, student)
    assert case.error("out.loss", value) < 1e-5
    assert case.error("grad.in.f_s", by_student.hints["a"]) < 1e-5
    own = by_params["a->x"]
    assert case.error("grad.param.log_scale", own["scale"]) < 1e-5
    for path, name in KERNELS.items():
        gradient = functools.reduce(lambda node, part: node[part], path, own["mean"])
        want = f"grad.param.{name}"
        assert case.error(want, gradient["kernel"][None, None]) < 1e-5


def test_the_variance_starts_as_asked_and_sizes_may_differ():
    generator = np.random.default_rng(0)
    student, teacher = (
        Features(hints={name: jnp.array(generator.normal(size=shape), jnp.float32)})
        for name, shape in (("a", (2, 8, 6, 3)), ("x", (2, 4, 6, 5)))
    )
    method = variational(
        [("a", "x"), ("a", "x")], regressor=regressors.linear, initial_variance=2.0
    )
    params, memory = method.init(KEY, student, teacher, None)
    assert params["a->x"]["scale"].shape == (5,)
    values, _, metrics = method.apply(params, memory, student, teacher, {}, CONTEXT)
    assert values.shape == (2,)
    np.testing.assert_allclose(metrics["variance"], 2.0, rtol=1e-6)


def test_a_variance_is_positive():
    with pytest.raises(ValueError, match="variational: expected initial_variance"):
        variational([("a", "x")], initial_variance=0.0)
