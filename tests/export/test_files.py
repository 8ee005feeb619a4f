"""Files have the same logits, the same bytes every time, and no names of a machine."""

import io
import json
import re
import shutil
import subprocess
import zipfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import linen as nn

import hintjax as hj
from hintjax import export, models
from hintjax.export import runtimes, standalone

# TensorFlow and its interpreters warn of their own future.
pytestmark = pytest.mark.filterwarnings("ignore")

MEAN, STD = np.float32([0.3]), np.float32([0.25])


def needs(*packages):
    missing = [name for name in packages if find_spec(name) is None]
    return pytest.mark.skipif(
        bool(missing), reason=f"no {missing}; ./setup.sh --export installs it"
    )


MICRO = Path(__file__).parents[1] / "fixtures" / "tflite_micro"
EXAMPLE = Path(__file__).parents[2] / "examples" / "microcontroller" / "main.cc"
STRICT = ("-Wall", "-Wextra", "-Werror")
NO_COMPILER = [name for name in ("cc", "c++") if shutil.which(name) is None]
compiles = pytest.mark.skipif(bool(NO_COMPILER), reason=f"no compiler {NO_COMPILER}")

FILES = [
    pytest.param("stablehlo", marks=needs("flatbuffers")),
    pytest.param("onnx", marks=needs("jax2onnx")),
    pytest.param("tflite", marks=needs("tensorflow", "ai_edge_litert")),
    pytest.param("tflite_int8", marks=needs("tensorflow", "ai_edge_litert")),
]
LOADS = {
    "stablehlo": runtimes.run_stablehlo,
    "onnx": runtimes.run_onnx,
    "tflite": runtimes.run_tflite,
    "tflite_int8": runtimes.run_tflite,
}


@pytest.fixture(scope="module")
def made(model, images):
    """The file of a format, made once."""
    found = {}

    def make(name):
        if name not in found:
            found[name] = make_again(name, model, images)
        return found[name]

    return make


def make_again(name, model, images):
    more = (images,) if name == "tflite_int8" else ()
    return getattr(export, name)(model, *more)


def bytes_in_c(files, folder):
    """The array, written by a C program that is linked with it."""
    (folder / "student.c").write_text(files.source)
    (folder / "student.h").write_text(files.header)
    (folder / "print.c").write_text(
        '#include <stdio.h>\n#include "student.h"\n'
        "int main(void) {\n"
        "  return fwrite(student_data, 1, STUDENT_BYTES, stdout) != STUDENT_BYTES\n"
        "    || sizeof student_data != STUDENT_BYTES || STUDENT_OUTPUT_SIZE != 4\n"
        "    || (size_t)student_data % 16 || STUDENT_ARENA_BYTES != 4096\n"
        "    || STUDENT_OUTPUT_SCALE <= 0 || STUDENT_OPERATIONS < 2;\n}\n"
    )
    cc = ["cc", "-std=c11", *STRICT]
    subprocess.run([*cc, "-c", "student.c"], cwd=folder, check=True)
    program = [*cc, "-o", "print", "print.c", "student.o"]
    subprocess.run(program, cwd=folder, check=True)
    return subprocess.run([folder / "print"], check=True, capture_output=True).stdout


def example_in_c(files, folder):
    """What the microcontroller's example prints, with a stand-in for TFLite Micro."""
    bytes_in_c(files, folder)
    include = [f"-I{folder}", f"-I{MICRO}"]
    program = ["c++", "-std=c++17", *STRICT, *include, "-o", "main", EXAMPLE]
    subprocess.run([*program, "student.o"], cwd=folder, check=True)
    done = subprocess.run([folder / "main"], check=True, capture_output=True, text=True)
    return done.stdout


@pytest.mark.parametrize("name", FILES)
def test_a_file_has_the_logits_of_the_network(name, made, images, wanted):
    found = LOADS[name](made(name))(images)
    assert found.shape == wanted.shape and found.dtype == np.float32
    error = np.abs(found - wanted).max()
    assert error < (0.05 * np.abs(wanted).max() if "int8" in name else 1e-5)
    margin = np.diff(np.sort(wanted, -1)[:, -2:])[:, 0]
    sure = margin > 2 * error
    assert sure.sum() > len(sure) / 2
    assert (found.argmax(-1) == wanted.argmax(-1))[sure].all()


@pytest.mark.parametrize("name", FILES)
def test_equal_networks_give_equal_bytes(name, made, model_again, images):
    assert make_again(name, model_again, images) == made(name)


@pytest.mark.parametrize("name", FILES)
def test_a_file_names_nothing_of_this_machine(name, made, secrets):
    assert [text for text in secrets if text in made(name)] == []


@pytest.mark.parametrize("name", FILES)
def test_a_file_describes_its_network(name, made, model):
    data = made(name)
    if name == "onnx":
        import onnx

        (entry,) = onnx.load_from_string(data).metadata_props
        found = json.loads(entry.value)
    else:
        found = export.description(data)
    assert found == model.about


@needs("tensorflow", "ai_edge_litert")
def test_fake_quantization_has_the_errors_of_the_int8_file(images):
    """Of layers one after another; the sum of two branches is not rounded."""
    network = hj.linen(models.plain_thin(classes=4, depth=6))
    inputs = jax.numpy.asarray((images / np.float32(255) - MEAN) / STD)
    variables = network.init(jax.random.key(0), inputs)
    data = export.tflite_int8(
        standalone(network, variables, (8, 8, 1), mean=MEAN, std=STD), images
    )
    file = runtimes.run_tflite(data)(images)
    wants = hj.Wants(output=True)
    own = hj.calibrated(network, variables, inputs)
    exact, rounded = (
        np.asarray(one.apply(*own, inputs, wants=wants, train=False)[0].output)
        for one in (network, hj.fake_quantized(network))
    )
    assert np.corrcoef((file - exact).ravel(), (rounded - exact).ravel())[0, 1] > 0.7
    assert np.square(file - rounded).mean() < 0.5 * np.square(file - exact).mean()


@needs("flatbuffers")
def test_stablehlo_runs_without_hintjax(made, images, wanted):
    exported = jax.export.deserialize(bytearray(made("stablehlo")))
    assert set(exported.platforms) == {"cpu", "cuda", "rocm", "tpu"}
    np.testing.assert_allclose(exported.call(images[:3]), wanted[:3], atol=1e-5)


@needs("flatbuffers")
def test_a_batch_of_one_size_takes_no_other(model, images):
    run = export.load_stablehlo(export.stablehlo(model, batch=2))
    assert run(images[:2]).shape == (2, 4)
    with pytest.raises(ValueError, match="24"):
        run(images)


@pytest.mark.quick
@pytest.mark.usefixtures("unchecked")
def test_a_missing_converter_is_one_sentence(model, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for write in (export.stablehlo, export.onnx, export.tflite):
        with pytest.raises(
            export.NoConverter, match=r"`\./setup.sh --export` installs"
        ):
            write(model)
    with pytest.raises(hj.Refusal, match="got no tensorflow"):
        export.tflite_int8(model, np.zeros((1, 8, 8, 1), np.uint8))


@needs("jax2onnx")
def test_onnx_has_no_batch_norm(made):
    import onnx

    nodes = onnx.load_from_string(made("onnx")).graph.node
    kinds = [node.op_type for node in nodes]
    assert kinds.count("Conv") == 9 and "BatchNormalization" not in kinds


@needs("tensorflow", "ai_edge_litert")
def test_the_int8_file_takes_pixels_and_has_no_float(made):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=made("tflite_int8"))
    (given,) = interpreter.get_input_details()
    (found,) = interpreter.get_output_details()
    assert given["dtype"] == np.uint8 and given["quantization"] == (1.0, 0)
    assert found["dtype"] == np.int8
    kinds = {tensor["dtype"] for tensor in interpreter.get_tensor_details()}
    assert kinds <= {np.uint8, np.int8, np.int32}
    scales = [
        tensor["quantization_parameters"]["scales"].size
        for tensor in interpreter.get_tensor_details()
        if tensor["dtype"] == np.int8 and len(tensor["shape"]) == 4
    ]
    assert max(scales) == 64  # one scale for each channel


@needs("tensorflow")
def test_the_error_of_each_layer_is_known(model, images):
    found = export.layer_errors(model, images)
    assert len(found) > 10
    errors = [one.error for one in found]
    assert errors == sorted(errors, reverse=True) and 0.1 < errors[0] < 2


@needs("tensorflow")
def test_representative_images_of_another_shape_are_refused(model):
    with pytest.raises(hj.Refusal, match=r"tflite_int8: expected images of shape \(8"):
        export.tflite_int8(model, np.zeros((3, 9, 9, 1), np.uint8))


@needs("tensorflow", "ai_edge_litert", "tflite_micro")
def test_a_microcontroller_gives_the_same_classes(made, images):
    data = made("tflite_int8")
    phone, micro = runtimes.run_tflite(data), runtimes.run_micro(data)
    one = phone(images), micro(images)
    # Kernels round differently, by at most a few steps.
    assert np.abs(one[0] - one[1]).max() < 0.03 * np.abs(one[0]).max()
    arena = runtimes.arena_bytes(data)
    assert 4_000 < arena < 100_000


@compiles
def test_the_example_for_a_microcontroller_compiles_and_runs(tmp_path):
    """The example, and the text of both C files; any bytes of TFLite will do."""
    data = bytes(4) + b"TFL3" + bytes(range(256))
    operations = ["Conv2D", "FullyConnected"]
    c_files = import_module("hintjax.export.c_array")  # its function has this name too
    ends = {"INPUT": c_files.End(64, 1.0, 0), "OUTPUT": c_files.End(4, 0.25, -3)}
    files = c_files.written(data, "student", operations, ends, arena=4096)
    assert bytes_in_c(files, tmp_path) == data
    assert example_in_c(files, tmp_path) == "class 2, logit 2.500000\n"


@needs("tensorflow", "ai_edge_litert")
@compiles
def test_the_c_array_compiles_and_holds_the_network(made, tmp_path):
    data = made("tflite_int8")
    files = export.c_array(data, "student", arena=4096)
    found = bytes_in_c(files, tmp_path)
    assert data.startswith(found) and found[4:8] == b"TFL3"
    rest = io.BytesIO(data[len(found) :])
    assert zipfile.ZipFile(rest).namelist() == ["about.json"]
    assert "resolver.AddConv2D(); resolver.AddDepthwiseConv2D();" in files.header
    assert "resolver.AddFullyConnected();" in files.header
    defined = dict(re.findall(r"#define (STUDENT_\w+) (\S+)", files.header))
    assert defined["STUDENT_INPUT_SIZE"] == "64" and defined["STUDENT_BYTES"]
    assert defined["STUDENT_INPUT_SCALE"] == "1.0f"
    scale = float(defined["STUDENT_OUTPUT_SCALE"].removesuffix("f"))
    logit = scale * (7 - int(defined["STUDENT_OUTPUT_ZERO_POINT"]))
    assert example_in_c(files, tmp_path) == f"class 2, logit {logit:f}\n"


@needs("jax2onnx")
def test_onnx_pools_over_height_and_width():
    kernel = np.random.default_rng(0).normal(size=(3, 3, 1, 2)).astype(np.float32)

    def apply(params, state, x, train, key):
        x = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = nn.max_pool(x, (2, 3), (2, 1), ((0, 1), (1, 0)))
        return x.mean((1, 2)), {}, state

    variables = hj.Variables({}, {})
    half = np.full(1, 0.5)
    net = hj.function(apply)
    model = export.standalone(net, variables, (5, 4, 1), mean=half, std=half)
    image = np.random.default_rng(1).integers(0, 256, (3, 5, 4, 1), dtype=np.uint8)
    found = runtimes.run_onnx(export.onnx(model))(image)
    np.testing.assert_allclose(found, model.apply(image), atol=1e-5)


@needs("tensorflow", "ai_edge_litert")
def test_a_vision_transformer_has_an_int8_file(transformer, images):
    data = export.tflite_int8(transformer, images)
    found, wanted = runtimes.run_tflite(data)(images), transformer.apply(images)
    assert np.corrcoef(found.ravel(), np.ravel(wanted))[0, 1] > 0.98
    assert "resolver.AddBatchMatMul();" in export.c_array(data).header


@needs("tensorflow")
def test_an_operation_without_an_int8_form_is_refused():
    def apply(params, state, x, train, key):
        return jax.numpy.sin(x).mean((1, 2)), {}, state

    one, variables = np.ones(1), hj.Variables({}, {})
    net = hj.function(apply)
    model = export.standalone(net, variables, (4, 4, 1), mean=one, std=one)
    image = np.random.default_rng(1).integers(0, 256, (3, 4, 4, 1), dtype=np.uint8)
    with pytest.raises(hj.Refusal, match="in int8, got .*SIN") as refused:
        export.tflite_int8(model, image)
    assert "Use tflite, onnx or stablehlo" in f"{refused.value}"
