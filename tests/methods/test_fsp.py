"""FSP as a method: the published loss, summed over the flows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import flows, fsp, regressors
from hintjax.losses import (
    fsp_loss,
    fsp_loss_paper,
    fsp_matrix_loss_paper,
    fsp_matrix_paper,
)
from hintjax.method import Context
from hintjax.networks import Features, Wants

pytestmark = pytest.mark.usefixtures("strict")

KEY = jax.random.key(0)
# Two flows of one shape, and one of another.
STUDENT = {"s0": (8, 8, 3), "s1": (8, 8, 3), "s2": (4, 4, 3), "s3": (2, 2, 5)}
TEACHER = {"t0": (9, 9, 3), "t1": (9, 9, 3), "t2": (3, 3, 3), "t3": (3, 3, 5)}
PAIRS = flows(list(zip(STUDENT, TEACHER, strict=True)))


def features(shapes, seed=0):
    generator = np.random.default_rng(seed)

    def draw(shape):
        return jnp.array(generator.normal(size=(3, *shape)), jnp.float32)

    return Features(hints={name: draw(shape) for name, shape in shapes.items()})


def apply(method, student, teacher, params=None, memory=None):
    context = Context(KEY, jnp.int32(0), True)
    run = jax.jit(
        lambda s, t: method.apply(params or {}, memory or {}, s, t, {}, context)
    )
    return run(student, teacher)


@pytest.mark.parametrize(
    ("arguments", "loss"),
    [
        ({}, fsp_loss),
        (
            {"matrix": fsp_matrix_paper, "loss": fsp_matrix_loss_paper},
            fsp_loss_paper,
        ),
    ],
)
def test_the_values_are_the_loss_summed_over_flows(arguments, loss):
    student, teacher = features(STUDENT), features(TEACHER, 1)
    method = fsp(PAIRS, **arguments)
    values, memory, metrics = apply(method, student, teacher)
    loss = jax.jit(loss)  # else each of its operations would be one program
    want = sum(
        np.asarray(
            loss(tuple(map(student.hints.get, s)), tuple(map(teacher.hints.get, t)))
        )
        for s, t in PAIRS
    )
    np.testing.assert_allclose(values, want, rtol=1e-5)
    assert (memory, metrics) == ({}, {})


def test_flows_join_neighbors_and_each_layer_is_wanted_once():
    assert PAIRS[0] == (("s0", "s1"), ("t0", "t1"))
    assert len(PAIRS) == 3
    method = fsp(PAIRS)
    assert method.student == Wants(hints=tuple(STUDENT))
    assert method.teacher == Wants(hints=tuple(TEACHER))
    with pytest.raises(ValueError, match="flows: expected at least two pairs"):
        flows([("a", "b")])
    with pytest.raises(ValueError, match="fsp: expected at least one"):
        fsp([])


def test_other_channels_need_a_regressor():
    student, teacher = features(STUDENT), features(TEACHER | {"t2": (3, 3, 4)}, 1)
    with pytest.raises(ValueError, match=r"fsp: .*s2 and t2.*regressor="):
        fsp(PAIRS).init(KEY, student, teacher, None)
    sizing = functools.partial(regressors.linear, batch_norm=True)
    method = fsp(PAIRS, regressor=sizing)
    params, memory = jax.jit(lambda k: method.init(k, student, teacher, None))(KEY)
    assert set(params) == {f"s{i}->t{i}" for i in range(4)}
    values, after, _ = apply(method, student, teacher, params, memory)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, memory)
    assert np.isfinite(values).all()
