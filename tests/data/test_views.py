"""Fixed views: a view of an example is always the same crop and flip."""

import itertools

import numpy as np
import pytest

from hintjax import Refusal
from hintjax.data import (
    Augment,
    Split,
    Standardize,
    fixed_views,
    place,
    stream,
    take,
    view_of,
)

pytestmark = pytest.mark.quick

N, BATCH, VIEWS = 8, 4, 3
AUGMENT = Augment(pad=1, flip=True)
STANDARD = Standardize(np.zeros(1, np.float32), np.ones(1, np.float32))
SPLIT = Split(
    np.random.default_rng(0).integers(0, 255, (N, 5, 5, 1), np.uint8),
    np.arange(N, dtype=np.int32),
)


def test_the_draws_of_a_view_do_not_depend_on_the_number_of_views():
    crops = fixed_views(N, VIEWS, AUGMENT)
    np.testing.assert_array_equal(crops[:2], fixed_views(N, 2, AUGMENT))
    assert crops[..., :2].max() <= 2 and set(np.unique(crops[..., 2])) == {0, 1}
    assert not (crops[0] == crops[1]).all()
    assert (fixed_views(N, VIEWS, Augment()) == 0).all()


def test_epoch_e_shows_view_e_modulo_the_number_of_views():
    crops = fixed_views(N, VIEWS, AUGMENT)
    for epoch in range(2 * VIEWS):
        view = view_of(crops, epoch)
        assert int(view.number) == epoch % VIEWS
        np.testing.assert_array_equal(view.crops, crops[epoch % VIEWS])


def test_a_stream_shows_the_images_that_take_shows():
    crops, placed = fixed_views(N, VIEWS, AUGMENT), place(SPLIT)
    batches = stream(SPLIT, BATCH, STANDARD, augment=AUGMENT, crops=crops)
    shown = list(itertools.islice(batches, (VIEWS + 1) * N // BATCH))
    for number, batch in enumerate(shown):
        epoch = number * BATCH // N
        assert set(batch["view"]) == {epoch % VIEWS}
        view = view_of(crops, epoch)
        want = take(placed, batch["index"], STANDARD, augment=AUGMENT, view=view)
        np.testing.assert_array_equal(batch["view"], want["view"])
        np.testing.assert_allclose(batch["image"], want["image"], atol=1e-6)


@pytest.mark.parametrize(("count", "pad"), [(0, 1), (1, 128)])
def test_views_that_cannot_be_stored_are_refused(count, pad):
    with pytest.raises(Refusal, match="views"):
        fixed_views(N, count, Augment(pad=pad))
