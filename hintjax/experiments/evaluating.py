"""The commands `eval` and `cache verify`: they check a run, and train nothing."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hintjax._checks import Refusal, message
from hintjax.experiments import config as configs
from hintjax.experiments.caching import CACHE, contents_of, methods_of, verify
from hintjax.experiments.comparison import REPORT
from hintjax.experiments.comparison_table import show_table
from hintjax.experiments.config import Config
from hintjax.experiments.finished import (
    DEPLOYED,
    RESULT,
    evaluation_size,
    run_config,
    score,
)
from hintjax.experiments.plan import planned, recipe_of
from hintjax.experiments.recipes import Recipe
from hintjax.experiments.run import load_deployed
from hintjax.experiments.setting import Setting, prepare
from hintjax.experiments.teaching import teacher_variables
from hintjax.networks import Network, Variables
from hintjax.training.run_directory import read_json


def evaluate_run(run_dir: Path) -> None:
    """Prints the metric of a finished run's student, or the table of a comparison.

    Of a run without labels, it prints the losses and R^2 that were measured at its end.

    Args:
        run_dir: run directory.
    """
    path = run_dir.expanduser().resolve()
    if (path / REPORT).exists():
        show_table(json.loads((path / REPORT).read_text()))
        return
    result = read_json(path / RESULT) or {}
    if result.get("class_names") == []:
        _show_losses(result)
        return
    setting, student, variables = shipped(path)
    dataset = setting.dataset
    for name in ("validation", "test"):
        split = getattr(dataset, name)
        size = evaluation_size(split, setting.config)
        where = (split, dataset.standardize, size, setting.task)
        found = score(student, variables, *where)
        print(f"{name} {setting.task.name}: {found:.4f}")


def _show_losses(result: Mapping[str, Any]) -> None:
    """Prints the losses and R^2 of a run without labels, measured at its end."""
    for name, value in result.items():
        of, slash, metric = name.partition("/")
        if slash and not metric.endswith("/weighted"):
            print(f"{of} {metric}: {value:.4g}")


def shipped(
    run_dir: Path, *, rounding: bool = True
) -> tuple[Setting, Network, Variables]:
    """The network that a finished run deploys, on one device.

    Args:
        run_dir: run directory.
        rounding: whether a student that was trained with --quantize rounds. A file has
            its parameters, and rounds them itself.

    Returns:
        The setting of the run, the network and its variables.

    Raises:
        Refusal: if it is not the directory of a finished run of one method.
    """
    config = configs.load(run_dir)
    if config.method is not None:
        recipe = recipe_of(config.method, config.task)
    else:
        recipe = _recipe_of_arm(config, run_dir)
    # Any machine can evaluate.
    quantize = config.quantize and rounding
    here = dataclasses.replace(config, devices=1, fsdp=1, quantize=quantize)
    setting = prepare(here, teach=(run_dir / DEPLOYED).exists())
    return setting, *load_deployed(setting, run_dir, recipe)


def _recipe_of_arm(config: Config, run_dir: Path) -> Recipe:
    """The recipe of a run in a comparison, whose directory is named after its arm."""
    arms = {arm.name: arm.recipe for arm in planned(config).arms}
    if (run_dir / RESULT).exists() and run_dir.parent.name in arms:
        return arms[run_dir.parent.name]
    wanted, do = "a finished comparison", f"Finish it with `hintjax resume {run_dir}`."
    if (run_dir / REPORT).exists():
        wanted, do = "a run of one method", "Name a directory in it that has a run."
    raise Refusal(message("evaluate", wanted, f"{run_dir}", do))


def verify_cache(run_dir: Path) -> None:
    """Checks a run's cache of teacher features: some rows are computed again.

    Prints the largest error and the least cosine of each feature.

    Args:
        run_dir: run directory.
    """
    path = run_dir.expanduser().resolve()
    config = run_config(path)
    here = dataclasses.replace(config, devices=1, fsdp=1)  # any machine can check
    setting = prepare(here, teach=True)
    teacher = teacher_variables(setting, path)
    methods = methods_of(setting, planned(config).recipes)
    verify(path / CACHE, setting, contents_of(setting, methods, teacher), teacher)
