"""FT as a method: a paraphraser first, then its factor, which does not move."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hintjax import factor_transfer, paraphrase
from hintjax.losses import factor_loss
from hintjax.method import Context
from hintjax.networks import Features

pytestmark = pytest.mark.usefixtures("strict")

KEY = jax.random.key(0)
PAIRS = [("a", "x")]


def drawn():
    generator = np.random.default_rng(0)
    return tuple(
        Features(hints={name: jnp.array(generator.normal(size=shape), jnp.float32)})
        for name, shape in (("a", (4, 4, 4, 3)), ("x", (4, 8, 8, 6)))
    )


def run(method, params, memory, student, teacher):
    context = Context(KEY, jnp.int32(0), True)
    return method.apply(params, memory, student, teacher, {}, context)


def largest(tree):
    return max(jnp.abs(x).max() for x in jax.tree.leaves(tree))


def test_what_the_first_stage_trains_the_second_remembers():
    student, teacher = drawn()
    shapes = jax.eval_shape(lambda: (student, teacher))
    method = factor_transfer(PAIRS, rate=0.7)
    before, after = (
        jax.eval_shape(lambda key, m=m: m.init(key, *shapes, None), KEY)
        for m in (method.prepare, method)
    )
    assert before[0] == after[1]["prepared"]
    encoder = before[0]["a->x"]["encoder"]
    channels = [layer["kernel"].shape[-1] for layer in encoder.values()]
    assert channels == [6, 4, 4]


def test_the_first_stage_trains_the_paraphraser():
    student, teacher = drawn()
    method = paraphrase(PAIRS)
    params, memory = jax.jit(lambda key: method.init(key, student, teacher, None))(KEY)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        return run(method, params, memory, student, teacher)[0].mean()

    before, gradients = loss(params)
    moved = optax.tree.add_scale(params, -0.1, gradients)
    assert loss(moved)[0] < before


def test_the_second_stage_leaves_the_paraphraser():
    student, teacher = drawn()
    seen = []

    def loss(ours, theirs):
        seen.append((ours.shape, theirs.shape))
        return factor_loss(ours, theirs)

    method = factor_transfer(PAIRS, loss=loss)
    params, memory = jax.jit(lambda key: method.init(key, student, teacher, None))(KEY)

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def learning(params):
        values, after, _ = run(method, params, memory, student, teacher)
        return values.mean(), after

    gradient, after = learning(params)
    assert largest(gradient) > 0
    chex.assert_trees_all_equal(after["prepared"], memory["prepared"])
    assert seen == [((4, 4, 4, 3), (4, 8, 8, 3))]


@pytest.mark.parametrize("rate", [0.0, 1.5])
def test_a_rate_is_a_share(rate):
    with pytest.raises(
        ValueError, match=r"factor_transfer: expected a rate in \(0, 1\]"
    ):
        factor_transfer(PAIRS, rate=rate)


def test_vectors_are_refused():
    student, _ = drawn()
    vector = Features(hints={"x": jnp.ones((4, 6))})
    with pytest.raises(
        ValueError, match=r"factor_transfer: expected a and x to be maps"
    ):
        paraphrase(PAIRS).init(KEY, student, vector, None)
