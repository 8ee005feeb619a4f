"""An int8 network as C: an array with its length, scales, operations and memory."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from hintjax._checks import Refusal, message
from hintjax.export.converters import need
from hintjax.export.description import without_description

# Names that TFLite Micro does not make of the words of the schema's names.
_SPELLED = {
    "BATCH_MATMUL": "BatchMatMul",
    "CUMSUM": "CumSum",
    "PADV2": "PadV2",
    "UNIDIRECTIONAL_SEQUENCE_LSTM": "UnidirectionalSequenceLSTM",
}


class CArray(NamedTuple):
    """The two files of `c_array`.

    Attributes:
        source: text of the .c file, which holds the array.
        header: text of the .h file.
    """

    source: str
    header: str


def c_array(data: bytes, name: str = "student", arena: int | None = None) -> CArray:
    """Writes an int8 network as C for TFLite Micro.

    The header has the length of the array, the scale and the zero point of the input
    and the output, and a macro that adds the network's operations to a
    `MicroMutableOpResolver`.

    Args:
        data: file of `tflite_int8`.
        name: name of the array, and of the two files.
        arena: bytes of memory that the network needs, if known; see
            `hintjax.export.runtimes.arena_bytes`.

    Returns:
        The texts of the two files.

    Raises:
        Refusal: if ai-edge-litert is not installed, or the name is no name in C.
    """
    need("c_array", "ai_edge_litert")
    schema = import_module("ai_edge_litert.schema_py_generated")
    if not (name.isascii() and name.isidentifier()):
        raise Refusal(message("c_array", "a name in C", repr(name)))
    data = without_description(data)
    model = schema.ModelT.InitFromPackedBuf(data, 0)
    graph = model.subgraphs[0]
    ends = {
        "INPUT": _end(graph.tensors[graph.inputs[0]]),
        "OUTPUT": _end(graph.tensors[graph.outputs[0]]),
    }
    return written(data, name, _operations(schema, model), ends, arena)


class End(NamedTuple):
    """The input or the output of a network: `real = scale (integer - zero_point)`."""

    size: int
    scale: float
    zero_point: int


def _end(tensor: Any) -> End:
    """The input or the output, from its tensor in the file."""
    numbers = tensor.quantization
    if numbers is None or numbers.scale is None:
        do = "Give the result of tflite_int8."
        raise Refusal(message("c_array", "an int8 network", "a float32 one", do))
    size = int(np.prod(tensor.shape))
    return End(size, float(numbers.scale[0]), int(numbers.zeroPoint[0]))


def written(
    data: bytes,
    name: str,
    operations: Sequence[str],
    ends: Mapping[str, End],
    arena: int | None,
) -> CArray:
    """The texts of both files.

    Args:
        data: bytes of the network alone.
        name: name of the array, and of the two files.
        operations: names of the network's operations, as TFLite Micro spells them.
        ends: input and output, as "INPUT" and "OUTPUT".
        arena: bytes of memory that the network needs, if known.
    """
    upper = name.upper()
    added = [f"resolver.Add{one}();" for one in operations]
    lines = [f"#define {upper}_OPERATIONS {len(added)}"]
    lines.append(f"#define {upper}_ADD_OPERATIONS(resolver) {' '.join(added)}")
    for kind, end in ends.items():
        lines += [
            f"#define {upper}_{kind}_SIZE {end.size}",
            f"#define {upper}_{kind}_SCALE {end.scale!r}f",
            f"#define {upper}_{kind}_ZERO_POINT {end.zero_point}",
        ]
    if arena is not None:
        lines.append(f"#define {upper}_ARENA_BYTES {arena}")
    return CArray(_source(data, name), _header(name, len(data), lines))


def _operations(schema: Any, model: Any) -> list[str]:
    """The operations of a network, as TFLite Micro names them."""
    names = {code: name for name, code in vars(schema.BuiltinOperator).items()}
    codes = {
        max(code.builtinCode, code.deprecatedBuiltinCode)
        for code in model.operatorCodes
    }
    return [_spelled(names[code]) for code in sorted(codes)]


def _spelled(name: str) -> str:
    """The name of an operation, as TFLite Micro writes it.

    >>> _spelled("DEPTHWISE_CONV_2D"), _spelled("PADV2")
    ('DepthwiseConv2D', 'PadV2')
    """
    words = (word.capitalize() for word in name.split("_"))
    return _SPELLED.get(name, "".join(words).replace("2d", "2D"))


def _source(data: bytes, name: str) -> str:
    """The .c file."""
    rows = [data[i : i + 12] for i in range(0, len(data), 12)]
    body = "\n".join("  " + " ".join(f"0x{b:02x}," for b in row) for row in rows)
    return (
        f'#include "{name}.h"\n\n'
        f"_Alignas(16) const unsigned char {name}_data[{name.upper()}_BYTES] = {{\n"
        f"{body}\n}};\n"
    )


def _header(name: str, length: int, lines: list[str]) -> str:
    """The .h file, for C and C++."""
    upper = name.upper()
    return "\n".join(
        [
            f"#ifndef {upper}_H_",
            f"#define {upper}_H_",
            "",
            "/* logits = OUTPUT_SCALE (output - OUTPUT_ZERO_POINT); the input is the",
            "   pixels 0..255 as they are. */",
            f"#define {upper}_BYTES {length}",
            *lines,
            "",
            "#ifdef __cplusplus",
            'extern "C" {',
            "#endif",
            f"extern const unsigned char {name}_data[{upper}_BYTES];",
            "#ifdef __cplusplus",
            "}",
            "#endif",
            "",
            f"#endif  /* {upper}_H_ */",
            "",
        ]
    )
