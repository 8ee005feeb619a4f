"""SimKD: projector, loss and prediction against the authors' code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import reused_classifier, simkd
from hintjax.method import Context
from hintjax.networks import Features

pytestmark = pytest.mark.usefixtures("strict")

KEY = jax.random.key(0)
CONTEXT = Context(KEY, jnp.int32(0), False)


def names(kind="param"):
    return {
        **{
            f"Conv_{i}": {"kernel": f"{kind}.simkd.transfer.{3 * i}.weight"}
            for i in range(3)
        },
        **{
            f"BatchNorm_{i}": {
                "scale": f"{kind}.simkd.transfer.{3 * i + 1}.weight",
                "bias": f"{kind}.simkd.transfer.{3 * i + 1}.bias",
            }
            for i in range(3)
        },
    }


def test_the_method_is_the_code(golden):
    case = golden("simkd/factor2_eval")
    head = {"kernel": case["param.cls_t.weight"], "bias": case["param.cls_t.bias"]}
    teacher = Features(hints={"x": case["in.f_t"]}, params={"classifier": head})
    student = Features(hints={"a": case["in.f_s"]})
    method = simkd(("a", "x"))
    params = {"a->x": jax.tree.map(lambda name: case[name], names())}
    statistics = {
        f"BatchNorm_{i}": {
            "mean": case[f"state.simkd.transfer.{3 * i + 1}.running_mean"],
            "var": case[f"state.simkd.transfer.{3 * i + 1}.running_var"],
        }
        for i in range(3)
    }
    memory = {"a->x": {"batch_stats": statistics}}
    shapes = jax.eval_shape(lambda: (student, teacher))
    made = jax.eval_shape(lambda key: method.init(key, *shapes, None), KEY)
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, (params, memory))
    label = case.arrays["out.logits"].argmax(-1).astype(np.int32)
    label[0] += 1
    label = jnp.array(label)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def run(params, student):
        batch = {"label": label}
        values, _, metrics = method.apply(
            params, memory, student, teacher, batch, CONTEXT
        )
        return values.mean(), metrics

    (value, metrics), (by_params, by_student) = run(params, student)
    assert case.error("out.loss", value) < 1e-5
    assert case.error("grad.in.f_s", by_student.hints["a"]) < 1e-5
    errors = jax.tree.map(case.error, names("grad.param"), by_params["a->x"])
    assert max(jax.tree.leaves(errors)) < 1e-5
    assert metrics["accuracy"] == 0.75
    assert (
        case.error("out.logits", jax.jit(reused_classifier)(case["out.trans_s"], head))
        < 1e-5
    )
    teacher = teacher._replace(hints={"x": jnp.zeros_like(case["in.f_t"])})
    logits = jax.jit(method.deploy)(params, memory, student, teacher)
    assert case.error("out.logits", logits) < 1e-5


def test_examples_without_a_label_do_not_count_in_the_accuracy():
    head = {"kernel": jnp.eye(3)}
    teacher = Features(hints={"x": jnp.ones((5, 2, 2, 3))}, params={"classifier": head})
    student = Features(hints={"a": jnp.ones((5, 2, 2, 3))})

    def measure(method):
        @jax.jit
        def run(key, batch):
            params, memory = method.init(key, student, teacher, None)
            context = Context(key, jnp.int32(0), True)
            return method.apply(params, memory, student, teacher, batch, context)[2]

        def measured(**batch):
            arrays = {name: jnp.asarray(values) for name, values in batch.items()}
            return float(run(KEY, arrays)["accuracy"])

        return measured

    measured = measure(simkd(("a", "x")))
    (right,) = [c for c in range(3) if measured(label=[c] * 5) == 1]
    wrong = (right + 1) % 3
    label = [right, -1, wrong, -1, right]
    assert measured(label=label) == pytest.approx(2 / 5)
    method = simkd(("a", "x"), ignore=-1)
    assert method.ignored == (-1,)
    measured = measure(method)
    assert measured(label=label) == pytest.approx(2 / 3)
    where = [True, True, True, True, False]
    assert measured(label=label, where=where) == pytest.approx(1 / 2)


def test_a_classifier_has_a_kernel():
    student = Features(hints={"a": jnp.ones((2, 4, 4, 3))})
    norm = {"scale": jnp.ones(3)}
    teacher = Features(hints={"x": jnp.ones((2, 4, 4, 3))}, params={"head": norm})
    with pytest.raises(ValueError, match="simkd: .*'head' .*kernel"):
        simkd(("a", "x"), "head").init(KEY, student, teacher, None)
