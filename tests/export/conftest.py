"""A trained-like network with BatchNorm, and images for it."""

import warnings
from importlib import import_module
from importlib.util import find_spec

import jax
import numpy as np
import pytest

import hintjax as hj
from hintjax import models
from hintjax.export import standalone

if find_spec("tensorflow"):
    # Keras defines a class of unpicklers, so it is imported before `no_pickle`.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import_module("tensorflow")

MEAN, STD = np.float32([0.3]), np.float32([0.25])
CLASSES = ("zero", "one", "two", "three")


@pytest.fixture(scope="session")
def images():
    draws = np.random.default_rng(1)
    return draws.integers(0, 256, (24, 8, 8, 1), dtype=np.uint8)


@pytest.fixture(scope="session")
def network():
    return hj.linen(models.resnet8(classes=4))


@pytest.fixture(scope="session")
def variables(network):
    return random(network)


def random(network):
    """Variables whose activations are neither small nor large in any layer."""
    draws = np.random.default_rng(0)
    shapes = jax.eval_shape(
        network.init, jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32)
    )

    def drawn(keys, leaf):
        if "var" in jax.tree_util.keystr(keys):
            return draws.uniform(0.5, 2, leaf.shape).astype(np.float32)
        width = 1 / np.sqrt(max(1, np.prod(leaf.shape[:-1])))
        return np.float32(draws.normal(0, width, leaf.shape))

    return jax.tree_util.tree_map_with_path(drawn, shapes)


def alone(network, variables):
    return standalone(
        network, variables, (8, 8, 1), mean=MEAN, std=STD, classes=CLASSES
    )


@pytest.fixture(scope="session")
def model(network, variables):
    return alone(network, variables)


@pytest.fixture(scope="session")
def transformer():
    network = hj.linen(models.VisionTransformer(4, 16, 1, 2, classes=4))
    return alone(network, random(network))


@pytest.fixture
def model_again(network, variables):
    """The same network, of which nothing that is traced is kept."""
    jax.clear_caches()
    return alone(network, variables)


@pytest.fixture(scope="session")
def wanted(network, variables, images):
    """The logits of the network itself."""
    inputs = jax.numpy.asarray((images / np.float32(255) - MEAN) / STD)
    wants = hj.Wants(output=True)
    shown, _ = network.apply(*variables, inputs, wants=wants, train=False)
    return np.asarray(shown.output)


@pytest.fixture
def secrets():
    """Names of this machine and its user, which no file may hold."""
    import getpass
    import socket
    from pathlib import Path

    paths = {str(Path.home()), str(Path.cwd()), str(Path(__file__).parents[2])}
    names = {getpass.getuser(), socket.gethostname(), "site-packages", ".py"}
    return [text.encode() for text in paths | names if len(text) > 1]
