"""Methods of outputs with positions, their masks, and shapes that cannot work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hintjax as hj
from hintjax import losses
from hintjax.method import Context
from hintjax.networks import Features

pytestmark = pytest.mark.usefixtures("strict")

CONTEXT = Context(jax.random.key(0), jnp.int32(0), True)
LABEL = jnp.arange(12, dtype=jnp.int32).reshape(4, 3) % 7
TOKENS = jnp.array([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]], bool)
EXAMPLES = jnp.array([True, False, True, True])


def standardized(student, teacher, where):
    ours, theirs = (
        losses.standardize_logits(x, where=where) for x in (student, teacher)
    )
    return losses.kd_loss(ours, theirs, temperature=2.0, where=where)


METHODS = {
    "kd": losses.kd_loss,
    "soft_targets": losses.soft_cross_entropy_loss,
    "standardized_kd": standardized,
    "decoupled_kd": lambda *a, **k: losses.decoupled_kd_loss(*a, LABEL, **k),
    "dist": losses.dist_loss,
}


# One program each: without it, every operation would be compiled by itself.
METHODS = {name: jax.jit(loss) for name, loss in METHODS.items()}


def applied(method, *arguments):
    return jax.jit(lambda *a: method.apply({}, {}, *a, CONTEXT))(*arguments)


def outputs(shape=(4, 3, 7)):
    generator = np.random.default_rng(0)
    draw = (jnp.array(generator.normal(size=shape), jnp.float32) for _ in "st")
    return [Features(output=x) for x in draw]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("filled", [False, True])
def test_padding_names_the_mask_of_positions(name, filled):
    student, teacher = outputs()
    batch = {"label": LABEL, "mask": TOKENS}
    batch |= {"where": EXAMPLES} if filled else {}
    method = getattr(hj, name)(padding="mask")
    got, memory, metrics = applied(method, student, teacher, batch)
    where = TOKENS & EXAMPLES[:, None] if filled else TOKENS
    want = METHODS[name](student.output, teacher.output, where=where)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert (memory, metrics) == ({}, {})


@pytest.mark.parametrize("name", METHODS)
def test_without_padding_all_positions_count(name):
    student, teacher = outputs()
    method = getattr(hj, name)()
    got, *_ = applied(method, student, teacher, {"label": LABEL})
    want = METHODS[name](student.output, teacher.output, where=None)
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_a_mask_that_is_not_in_the_batch_is_refused(name):
    method = getattr(hj, name)(padding="mask")
    message = rf"{name}: expected 'mask' in the batch, got \['label'\]"
    with pytest.raises(hj.Refusal, match=message):
        method.apply({}, {}, *outputs(), {"label": LABEL}, CONTEXT)


def test_labels_that_are_not_in_the_batch_are_refused():
    with pytest.raises(
        hj.Refusal, match=r"decoupled_kd: expected 'label' in the batch"
    ):
        hj.decoupled_kd().apply({}, {}, *outputs(), {}, CONTEXT)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(), (4,)])
def test_outputs_without_classes_are_refused_at_initialization(name, shape):
    with pytest.raises(hj.Refusal, match=f"{name}: expected the output .*channels"):
        getattr(hj, name)().init(CONTEXT.key, *outputs(shape), None)


@pytest.mark.parametrize("name", METHODS)
def test_outputs_of_time_first_are_refused_before_the_loss(name):
    """Both networks put the tokens first, so only the batch tells them apart."""
    batch = {"label": jnp.zeros(5, jnp.int32), "x": jnp.zeros((5, 2))}
    wanted = f"{name}: expected the output .*the batch of 5 as their first axis"
    with pytest.raises(hj.Refusal, match=wanted):
        getattr(hj, name)().apply({}, {}, *outputs((3, 5, 7)), batch, CONTEXT)
