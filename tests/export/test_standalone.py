"""A network that stands alone takes pixels, and gives the logits of the network."""

import jax
import numpy as np
import pytest

import hintjax as hj
from hintjax.data import Standardize
from hintjax.data.standardize import standardized
from hintjax.export import standalone

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("unchecked")]


def test_pixels_of_any_dtype_give_the_logits(model, images, wanted):
    for pixels in (images, images.astype(np.float32)):
        found = jax.jit(model.apply)(pixels)
        np.testing.assert_allclose(found, wanted, atol=1e-5)
        assert (found.argmax(-1) == wanted.argmax(-1)).all()


def test_it_standardizes_as_training_does():
    draws = np.random.default_rng(0)
    image = draws.integers(0, 256, (2, 3, 3, 3), dtype=np.uint8)
    mean, std = np.float32([0.1, 0.5, 0.9]), np.float32([0.2, 1 / 255, 0.3])
    same = hj.function(lambda params, state, x, train, key: (x, {}, state))
    alone = standalone(same, hj.Variables({}, {}), (3, 3, 3), mean=mean, std=std)
    wanted = standardized(np, image, Standardize(mean, std))
    np.testing.assert_allclose(alone.apply(image), wanted, rtol=1e-5, atol=1e-5)


def test_the_description_names_classes_and_preprocessing(model):
    assert model.about["classes"] == ["zero", "one", "two", "three"]
    assert model.about["input"] == "image: pixels 0..255, shape (batch, 8, 8, 1)"
    assert model.about["output"] == "logits: shape (batch, 4)"
    np.testing.assert_allclose(model.about["std"], [0.25])


def test_statistics_of_other_channels_are_refused(network, variables):
    with pytest.raises(hj.Refusal, match="mean and std to have 1 numbers"):
        two = np.ones(2)
        standalone(network, variables, (8, 8, 1), mean=two, std=two)


def test_an_output_of_several_arrays_is_refused():
    pair = hj.function(lambda params, state, x, train, key: ((x, x), {}, state))
    one = np.ones(1)
    with pytest.raises(hj.Refusal, match="output is one array, got tuple of 2"):
        standalone(pair, hj.Variables({}, {}), (2, 2, 1), mean=one, std=one)
