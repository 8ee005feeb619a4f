"""The results of a finished run: its student, its config, its accuracy."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hintjax._checks import Refusal, message
from hintjax.data import Source, Standardize, evaluation_batches
from hintjax.experiments import config as configs
from hintjax.experiments.config import Config
from hintjax.experiments.factories import student_network
from hintjax.experiments.tasks import Task
from hintjax.networks import Network, Variables, Wants, split
from hintjax.processes import told
from hintjax.training import load_tree

RESULT = "result.json"
DEPLOYED = "deployed"  # the network of a student that does not stand alone
EVALUATION_BATCH = 500  # examples, at most
_SMALL = EVALUATION_BATCH * 32 * 32 * 3  # pixels (times channels) of such a batch


def load_student(
    run_dir: str | os.PathLike[str],
    *,
    hints_only: bool = False,
    rounding: bool = True,
) -> tuple[Network, Variables]:
    """The student of a finished run, with its network.

    Args:
        run_dir: run directory.
        hints_only: whether to load also a student whose own output was not trained,
            since it is deployed with other parts; see `load_deployed`.
        rounding: whether a student that was trained with --quantize rounds.

    Raises:
        Refusal: if the run has no student.
    """
    path = Path(run_dir).expanduser()
    config = run_config(path)

    def classes() -> int:
        if not (path / "student").exists():
            do = f"Finish it with `hintjax resume {path}`."
            raise Refusal(message("teacher", f"a student in {path}", "none", do))
        if (path / DEPLOYED).exists() and not hints_only:
            wanted = f"a student in {path} that stands alone"
            got = f"one of {config.method}, which is deployed with other parts"
            raise Refusal(message("teacher", wanted, got))
        return json.loads((path / RESULT).read_text())["classes"]

    config = dataclasses.replace(config, quantize=config.quantize and rounding)
    made = student_network(config, told(classes))
    return made, split(load_tree(path / "student"))


def run_config(run_dir: Path) -> Config:
    """The config of a run directory, in all processes."""
    return configs.from_dict(told(lambda: dataclasses.asdict(configs.load(run_dir))))


def evaluation_size(split: Source, config: Config, parts: int = 1) -> int:
    """The number of examples in a batch for evaluation.

    A batch of small images (up to 32 x 32 pixels in color) holds 500 examples. A batch
    of larger images holds as many pixels, but no fewer examples than a micro-batch of
    training: if training fits into memory, evaluation fits, too. Then a batch is not
    larger than the split. The metrics do not depend on the size beyond rounding.

    Args:
        split: the split, for its number of examples and the shape of its images.
        config: config of the run, for its batch size and number of micro-batches.
        parts: number of devices that share a batch; the size is a multiple of it.

    Returns:
        The number of examples.
    """
    trained = config.batch_size // config.accumulate
    size = max(trained, _SMALL // int(np.prod(split.shape)), 1)
    size = min(size, split.n) if size < EVALUATION_BATCH else EVALUATION_BATCH
    return -(-size // parts) * parts


def score(
    network: Network,
    variables: Variables,
    split: Source,
    standardize: Standardize,
    size: int,
    task: Task,
) -> float:
    """The metric of a task, for a network on a split.

    Args:
        network: the network.
        variables: its variables.
        split: the split.
        standardize: the statistics of the training split.
        size: number of examples in a batch.
        task: the task.

    Returns:
        The mean over the examples that have labels that count.
    """
    batches = evaluation_batches(split, size, standardize)
    return scorer(network, task)(variables, batches)


def scorer(
    network: Network, task: Task
) -> Callable[[Variables, Iterable[Mapping[str, Any]]], float]:
    """Makes `(variables, batches) -> metric`, which compiles once for all variables.

    Args:
        network: the network.
        task: the task.
    """

    @jax.jit
    def measured(variables, image, label, where):
        wants = Wants(output=True)
        shown, _ = network.apply(*variables, image, wants=wants, train=False)
        return task.measured(shown.output, label, where)

    def scored(variables: Variables, batches: Iterable[Mapping[str, Any]]) -> float:
        total, count = 0.0, 0
        for batch in batches:
            found = measured(variables, batch["image"], batch["label"], batch["where"])
            total, count = total + float(found[0]), count + int(found[1])
        return total / max(count, 1)

    return scored
