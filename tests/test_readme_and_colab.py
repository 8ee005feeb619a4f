"""What the README and the notebook show, runs."""

import importlib.util
import json
import os
import re
import runpy
from pathlib import Path

import jupytext
import nbclient
import nbformat
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def examples(file="README.md"):
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
    """The page's blocks, one after the other, with a small file of weights."""
    blocks = examples("hintjax/models/README.md")
    assert len(blocks) == 6
    if importlib.util.find_spec("equinox") is None:
        blocks = [block for block in blocks if "equinox" not in block]
    seen = "\nlosses.append(metrics['loss'])\n"
    code = "".join(b + (seen if "state, metrics = " in b else "\n") for b in blocks)
    file = ROOT / "tests" / "fixtures" / "resnet_basic.safetensors"
    (tmp_path / "page.py").write_text(code.replace("resnet50.safetensors", str(file)))
    tiny = {"blocks": (2, 1, 1, 1), "widths": (4, 4, 6, 8, 10), "classes": 5}
    given = {"TINY": tiny, "losses": []}
    scope = runpy.run_path(str(tmp_path / "page.py"), init_globals=given)
    assert len(scope["losses"]) == len(blocks) - 2
    assert np.isfinite(scope["losses"]).all()
    assert scope["variables"].params["classifier"]["kernel"].shape[-1] == 5


def test_the_notebook_and_its_script_say_the_same():
    notebook = jupytext.read(ROOT / "colabs" / "quickstart.ipynb")
    script = jupytext.read(ROOT / "colabs" / "quickstart.py")
    cells = [
        [(cell.cell_type, cell.source) for cell in nb.cells]
        for nb in (notebook, script)
    ]
    assert cells[0] == cells[1]
    assert notebook.metadata["accelerator"] == "TPU"


def test_the_notebook_runs_on_eight_devices(monkeypatch):
    monkeypatch.setenv("HINTJAX_STEPS", "3")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = nbformat.read(ROOT / "colabs" / "quickstart.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(ROOT / "colabs")}},
    )
    client.execute()
    printed = "".join(
        output.get("text", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    )
    assert printed.count("CpuDevice") == 8
    assert "with hints" in printed and "('conv10', 'conv2')" in printed
    assert os.environ["HINTJAX_STEPS"] == "3"


def report(name):
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
