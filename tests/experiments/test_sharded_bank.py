"""The command's CRD shards its bank, and a run goes on with other devices."""

import dataclasses
import functools
import os
import signal
import sys
import types

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from hintjax.experiments import recipes
from hintjax.experiments import run as experiment
from hintjax.experiments.config import Config
from hintjax.experiments.setting import prepare
from hintjax.training import on_device, read_metrics

EXAMPLES = 26  # for training: 32 rows on 8 devices, 27 on 3, 28 on 4


class Net(nn.Module):
    width: int
    classes: int

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(self.width, (1, 1), name="conv")(x))
        x = nn.relu(nn.Dense(self.width, name="pool")(x.mean((1, 2))))
        return nn.Dense(self.classes, name="classifier")(x)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """`(devices) -> setting`, and a teacher's variables."""
    tiny = types.ModuleType("tiny_networks")
    tiny.student = lambda classes: Net(3, classes)
    tiny.teacher = lambda classes: Net(5, classes)
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "noise.npz"
    image = random.integers(0, 256, (36, 4, 4, 1), dtype=np.uint8)
    np.savez(path, image=image, label=np.arange(36) % 3)
    config = Config(
        dataset=str(path),
        student="tiny_networks:student",
        teacher="tiny_networks:teacher",
        batch_size=24,
        epochs=4,
        negatives=4,
        optimizer="sgd",
        learning_rate=0.05,
        pad=0,
        flip=False,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tiny_networks", tiny)

        @functools.cache
        def setting(devices):
            return prepare(dataclasses.replace(config, devices=devices), teach=True)

        first = setting(1)
        assert first.dataset.train.n == EXAMPLES
        yield setting, first.teacher.init(jax.random.key(1), first.inputs)


def train(world, run_dir, devices, stop_at=None):
    """A run of the command on some devices, which may be stopped after a step."""
    made, teacher = world

    def feed(*arguments):
        found = on_device(*arguments)

        def advance(*where):
            result = found.advance(*where)
            if where[-2] + 1 == stop_at:
                os.kill(os.getpid(), signal.SIGINT)
            return result

        return found._replace(advance=advance)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "on_device", feed)
        setting = made(devices)
        return experiment.run(
            setting, run_dir, recipes.CRD, teacher=teacher, resume=True
        )


@pytest.mark.long
@pytest.mark.filterwarnings("default:resume. .* goes on with changes")
def test_a_run_with_a_sharded_bank_moves_between_devices(world, tmp_path):
    """From 1 device to 3 and to 8: the numbers are those of a run on 1 device."""
    whole, results = train(world, tmp_path / "whole", 1)
    for at, devices in ((1, 1), (2, 3)):
        with pytest.raises(KeyboardInterrupt, match=f"step {at} is saved"):
            train(world, tmp_path / "moved", devices, stop_at=at)
    moved, again = train(world, tmp_path / "moved", 8)
    assert again["steps"] == results["steps"] == 4
    np.testing.assert_allclose(again["test/loss"], results["test/loss"], rtol=1e-4)
    ours, alone = (run.state.memory["crd"]["bank"] for run in (moved, whole))
    for name in ("student", "teacher"):
        rows, wanted = getattr(ours, name), getattr(alone, name)
        assert wanted.shape[0] == EXAMPLES
        assert rows.sharding.spec == PartitionSpec("data")
        assert [shard.data.shape[0] for shard in rows.addressable_shards] == [4] * 8
        np.testing.assert_allclose(rows[:EXAMPLES], wanted, atol=1e-5)
        np.testing.assert_array_equal(rows[EXAMPLES:], 0)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        *(run.state.params for run in (moved, whole)),
    )
    lines = [read_metrics(tmp_path / run) for run in ("moved", "whole")]
    for one, other in zip(*lines, strict=True):
        for name in ("loss", "crd", "crd/positive", "validation/loss"):
            np.testing.assert_allclose(one[name], other[name], rtol=1e-4)


@pytest.mark.quick
def test_each_device_of_a_mesh_takes_a_part_of_the_bank(world):
    config = world[0](1).config
    places = world[0](1).places
    alone, parted = (
        recipes.CRD.note(config, places._replace(examples=2**20, mesh=mesh))
        for mesh in (None, world[0](8).layout.mesh)
    )
    assert "1024.0 MiB for the memory bank, " in alone
    assert parted == "crd: 128.0 MiB for the memory bank on each device"
    method = recipes.CRD_IN_BATCH(config, places, 1)[-1].method
    assert method.split is None  # there is no bank
