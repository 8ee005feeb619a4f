"""Metrics against their formulas, and their sentences."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import metrics

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("strict")]


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_accuracy_is_right_for_the_largest_output_alone():
    output = drawn(3, 4, 5)
    labels = np.argmax(output, -1).astype(np.int32)
    labels[0, 0], labels[1, 1] = -1, 255  # no class: never right
    values = metrics.accuracy(jnp.array(output), jnp.array(labels))
    assert values.shape == (3, 4)
    assert values.sum() == 10 and values[0, 0] == values[1, 1] == 0


@pytest.mark.parametrize("labels", [(4,), (4, 1), (4, 7)])
def test_binary_accuracy_compares_signs(labels):
    output = drawn(*labels)
    label = (drawn(*labels, seed=1) > 0).astype(np.int32)
    values = metrics.binary_accuracy(jnp.array(output), jnp.array(label))
    np.testing.assert_array_equal(values, (output > 0) == (label == 1))
    if labels == (4,):
        added = metrics.binary_accuracy(jnp.array(output)[:, None], jnp.array(label))
        np.testing.assert_array_equal(added, values)


def test_f1_is_that_of_the_formula():
    output, label = drawn(6, 5), drawn(6, 5, seed=1) > 0.3
    output[0], label[0] = -1, False
    label[1] = False
    found = output > 0
    both, one = (found & label).sum(-1), (found ^ label).sum(-1)
    with np.errstate(invalid="ignore"):
        want = np.where(both + one == 0, 1, 2 * both / (2 * both + one))
    values = metrics.f1(jnp.array(output), jnp.array(label, jnp.int32))
    np.testing.assert_allclose(values, want, rtol=1e-6)
    assert values[0] == 1 and values[1] == 0


def test_the_error_of_a_regression_is_in_the_unit_of_its_labels():
    output, label = drawn(4, 1), np.arange(4, dtype=np.int32)
    values = metrics.absolute_error(jnp.array(output), jnp.array(label))
    np.testing.assert_allclose(values, np.abs(output[:, 0] - label), rtol=1e-6)


@pytest.mark.parametrize("ignore", [(), 255, (255, -1)])
def test_intersection_over_union_is_that_of_the_formula(ignore):
    output = drawn(3, 6, 6, 4)
    label = np.random.default_rng(1).integers(0, 3, (3, 6, 6)).astype(np.int32)
    label[:, 0], label[:, 1], label[2] = 255, -1, 255
    valid = ~np.isin(label, ignore)
    found = output.argmax(-1)
    want = []
    for i in range(3):
        shares = []
        for one in range(4):
            true, said = ((x[i] == one) & valid[i] for x in (label, found))
            if (true | said).any():
                shares.append((true & said).sum() / (true | said).sum())
        want.append(np.mean(shares) if shares else 1)
    of = functools.partial(metrics.intersection_over_union, ignore=ignore)
    values = of(jnp.array(output), jnp.array(label))
    np.testing.assert_allclose(values, want, rtol=1e-6)
    assert (values[2] == 1) == (ignore != ())


def test_labels_of_unsigned_bytes_may_be_ignored():
    label = jnp.array([[0, 255]], jnp.uint8)
    output = jnp.array([[[1.0, 0.0], [0.0, 1.0]]])
    of = functools.partial(metrics.intersection_over_union, ignore=(-100, 255))
    assert of(output, label).tolist() == [1]


@pytest.mark.parametrize(
    "metric, labels, sentence",
    [
        (metrics.accuracy, (4, 10), r"accuracy: expected integer labels of the out"),
        (metrics.binary_accuracy, (4,), r"expected output and labels to have the same"),
        (metrics.f1, (3, 10), r"f1: expected .* got output \(4, 10\) and labels"),
        (metrics.absolute_error, (4,), r"absolute_error: expected .* the same shape"),
        (metrics.intersection_over_union, (4, 10), r"expected integer labels of the"),
    ],
)
def test_labels_of_another_shape_are_refused(unchecked, metric, labels, sentence):
    with pytest.raises(ValueError, match=sentence):
        metric(jnp.zeros((4, 10)), jnp.zeros(labels, jnp.int32))


def test_what_is_ignored_are_integers(unchecked):
    with pytest.raises(TypeError, match="ignore to be an integer, or several, got 0.5"):
        metrics.intersection_over_union(
            jnp.zeros((2, 3)), jnp.zeros(2, jnp.int32), ignore=0.5
        )
