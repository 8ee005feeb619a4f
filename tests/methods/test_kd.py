"""KD as a method: the loss of the two outputs, nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import decoupled_kd, dist, kd, soft_targets, standardized_kd
from hintjax.losses import kd_loss, soft_cross_entropy_loss, standardize_logits
from hintjax.method import Context
from hintjax.networks import Features, Wants

pytestmark = pytest.mark.usefixtures("strict")


def standardized_loss(student, teacher, *, temperature):
    student, teacher = standardize_logits(student), standardize_logits(teacher)
    return kd_loss(student, teacher, temperature=temperature)


METHODS = {
    kd: (kd_loss, 4.0),
    soft_targets: (soft_cross_entropy_loss, 3.0),
    standardized_kd: (standardized_loss, 2.0),
}


def outputs(*shapes):
    generator = np.random.default_rng(0)
    draw = [jnp.array(generator.normal(size=s), jnp.float32) for s in shapes]
    return [Features(output=x) for x in draw]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("temperature", [None, 1.5])
def test_the_values_are_those_of_the_loss(method, temperature):
    loss, default = METHODS[method]
    student, teacher = outputs((5, 7), (5, 7))
    made = method() if temperature is None else method(temperature)
    context = Context(jax.random.key(0), jnp.int32(0), True)
    # A program each: without it, every operation would be compiled by itself.
    apply = jax.jit(lambda *shown: made.apply({}, {}, *shown, {}, context))
    values, memory, metrics = apply(student, teacher)
    loss = jax.jit(functools.partial(loss, temperature=temperature or default))
    want = loss(student.output, teacher.output)
    np.testing.assert_array_equal(values, want)
    assert (memory, metrics) == ({}, {})


@pytest.mark.parametrize("method", METHODS)
def test_both_outputs_are_wanted_and_nothing_is_trained(method):
    made = method()
    assert made.student == made.teacher == Wants(output=True)
    assert made.init(jax.random.key(0), *outputs((5, 7), (5, 7)), None) == ({}, {})


FEWEST = {
    "kd": (kd(), 2),
    "soft_targets": (soft_targets(), 2),
    "standardized_kd": (standardized_kd(), 3),
    "dist": (dist(), 2),
    "dist within examples": (dist(gamma=0.0), 3),
    "decoupled_kd": (decoupled_kd(), 2),
    "decoupled_kd of the others": (decoupled_kd(alpha=0.0), 3),
}


@pytest.mark.parametrize("name", FEWEST)
def test_so_few_classes_that_nothing_is_learned_are_refused(name):
    (method, least), key = FEWEST[name], jax.random.key(0)
    few, enough = (outputs((5, n), (5, n)) for n in (least - 1, least))
    match = rf"{name.partition(' ')[0]}: expected outputs of {least} classes or more"
    with pytest.raises(ValueError, match=match):
        method.init(key, *few, None)
    assert method.init(key, *enough, None) == ({}, {})

    def learned(student, teacher):
        def total(output):
            batch = {"label": jnp.arange(5) % output.shape[-1]}
            context, student = Context(key, jnp.int32(0), True), Features(output=output)
            return method.apply({}, {}, student, teacher, batch, context)[0].sum()

        return np.abs(jax.jit(jax.grad(total))(student.output)).max()

    assert learned(*enough) > 1e-3
    if name != "decoupled_kd":  # its loss refuses one class by itself
        assert learned(*few) < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_other_classes_are_refused_at_initialization(method):
    message = r"same number of classes, got outputs \(5, 7\) and \(5, 10\)"
    with pytest.raises(ValueError, match=f"{method.__name__}: .*{message}"):
        method().init(jax.random.key(0), *outputs((5, 7), (5, 10)), None)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("temperature", [0.0, -1.0, np.nan, np.inf])
def test_a_temperature_that_is_none_is_refused(method, temperature):
    with pytest.raises(ValueError, match=f"{method.__name__}: expected temperature"):
        method(temperature)
