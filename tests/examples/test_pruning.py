"""The example of pruning: what is cut was not needed, and the whole script runs."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hintjax as hj

FOLDER = Path(__file__).parents[2] / "examples" / "pruning"


@pytest.fixture(scope="module")
def prune():
    """The example, as if it were run from its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield import_module("prune")


@pytest.fixture(scope="module")
def images():
    draws = np.random.default_rng(0)
    image = jnp.asarray(draws.normal(size=(64, 8, 8, 1)), jnp.float32)
    return {"image": image, "label": jnp.arange(64) % 4}


def with_dead_channels(prune, images):
    """A network, half of whose channels are zero, and the numbers of the others."""
    whole = hj.linen(prune.network(prune.WIDTHS, 4))
    fresh = whole.init(jax.random.key(1), images["image"][:1])
    params, alive = jax.tree.map(np.array, fresh.params), {}
    draws = np.random.default_rng(1)
    for layer, width in zip(prune.LAYERS, prune.WIDTHS, strict=True):
        alive[layer] = np.sort(draws.permutation(width)[: width // 2])
        dead = np.setdiff1d(np.arange(width), alive[layer])
        params[layer]["conv"]["kernel"][..., dead] = 0
    return whole, hj.Variables(params, fresh.state), alive


@pytest.mark.quick
def test_cutting_channels_that_are_zero_changes_no_logit(prune, images):
    whole, variables, alive = with_dead_channels(prune, images)
    widths = [width // 2 for width in prune.WIDTHS]
    for scores in (
        prune.magnitude(variables.params),
        prune.taylor(whole, variables, images),
    ):
        kept = prune.kept(scores, widths)
        assert all((kept[layer] == alive[layer]).all() for layer in prune.LAYERS)
    narrow = hj.linen(prune.network(widths, 4))
    left = hj.Variables(prune.cut(variables.params, alive), {})
    shapes = jax.eval_shape(narrow.init, jax.random.key(0), images["image"][:1])
    assert jax.tree.map(np.shape, left.params) == jax.tree.map(np.shape, shapes.params)
    np.testing.assert_allclose(
        prune.output(narrow, left, images),
        prune.output(whole, variables, images),
        atol=1e-5,
    )


def test_the_pruning_example_runs(prune, tmp_path, capsys):
    options = ["--limit", "64", "--epochs", "1", "--output", str(tmp_path / "out")]
    found = prune.main(options)
    assert list(found)[:3] == ["whole", "cut by magnitude", "cut by taylor"]
    assert len(found) == 7 and all(0 <= each <= 1 for each in found.values())
    shown = capsys.readouterr().out
    files = {path.name for path in (tmp_path / "out").iterdir()}
    for package, name in (
        ("flatbuffers", "pruned.stablehlo"),
        ("tensorflow", "pruned-int8.tflite"),
    ):
        assert (name in files) == (find_spec(package) is not None)
        assert f"no {name}" in shown or f"{name}, " in shown
