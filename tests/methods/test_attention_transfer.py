"""AT as a method: the published loss, summed over the pairs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import attention_transfer
from hintjax.losses import (
    attention_map_loss_paper,
    attention_transfer_loss,
    attention_transfer_loss_paper,
)
from hintjax.method import Context
from hintjax.networks import Features, Wants

pytestmark = pytest.mark.usefixtures("strict")

# Two pairs whose maps have one size, one of another, one where the student is smaller.
SHAPES = {
    ("s1", "t1"): ((8, 8, 3), (8, 8, 5)),
    ("s2", "t2"): ((8, 8, 2), (8, 8, 4)),
    ("s3", "t3"): ((4, 6, 3), (4, 6, 3)),
    ("s4", "t4"): ((4, 4, 3), (8, 8, 7)),
}


def features():
    generator = np.random.default_rng(0)

    def draw(shape):
        return jnp.array(generator.normal(size=(3, *shape)), jnp.float32)

    student = {s: draw(shape) for (s, _), (shape, _) in SHAPES.items()}
    teacher = {t: draw(shape) for (_, t), (_, shape) in SHAPES.items()}
    return Features(hints=student), Features(hints=teacher)


def apply(method, student, teacher):
    context = Context(jax.random.key(0), jnp.int32(0), True)
    run = jax.jit(lambda s, t: method.apply({}, {}, s, t, {}, context))
    return run(student, teacher)


@pytest.mark.parametrize(
    ("arguments", "loss", "hyper"),
    [
        ({}, attention_transfer_loss, {}),
        ({"power": 1}, attention_transfer_loss, {"power": 1}),
        ({"loss": attention_map_loss_paper}, attention_transfer_loss_paper, {}),
    ],
)
def test_the_values_are_the_loss_summed_over_pairs(arguments, loss, hyper):
    student, teacher = features()
    method = attention_transfer(list(SHAPES), **arguments)
    values, memory, metrics = apply(method, student, teacher)
    loss = jax.jit(functools.partial(loss, **hyper))
    want = sum(np.asarray(loss(student.hints[s], teacher.hints[t])) for s, t in SHAPES)
    np.testing.assert_allclose(values, want, rtol=1e-5)
    assert (memory, metrics) == ({}, {})


def test_only_the_layers_of_the_pairs_are_wanted():
    method = attention_transfer([("a", "x"), ("b", "x")])
    assert method.student == Wants(hints=("a", "b"))
    assert method.teacher.hints[0] == "x"
    assert not method.teacher.output
    alone = attention_transfer(list(SHAPES))
    assert alone.init(jax.random.key(0), *features(), None) == ({}, {})


def test_equal_maps_cost_nothing():
    student, _ = features()
    values, _, _ = apply(attention_transfer([("s1", "s1")]), student, student)
    assert np.abs(values).max() < 1e-12


def test_no_pairs_and_no_power_are_refused():
    with pytest.raises(ValueError, match="attention_transfer: expected at least one"):
        attention_transfer([])
    with pytest.raises(ValueError, match="attention_transfer: expected power"):
        attention_transfer([("a", "b")], power=0)
