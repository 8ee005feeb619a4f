"""Hard labels, against the authors' line in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hintjax as hj
from hintjax import losses
from hintjax.networks import Features

pytestmark = pytest.mark.usefixtures("strict")

# One program: without it, every operation would be compiled by itself.
hard_label_loss = jax.jit(losses.hard_label_loss)


def test_it_is_the_cross_entropy_with_the_teachers_class():
    draw = np.random.default_rng(0).normal(size=(2, 7, 5))
    student, teacher = np.float32(draw)
    logs = draw[0] - np.log(np.exp(draw[0]).sum(-1, keepdims=True))
    want = -logs[np.arange(7), draw[1].argmax(-1)]
    np.testing.assert_allclose(hard_label_loss(student, teacher), want, rtol=1e-5)
    total = jax.grad(lambda s, t: hard_label_loss(s, t).sum(), 1)
    by_teacher = jax.jit(total)(student, teacher)
    assert np.all(by_teacher == 0)


def test_deit_has_two_heads_of_equal_weight():
    task = hj.task(optax.softmax_cross_entropy_with_integer_labels)
    eye = np.eye(3, dtype=np.float32)
    heads = {"class": jnp.array(eye), "distilled": jnp.array(2 * eye)}
    method = hj.objective(
        task=hj.weighted(hj.at_head(task, student="class"), 0.5),
        hard=hj.weighted(hj.at_head(hj.hard_labels(), student="distilled"), 0.5),
    )
    teacher = jnp.array(eye[[0, 1, 1]])
    label = jnp.array([0, 1, 2])
    context = hj.Context(jax.random.key(0), jnp.int32(0), True)
    shown = Features(hints=heads), Features(output=teacher)
    params, memory = method.init(context.key, *shown, None)
    values = jax.jit(
        lambda *shown: method.apply(params, memory, *shown, {"label": label}, context)
    )(*shown)[0]
    entropy = jax.jit(optax.softmax_cross_entropy_with_integer_labels)
    want = np.asarray(entropy(heads["class"], label))
    want = want + entropy(heads["distilled"], jnp.array([0, 1, 1]))
    np.testing.assert_allclose(values, want / 2, rtol=1e-6)
