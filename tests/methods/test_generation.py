"""MGD: the generator and the loss against the authors' code, and the masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import masked_channels, masked_generation, masked_positions, regressors
from hintjax.losses import masked_generation_loss
from hintjax.method import Context
from hintjax.networks import Features

pytestmark = pytest.mark.usefixtures("strict")

KEY = jax.random.key(0)
CONTEXT = Context(KEY, jnp.int32(0), True)
LAYERS = {"align": "align", "hidden": "generation.0", "generate": "generation.2"}


def read(case, kind):
    return {
        ours: {"kernel": f"{kind}.{theirs}.weight", "bias": f"{kind}.{theirs}.bias"}
        for ours, theirs in LAYERS.items()
    }


def test_generator_and_loss_are_the_code(golden):
    case = golden("mgd/cls_channel_mask")
    module = regressors.Generator(12)
    mask = (case["state.mask_uniform"] >= 0.15).reshape(4, 1, 1, 12)
    params = jax.tree.map(lambda name: case[name], read(case, "param"))

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def run(params, x):
        generated = module.apply({"params": params}, x, mask=mask)
        return 7e-5 * masked_generation_loss(generated, case["in.f_t"]).mean()

    value, (by_params, by_x) = run(params, case["in.f_s"])
    assert case.error("out.loss", value) < 1e-5
    assert case.error("grad.in.f_s", by_x) < 1e-5
    errors = jax.tree.map(case.error, read(case, "grad.param"), by_params)
    assert max(jax.tree.leaves(errors)) < 1e-5


@pytest.mark.parametrize(
    ("mask", "shape"), [(masked_channels, (1, 1, 50)), (masked_positions, (40, 30, 1))]
)
def test_a_mask_hides_its_share(mask, shape):
    keys = jax.random.split(KEY, 100)
    draw = jax.vmap(lambda key: mask(key, (40, 30, 50), 0.15))
    kept = np.asarray(jax.jit(draw)(keys))
    assert kept.shape == (100, *shape)
    np.testing.assert_allclose(kept.mean(), 0.85, atol=0.02)


def features(channels=3):
    generator = np.random.default_rng(0)
    s, t = (
        jnp.array(generator.normal(size=(4, 6, 6, c)), jnp.float32)
        for c in (channels, 5)
    )
    return Features(hints={"a": s}), Features(hints={"x": t})


def test_the_method_draws_the_mask_of_an_example_from_its_index():
    student, teacher = features()
    method = masked_generation([("a", "x")], rate=0.5, mask=masked_positions)
    params, memory = jax.jit(lambda key: method.init(key, student, teacher, None))(KEY)
    same = jax.tree.map(lambda x: np.repeat(x[:1], 4, 0), (student, teacher))
    batch = {"index": jnp.array([7, 8, 9, 7])}

    @jax.jit
    def apply(key):
        context = CONTEXT._replace(key=key)
        return method.apply(params, memory, *same, batch, context)

    values, after, _ = apply(KEY)
    values = np.asarray(values)
    assert values[0] == values[3]
    assert len(set(values.tolist())) == 3
    assert after == memory
    again, _, _ = apply(jax.random.key(1))
    assert np.any(again != values)


def test_equal_channels_are_not_aligned_and_no_rate_hides_nothing():
    student, teacher = features(5)
    method = masked_generation([("a", "x")], rate=0.0)
    params, memory = jax.jit(lambda key: method.init(key, student, teacher, None))(KEY)
    assert set(params["a->x"]) == {"hidden", "generate"}
    apply = jax.jit(lambda *shown: method.apply(params, memory, *shown, {}, CONTEXT))
    values, _, _ = apply(student, teacher)
    module = regressors.Generator(5)

    @jax.jit
    def loss(x, hint):
        return masked_generation_loss(module.apply({"params": params["a->x"]}, x), hint)

    want = loss(student.hints["a"], teacher.hints["x"])
    np.testing.assert_allclose(values, want, rtol=1e-5)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match=r"masked_generation: expected a rate in"):
        masked_generation([("a", "x")], rate=1.0)
    student, _ = features()
    vector = Features(hints={"x": jnp.ones((4, 5))})
    with pytest.raises(ValueError, match=r"masked_generation: expected maps"):
        masked_generation([("a", "x")]).init(KEY, student, vector, None)
