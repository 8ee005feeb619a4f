"""The memory bank: what a step writes, and what is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import memory

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("strict")]

KEY = jax.random.key(0)


def vectors(seed, rows, width=4):
    x = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    return jnp.array(x / np.linalg.norm(x, axis=1, keepdims=True))


def test_a_new_bank_is_of_norm_one_on_average_and_has_no_constants():
    bank = jax.jit(memory.init, static_argnums=(1, 2))(KEY, 2000, 128)
    bank = jax.device_get(bank)
    for rows in bank[:2]:
        np.testing.assert_allclose(np.square(rows).sum(1).mean(), 1, rtol=0.02)
        assert np.abs(rows).max() <= (3 / 128) ** 0.5
    assert np.isneginf(bank[2:]).all()
    assert not np.allclose(bank.student, bank.teacher)


def test_an_update_mixes_and_normalizes_what_stands_in_the_batch():
    bank = jax.jit(memory.init, static_argnums=(1, 2))(KEY, 6, 4)
    index, s, t = jnp.array([4, 1]), vectors(0, 2), vectors(1, 2)
    got = jax.jit(lambda *a: memory.update(*a, momentum=0.75))(bank, index, s, t)
    bank, s, t = jax.device_get((bank, s, t))
    for before, after, new in ((bank[0], got[0], s), (bank[1], got[1], t)):
        want = np.array(before)
        for row, i in enumerate([4, 1]):
            mixed = 0.75 * before[i] + 0.25 * new[row]
            want[i] = mixed / np.linalg.norm(mixed)
        np.testing.assert_allclose(after, want, rtol=1e-5)


def test_the_last_of_an_examples_embeddings_counts():
    bank = jax.jit(memory.init, static_argnums=(1, 2))(KEY, 6, 4)
    index, s = jnp.array([2, 5, 2, 2]), vectors(0, 4)
    where = jnp.array([True, True, True, False])
    update = jax.jit(memory.update, static_argnames="momentum")
    got = np.asarray(update(bank, index, s, s, momentum=0.0, where=where).student)
    np.testing.assert_allclose(got[2], np.asarray(s)[2], rtol=1e-6)
    np.testing.assert_allclose(got[5], np.asarray(s)[1], rtol=1e-6)
    alone = update(bank, index, s, s, where=jnp.zeros(4, bool))
    np.testing.assert_array_equal(alone.student, bank.student)


def test_a_constant_is_set_once():
    unset = memory.init(KEY, 1, 1).student_constant
    once = memory.set_once(unset, jnp.float32(3.0))
    assert once == 3
    assert memory.set_once(once, jnp.float32(5.0)) == 3


LABELS = np.random.default_rng(0).integers(0, 4, 50).astype(np.int32)
CLASSES = memory.by_class(jnp.array(LABELS))
ANCHORS = np.array([0, 1, 2], np.int32)  # labels of anchors, not examples
KEYS = jax.random.split(jax.random.key(1), 3)


def assert_uniform(drawn, among):
    """Everything is drawn, about equally often, and nothing else is."""
    counts = np.bincount(np.ravel(drawn), minlength=50)
    assert counts[np.setdiff1d(np.arange(50), among)].sum() == 0
    mean = counts.sum() / len(among)
    assert np.abs(counts[among] - mean).max() < 5 * mean**0.5


def test_others_are_drawn_evenly_from_all_other_classes():
    draw = jax.jit(memory.draw_others, static_argnums=3)
    index, valid = draw(CLASSES, KEYS, jnp.array(ANCHORS), 20_000)
    assert np.all(valid)
    for row, label in zip(np.array(index), ANCHORS, strict=True):
        assert_uniform(row, np.flatnonzero(label != LABELS))


def test_shared_draws_are_even_and_masked_by_class():
    draw = jax.jit(memory.draw_shared, static_argnums=3)
    index, valid = draw(CLASSES, KEY, jnp.array(ANCHORS), 20_000)
    assert_uniform(index, np.arange(50))
    np.testing.assert_array_equal(valid, LABELS[index][None] != ANCHORS[:, None])


def test_relaxed_positives_are_drawn_evenly_from_the_class():
    keys = jax.random.split(KEY, 6000)
    label = jnp.full(6000, 2, jnp.int32)
    index = jax.jit(memory.draw_same)(CLASSES, keys, label)
    assert_uniform(index, np.flatnonzero(LABELS == 2))


@pytest.mark.parametrize("size", [1, 2, 7, 50])
def test_a_label_is_compared_with_that_of_the_index(size):
    classes = memory.by_class(jnp.array(LABELS[:size]))
    index, label = np.meshgrid(np.arange(-2, size + 2), np.arange(-1, 5))
    # One program: without it, every operation would be compiled by itself.
    labeled = jax.jit(memory.labeled)
    got = labeled(classes, index.ravel(), label.ravel())
    inside = (index >= 0) & (index < size)
    wanted = inside & (LABELS[np.clip(index, 0, size - 1)] == label)
    np.testing.assert_array_equal(got, wanted.ravel())


def test_draws_do_not_depend_on_the_place_in_the_batch():
    turned = [2, 0, 1]
    draw = jax.jit(memory.draw_others, static_argnums=3)
    index, _ = draw(CLASSES, KEYS, ANCHORS, 9)
    got, _ = draw(CLASSES, KEYS[np.array(turned)], ANCHORS[turned], 9)
    np.testing.assert_array_equal(got, np.asarray(index)[turned])


@pytest.mark.parametrize("count", [0, -1, 2.5])
def test_a_count_is_a_positive_integer(unchecked, count):
    for draw, key in ((memory.draw_others, KEYS), (memory.draw_shared, KEY)):
        with pytest.raises(ValueError, match="draw_.*: expected count .*integer >= 1"):
            draw(CLASSES, key, jnp.array(ANCHORS), count)
