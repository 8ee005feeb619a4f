"""AB as a method: the benchmark's weights of the pairs, and the connectors."""

import jax
import jax.numpy as jnp
import pytest

from hintjax import activation_boundary, regressors
from hintjax.method import Context
from hintjax.networks import Features

pytestmark = pytest.mark.usefixtures("strict")

KEY = jax.random.key(0)
CONTEXT = Context(KEY, jnp.int32(0), True)


def test_the_method_is_the_code_behind_no_connector(golden):
    case = golden("ab/rep_3stages")
    pairs = [(f"s{i}", f"t{i}") for i in range(3)]
    student = {f"s{i}": case[f"in.g_s.{i}"] for i in range(3)}
    teacher = Features(hints={f"t{i}": case[f"in.g_t.{i}"] for i in range(3)})
    method = activation_boundary(pairs, regressor=regressors.identity)
    params, memory = method.init(KEY, Features(hints=student), teacher, None)

    @jax.jit
    @jax.value_and_grad
    def run(student):
        shown = Features(hints=student)
        values, _, _ = method.apply(params, memory, shown, teacher, {}, CONTEXT)
        return values.mean()

    value, gradients = run(student)
    assert case.error("out.loss", value) < 1e-5
    for i in range(3):
        assert case.error(f"grad.in.g_s.{i}", gradients[f"s{i}"]) < 1e-5


def test_the_connector_has_a_batch_norm_and_no_activation():
    student = Features(hints={"a": jnp.ones((2, 8, 8, 3))})
    teacher = Features(hints={"x": jnp.ones((2, 4, 4, 5))})
    shapes = jax.eval_shape(lambda: (student, teacher))
    method = activation_boundary([("a", "x")])
    params, memory = jax.eval_shape(lambda key: method.init(key, *shapes, None), KEY)
    assert params["a->x"]["layers_0"]["kernel"].shape == (3, 3, 3, 5)
    assert "batch_stats" in memory["a->x"]


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="activation_boundary: expected margin"):
        activation_boundary([("a", "x")], margin=0.0)
    with pytest.raises(ValueError, match="activation_boundary: expected at least one"):
        activation_boundary([])
