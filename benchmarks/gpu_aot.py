"""Steps compiled for one GPU, without a GPU: operations, bytes and memory.

    pip install --no-deps jax-cuda12-plugin==VERSION jax-cuda12-pjrt==VERSION
    JAX_PLATFORMS=cpu python benchmarks/gpu_aot.py --out benchmarks/results/gpu_aot.json

VERSION is that of jax; nothing else of CUDA is needed. Device: a CPU host; no program
runs. Minutes: 5 on two cores.

The steps are those of `tpu_aot.py`: WRN-40-2 teaches WRN-16-2, 128 images 32x32x3. Each
is compiled for one H100 (SXM, 80 GB). A row has

    operations   counted by XLA before it optimizes, since it cannot look into cuDNN
    bytes        that the kernels of the compiled program read and write
    memory       arguments, and temporary arrays, of the compiled program
    kernels      calls of cuDNN and cuBLAS, and fusions
    bound        the least time of a step, in ms: the larger of operations / peak and
                 bytes / bandwidth of the memory, with the published constants

float32 steps use the tensor cores in TF32, as JAX does by default. The bound is no
prediction: it leaves out the start of each kernel, some microseconds, which CUDA graphs
(XLA's command buffers) make shorter.

Constants: NVIDIA H100 Tensor Core GPU datasheet (SXM: 989 TFLOP/s of bfloat16 and 495
of TF32 without sparsity, 3.35 TB/s).
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import measure
import tpu_aot
from jax.experimental import topologies
from jaxlib import xla_client

import hintjax as hj
from hintjax.memory import rows

PEAK = {"float32": 495e12, "bfloat16": 989e12}  # operations per second
BANDWIDTH = 3.35e12  # bytes per second
# The facts of the device that the compiler asks for.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  device_memory_size: 84942979072
  l2_cache_size: 52428800
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Compiles, prints the table, and returns the record that `--out` writes."""
    options = _options(arguments)
    record = {"benchmark": "gpu_aot", "machine": measure.machine(), "programs": []}
    if options.out and options.out.exists():  # continues an interrupted run
        record = json.loads(options.out.read_text())
    done = [(row["method"], row["dtype"]) for row in record["programs"]]
    for dtype in PEAK:
        for method in [options.small] if options.small else tpu_aot.CORE:
            if (method, dtype) in done:
                continue
            pair = "small" if options.small else "wrn"
            case = tpu_aot.Case(pair, method, student=dtype, teacher=dtype)
            row = {"method": method, "dtype": dtype, **told(case, options.host)}
            record["programs"].append(row)
            print(f"{method}, {dtype}: {row['compile_seconds']:.0f} s", flush=True)
            if options.out:
                measure.write(options.out, record)
    print(table(record))
    return record


def told(case: tpu_aot.Case, host: bool) -> dict[str, Any]:
    """Compiles one program and returns its row of the record."""
    here = hj.make_mesh(devices=jax.devices("cpu")[:1])
    flops = lowered(case, here).cost_analysis()["flops"]
    mesh = here
    if not host:
        gpu = topologies.get_topology_desc(
            platform="cuda", target_config=H100, topology="1x1x1"
        )
        mesh = hj.make_mesh(devices=gpu.devices)
    start = time.perf_counter()
    compiled = lowered(case, mesh).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    (module,) = compiled.runtime_executable().hlo_modules()
    client = jax.devices("cpu")[0].client
    costs = xla_client._xla.hlo_module_cost_analysis(client, module)
    text, moved = compiled.as_text(), costs["bytes accessed"]
    return {
        "compile_seconds": seconds,
        "flops": flops,
        "bytes": moved,
        "memory": {
            "argument": memory.argument_size_in_bytes,
            "temp": memory.temp_size_in_bytes,
        },
        "kernels": {
            "cudnn": text.count('custom_call_target="__cudnn$'),
            "cublas": text.count('custom_call_target="__cublas$'),
            "fusions": text.count(" fusion("),
        },
        "bound_seconds": max(flops / PEAK[case.student], moved / BANDWIDTH),
    }


def lowered(case: tpu_aot.Case, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """The step of a case as XLA gets it; CRD's anchors are scored in one piece.

    XLA counts the body of a loop once.
    """
    update, arguments = tpu_aot.step(case, mesh)
    with mock.patch.object(rows, "PIECES", 1):
        return update.lower(*arguments)


def table(record: Mapping[str, Any]) -> str:
    """The record as text."""
    heads = f"{'step':22}{'dtype':>10}{'GFLOP':>8}{'GB':>7}{'arguments MB':>14}"
    heads += (
        f"{'temporary MB':>14}{'cuDNN':>7}{'cuBLAS':>8}{'fusions':>9}{'bound ms':>10}"
    )
    lines = [heads]
    for row in record["programs"]:
        memory, kernels = row["memory"], row["kernels"]
        lines.append(
            f"{row['method']:22}{row['dtype']:>10}{row['flops'] / 1e9:8.1f}"
            f"{row['bytes'] / 1e9:7.2f}{memory['argument'] / 1e6:14.0f}"
            f"{memory['temp'] / 1e6:14.0f}{kernels['cudnn']:7}{kernels['cublas']:8}"
            f"{kernels['fusions']:9}{1e3 * row['bound_seconds']:10.2f}"
        )
    return "\n".join(lines)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, help="JSON file to write, or to continue if it exists")
    add("--small", metavar="METHOD", help="compile one tiny program of this method")
    add("--host", action="store_true", help="compile for the CPU of this host")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
