"""Measurements of two tiny networks, against numpy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hintjax as hj
from hintjax.pairing import Seen, alignment, measure
from hintjax.pairing.measuring import _compared, _size
from hintjax.similarity import add_minibatch, begin_minibatch, minibatch_cka

CLASSES, SIZE = 3, 16


class Net(nn.Module):
    """Convolutions by name, then the mean of the positions and a head."""

    widths: tuple[int, ...]
    strides: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for i, width in enumerate(self.widths):
            stride = self.strides[i]
            conv = nn.Conv(width, (3, 3), (stride, stride), name=f"conv{i + 1}")
            x = conv(jnp.tanh(x))
        return nn.Dense(CLASSES, name="head")(x.mean((1, 2)))


STUDENT = hj.linen(Net((2, 2, 2, 3), (1, 1, 1, 1)))
TEACHER = hj.linen(Net((4, 3, 2), (1, 2, 1)))


def batches(count=4):
    random = np.random.default_rng(0)
    found = []
    for i in range(count):
        label = random.integers(0, CLASSES, SIZE)
        image = random.normal(size=(SIZE, 4, 4, 1)) + label[:, None, None, None]
        where = np.arange(SIZE) < (SIZE if i < count - 1 else 10)
        image = np.where(where[:, None, None, None], image, 1e6).astype(np.float32)
        found.append({"image": image, "label": label.astype(np.int32), "where": where})
    return found


BATCHES = batches()
STARTED, TAUGHT = (
    jax.jit(network.init)(jax.random.key(i), BATCHES[0]["image"])
    for i, network in enumerate((STUDENT, TEACHER))
)
LAST = ("conv4", "conv3")


@pytest.fixture(scope="module")
def found():
    networks = STUDENT, STARTED, TEACHER, TAUGHT
    extra = [("conv1", "conv3")]
    return measure(*networks, BATCHES, classes=CLASSES, pairs=extra)


def hints(network, variables, path, half):
    """The activations of the valid examples of the even or odd batches."""
    wants = hj.Wants(hints=(path,))
    return np.concatenate(
        [
            np.asarray(
                network.apply(*variables, b["image"], wants=wants, train=False)[
                    0
                ].hints[path]
            )[b["where"]]
            for b in BATCHES[half::2]
        ]
    ).astype(float)


def labels(half):
    return np.concatenate([b["label"][b["where"]] for b in BATCHES[half::2]])


def ridge(x, y):
    """The weights and the bias of ridge regression."""
    centered = x - x.mean(0)
    square = centered.T @ centered
    penalty = 0.01 * np.trace(square) / len(square) * np.eye(len(square))
    weights = np.linalg.solve(square + penalty, centered.T @ (y - y.mean(0)))
    return weights, y.mean(0) - x.mean(0) @ weights


def test_each_hint_layer_has_the_guided_layer_of_nearest_depth(found):
    pairs = [(one.guided, one.hint) for one in found.candidates]
    assert pairs == [
        *(("conv1", "conv1"), ("conv3", "conv2"), ("conv4", "conv3")),
        ("conv1", "conv3"),
    ]
    assert [one.depth for one in found.candidates] == pytest.approx(
        [1 / 3, 2 / 3, 1, 1]
    )
    assert [one.guided_depth for one in found.candidates] == [0.25, 0.75, 1.0, 0.25]
    assert [one.shape for one in found.candidates[:2]] == [(4, 4, 4), (2, 2, 3)]
    assert found.chance == np.bincount(labels(1)).max() / len(labels(1))


def test_the_probe_is_ridge_regression_judged_on_the_other_half(found):
    for one in found.candidates[:3]:
        x, new = (hints(TEACHER, TAUGHT, one.hint, h).mean((1, 2)) for h in (0, 1))
        weights, bias = ridge(x, np.eye(CLASSES)[labels(0)])
        right = (new @ weights + bias).argmax(-1) == labels(1)
        assert one.probe == pytest.approx(right.mean(), abs=1e-6)
    assert found.candidates[0].probe > found.chance


def test_r2_is_that_of_a_linear_map_at_the_smaller_size(found):
    def rows(network, variables, path, half):
        x = hints(network, variables, path, half)
        if x.shape[1] == 4:
            n, _, _, c = x.shape
            x = x.reshape(n, 2, 2, 2, 2, c).mean((2, 4))
        return x.reshape(-1, x.shape[-1])

    for one in found.candidates[1:]:
        x, new_x = (rows(STUDENT, STARTED, one.guided, half) for half in (0, 1))
        y, new_y = (rows(TEACHER, TAUGHT, one.hint, half) for half in (0, 1))
        weights, bias = ridge(x, y)
        error = np.square(new_y - new_x @ weights - bias).sum()
        want = 1 - error / np.square(new_y - new_y.mean(0)).sum()
        assert one.explained == pytest.approx(want, abs=1e-3)


def test_costs_rise_with_the_depth_and_regressors_are_counted(found):
    first, second, third, other = found.candidates
    assert 0 < first.cost < second.cost < third.cost <= 1
    assert other.cost < third.cost  # its guided layer is shallower
    assert first.regressor == 2 * 4 + 4
    assert second.regressor == 3 * 3 * 2 * 3 + 3


def test_the_alignment_is_the_similarity_of_all_layers(found):
    assert found.teacher == ("conv1", "conv2", "conv3")
    assert found.student == ("conv1", "conv2", "conv3", "conv4")
    sums = begin_minibatch(2)
    for batch in BATCHES:
        pair = [
            network.apply(
                *variables, batch["image"], wants=hj.Wants(hints=(path,)), train=False
            )[0].hints[path]
            for network, variables, path in (
                (TEACHER, TAUGHT, "conv3"),
                (STUDENT, STARTED, "conv2"),
            )
        ]
        sums = add_minibatch(sums, pair, where=jnp.asarray(batch["where"]))
    np.testing.assert_allclose(found.alike[2, 4], minibatch_cka(sums)[0, 1], rtol=1e-4)
    alone = alignment(Seen(TEACHER, TAUGHT, ("conv3", "conv1")), batches=BATCHES)
    np.testing.assert_allclose(alone[0, 1], found.alike[2, 0], rtol=1e-4)


def test_without_labels_all_but_the_probe_is_measured(found):
    images = [{name: one[name] for name in ("image", "where")} for one in BATCHES]
    networks = STUDENT, STARTED, TEACHER, TAUGHT
    unlabeled = measure(*networks, images, classes=None, pairs=[("conv1", "conv3")])
    assert unlabeled.chance is None
    labeled = tuple(one._replace(probe=None) for one in found.candidates)
    assert unlabeled.candidates == labeled
    np.testing.assert_array_equal(unlabeled.alike, found.alike)


def test_too_little_to_measure_is_refused(unchecked):
    networks = STUDENT, STARTED, TEACHER, TAUGHT
    with pytest.raises(ValueError, match="two batches or more.* got 1"):
        measure(*networks, BATCHES[:1], classes=CLASSES)
    with pytest.raises(ValueError, match=r"a layer of the network, got 'conv9'. List"):
        measure(*networks, BATCHES, classes=CLASSES, pairs=[("conv9", "conv1")])
    with pytest.raises(ValueError, match="the teacher's variables"):
        measure(STUDENT, STARTED, TEACHER, {"w": 1}, BATCHES, classes=CLASSES)


def test_tokens_are_compared_one_by_one_or_as_a_map():
    random = np.random.default_rng(1)
    tokens = random.normal(size=(2, 1 + 16, 3)).astype(np.float32)
    maps = random.normal(size=(2, 2, 2, 5)).astype(np.float32)
    where = jnp.array([True, False])

    def rows(guided, hint, *drop):
        return _compared(jnp.asarray(guided), jnp.asarray(hint), where, drop)

    one, other, valid = rows(tokens, tokens[..., :2], 0, 0)
    np.testing.assert_array_equal(one, tokens.reshape(-1, 3))
    np.testing.assert_array_equal(other, tokens[..., :2].reshape(-1, 2))
    assert valid.tolist() == 17 * [True] + 17 * [False]
    grid = tokens[:, 1:].reshape(2, 2, 2, 2, 2, 3).mean((2, 4)).reshape(-1, 3)
    one, other, valid = rows(tokens, maps, 1, 0)
    np.testing.assert_allclose(one, grid, rtol=1e-5)
    np.testing.assert_array_equal(other, maps.reshape(-1, 5))
    other, one, valid = rows(maps, tokens, 0, 1)
    np.testing.assert_allclose(one, grid, rtol=1e-5)
    # Seventeen tokens are on no square grid, and eight are not seventeen.
    for pair in ((tokens, maps), (tokens, tokens[:, :8])):
        one, other, valid = rows(*pair, 0, 0)
        np.testing.assert_allclose(one, tokens.mean(1), atol=1e-6)
        assert len(other) == 2 and valid is where


def test_the_default_regressor_of_tokens_is_that_of_their_map():
    tokens, fewer, maps = (
        jax.ShapeDtypeStruct(shape, "float32")
        for shape in ((1, 17, 3), (1, 5, 3), (1, 4, 4, 5))
    )
    assert _size(tokens, tokens, (1, 1)) == 3 * 3 + 3
    assert _size(tokens, maps, (1, 0)) == 3 * 5 + 5
    assert _size(maps, tokens, (0, 1)) == 5 * 3 + 3
    assert _size(tokens, maps, (0, 0)) is None  # on no square grid
    assert _size(tokens, fewer, (1, 1)) is None
