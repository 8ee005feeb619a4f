"""The devices of a run: how many share a batch if nobody says it."""

import os
import subprocess
import sys

import jax
import pytest

from hintjax.experiments import devices
from hintjax.experiments.config import Config
from hintjax.experiments.factories import student_network
from hintjax.sharding import shares

INPUTS = jax.numpy.zeros((1, 8, 8, 1))


@pytest.fixture(scope="module")
def student():
    return student_network(Config(student="hintjax.models:plain_wide"), 10)


@pytest.fixture(scope="module")
def flops(student):
    """The operations of the student for one image."""
    variables = jax.eval_shape(student.init, jax.random.key(0), INPUTS)
    return devices.forward_flops(student, variables, INPUTS)


@pytest.mark.parametrize(
    ("worth", "batch", "count"),
    [
        (1000, 16, 1),  # a step of a small network is not worth a second device
        (8, 16, 2),
        (0.01, 16, 8),
        (0.01, 12, 6),  # equal shares
        (0.01, 7, 7),
        (0.01, 13, 1),
    ],
)
def test_a_cpu_has_as_many_devices_as_the_step_is_worth(
    student, flops, monkeypatch, worth, batch, count
):
    monkeypatch.setattr(devices, "WORTH", worth * flops)
    monkeypatch.setattr(devices, "SHARED_BEFORE", (99, 0))
    layout = devices.mesh_of(Config(batch_size=batch), student, INPUTS)
    assert (1 if layout is None else shares(layout.mesh)) == count


def test_later_versions_of_jax_share_the_cores_of_one_device(student, monkeypatch):
    monkeypatch.setattr(devices, "WORTH", 1)
    monkeypatch.setattr(devices, "SHARED_BEFORE", jax.__version_info__)
    assert devices.mesh_of(Config(batch_size=16), student, INPUTS) is None


def test_devices_that_are_asked_for_are_used(student):
    layout = devices.mesh_of(Config(batch_size=16, devices=4), student, INPUTS)
    assert layout is not None and shares(layout.mesh) == 4


def test_accelerators_are_all_used(student, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    layout = devices.mesh_of(Config(batch_size=16), student, INPUTS)
    assert layout is not None and shares(layout.mesh) == 8


@pytest.mark.parametrize(
    ("flags", "before", "after"),
    [("", -1, 3), ("", 5, 5), ("--xla_force_host_platform_device_count=8", -1, -1)],
)
def test_cores_become_devices_unless_a_number_is_set(monkeypatch, flags, before, after):
    counted = {"jax_num_cpu_devices": before}

    class Settings:
        values = counted
        update = staticmethod(counted.__setitem__)

    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.setattr(jax, "config", Settings)
    devices.split_cpu()
    assert counted["jax_num_cpu_devices"] == after


def test_a_process_that_starts_has_a_device_for_each_core():
    code = (
        "import jax, os\n"
        "from hintjax.experiments.devices import split_cpu\n"
        "split_cpu()\n"
        "assert jax.device_count() == len(os.sched_getaffinity(0)), jax.devices()\n"
        "split_cpu()  # too late, and harmless\n"
    )
    known = ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")
    environment = {name: os.environ[name] for name in os.environ if name not in known}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
