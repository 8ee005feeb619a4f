"""A memory bank is restored on any number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from hintjax import memory
from hintjax.sharding import data_mesh, spread
from hintjax.training import open_checkpoints

pytestmark = pytest.mark.quick

KEY, SIZE = jax.random.key(0), 25


def bank_on(devices, size=SIZE, features=4):
    """A bank as a stage on these devices has it: whole on one, else sharded by rows."""
    if devices == 1:
        return {"bank": memory.init(KEY, size, features)}
    mesh = data_mesh(jax.devices()[:devices])
    bank = memory.init(KEY, size, features, mesh)
    homes = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        memory.split_rows(bank, mesh),
        is_leaf=lambda node: isinstance(node, PartitionSpec),
    )
    return {"bank": spread(bank, homes)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The checkpoints of a bank on 1 device and on 8."""
    folder = tmp_path_factory.mktemp("banks")
    for devices in (1, 8):
        with open_checkpoints(folder / str(devices)) as checkpoints:
            checkpoints.save(1, bank_on(devices))
    return folder


@pytest.mark.parametrize("devices", range(1, 9))
@pytest.mark.parametrize("before", [1, 8])
def test_a_bank_is_the_same_on_any_number_of_devices(before, devices, saved):
    like, want = bank_on(devices), bank_on(1)
    found, _ = open_checkpoints(saved / str(before)).restore(like)
    for name in ("student", "teacher"):
        rows, wanted = getattr(found["bank"], name), getattr(like["bank"], name)
        assert (rows.shape, rows.sharding) == (wanted.shape, wanted.sharding)
        np.testing.assert_array_equal(rows[:SIZE], getattr(want["bank"], name))
        np.testing.assert_array_equal(rows[SIZE:], 0)


@pytest.mark.parametrize(
    ("like", "words"),
    [
        ({"size": SIZE + 1}, "2 differences"),  # one device needs no row of zeros
        ({"size": 0}, "2 differences"),  # negatives from the batch
        ({"features": 5}, "2 differences"),
        ({"size": 24}, "restore: expected bank/student with 24 rows, and zeros after"),
    ],
)
def test_a_bank_of_other_examples_is_refused(like, words, saved):
    with pytest.raises(ValueError, match=words):
        open_checkpoints(saved / "1").restore(bank_on(1, **like))


def test_rows_are_added_for_devices_alone(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, bank_on(1, SIZE - 8))
    with pytest.raises(ValueError, match="2 differences"):
        open_checkpoints(tmp_path).restore(bank_on(8))
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, {"bank": jnp.zeros((SIZE, 4))})  # it is no bank
    with pytest.raises(ValueError, match="1 differences"):
        open_checkpoints(tmp_path).restore({"bank": jnp.zeros((SIZE - 1, 4))})
