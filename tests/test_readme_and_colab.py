"""The README's example and the notebook run, and the README's tables are measured."""

import importlib
import importlib.util
import json
import re
import runpy
from pathlib import Path
from typing import Any

import jupytext
import nbclient
import nbformat
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def examples(file: str = "README.md") -> list[str]:
    """The Python blocks of a page."""
    text = (ROOT / file).read_text()
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.quick
def test_the_readme_example_is_short_and_runs(tmp_path):
    (code,) = examples()
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) < 25
    (tmp_path / "example.py").write_text(code)
    scope = runpy.run_path(str(tmp_path / "example.py"))
    assert scope["logits"].shape == (32, 10)
    assert {"task", "kd", "loss", "task/accuracy"} <= set(scope["metrics"])
    assert int(scope["state"].step) == 100


def test_every_way_to_bring_a_model_runs(tmp_path):
    """The blocks of the page run one after another, with a small file of weights."""
    blocks = examples("hintjax/models/README.md")
    assert len(blocks) == 8
    if importlib.util.find_spec("equinox") is None:
        blocks = [block for block in blocks if "equinox" not in block]
    seen = "\nlosses.append(metrics['loss'])\n"
    code = "".join(b + (seen if "state, metrics = " in b else "\n") for b in blocks)
    file = ROOT / "tests" / "fixtures" / "resnet_basic.safetensors"
    (tmp_path / "page.py").write_text(code.replace("resnet50.safetensors", str(file)))
    tiny = {"blocks": (2, 1, 1, 1), "widths": (4, 4, 6, 8, 10), "classes": 5}
    given = {"TINY": tiny, "losses": []}
    scope = runpy.run_path(str(tmp_path / "page.py"), init_globals=given)
    assert len(scope["losses"]) == len(blocks) - 4
    assert np.isfinite(scope["losses"]).all()
    assert scope["variables"].params["classifier"]["kernel"].shape[-1] == 5


@pytest.mark.parametrize("name", ["quickstart", "tpu_benchmark"])
def test_a_notebook_and_its_script_say_the_same(name):
    notebook = jupytext.read(ROOT / "colabs" / f"{name}.ipynb")
    script = jupytext.read(ROOT / "colabs" / f"{name}.py")
    cells = [
        [(cell.cell_type, cell.source) for cell in nb.cells]
        for nb in (notebook, script)
    ]
    assert cells[0] == cells[1]
    assert notebook.metadata["accelerator"] == "TPU"


def printed(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The text that a notebook prints with few steps on eight devices."""
    monkeypatch.setenv("HINTJAX_STEPS", "3")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiles faster
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = nbformat.read(ROOT / "colabs" / f"{name}.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=1200,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()
    return "".join(
        output.get("text", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    )


def test_the_quickstart_notebook_runs_on_eight_devices(monkeypatch):
    text = printed("quickstart", ROOT / "colabs", monkeypatch)
    assert text.count("CpuDevice") == 8
    assert "with hints" in text and "('conv10', 'conv2')" in text


def test_the_tpu_notebook_runs_on_eight_devices(monkeypatch, tmp_path):
    (tmp_path / "colabs").mkdir()  # it writes its numbers where it runs
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    text = printed("tpu_benchmark", tmp_path / "colabs", monkeypatch)
    assert text.count("CpuDevice") == 8
    record = json.loads((tmp_path / "colabs" / "on_device.json").read_text())
    row = record["programs"]["kd"]
    assert record["devices"] == 8 and row["images_per_second"] > 0
    assert row["cached_over_live"]["median"] > 0


def report(name: str) -> dict[str, Any]:
    """A committed report of a comparison."""
    return json.loads((RESULTS / name / "report.json").read_text())


@pytest.mark.quick
def test_the_readme_table_is_the_committed_reports():
    text = (ROOT / "README.md").read_text()
    digits, few, mnist = map(report, ("digits", "digits_100_labels", "mnist"))
    lines = [
        "| arm | digits | trained | 100 labels | trained | MNIST, 14x14 | trained |",
        "|---|---|---|---|---|---|---|",
    ]
    for rows in zip(digits["rows"], few["rows"], mnist["rows"], strict=True):
        assert len({row["arm"] for row in rows}) == 1
        cells = [rows[0]["arm"]]
        for row in rows:
            cells.append(f"{100 * row['mean']:.1f} ± {100 * row['std']:.1f}")
            cells.append(f"{row['trained']}/{len(row['seeds'])}")
        lines.append(f"| {' | '.join(cells)} |")
    accuracies = [f"{100 * r['teacher']['accuracy']:.1f}" for r in (digits, few, mnist)]
    lines.append(f"| *the teacher* | {' | | '.join(accuracies)} | |")
    assert "\n".join(lines) in text


@pytest.mark.quick
def test_the_readme_table_of_core_methods_is_the_committed_reports():
    text = (ROOT / "README.md").read_text()
    reports = [report(name) for name in ("digits_core", "mnist_core")]
    lines = [
        "| method | digits, 100 labels | MNIST 14x14, 1,000 labels |",
        "|---|---|---|",
    ]
    for rows in zip(*(r["rows"] for r in reports), strict=True):
        assert len({row["arm"] for row in rows}) == 1
        cells = [f"{100 * row['mean']:.1f} ± {100 * row['std']:.1f}" for row in rows]
        lines.append(f"| {' | '.join([rows[0]['arm'], *cells])} |")
    cells = [f"{100 * r['teacher']['accuracy']:.1f}" for r in reports]
    lines.append(f"| {' | '.join(['*the teacher*', *cells])} |")
    assert "\n".join(lines) in text


def ratio(time: dict[str, float]) -> str:
    """A median with its interval, as the README prints it."""
    return "{median:.2f} [{low:.2f}, {high:.2f}]".format(**time)


STEPS = {
    "kd": "kd / (teacher forward + task step)",
    "attention_transfer": "attention_transfer / (teacher forward + task step)",
    "fitnets": "fitnets, joint / (teacher forward + task step with regressor)",
    "fsp": "fsp / (teacher forward + task step)",
    "review": "review / (teacher forward + task step with ABF fusion)",
    "crd": "crd, shared negatives / (teacher forward + task step with embedding heads)",
    "hint_stage": "hint stage / (teacher forward + cut student with regressor)",
    "hint_stage / cut networks": "hint stage / hint stage of networks cut at the hint",
    "hint_stage / fitnets": "hint stage / fitnets, joint",
}


@pytest.mark.quick
def test_the_readme_tables_of_step_times_are_the_committed_results():
    text = (ROOT / "README.md").read_text()
    record = json.loads((RESULTS / "step_time_cpu.json").read_text())
    assert set(record["ratios"]) == {*STEPS, "task"}
    for name, title in STEPS.items():
        row = record["ratios"][name]
        assert f"| {title} | {ratio(row['time'])} | {row['flops']:.3f} |" in text
    record = json.loads((RESULTS / "crd_negatives_cpu.json").read_text())
    for kind, title in {
        "shared": "shared by the batch",
        "anchor": "for each anchor, as in the paper",
        "gather": "for each anchor, gathered as in the published code",
        "in_batch": "the other examples of the batch",
    }.items():
        time = ratio(record["over_none"][kind]["time"])
        memory = record["programs"][f"{kind}, alone"]["temp_bytes"] / 1e6
        shown = f"{memory:,.0f}" if memory > 1 else f"{memory:.1f}"
        assert f"| {title} | {time} | {shown} |" in text


@pytest.mark.quick
def test_the_readme_table_of_students_for_devices_is_the_committed_results(monkeypatch):
    text = (ROOT / "README.md").read_text()
    record = json.loads((RESULTS / "edge_table.json").read_text())
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    edge_table = importlib.import_module("edge_table")
    assert edge_table.markdown(record, ["int8"]) in text
    assert edge_table.markdown(record) in (RESULTS / "README.md").read_text()
    for data in record["data"]:
        aim = edge_table.aim(data["config"]["dataset"])
        again = edge_table.judged(data["rows"], aim)
        assert [row["misses"] for row in again] == [
            row["misses"] for row in data["rows"]
        ]


@pytest.mark.quick
def test_the_readme_lists_every_room():
    text = (ROOT / "README.md").read_text().partition("## The house")[2]
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    shown = re.findall(r"`([^`]+)`", " ".join(row.split("|")[1] for row in rows))
    package = ROOT / "hintjax"
    rooms = {f"{path.parent.name}/" for path in package.glob("*/*.py")}
    files = {path.name for path in package.glob("*.py")}
    assert sorted(shown) == sorted(
        rooms
        | files
        - {
            "__init__.py",
            "_checks.py",
            "_numerics.py",
        }
    )
