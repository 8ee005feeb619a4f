"""SP against its formula and the field's code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax.losses import similarity_loss, similarity_matrix

pytestmark = pytest.mark.usefixtures("strict")


def features(seed, shape=(5, 4, 3, 2)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def formula_matrix(features):
    """<f_i, f_j> over the norm of the row, entry by entry."""
    rows = np.float64(features).reshape(len(features), -1)
    gram = np.array([[(a * b).sum() for b in rows] for a in rows])
    return np.array([row / np.sqrt((row**2).sum()) for row in gram])


def test_matrix_is_the_formula():
    got = similarity_matrix(jnp.array(features(0)))
    np.testing.assert_allclose(got, formula_matrix(features(0)), rtol=1e-4, atol=1e-6)


def test_loss_is_the_formula():
    student, teacher = features(0), features(1, (5, 7))
    difference = formula_matrix(student) - formula_matrix(teacher)
    got = similarity_loss(jnp.array(student), jnp.array(teacher))
    np.testing.assert_allclose(got, (difference**2).sum(1) / 5, rtol=1e-5)


def test_loss_matches_repdistiller(golden):
    case = golden("sp/rep")
    value_and_grad = jax.value_and_grad(lambda s, t: similarity_loss(s, t).mean())
    value, gradient = jax.jit(value_and_grad)(case["in.f_s"], case["in.f_t"])
    assert case.error("out.loss", value) < 1e-5
    assert case.error("grad.in.f_s", gradient) < 1e-5


def test_scale_does_not_matter():
    student, teacher = jnp.array(features(0)), jnp.array(features(1))
    want = similarity_loss(student, teacher)
    got = similarity_loss(student * 1e3, teacher * 1e-2)
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_a_batch_of_one_is_alike():
    assert similarity_loss(jnp.ones((1, 3)), -jnp.ones((1, 4)))[0] == 0


def test_a_mask_takes_rows_and_columns():
    where = np.array([True, False, True, True, False])
    got = similarity_matrix(jnp.array(features(0)), where=jnp.array(where))
    want = similarity_matrix(jnp.array(features(0)[where]))
    np.testing.assert_allclose(np.asarray(got)[where][:, where], want, rtol=1e-5)
    assert np.abs(got[~where]).max() == np.abs(got[:, ~where]).max() == 0


def test_masked_positions_are_left_out_of_every_product():
    generator = np.random.default_rng(0)
    student, teacher = generator.normal(size=(2, 4, 3, 5)).astype(np.float32)
    where = np.array([[1, 1, 1], [1, 0, 1], [0, 0, 0], [0, 1, 1]], bool)
    zeroed = [np.where(where[..., None], x, 0) for x in (student, teacher)]
    some = where.any(1)
    want = similarity_loss(*map(jnp.array, zeroed), where=jnp.array(some))
    hidden = [np.where(where[..., None], x, np.nan) for x in (student, teacher)]
    arrays = [jnp.array(x, jnp.float32) for x in hidden]
    got = similarity_loss(*arrays, where=jnp.array(where))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert got[2] == 0
    matrix = similarity_matrix(arrays[0], where=jnp.array(where))
    rows = zeroed[0].reshape(4, -1)
    products = rows @ rows.T
    norms = np.linalg.norm(products, axis=1, keepdims=True)
    np.testing.assert_allclose(
        matrix, products / np.where(norms == 0, 1, norms), rtol=1e-4, atol=1e-6
    )
