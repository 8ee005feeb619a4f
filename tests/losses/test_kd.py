"""KD against its formula and the field's code."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import losses

pytestmark = pytest.mark.usefixtures("strict")

# One program each: without it, every operation would be compiled by itself.
OPTIONS = "temperature", "batch_dims"
kd_loss, soft_cross_entropy_loss = (
    jax.jit(loss, static_argnames=OPTIONS)
    for loss in (losses.kd_loss, losses.soft_cross_entropy_loss)
)


def logits(seed, shape=(2, 3, 7)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 3


def softmax(z):
    return np.exp(np.float64(z)) / np.exp(np.float64(z)).sum(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [0.5, 1, 4.0])
def test_kd_is_the_formula(temperature):
    student, teacher = logits(0), logits(1)
    q, p = softmax(student / temperature), softmax(teacher / temperature)
    want = temperature**2 * (p * np.log(p / q)).sum(-1)
    arrays, hyper = (
        (jnp.array(student), jnp.array(teacher)),
        {"temperature": temperature},
    )
    got = kd_loss(*arrays, batch_dims=2, **hyper)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(kd_loss(*arrays, **hyper), want.mean(1), rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1, 3.0])
def test_soft_cross_entropy_is_the_formula(temperature):
    student, teacher = logits(0), logits(1)
    q, p = softmax(student / temperature), softmax(teacher / temperature)
    got = soft_cross_entropy_loss(
        jnp.array(student), jnp.array(teacher), temperature=temperature, batch_dims=2
    )
    np.testing.assert_allclose(got, -(p * np.log(q)).sum(-1), rtol=1e-5)


def test_defaults_are_the_published_temperatures():
    student, teacher = jnp.array(logits(0)), jnp.array(logits(1))
    for loss, temperature in (kd_loss, 4.0), (soft_cross_entropy_loss, 3.0):
        want = loss(student, teacher, temperature=temperature)
        np.testing.assert_array_equal(loss(student, teacher), want)


def test_kd_matches_repdistiller(golden):
    case = golden("kd/rep_T4_b8_c100")
    value_and_grad = jax.value_and_grad(lambda s, t: kd_loss(s, t).mean())
    value, gradient = jax.jit(value_and_grad)(case["in.y_s"], case["in.y_t"])
    assert case.error("out.loss", value) < 1e-5
    assert case.error("grad.in.y_s", gradient) < 1e-5


@pytest.mark.parametrize("loss", [kd_loss, soft_cross_entropy_loss])
def test_a_constant_on_all_logits_changes_nothing(loss):
    student, teacher = logits(0), logits(1)
    want = loss(student, teacher)
    np.testing.assert_allclose(loss(student + 10, teacher - 20), want, rtol=1e-4)


@pytest.mark.parametrize("loss", [kd_loss, soft_cross_entropy_loss])
def test_excluded_classes_count_nothing(loss):
    without = [np.delete(logits(i), 2, axis=-1) for i in (0, 1)]
    excluded = [np.insert(x, 2, -np.inf, axis=-1) for x in without]
    np.testing.assert_allclose(loss(*excluded), loss(*without), rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda *x: loss(*x).sum(), (0, 1)))
    for got, want in zip(gradient(*excluded), gradient(*without), strict=True):
        np.testing.assert_allclose(np.delete(got, 2, axis=-1), want, atol=1e-5)
        np.testing.assert_array_equal(np.asarray(got)[..., 2], 0)


def test_a_certain_teacher_is_a_label():
    teacher = jnp.array([[-jnp.inf, 0, -jnp.inf], [3e4, 0, -3e4]])
    student = np.array([[1, 2, 3], [1, 2, 3]], np.float32)
    want = -np.log(softmax(student)[[0, 1], [1, 0]])
    got = kd_loss(jnp.array(student), teacher, temperature=1)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_one_trace_serves_all_temperatures():
    student, teacher = jnp.array(logits(0)), jnp.array(logits(1))
    traced = jax.jit(
        chex.assert_max_traces(
            lambda t: losses.kd_loss(student, teacher, temperature=t), n=1
        )
    )
    for temperature in 1.0, 4.0:
        want = kd_loss(student, teacher, temperature=temperature)
        np.testing.assert_allclose(traced(temperature), want, rtol=1e-6)


@pytest.mark.parametrize("loss", [kd_loss, soft_cross_entropy_loss])
@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf")])
def test_a_temperature_is_positive(loss, temperature):
    with pytest.raises(ValueError, match=f"{loss.__name__}.*temperature.*> 0"):
        loss(jnp.zeros((2, 3)), jnp.zeros((2, 3)), temperature=temperature)


def test_unequal_classes_say_what_to_do(unchecked):
    with pytest.raises(ValueError, match="same classes"):
        kd_loss(jnp.zeros((2, 10)), jnp.zeros((2, 100)))
