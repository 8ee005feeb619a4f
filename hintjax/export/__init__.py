"""The network that is shipped, alone, in the files that devices read.

`deployed` says which network is shipped. `standalone` joins it with its variables and
the standardization of its images. `stablehlo`, `onnx`, `tflite`, `tflite_int8` and
`c_array` write it: data in, bytes out. `hintjax.export.runtimes` runs these files.
"""

from hintjax.export.c_array import CArray, c_array
from hintjax.export.converters import NoConverter
from hintjax.export.description import description
from hintjax.export.folding import folded
from hintjax.export.onnx import onnx
from hintjax.export.shipped import deployed, deployed_variables
from hintjax.export.stablehlo import load_stablehlo, stablehlo
from hintjax.export.standalone import Standalone, standalone
from hintjax.export.tflite import LayerError, layer_errors, tflite, tflite_int8

__all__ = [
    "CArray",
    "LayerError",
    "NoConverter",
    "Standalone",
    "c_array",
    "deployed",
    "deployed_variables",
    "description",
    "folded",
    "layer_errors",
    "load_stablehlo",
    "onnx",
    "stablehlo",
    "standalone",
    "tflite",
    "tflite_int8",
]
