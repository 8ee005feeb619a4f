"""MGD's distance against its formula; the whole method is tested with the methods."""

import jax.numpy as jnp
import numpy as np
import pytest

from hintjax.losses import masked_generation_loss

pytestmark = pytest.mark.usefixtures("strict")


def test_the_loss_is_the_formula():
    s, t = np.random.default_rng(0).normal(size=(2, 3, 4, 4, 5)).astype(np.float32)
    got = masked_generation_loss(jnp.array(s), jnp.array(t))
    np.testing.assert_allclose(got, ((s - t) ** 2).sum((1, 2, 3)), rtol=1e-5)
