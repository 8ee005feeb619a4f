"""Finished runs and comparisons that are made by hand, as files."""

import json

import pytest

from hintjax.experiments import config as configs
from hintjax.experiments.config import Config
from hintjax.training import read_metrics

MACHINE = {"device": "1 x cpu", "cores": 2, "python": "3.11.7", "hintjax": "0.1.0"}
MACHINE |= {"jax": "0.10.2", "flax": "0.12.8", "orbax-checkpoint": "0.12.8"}


@pytest.fixture(scope="session")
def by_hand():
    """Makes the files of a finished run."""

    def make(run_dir, method="kd", accuracy=0.9, names=("0", "1"), **fields):
        run_dir.mkdir(parents=True)
        configs.save(Config(method=method, **fields), run_dir)
        result = {"seconds": 3.0, "boundaries": [20], "class_names": names}
        result |= {"classes": len(names)}
        result |= {f"{split}/accuracy": accuracy for split in ("validation", "test")}
        (run_dir / "result.json").write_text(json.dumps(result))
        right = round(100 * accuracy)
        classes = {"examples": 100, "right": right, "complete": True, "ece": 0.125}
        classes["confusions"] = [[0, 0, right], [0, 1, 100 - right]]
        classes["bins"] = [[100, right, 80.0]]
        sizes = {"student": 1000, "teacher": 5000}
        facts = {"parameters": sizes, "classes": classes, "pair": None, "teacher": None}
        facts |= {"machine": MACHINE}
        (run_dir / "facts.json").write_text(json.dumps(facts))
        lines = [
            {"step": step, "stage": method, "kd": 2.0 / step, "kd/weighted": 1.0 / step}
            | {"loss": None, "validation/task/accuracy": accuracy - 1 / step}
            for step in (10, 20)
        ]
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        (run_dir / "metrics.jsonl").write_text(text)
        assert read_metrics(run_dir) == lines
        return run_dir

    return make


@pytest.fixture(scope="session")
def compared_by_hand(by_hand):
    """Makes the files of a finished comparison."""

    def make(run_dir, arms):
        rows, differences = [], {}
        for arm in arms:
            run = f"{arm}/rate0.001-seed0"
            by_hand(run_dir / run, "kd")
            seeds = [0.91, 0.93, 0.92]
            rows.append(
                {"arm": arm, "mean": 0.92, "std": 0.01, "seeds": seeds, "trained": 3}
                | {"r2": 0.8, "seconds": 12.5, "rate": 0.001, "runs": [run]}
            )
            differences[arm] = {"mean": 0.01, "low": -0.02, "high": 0.04}
            differences[arm]["told_apart"] = False
        report = {
            "dataset": "digits",
            "task": "classification",
            "machine": MACHINE,
            "teacher": {"accuracy": 0.98, "parameters": 5000},
            "parameters": 1000,
            "compression": 5.0,
            "chance": 0.1,
            "pairs": [["group2/block1/conv2", "group2/block1/conv2"]],
            "baseline": arms[0],
            "rows": rows,
            "differences": differences,
        }
        configs.save(Config(compare=("kd", "fitnets")), run_dir)
        (run_dir / "report.json").write_text(json.dumps(report))
        return run_dir

    return make
