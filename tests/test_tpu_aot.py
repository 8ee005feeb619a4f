"""The ahead-of-time benchmark: how it reads a program, and its model of time."""

import json
from importlib import import_module
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

from hintjax.sharding import check_spans

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def tpu_aot():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield import_module("tpu_aot")


PROGRAM = """
%cond.1 (p: (s32[], f32[4])) -> pred[] {
  %n = s32[]{:T(128)} constant(16), metadata={op_name="while"}
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body.1 (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %g = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%x), channel_id=3
}

ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %w = (s32[], f32[4]) while(%t), condition=%cond.1, body=%body.1, metadata={}
  %a = f32[8,4]{1,0:T(8,128)} all-reduce(%x), channel_id=1, to_apply=%add
  %b = (f32[16]{0:T(128)}, bf16[3,2]{1,0:T(8,128)(2,1)}) all-reduce(%x, %y)
  %c = (f32[2,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%z), dimensions={0}
  %d = f32[16,8]{1,0} all-gather-done(%c)
  %e = f32[2]{0} reduce-scatter(%w), dimensions={0}
  ROOT %f = f32[8,4]{1,0} add(%a, %all-reduce.7)
"""


@pytest.mark.quick
def test_collectives_are_counted_with_what_they_give(tpu_aot):
    assert tpu_aot.collectives(PROGRAM) == {
        "all-reduce": {"count": 2, "bytes": 128 + 64 + 12},
        "all-gather": {"count": 1, "bytes": 512},
        "reduce-scatter": {"count": 1, "bytes": 8},
        "collective-permute": {"count": 16, "bytes": 256},
    }


@pytest.mark.quick
def test_time_is_modeled_from_constants(tpu_aot):
    chip = tpu_aot.Chip(flops=1e12, hbm=1e11, port=1e9, ports=4, options={})
    row = {
        "chips": 4,
        "flops": 2e9,
        "bytes": 1e8,
        "collectives": {
            "all-reduce": {"count": 2, "bytes": 8_000_000},
            "all-gather": {"count": 1, "bytes": 4_000_000},
            "reduce-scatter": {"count": 1, "bytes": 1_000_000},
            "collective-permute": {"count": 4, "bytes": 2_000_000},
        },
    }
    got = tpu_aot.modeled(row, chip, (2, 2))
    assert got["compute_seconds"] == pytest.approx(2e-3) and got["bound"] == "FLOPs"
    # 2 x 8 MB x 3/4, 4 MB x 3/4, 1 MB x 3 and 2 MB, over two ports.
    assert got["bandwidth_seconds"] == pytest.approx((12e6 + 3e6 + 3e6 + 2e6) / 2e9)
    # 2 links: there and back for each sum, once for the others; one in a ring.
    assert got["hop_seconds"] == pytest.approx((2 * 4 + 2 + 2 + 4) * 1e-6)
    assert tpu_aot.modeled(row | {"bytes": 1e9}, chip, (2, 2))["bound"] == "HBM"


@pytest.mark.quick
def test_efficiency_is_that_of_the_smallest_slice_over_each(tpu_aot):
    def row(case, seconds):
        times = dict.fromkeys(("bandwidth_seconds", "hop_seconds"), seconds / 4)
        chips = case.sides[0] * case.sides[1]
        return {**case._asdict(), **times, "chips": chips, "compute_seconds": 1.0}

    small, large = (
        tpu_aot.Case("wrn", "kd", sides=sides) for sides in ((2, 2), (4, 4))
    )
    other = tpu_aot.Case("wrn", "task", sides=(4, 4))
    rows = [row(large, 2.0), row(small, 1.0), row(other, 3.0)]
    found = tpu_aot.efficiencies({"programs": rows})
    assert found[small] == dict.fromkeys(tpu_aot.KINDS, 1.0)
    assert found[other] == dict.fromkeys(tpu_aot.KINDS, 1.0)
    assert found[large]["without overlap"] == pytest.approx(1.25 / 1.5)
    assert found[large]["with overlap"] == 1
    assert found[large]["with hops"] == pytest.approx(1.5 / 2)


@pytest.mark.quick
def test_a_batch_of_shapes_is_that_of_all_processes():
    """Steps can be compiled for slices of several hosts that do not exist here."""
    slices = mock.Mock(spec=jax.sharding.Mesh, is_multi_process=True)
    check_spans({"image": jax.ShapeDtypeStruct((8, 2), np.float32)}, slices)
    with pytest.raises(ValueError, match="expected a batch on the devices of all"):
        check_spans({"image": np.zeros((8, 2), np.float32)}, slices)


@pytest.mark.quick
def test_the_matrix_has_all_core_methods_on_every_generation(tpu_aot):
    record = json.loads((FOLDER / "results" / "tpu_aot.json").read_text())
    programs = {tpu_aot._case(row) for row in record["programs"]}
    assert programs == set(tpu_aot.cases())
    for name in tpu_aot.CORE:
        found = {case.chip for case in programs if case.method == name}
        assert found == set(tpu_aot.CHIPS)


@pytest.mark.quick
def test_the_page_says_what_the_record_has(tpu_aot):
    """The page has all efficiencies, and names all forms that miss the bar."""
    record = json.loads((FOLDER / "results" / "tpu_aot.json").read_text())
    page = (FOLDER / "results" / "README.md").read_text()
    found = {
        case: value["without overlap"]
        for case, value in tpu_aot.efficiencies(record).items()
        if case.sides == (16, 16)
    }
    assert len(found) == len(tpu_aot.CORE) + 2
    for case, value in found.items():
        assert f"| {case.pair} | `{case.method}` | {value:.3f} |" in page
    low = {case.method for case, value in found.items() if value < 0.95}
    assert low == {"crd_shared", "crd_by_rows"}
    hint, cut = (
        next(row["flops"] for row in record["programs"] if row["method"] == name)
        for name in ("hint_stage", "hint_stage_cut")
    )
    assert hint == pytest.approx(cut, rel=0.02)


def test_a_program_is_compiled_and_told_of(tpu_aot, tmp_path, capsys):
    """The program is for this host; without --host, libtpu compiles it for a TPU."""
    out = tmp_path / "aot.json"
    arguments = ["--small", "kd", "--host", "--out", str(out)]
    record = tpu_aot.main(arguments)
    (row,) = record["programs"]
    assert row["chips"] == 8 and row["flops"] > 0 and row["memory"]["peak"] > 0
    assert row["memory"]["argument"] == row["memory"]["argument_ideal"]
    assert set(row["collectives"]) == {"all-reduce"}
    assert "v5e small kd" in capsys.readouterr().out
    # An interrupted run continues.
    assert (
        tpu_aot.main(arguments)["programs"] == json.loads(out.read_text())["programs"]
    )
    assert "1 of 1" not in capsys.readouterr().out
    record["programs"] = [
        row | {"chips": chips, "sides": [chips, 1]} for chips in (4, 8, 16)
    ]
    tpu_aot.plot(record, tmp_path / "aot.png")
    assert (tmp_path / "aot.png").stat().st_size > 0


def test_a_step_is_told_of_for_a_gpu(tpu_aot, capsys):
    """The program is for this host; without --host, it is for a GPU."""
    gpu_aot = import_module("gpu_aot")
    record = gpu_aot.main(["--small", "kd", "--host"])
    single, half = record["programs"]
    assert [single["dtype"], half["dtype"]] == ["float32", "bfloat16"]
    for row in record["programs"]:
        assert row["flops"] > 0 and row["bytes"] > 0 and row["memory"]["temp"] > 0
    assert single["bound_seconds"] == max(
        single["flops"] / 495e12, single["bytes"] / 3.35e12
    )
    assert "bound ms" in capsys.readouterr().out


def test_the_page_has_the_numbers_of_the_gpu(tpu_aot):
    page = (FOLDER / "results" / "README.md").read_text()
    record = json.loads((FOLDER / "results" / "gpu_aot.json").read_text())
    assert len(record["programs"]) == 2 * len(tpu_aot.CORE)
    for row in record["programs"]:
        shown = f"{1e3 * row['bound_seconds']:.2f}"
        numbers = f"{row['flops'] / 1e9:.0f} | {row['bytes'] / 1e9:.2f} | "
        numbers += f"{row['memory']['temp'] / 1e6:.0f} | {shown}"
        assert f"| `{row['method']}` | {row['dtype']} | {numbers} |" in page


@pytest.mark.long
def test_every_program_of_the_matrix_traces(tpu_aot):
    mesh = tpu_aot.hj.make_mesh()
    kinds = {
        case._replace(chip="v5e", sides=(4, 4), fsdp=1) for case in tpu_aot.cases()
    }
    for case in kinds:
        if case.pair == "wrn" and case.student == case.teacher == "float32":
            update, arguments = tpu_aot.step(case._replace(pair="small"), mesh)
            update.lower(*arguments)
