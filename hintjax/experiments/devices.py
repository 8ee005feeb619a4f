"""The devices that share the batches of a run, and the mesh over them."""

import os

import jax
from jaxtyping import Array

from hintjax._checks import Refusal, message
from hintjax.experiments.config import Config
from hintjax.networks import Network, Variables, Wants
from hintjax.sharding import Layout, make_mesh

# Operations of the student's forward pass that are worth a device of a CPU, in a step
# (benchmarks/cpu_devices.py). With later versions of JAX, one device is as fast.
WORTH = 4e8
SHARED_BEFORE = (0, 11)


def split_cpu() -> None:
    """Makes every core of the CPU a device, before JAX starts its devices.

    `mesh_of` decides how many of them share a batch. A number of devices that the user
    has set stays.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if (
        "host_platform_device_count" in flags
        or jax.config.values["jax_num_cpu_devices"] > 0
    ):
        return
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        jax.config.update("jax_num_cpu_devices", cores)
    except RuntimeError:
        return  # the devices exist already


def mesh_of(config: Config, student: Network, inputs: Array) -> Layout | None:
    """The mesh that a config asks for; None for a single device.

    Args:
        config: config of the run.
        student: network of the student.
        inputs: one image.

    Raises:
        Refusal: if there are too few devices, or if they cannot share a batch.
    """
    devices = jax.devices()
    wanted = config.devices or _by_default(config, student, inputs)
    if wanted > len(devices) or (jax.process_count() > 1 and wanted < len(devices)):
        limit = "at most" if jax.process_count() == 1 else "all"
        got = f"{wanted} of {jax.device_count()}"
        raise Refusal(message("config", f"{limit} the devices that are here", got))
    if wanted % config.fsdp:
        got = f"{config.fsdp} with {wanted} devices"
        raise Refusal(message("config", "fsdp to divide the devices", got))
    if config.batch_size % wanted:
        low = config.batch_size // wanted * wanted
        sizes = " or ".join(str(n) for n in (low, low + wanted) if n)
        do = f"Use {sizes}, or fewer --devices."
        text = f"a batch_size that {wanted} devices can share evenly"
        raise Refusal(message("config", text, f"{config.batch_size}", do))
    if wanted == 1:
        return None
    shares = {"fsdp": config.fsdp} if config.fsdp > 1 else {}
    return Layout(make_mesh(**shares, devices=devices[:wanted]))


def _by_default(config: Config, student: Network, inputs: Array) -> int:
    """All devices; on a CPU as many as have `WORTH` operations and an equal share."""
    here = jax.device_count()
    cpu = jax.default_backend() == "cpu"
    if not cpu or jax.process_count() > 1 or config.fsdp > 1:
        return here
    if jax.__version_info__ >= SHARED_BEFORE:
        return 1
    variables = jax.eval_shape(student.init, jax.random.key(0), inputs)
    flops = config.batch_size * (forward_flops(student, variables, inputs) or 0)
    shares = range(min(here, int(flops / WORTH)), 0, -1)
    return next((n for n in shares if config.batch_size % n == 0), 1)


def forward_flops(
    network: Network, variables: Variables, inputs: Array
) -> float | None:
    """The number of operations of a forward pass; None if JAX does not tell it.

    Args:
        network: the network.
        variables: its variables, or their shapes.
        inputs: the images.
    """

    def forward(variables: Variables, inputs: Array) -> Array:
        wants = Wants(output=True)
        return network.apply(*variables, inputs, wants=wants, train=False)[0].output

    costs = jax.jit(forward).lower(variables, inputs).cost_analysis()
    return (costs or {}).get("flops")
