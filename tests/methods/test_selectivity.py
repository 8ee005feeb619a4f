"""NST as a method: the published loss, summed over the pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import selectivity
from hintjax.losses import selectivity_loss
from hintjax.method import Context
from hintjax.networks import Features

pytestmark = pytest.mark.usefixtures("strict")


def test_the_values_are_the_loss_summed_over_pairs():
    generator = np.random.default_rng(0)
    s, t = jnp.array(generator.normal(size=(2, 3, 4, 4, 5)), jnp.float32)
    student = Features(hints={"a": s, "b": s[:, ::2]})
    teacher = Features(hints={"x": t, "y": t[..., :2]})
    context = Context(jax.random.key(0), jnp.int32(0), True)
    method = selectivity([("a", "x"), ("b", "y")])
    values, memory, metrics = method.apply({}, {}, student, teacher, {}, context)
    want = selectivity_loss(s, t) + selectivity_loss(s[:, ::2], t[..., :2])
    np.testing.assert_allclose(values, want, rtol=1e-5)
    assert (memory, metrics) == ({}, {})
    with pytest.raises(ValueError, match="selectivity: expected at least one"):
        selectivity([])
