"""Images in another normalization: what is converted, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import hintjax as hj
from hintjax.networks import renormalized

pytestmark = pytest.mark.quick
OWN = ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
NETWORK = hj.linen(nn.Sequential([nn.Dense(2)]))


@pytest.mark.parametrize(
    "given", [((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)), (np.array([0.5]), np.array([0.25]))]
)
def test_the_network_sees_pixels_in_its_own_normalization(given):
    mean, std = map(np.asarray, given)
    pixels = np.random.default_rng(0).uniform(size=(2, 4, 4, len(mean)))
    network = renormalized(NETWORK, given, OWN)
    images = jnp.asarray((pixels - mean) / std, jnp.float32)
    variables = jax.jit(network.init)(jax.random.key(0), images)
    assert variables.params["layers_0"]["kernel"].shape == (3, 2)
    wants = hj.Wants(output=True, hints=("layers_0",))
    got, _ = network.apply(*variables, images, wants=wants, train=False)
    own = jnp.asarray((pixels - np.array(OWN[0])) / np.array(OWN[1]), jnp.float32)
    want, _ = NETWORK.apply(*variables, own, wants=wants, train=False)
    np.testing.assert_allclose(got.output, want.output, rtol=0, atol=1e-6)
    np.testing.assert_allclose(got.hints["layers_0"], want.output, rtol=0, atol=1e-6)
    layers = network.layers(*variables, images)
    assert layers == NETWORK.layers(*variables, own)


def test_the_precision_of_the_images_stays():
    network = renormalized(NETWORK, OWN, OWN)
    images = jnp.ones((1, 2, 2, 3), jnp.bfloat16)
    variables = NETWORK.init(jax.random.key(0), images)
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables)
    wants = hj.Wants(output=True)
    assert network.apply(*low, images, wants=wants, train=False)[0].output.dtype == (
        jnp.bfloat16
    )


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (((0.5,) * 3, (0.5,) * 2), "a mean and a std for each channel, got the shapes"),
        (((0.5,) * 4, (0.5,) * 4), "images of 1 or 3 channels, got 4"),
    ],
)
def test_other_channels_are_refused(given, sentence):
    with pytest.raises(ValueError, match=f"renormalized: expected {sentence}"):
        renormalized(NETWORK, given, OWN)
