"""A network as ONNX, which ONNX Runtime and many compilers read."""

from importlib import import_module
from typing import Any

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
    jax2onnx = import_module("jax2onnx")
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
    _pool_in_two_axes(proto.graph)
    del proto.graph.value_info[:]  # shapes before jax2onnx moved the channels
    del proto.metadata_props[:]
    entry = proto.metadata_props.add()
    entry.key, entry.value = ABOUT, described_as(model.about)
    return proto.SerializeToString(deterministic=True)


def _pool_in_two_axes(graph: Any) -> None:
    """Rewrites each max pooling of maps, channels last, as one of height and width.

    jax2onnx pools over all four axes. ONNX Runtime pools over three at most.
    """
    made = {name: node for node in graph.node for name in node.output}
    read = {name: node for node in graph.node for name in node.input}
    for pool in [node for node in graph.node if node.op_type == "MaxPool"]:
        numbers = {one.name: one.ints for one in pool.attribute}
        window = numbers["kernel_shape"]
        if len(window) != 4 or (window[0], window[3]) != (1, 1):
            continue
        inner = made[pool.input[0]]
        outer, after = made[inner.input[0]], read[pool.output[0]]
        for ints in numbers.values():
            if ints:  # the pads are four numbers before, and four after
                parts = [ints[i : i + 4] for i in range(0, len(ints), 4)]
                ints[:] = [number for part in parts for number in part[1:3]]
        for node, order in ((outer, (0, 3, 1, 2)), (after, (0, 2, 3, 1))):
            node.op_type = "Transpose"
            del node.input[1:]
            node.attribute.add(name="perm", ints=order, type=7)
        pool.input[0] = outer.output[0]
        graph.node.remove(inner)
