"""The queue of embeddings: order, masked examples, batches larger than the queue."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax.memory import enqueue

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("strict")]


def column(*numbers):
    return np.array(numbers, np.float32)[:, None]


@pytest.mark.parametrize("batch", [(7,), (7, 8), (7, 8, 9), (7, 8, 9, 10)])
@pytest.mark.parametrize("masked", [False, True])
def test_the_newest_are_in_front_and_masked_examples_do_not_enter(batch, masked):
    where = np.array([i != 1 for i in range(len(batch))]) if masked else None
    valid = [x for i, x in enumerate(batch) if not masked or where[i]]
    told = {} if where is None else {"where": jnp.array(where)}
    # One program: without it, every operation would be compiled by itself.
    got = jax.jit(enqueue)(column(1, 2, 3), column(*batch), **told)
    np.testing.assert_array_equal(got, column(*[*valid, 1, 2, 3][:3]))


@pytest.mark.usefixtures("unchecked")
def test_the_features_must_agree():
    with pytest.raises(ValueError, match="enqueue: .*as many features"):
        enqueue(jnp.ones((3, 2)), jnp.ones((4, 5)))
