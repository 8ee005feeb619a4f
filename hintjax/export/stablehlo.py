"""A network as StableHLO, which `jax.export` reads on CPUs, GPUs and TPUs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import jax.export
import numpy as np
from jaxtyping import Array

from hintjax._checks import positive_int
from hintjax.export.converters import need
from hintjax.export.description import with_description
from hintjax.export.standalone import Standalone

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_LOCATIONS = "jax_traceback_in_locations_limit"


def image_spec(
    caller: str, model: Standalone, batch: int | None
) -> jax.ShapeDtypeStruct:
    """The images of a network: uint8, with a batch of any size if it is None."""
    if batch is None:
        size = jax.export.symbolic_shape("batch")
    else:
        positive_int(caller, batch=batch)
        size = (batch,)
    return jax.ShapeDtypeStruct((*size, *model.shape), np.uint8)


def stablehlo(model: Standalone, batch: int | None = None) -> bytes:
    """Exports a network as StableHLO for CPU, CUDA, ROCm and TPU.

    `jax.export.deserialize(bytearray(data)).call(image)` runs it, without HintJAX and
    without Flax. Equal networks give equal bytes, which name no file of this machine.

    Args:
        model: network that stands alone.
        batch: number of images in a batch; by default any number.

    Returns:
        The file, with the description of the network; see `description`.

    Raises:
        Refusal: if flatbuffers is not installed.
    """
    need("stablehlo", "flatbuffers")
    image = image_spec("stablehlo", model, batch)

    def student(image):  # this name is in the file
        return model.apply(image)

    with _without_paths():
        exported = jax.export.export(jax.jit(student), platforms=PLATFORMS)(image)
        return with_description(bytes(exported.serialize()), model.about)


def load_stablehlo(data: bytes) -> Callable[[Array], Array]:
    """The function of a file of `stablehlo`, from uint8 images to logits."""
    need("load_stablehlo", "flatbuffers")
    return jax.jit(jax.export.deserialize(bytearray(data)).call)


@contextmanager
def _without_paths() -> Iterator[None]:
    """Programs do not name the files and the lines from which they were traced."""
    before = jax.config.values[_LOCATIONS]
    jax.config.update(_LOCATIONS, 0)
    try:
        yield
    finally:
        jax.config.update(_LOCATIONS, before)
