"""A network as ONNX, which ONNX Runtime and many compilers read."""

import jax
from jax.extend.core import jaxpr_as_fun

from hintjax.export.converters import need
from hintjax.export.description import described_as
from hintjax.export.stablehlo import image_spec
from hintjax.export.standalone import INPUT, OUTPUT, Standalone

ABOUT = "about"  # the metadata that holds the description


def onnx(model: Standalone, batch: int | None = None) -> bytes:
    """Exports a network as ONNX.

    Equal networks give equal bytes, which name no file of this machine.

    Args:
        model: network that stands alone.
        batch: number of images in a batch; by default any number.

    Returns:
        The file. Its metadata `about` holds the description of the network.

    Raises:
        Refusal: if jax2onnx is not installed.
    """
    need("onnx", "jax2onnx")
    import jax2onnx

    image = image_spec("onnx", model, batch)
    # Traced first: while it converts, jax2onnx replaces functions of JAX and Flax by
    # its own, and BatchNorm would not be folded.
    traced = jaxpr_as_fun(jax.make_jaxpr(model.apply)(image))

    def student(image):
        return traced(image)[0]

    proto = jax2onnx.to_onnx(
        student,
        [image],
        model_name="student",
        input_names=[INPUT],
        output_names=[OUTPUT],
    )
    del proto.graph.value_info[:]  # shapes before jax2onnx moved the channels
    del proto.metadata_props[:]
    entry = proto.metadata_props.add()
    entry.key, entry.value = ABOUT, described_as(model.about)
    return proto.SerializeToString(deterministic=True)
