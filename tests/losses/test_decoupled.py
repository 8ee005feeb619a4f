"""DKD against its formula and the field's code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import losses

pytestmark = pytest.mark.usefixtures("strict")

# One program each: without it, every operation would be compiled by itself.
OPTIONS = "alpha", "beta", "temperature"
decoupled_kd_loss = jax.jit(losses.decoupled_kd_loss, static_argnames=OPTIONS)
kd_loss = jax.jit(losses.kd_loss, static_argnames="temperature")

LABEL = np.array([0, 3, 6, 3], np.int32)


def logits(seed, shape=(4, 7)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 3


def softmax(z):
    return np.exp(z) / np.exp(z).sum()


def formula(student, teacher, label, temperature):
    """The two divergences of one example."""
    q = softmax(np.float64(student) / temperature)
    p = softmax(np.float64(teacher) / temperature)
    sure = p[label] * np.log(p[label] / q[label])
    unsure = (1 - p[label]) * np.log((1 - p[label]) / (1 - q[label]))
    rest_q, rest_p = (np.delete(x, label) / (1 - x[label]) for x in (q, p))
    return sure + unsure, (rest_p * np.log(rest_p / rest_q)).sum()


@pytest.mark.parametrize(
    ("hyper", "used"),
    [({}, (1.0, 8.0, 4.0)), ({"alpha": 0.3, "beta": 2.0, "temperature": 1.0},) * 2],
)
def test_loss_is_the_formula(hyper, used):
    alpha, beta, temperature = used.values() if isinstance(used, dict) else used
    student, teacher = logits(0), logits(1)
    parts = np.array(
        [
            formula(*each, temperature)
            for each in zip(student, teacher, LABEL, strict=True)
        ]
    )
    want = temperature**2 * parts @ [alpha, beta]
    arrays = jnp.array(student), jnp.array(teacher), jnp.array(LABEL)
    np.testing.assert_allclose(decoupled_kd_loss(*arrays, **hyper), want, rtol=1e-5)


def test_loss_matches_mdistiller(golden):
    case = golden("dkd/b6_c100_beta8")
    value_and_grad = jax.value_and_grad(lambda *x: decoupled_kd_loss(*x).mean())
    value, gradient = jax.jit(value_and_grad)(
        case["in.logits_student"], case["in.logits_teacher"], case["int.target"]
    )
    assert case.error("out.loss", value) < 1e-5
    assert case.error("grad.in.logits_student", gradient) < 1e-5


def test_kd_is_one_weighting_of_the_parts():
    """With 1 - p_y for beta, as the paper derives."""
    student, teacher = jnp.array(logits(0)), jnp.array(logits(1))
    label = jnp.array(LABEL)
    p = np.array([softmax(z)[of] for z, of in zip(logits(1), LABEL, strict=True)])
    alone, rest = (
        np.asarray(decoupled_kd_loss(student, teacher, label, temperature=1.0, **hyper))
        for hyper in ({"beta": 0.0}, {"alpha": 0.0, "beta": 1.0})
    )
    want = kd_loss(student, teacher, temperature=1.0)
    np.testing.assert_allclose(alone + (1 - p) * rest, want, rtol=1e-4)


@functools.cache
def slope(temperature):
    def total(student, teacher):
        label = jnp.zeros(1, jnp.int32)
        hyper = {"temperature": temperature}
        return decoupled_kd_loss(student, teacher, label, **hyper).sum()

    return jax.jit(jax.value_and_grad(total))


@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("signs", [(1, -1), (-1, 1), (1, 1)])
def test_margins_of_120_are_the_formula(temperature, signs):
    """Of the divergences of a margin: softplus in double precision."""
    student, teacher = (np.array([[sign * 120.0, 0, 0, 0]]) for sign in signs)
    arrays = (jnp.array(x, jnp.float32) for x in (student, teacher))
    value, gradient = slope(temperature)(*arrays)
    margin_s, margin_t = (x[0, 0] / temperature - np.log(3) for x in (student, teacher))
    p = np.exp(-np.logaddexp(0, -margin_t))
    want = p * (np.logaddexp(0, -margin_s) - np.logaddexp(0, -margin_t))
    p = np.exp(-np.logaddexp(0, margin_t))
    want += p * (np.logaddexp(0, margin_s) - np.logaddexp(0, margin_t))
    np.testing.assert_allclose(value, temperature**2 * want, rtol=1e-5, atol=1e-6)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() <= max(temperature, 1)


def test_excluded_classes_count_nothing():
    label = jnp.array([0, 1, 3, 4])
    without = [np.delete(logits(i), 5, axis=-1) for i in (0, 1)]
    excluded = [np.insert(x, 5, -np.inf, axis=-1) for x in without]
    gradient = jax.jit(
        jax.value_and_grad(lambda *x: decoupled_kd_loss(*x, label).sum(), (0, 1))
    )
    (got, got_by), (want, want_by) = gradient(*excluded), gradient(*without)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in zip(got_by, want_by, strict=True):
        np.testing.assert_allclose(np.delete(a, 5, axis=-1), b, atol=1e-5)
        np.testing.assert_array_equal(np.asarray(a)[..., 5], 0)


def test_labels_and_classes_are_checked(unchecked):
    zeros = jnp.zeros((2, 3))
    for label in jnp.zeros(3, jnp.int32), jnp.zeros(2):
        with pytest.raises(ValueError, match=r"label to be integer \(2,\), got"):
            decoupled_kd_loss(zeros, zeros, label)
    with pytest.raises(ValueError, match="2 or more classes"):
        decoupled_kd_loss(zeros[:, :1], zeros[:, :1], jnp.zeros(2, jnp.int32))
