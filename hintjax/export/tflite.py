"""A network as TFLite, in float32 or int8, for phones and microcontrollers."""

import os
import re
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import UInt8

from hintjax._checks import Refusal, message, positive_int
from hintjax.export.converters import need, quiet
from hintjax.export.description import with_description
from hintjax.export.folding import folded
from hintjax.export.standalone import INPUT, Standalone

# The standard normal distribution function is nearly sigmoid(1.702 x), with an error of
# at most 0.0095 (Camilli 1994). In int8, a sigmoid is one table.
_LOGISTIC = 1.702 * 2**0.5

# Operations that TFLite lacks in int8, by operations that it has.
INTEGER = {
    "erf": lambda x: 2 * jax.lax.logistic(_LOGISTIC * x) - 1,
    "erfc": lambda x: 2 * jax.lax.logistic(-_LOGISTIC * x),
    "neg": lambda x: -1 * x,
}


class LayerError(NamedTuple):
    """The error of one int8 layer, of the same inputs in float32.

    Attributes:
        layer: name of the layer in the file.
        error: root of the mean squared error of its output, in steps of its int8 scale.
            Rounding alone gives 0.29.
    """

    layer: str
    error: float


def tflite(model: Standalone, batch: int = 1) -> bytes:
    """Exports a network as TFLite in float32, with uint8 images as inputs.

    Equal networks give equal bytes, which name no file of this machine.

    Args:
        model: network that stands alone.
        batch: number of images in a batch.

    Returns:
        The file, with the description of the network; see `description`.

    Raises:
        Refusal: if tensorflow is not installed, or TFLite lacks an operation.
    """
    made = _converter("tflite", model, batch, np.uint8)
    return with_description(_converted("tflite", made), model.about)


def tflite_int8(
    model: Standalone, representative: UInt8[np.ndarray, "n height width channels"]
) -> bytes:
    """Exports a network as TFLite in int8: weights, activations and arithmetic.

    The exact GELU becomes `x sigmoid(1.702 x)`, which differs by at most 0.021: TFLite
    has no erf in int8.

    Weights have one scale for each channel. The input is uint8: the pixels as they are.
    The output is int8, and stands for the logits scale (output - zero point).

    Args:
        model: network that stands alone.
        representative: some training images, uint8; they set the ranges of the
            activations.

    Returns:
        The file for one image at a time, with the description of the network.

    Raises:
        Refusal: if tensorflow is not installed, or TFLite lacks an operation.
    """
    made = _int8_converter("tflite_int8", model, representative)
    tf = import_module("tensorflow")

    made.inference_input_type, made.inference_output_type = tf.uint8, tf.int8
    data = _converted("tflite_int8", made)
    left = _float_operations(data)
    if left:
        wanted = "operations that TFLite has in int8"
        do = "Use tflite, onnx or stablehlo, which compute in float32."
        raise Refusal(message("tflite_int8", wanted, ", ".join(left), do))
    return with_description(data, model.about)


def layer_errors(
    model: Standalone, representative: UInt8[np.ndarray, "n height width channels"]
) -> list[LayerError]:
    """The error of each layer of `tflite_int8`, the largest first.

    Each layer is run in int8 and in float32 on the same inputs.

    Args:
        model: network that stands alone.
        representative: images, as for `tflite_int8`.
    """
    made = _int8_converter("layer_errors", model, representative)
    tf = import_module("tensorflow")

    def squared(real, quantized, scale, zero_point):
        return np.mean((real / scale + zero_point - quantized) ** 2)

    debug = tf.lite.experimental
    options = debug.QuantizationDebugOptions(
        layer_direct_compare_metrics={"squared": squared}
    )
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        debugger = debug.QuantizationDebugger(
            converter=made,
            debug_dataset=made.representative_dataset,
            debug_options=options,
        )
        debugger.run()
    found = [
        LayerError(_layer(name), float(numbers["squared"]) ** 0.5)
        for name, numbers in debugger.layer_statistics.items()
    ]
    return sorted(found, key=lambda one: -one.error)


def _layer(name: str) -> str:
    """The name of a layer, from the name that the debugger gives to its output.

    >>> _layer("NumericVerify/jit(student)/max;jit(student)/Net/conv1/dot1:49")
    'Net/conv1/dot1'
    """
    name = name.removeprefix("NumericVerify/").rpartition(":")[0]
    return max(re.sub(r"jit\(\w+\)/", "", name).split(";"), key=len)


def _converter(caller: str, model: Standalone, batch: int, dtype: Any) -> Any:
    """TFLite's converter of a network."""
    need(caller, "tensorflow")
    positive_int(caller, batch=batch)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with quiet():
        tf = import_module("tensorflow")
        jax2tf = import_module("jax.experimental.jax2tf")

    def student(image):  # this name is in the file
        return model.apply(image)

    image = tf.TensorSpec((batch, *model.shape), dtype, name=INPUT)
    module = tf.Module()
    module.student = tf.function(
        jax2tf.convert(
            student, with_gradient=False, native_serialization_platforms=("cpu",)
        ),
        input_signature=[image],
        autograph=False,
    )
    with quiet():
        concrete = module.student.get_concrete_function()
    return tf.lite.TFLiteConverter.from_concrete_functions([concrete], module)


def _int8_converter(caller: str, model: Standalone, representative: np.ndarray) -> Any:
    """TFLite's converter of a network to int8."""
    if representative.shape[1:] != model.shape or not len(representative):
        wanted = f"images of shape {model.shape}"
        raise Refusal(message(caller, wanted, f"{representative.shape}"))
    integer = model._replace(apply=folded(model.apply, INTEGER))
    made = _converter(caller, integer, 1, np.float32)
    tf = import_module("tensorflow")

    made.optimizations = [tf.lite.Optimize.DEFAULT]
    made.representative_dataset = _whole_range(representative)
    made.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    return made


def _float_operations(data: bytes) -> list[str]:
    """The names of operations that compute in float32, in a TFLite file."""
    schema = import_module("tensorflow.lite.python.schema_py_generated")

    model = schema.ModelT.InitFromPackedBuf(data, 0)
    kinds = {code: name for name, code in vars(schema.BuiltinOperator).items()}
    found = set()
    for graph in model.subgraphs:
        for operator in graph.operators:
            code = model.operatorCodes[operator.opcodeIndex]
            tensors = [graph.tensors[at] for at in operator.outputs]
            if any(one.type == schema.TensorType.FLOAT32 for one in tensors):
                found.add(kinds[max(code.builtinCode, code.deprecatedBuiltinCode)])
    return sorted(found)


def _whole_range(images: np.ndarray) -> Callable[[], Iterator[list[np.ndarray]]]:
    """The images one by one; two corners of the first are black and white.

    Then the int8 input has the scale 1 and stands for the pixels 0..255 exactly.
    """
    images = images.astype(np.float32)
    images[0, 0, 0], images[0, -1, -1] = 0.0, 255.0
    return lambda: ([image[None]] for image in images)


def _converted(caller: str, converter: Any) -> bytes:
    """The result of a converter, or one sentence."""
    errors = import_module("tensorflow.lite.python.convert")

    try:
        with warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")
            return bytes(converter.convert())
    except errors.ConverterError as error:
        lines = [line for line in f"{error}".splitlines() if line.strip()]
        got = lines[0] if lines else "an error"
        do = "Use --to stablehlo or --to onnx."
        wanted = "operations that TFLite has"
        raise Refusal(message(caller, wanted, got, do)) from error
