"""OFD as a method: mdistiller's code, margins from the teacher's BatchNorm."""

import functools

import jax
import jax.numpy as jnp
import pytest

from hintjax import overhaul
from hintjax.method import Context
from hintjax.networks import Features, Wants

pytestmark = pytest.mark.usefixtures("strict")

KEY = jax.random.key(0)
CONTEXT = Context(KEY, jnp.int32(0), False)
PAIRS = [("s0", "t0"), ("s1", "t1")]
NORMS = ["n0", "n1"]


def connector(i, kind="param"):
    prefix = f"{kind}.connectors.connectors.{i}"
    return {
        "BatchNorm_0": {"bias": f"{prefix}.1.bias", "scale": f"{prefix}.1.weight"},
        "layers_0": {"kernel": f"{prefix}.0.weight"},
    }


def test_the_method_is_the_code(golden):
    case = golden("ofd/mdistiller_eval")
    method = overhaul(PAIRS, NORMS)
    student = Features(hints={f"s{i}": case[f"in.f_s.{i}"] for i in range(2)})
    teacher = Features(
        hints={f"t{i}": case[f"in.f_t.{i}"] for i in range(2)},
        params={
            f"n{i}": {
                "scale": case[f"state.teacher_bn_weight_{i}"],
                "bias": case[f"state.teacher_bn_bias_{i}"],
            }
            for i in range(2)
        },
    )
    names = {f"s{i}->t{i}": connector(i) for i in range(2)}
    params = jax.tree.map(lambda name: case[name], names)
    for own in params.values():
        own["layers_0"]["kernel"] = own["layers_0"]["kernel"][0, 0]
    memory = {
        f"s{i}->t{i}": {
            "batch_stats": {
                "BatchNorm_0": {
                    "mean": case[f"state.connectors.connectors.{i}.1.running_mean"],
                    "var": case[f"state.connectors.connectors.{i}.1.running_var"],
                }
            }
        }
        for i in range(2)
    }
    shapes = jax.eval_shape(lambda: (student, teacher))
    made = jax.eval_shape(lambda key: method.init(key, *shapes, None), KEY)
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, (params, memory))

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def run(params, student):
        values, _, _ = method.apply(params, memory, student, teacher, {}, CONTEXT)
        return values.mean()

    value, (by_params, by_student) = run(params, student)
    assert case.error("out.loss", value) < 1e-5
    for i in range(2):
        assert case.error(f"grad.in.f_s.{i}", by_student.hints[f"s{i}"]) < 1e-5
        own, names = by_params[f"s{i}->t{i}"], connector(i, "grad.param")
        own["layers_0"]["kernel"] = own["layers_0"]["kernel"][None, None]
        errors = jax.tree.map(case.error, names, own)
        assert max(jax.tree.leaves(errors)) < 1e-5


def test_the_hint_layers_are_the_norms_by_default():
    method = overhaul([("a", "x"), ("b", "y")])
    assert method.teacher == Wants(hints=("x", "y"), params=("x", "y"))
    with pytest.raises(ValueError, match="overhaul: expected norms to have one path"):
        overhaul(PAIRS, ["n0"])


def test_a_layer_that_is_no_batch_norm_is_refused():
    student = Features(hints={"a": jnp.ones((2, 4, 4, 3))})
    teacher = Features(
        hints={"x": jnp.ones((2, 4, 4, 3))}, params={"x": {"kernel": jnp.ones(3)}}
    )
    with pytest.raises(ValueError, match="overhaul: .*'x' to be a BatchNorm"):
        overhaul([("a", "x")]).init(KEY, student, teacher, None)
