"""Losses of outputs with positions: tokens, pixels, voxels, and masks of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import losses

pytestmark = pytest.mark.usefixtures("strict")

LABEL = np.random.default_rng(5).integers(0, 7, (4, 2, 3)).astype(np.int32)


def decoupled(student, teacher, label=None, where=None):
    label = jnp.asarray(LABEL if label is None else label)
    return losses.decoupled_kd_loss(student, teacher, label, where=where)


def standardized(student, teacher, where=None):
    ours, theirs = (
        losses.standardize_logits(x, where=where) for x in (student, teacher)
    )
    return losses.kd_loss(ours, theirs, where=where)


LOSSES = {
    "kd": losses.kd_loss,
    "soft_targets": losses.soft_cross_entropy_loss,
    "decoupled_kd": decoupled,
    "standardized_kd": standardized,
    "dist": losses.dist_loss,
}
# One program each: without it, every operation would be compiled by itself.
LOSSES = {name: jax.jit(loss) for name, loss in LOSSES.items()}
# One example without a valid position, one with a single one, one with all.
WHERE = np.random.default_rng(2).random((4, 2, 3)) < 0.5
WHERE[0] = False
WHERE[1] = np.eye(3, dtype=bool)[:2] & np.array([[True], [False]])
WHERE[2] = True


def logits(shape=(4, 2, 3, 7)):
    generator = np.random.default_rng(0)
    return [generator.normal(size=shape).astype(np.float32) * 2 for _ in range(2)]


def of_rows(name, student, teacher, label, kept):
    """The published loss of the valid rows (row, classes), and its mean per example."""
    rows = [x.reshape(-1, 7)[kept.ravel()] for x in (student, teacher)]
    if name == "dist":  # the correlation over rows is one for all
        p = [np.exp(np.float64(x)) for x in rows]
        q, p = (x / x.sum(1, keepdims=True) for x in p)
        within = [1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)]
        between = np.mean([1 - np.corrcoef(q[:, c], p[:, c])[0, 1] for c in range(7)])
        values = np.array(within) + between
    elif name == "decoupled_kd":
        of = jnp.asarray(label.ravel()[kept.ravel()])
        values = np.asarray(LOSSES[name](*map(jnp.asarray, rows), label=of))
    else:
        values = np.asarray(LOSSES[name](*map(jnp.asarray, rows)))
    owner = np.nonzero(kept.reshape(len(kept), -1))[0]
    return [values[owner == i].mean() if kept[i].any() else 0 for i in range(4)]


@functools.cache
def compiled(name):
    def total(student, teacher, where):
        values = LOSSES[name](student, teacher, where=where)
        return values.sum(), values

    return jax.jit(jax.grad(total, (0, 1), has_aux=True))


@pytest.mark.parametrize("name", LOSSES)
def test_an_example_is_the_mean_of_its_valid_positions(name):
    student, teacher = logits()
    for where in (np.ones((4, 2, 3), bool), WHERE):
        _, got = compiled(name)(student, teacher, where)
        want = of_rows(name, student, teacher, LABEL, where)
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)
    got = LOSSES[name](*map(jnp.asarray, (student, teacher)))
    want = of_rows(name, student, teacher, LABEL, np.ones((4, 2, 3), bool))
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("hidden", [np.nan, np.inf, 1e30])
def test_masked_positions_change_no_bit(name, hidden):
    student, teacher = logits()
    gradients, values = compiled(name)(student, teacher, WHERE)
    broken = [np.where(WHERE[..., None], x, hidden) for x in (student, teacher)]
    again, same = compiled(name)(*map(np.float32, broken), WHERE)
    np.testing.assert_array_equal(same, values)
    for got, want in zip(again, gradients, strict=True):
        np.testing.assert_array_equal(got, want)
        assert not np.any(np.asarray(got)[~WHERE])


@pytest.mark.parametrize("name", LOSSES)
def test_a_mask_of_examples_masks_all_their_positions(name):
    student, teacher = logits()
    where = np.array([True, False, True, False])
    wide = np.broadcast_to(where[:, None, None], (4, 2, 3))
    arrays = [jnp.asarray(x) for x in (student, teacher)]
    got = LOSSES[name](*arrays, where=jnp.asarray(where))
    want = LOSSES[name](*arrays, where=jnp.asarray(wide))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert not np.any(np.asarray(got)[~where])


@pytest.mark.parametrize("name", LOSSES)
def test_positions_on_any_number_of_axes_agree(name):
    """The same six positions as a sequence, a map and a volume."""
    arrays = [jnp.asarray(x) for x in logits()]
    want = LOSSES[name](*arrays, where=jnp.asarray(WHERE))
    for grid in ((6,), (3, 2), (1, 3, 2)):
        shaped = [x.reshape(4, *grid, 7) for x in arrays]
        more = {"where": jnp.asarray(WHERE.reshape(4, *grid))}
        if name == "decoupled_kd":
            more["label"] = LABEL.reshape(4, *grid)
        np.testing.assert_allclose(LOSSES[name](*shaped, **more), want, rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_a_mask_of_other_positions_is_refused(name, unchecked):
    arrays = [jnp.asarray(x) for x in logits()]
    with pytest.raises(ValueError, match=r"where to be bool .*, got bool \(4, 3, 2\)"):
        LOSSES[name](*arrays, where=jnp.ones((4, 3, 2), bool))


def test_labels_of_masked_positions_may_be_anything():
    arrays, where = [jnp.asarray(x) for x in logits()], jnp.asarray(WHERE)
    loss = LOSSES["decoupled_kd"]
    want = loss(*arrays, where=where)
    for ignored in (-1, 255):
        label = np.where(WHERE, LABEL, np.int32(ignored))
        got = loss(*arrays, label=label, where=where)
        np.testing.assert_array_equal(got, want)


def test_labels_are_one_for_each_position(unchecked):
    arrays = [jnp.asarray(x) for x in logits()]
    wanted = r"label to be integer \(4, 2, 3\), got int32 \(4,\)"
    with pytest.raises(ValueError, match=wanted):
        decoupled(*arrays, label=np.zeros(4, np.int32))
