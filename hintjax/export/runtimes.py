"""The programs that run exported files; each file becomes a function of images."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import jax
import jax.export
import numpy as np
from jaxtyping import Float, UInt8

from hintjax.export.converters import need, quiet
from hintjax.export.description import without_description
from hintjax.export.standalone import INPUT

Images = UInt8[np.ndarray, "n height width channels"]
Logits = Float[np.ndarray, "n ..."]
Run = Callable[[Images], Logits]


def run_stablehlo(data: bytes) -> Run:
    """A file of `stablehlo` in JAX, on the default device."""
    need("run_stablehlo", "flatbuffers")
    exported = jax.export.deserialize(bytearray(data))
    call = jax.jit(exported.call)
    size = exported.in_avals[0].shape[0]
    return _by_batch(lambda images: np.asarray(call(images)), size)


def run_onnx(data: bytes) -> Run:
    """A file of `onnx` in ONNX Runtime, on one thread of the CPU."""
    need("run_onnx", "onnxruntime")
    onnxruntime = import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        data, options, providers=["CPUExecutionProvider"]
    )
    size = session.get_inputs()[0].shape[0]
    return _by_batch(lambda images: session.run(None, {INPUT: images})[0], size)


def run_tflite(data: bytes) -> Run:
    """A file of `tflite` or `tflite_int8` in LiteRT, on one thread of the CPU."""
    need("run_tflite", "ai_edge_litert")
    litert = import_module("ai_edge_litert.interpreter")

    with quiet():
        interpreter = litert.Interpreter(model_content=data, num_threads=1)
        interpreter.allocate_tensors()
    (given,) = interpreter.get_input_details()
    (found,) = interpreter.get_output_details()

    def run(images: Images) -> Logits:
        interpreter.set_tensor(given["index"], images)
        interpreter.invoke()
        return _real(interpreter.get_tensor(found["index"]), found["quantization"])

    return _by_batch(run, given["shape"][0])


def int8_network(data: bytes) -> bool:
    """Whether a TFLite file takes uint8 and gives int8, as those of `tflite_int8`."""
    need("int8_network", "ai_edge_litert")
    litert = import_module("ai_edge_litert.interpreter")

    (found,) = litert.Interpreter(model_content=data).get_output_details()
    return found["dtype"] == np.int8


def run_micro(data: bytes) -> Run:
    """A file of `tflite_int8` in TFLite Micro, the runtime of microcontrollers."""
    need("run_micro", "tflite_micro")
    runtime = import_module("tflite_micro.python.tflite_micro.runtime")

    data = without_description(data)
    interpreter = runtime.Interpreter.from_bytes(data, arena_size=_LARGEST)
    found = interpreter.get_output_details(0)["quantization_parameters"]

    def run(images: Images) -> Logits:
        interpreter.set_input(images, 0)
        interpreter.invoke()
        scale, zero_point = found["scales"].item(), found["zero_points"].item()
        return _real(interpreter.get_output(0), (scale, zero_point))

    return _by_batch(run, 1)


_LARGEST = 2**26  # bytes


def arena_bytes(data: bytes) -> int:
    """The least memory in which TFLite Micro runs a file of `tflite_int8`.

    It is measured here, to 64 bytes. Pointers are as long as on this machine, so that
    a microcontroller of 32 bits needs less.

    Raises:
        Refusal: if tflite_micro is not installed.
    """
    need("arena_bytes", "tflite_micro")
    runtime = import_module("tflite_micro.python.tflite_micro.runtime")

    data = without_description(data)

    def fits(size: int) -> bool:
        try:
            with quiet():
                runtime.Interpreter.from_bytes(data, arena_size=size)
        except RuntimeError:
            return False
        return True

    low, high = 0, _LARGEST  # low does not fit
    while high - low > 64:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _real(output: np.ndarray, quantization: tuple[float, int]) -> np.ndarray:
    """The numbers that int8 numbers stand for; float numbers stay as they are."""
    scale, zero_point = quantization
    if np.issubdtype(output.dtype, np.floating):
        return output.copy()
    return np.float32(scale) * (output.astype(np.float32) - zero_point)


def _by_batch(run: Run, batch: Any) -> Run:
    """A function of any number of images, from one of a batch.

    Args:
        run: the function.
        batch: number of images that it takes; a name if it takes any number.
    """
    if not isinstance(batch, int | np.integer):
        return run

    def several(images: Images) -> Logits:
        missing = -len(images) % batch
        filled = np.concatenate([images, np.repeat(images[-1:], missing, 0)])
        parts = np.split(filled, len(filled) // batch)
        return np.concatenate([run(part) for part in parts])[: len(images)]

    return several


RUNTIMES: Mapping[str, Callable[[bytes], Any]] = {
    ".stablehlo": run_stablehlo,
    ".onnx": run_onnx,
    ".tflite": run_tflite,
}
