"""FT as a method: a paraphraser first, then its factor, which does not move."""

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


def test_the_two_stages_share_their_parameters():
    student, teacher = drawn()
    shapes = jax.eval_shape(lambda: (student, teacher))
    first, second = (
        jax.eval_shape(
            lambda key, m=m: m(PAIRS, rate=0.7).init(key, *shapes, None), KEY
        )
        for m in (paraphrase, factor_transfer)
    )
    assert first == second
    encoder = first[0]["a->x"]["paraphraser"]["encoder"]
    channels = [layer["kernel"].shape[-1] for layer in encoder.values()]
    assert channels == [6, 4, 4]


def test_the_first_stage_trains_the_paraphraser_alone():
    student, teacher = drawn()
    method = paraphrase(PAIRS)
    params, memory = jax.jit(lambda key: method.init(key, student, teacher, None))(KEY)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        return run(method, params, memory, student, teacher)[0].mean()

    before, gradients = loss(params)
    assert largest(gradients["a->x"]["translator"]) == 0
    assert largest(gradients["a->x"]["paraphraser"]["encoder"]) > 0
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
    @jax.grad
    def gradient(params):
        return run(method, params, memory, student, teacher)[0].mean()

    own = gradient(params)["a->x"]
    assert largest(own["translator"]) > 0
    assert largest(own["paraphraser"]) == 0
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
    with pytest.raises(ValueError, match=r"paraphrase: expected a and x to be maps"):
        paraphrase(PAIRS).init(KEY, student, vector, None)
