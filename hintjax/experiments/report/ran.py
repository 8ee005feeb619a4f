"""A finished run, as the files of its run directory have it."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hintjax._checks import Refusal, message
from hintjax.experiments import config as configs
from hintjax.experiments.comparison import REPORT
from hintjax.experiments.config import Config
from hintjax.experiments.finished import RESULT
from hintjax.experiments.report.facts import FACTS
from hintjax.experiments.tasks import TASKS, Task
from hintjax.training import read_metrics

Lines = Sequence[Mapping[str, Any]]


class Ran(NamedTuple):
    """A finished run, as its files have it.

    Attributes:
        name: name of the run.
        path: run directory.
        config: config of the run.
        result: contents of result.json.
        facts: contents of facts.json; empty if there is no such file.
        lines: lines of metrics.jsonl.
    """

    name: str
    path: Path
    config: Config
    result: Mapping[str, Any]
    facts: Mapping[str, Any]
    lines: Lines

    @property
    def task(self) -> Task:
        """The task of the run."""
        return TASKS[self.config.task]

    @property
    def score(self) -> float:
        """The metric of the task on the test split; nan without labels."""
        return self.result.get(f"test/{self.task.name}", math.nan)


def read_run(run_dir: Path) -> Ran:
    """Reads the files of a finished run.

    Args:
        run_dir: run directory.

    Raises:
        Refusal: if the run is not finished.
    """
    config = configs.load(run_dir)
    if not (run_dir / RESULT).exists():
        if (run_dir / REPORT).exists():
            do = "Name runs in it, such as KD/rate0.001-seed0."
            got = f"the comparison {run_dir}"
            raise Refusal(message("report", "runs", got, do))
        do = f"Finish it with `hintjax resume {run_dir}`."
        raise Refusal(message("report", "a finished run", f"{run_dir}", do))
    result, facts = (
        json.loads(path.read_text()) if path.exists() else {}
        for path in (run_dir / RESULT, run_dir / FACTS)
    )
    lines = read_metrics(run_dir)
    return Ran(run_dir.name, run_dir, config, result, facts, lines)


def named_apart(runs: Sequence[Ran]) -> list[Ran]:
    """The runs with as much of their paths as tells them apart."""
    names = [run.name for run in runs]
    return [
        run._replace(name=run.name if names.count(run.name) == 1 else str(run.path))
        for run in runs
    ]
