"""A weight that is trained beside the student."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import hintjax as hj

LOGITS = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
LABELS = jnp.arange(4) % 3
CONTEXT = hj.Context(jax.random.key(0), jnp.int32(0), train=True)


def task():
    return hj.task(optax.softmax_cross_entropy_with_integer_labels)


def applied(method, params, memory, **batch):
    # One program: without it, every operation would be compiled by itself.
    run = jax.jit(lambda *a: method.apply(*a, CONTEXT))
    features = hj.Features(output=LOGITS)
    return run(params, memory, features, features, batch)


def test_the_loss_is_that_of_the_paper_and_its_best_weight_is_half_of_1_over_the_loss(
    strict,
):
    method, where = hj.uncertain(task()), jnp.array([True, True, True, False])
    features = hj.Features(output=LOGITS)
    params, memory = method.init(jax.random.key(0), features, features, None)
    batch = {"label": LABELS, "where": where}
    plain = np.asarray(applied(task(), {}, {}, **batch)[0])

    def mean(s):
        changed = {**params, "log_variance": s}
        values, _, metrics = applied(method, changed, memory, **batch)
        return values[:3].mean(), (values, metrics)

    _, (values, metrics) = mean(jnp.float32(0.7))
    np.testing.assert_allclose(values, np.exp(-0.7) * plain + 0.35, rtol=1e-6)
    np.testing.assert_allclose(metrics["weight"], np.exp(-0.7), rtol=1e-6)
    np.testing.assert_allclose(metrics["before"], np.mean(plain[:3]), rtol=1e-6)
    assert "accuracy" in metrics
    slope, _ = jax.jit(jax.grad(mean, has_aux=True))(np.log(2 * np.mean(plain[:3])))
    np.testing.assert_allclose(slope, 0, atol=1e-6)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.Dense(4, name="first")(x))


def test_a_stage_trains_the_weight_and_reports_it():
    network = hj.linen(Net())
    method = hj.objective(
        task=hj.uncertain(task()), hint=hj.uncertain(hj.fitnets([("first", "first")]))
    )
    stage = hj.distillation_stage(
        *(network, network, method, optax.sgd(0.1)),
        inputs=lambda batch: batch["x"],
        teacher_inputs=lambda batch: batch["x"],
    )
    batch = {"x": jnp.ones((4, 2)), "label": LABELS}
    ours, theirs = (
        jax.jit(network.init)(jax.random.key(i), batch["x"]) for i in range(2)
    )
    state = stage.init(jax.random.key(2), ours, theirs, batch)
    state, metrics = stage.update(state, theirs, batch)
    assert metrics["task/weight"] == metrics["hint/weight"] == 1
    for name in ("task", "hint"):
        slope = 0.5 - metrics[f"{name}/before"]
        found = state.params["regressors"][name]["log_variance"]
        np.testing.assert_allclose(found, -0.1 * slope, rtol=1e-5)


def test_what_is_shipped_and_what_is_cached_have_no_weight():
    """SimKD ships its projector, and AT is cached as maps."""
    shipped = hj.Method(
        *(hj.Wants(output=True), hj.Wants()),
        init=lambda *_: ({"scale": jnp.float32(3)}, {}),
        apply=lambda *_: (jnp.zeros(4), {}, {}),
        deploy=lambda params, memory, student, teacher: params["scale"],
    )
    features = hj.Features(output=LOGITS)
    method = hj.uncertain(shipped)
    params, memory = method.init(jax.random.key(0), features, features, None)
    assert method.deploy(params, memory, features, features) == 3
    at = hj.attention_transfer([("a", "b")])
    shapes = hj.Features(hints={"a": jax.ShapeDtypeStruct((4, 2, 2, 5), jnp.float32)})
    maps = {"b": jnp.ones((4, 2, 2, 3)) * jnp.arange(1, 5.0)[:, None, None, None]}
    ours = hj.Features(hints={"a": jnp.asarray(np.random.rand(4, 2, 2, 5), "f")})
    made = hj.uncertain(at)
    found = made.reduced(shapes)
    params, memory = made.init(jax.random.key(0), ours, hj.Features(hints=maps), None)
    whole, *_ = made.apply(params, memory, ours, hj.Features(hints=maps), {}, CONTEXT)
    few, *_ = found.method.apply(
        *(params, memory, ours, found.reduce(hj.Features(hints=maps)), {}, CONTEXT)
    )
    np.testing.assert_allclose(few, whole, rtol=1e-5)
    assert hj.uncertain(task()).deploy is hj.uncertain(task()).reduced is None
