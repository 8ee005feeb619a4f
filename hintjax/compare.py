"""A comparison: one teacher, several arms, the same seeds; a table and a picture.

Every arm has the same number of steps. Where an arm has several learning rates to
choose from, it runs with all of them, and the mean over the seeds on the validation
split decides. The test split decides nothing.
"""

import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from hintjax.data import order, take
from hintjax.experiment import (
    RESULT,
    Setting,
    accuracy,
    load_student,
    network,
    run,
)
from hintjax.losses import attention_map
from hintjax.metrics import paired, read_metrics, summary
from hintjax.networks import Variables, Wants
from hintjax.pairing import linearly_explained
from hintjax.places import middle
from hintjax.recipes import Recipe
from hintjax.regressors import to_grid
from hintjax.rundir import inside
from hintjax.signals import stoppable

REPORT = "report.json"
_EXAMPLES = 256  # that R^2 is fitted and judged on
_SHOWN = 6  # images in the picture


class Arm(NamedTuple):
    """One way to train the student.

    Attributes:
        name: in the table.
        recipe: its phases.
        rates: the learning rates to choose from.
        initial: the factory of the module that initialises the student.
        untrained: whether its hints come from a teacher that was never trained.
        baseline: whether others are measured against it.
    """

    name: str
    recipe: Recipe
    rates: Sequence[float]
    initial: str
    untrained: bool = False
    baseline: bool = True


def compare(
    setting: Setting,
    run_dir: Path,
    arms: Sequence[Arm],
    teacher: Variables,
    *,
    begin: Callable[[str], Callable[..., None]],
) -> dict[str, Any]:
    """Runs all arms over all seeds; runs that are finished are not run again.

    Args:
        setting: data, networks, pairs.
        run_dir: each run has a directory in it.
        arms: what is compared; they differ in nothing else.
        teacher: its variables.
        begin: called with the name of each run; gives what `fit` calls to show it.

    Returns:
        For each arm its learning rate and, per seed, the results; with R^2.
    """
    classes = setting.dataset.classes
    initial = {arm.initial: network(arm.initial, classes) for arm in arms}
    untrained = setting.teacher.init(
        jax.random.key(setting.config.seed), setting.inputs
    )
    explained = _explained(setting, teacher)

    def one(arm, rate, seed):
        path = inside(run_dir, f"{arm.name}/rate{rate:g}-seed{seed}")
        if not (path / RESULT).exists():
            run(
                setting,
                path,
                arm.recipe,
                teacher=teacher,
                hints=untrained if arm.untrained else None,
                initial=initial[arm.initial],
                learning_rate=rate,
                seed=seed,
                resume=True,
                show=begin(f"{arm.name}, rate {rate:g}, seed {seed}"),
            )
        return path, json.loads((path / RESULT).read_text())

    alone = setting.layout is None  # programs of one mesh must not cross
    first = setting.config.seed
    seeds = range(first, first + setting.config.seeds)
    jobs = [(arm, rate, seed) for arm in arms for rate in arm.rates for seed in seeds]
    done = dict(
        zip(
            [(arm.name, rate, seed) for arm, rate, seed in jobs],
            _side_by_side(one, jobs, setting.config.seeds if alone else 1),
            strict=True,
        )
    )
    found = {}
    for arm in arms:
        tried = {
            rate: [done[arm.name, rate, seed] for seed in seeds] for rate in arm.rates
        }
        validation = {
            rate: float(np.mean([result["validation/accuracy"] for _, result in runs]))
            for rate, runs in tried.items()
        }
        rate = max(validation, key=validation.get)
        found[arm.name] = {
            "rate": rate,
            "validation": {str(rate): value for rate, value in validation.items()},
            "test": [result["test/accuracy"] for _, result in tried[rate]],
            "seconds": [result["seconds"] for _, result in tried[rate]],
            "r2": [
                explained(load_student(path, hints_only=True)[1])
                for path, _ in tried[rate]
            ],
            "runs": [str(path.relative_to(run_dir)) for path, _ in tried[rate]],
        }
    return found


def _side_by_side(one, jobs, most):
    """All jobs, in their order; on a CPU, whose cores one small step cannot fill,
    several at a time. Each trains to the same bits as alone."""
    workers = min(os.cpu_count(), most) if jax.default_backend() == "cpu" else 1
    with stoppable():  # for all of them: signals come to the main thread
        pool = ThreadPoolExecutor(workers)
        try:
            return list(pool.map(lambda job: one(*job), jobs))
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, or Ctrl-C


def _explained(setting, teacher):
    """(student's variables) -> R^2 of the hint, from training to test images."""
    guided, hint = middle(setting.places)[-1]
    ours, theirs = setting.places.class_tokens
    shown = {
        "student": jax.jit(_map(setting.student, guided, ours)),
        "teacher": jax.jit(_map(setting.teacher, hint, theirs)),
    }
    dataset = setting.dataset
    fit_on, judge_on = (
        _images(split, order(jax.random.key(0), split.n)[:_EXAMPLES], dataset)
        for split in (dataset.train, dataset.test)
    )
    theirs = [shown["teacher"](teacher, images) for images in (fit_on, judge_on)]

    def r2(student):
        ours = [shown["student"](student, images) for images in (fit_on, judge_on)]
        return float(linearly_explained(*zip(ours, theirs, strict=True)))

    return r2


def _images(split, index, dataset):
    """Standardised images of a split, decoded or on disk."""
    chosen = split.read(np.asarray(index))
    return take(chosen, np.arange(chosen.n), dataset.standardize)["image"]


def _map(network, path, class_tokens):
    """A layer's map; that of tokens is their grid."""

    def shown(variables, images):
        wants = Wants(hints=(path,))
        features, _ = network.apply(*variables, images, wants=wants, train=False)
        hint = features.hints[path]
        return hint if hint.ndim == 4 else to_grid(hint, drop=class_tokens)

    return shown


def table(
    setting: Setting,
    teacher: Variables,
    found: Mapping[str, Mapping[str, Any]],
    baselines: Sequence[str],
) -> dict[str, Any]:
    """The comparison in numbers: one row per arm, and what can be told apart.

    Args:
        setting: see `compare`.
        teacher: its variables.
        found: what `compare` returned.
        baselines: every other arm is compared, seed by seed, with the best of these
            arms (chosen on validation).

    Returns:
        Rows and differences; JSON.
    """
    dataset = setting.dataset
    sizes = {
        "teacher": _size(teacher.params),
        "student": _size(
            setting.student.init(jax.random.key(0), setting.inputs).params
        ),
    }
    labels = dataset.test.labels(np.arange(dataset.test.n))
    chance = float(np.bincount(labels).max() / dataset.test.n)
    rows = []
    for name, arm in found.items():
        spread = summary(arm["test"])
        rows.append(
            {
                "arm": name,
                "mean": spread.mean,
                "std": spread.std,
                "seeds": arm["test"],
                # Twice chance is far from both: an arm learns, or it does not.
                "trained": sum(accuracy > 2 * chance for accuracy in arm["test"]),
                "r2": float(np.mean(arm["r2"])),
                "seconds": float(np.mean(arm["seconds"])),
                "rate": arm["rate"],
            }
        )
    best = max(baselines, key=lambda name: max(found[name]["validation"].values()))
    differences = {
        name: paired(arm["test"], found[best]["test"])._asdict()
        for name, arm in found.items()
        if name != best
    }
    return {
        "dataset": setting.config.dataset,
        "machine": _machine(),
        "teacher": {
            "accuracy": accuracy(
                setting.teacher, teacher, dataset.test, dataset.standardize
            ),
            "parameters": sizes["teacher"],
        },
        "parameters": sizes["student"],
        "compression": sizes["teacher"] / sizes["student"],
        "chance": chance,
        "pairs": [list(pair) for pair in middle(setting.places)],
        "baseline": best,
        "rows": rows,
        "differences": differences,
    }


def show_table(report: Mapping[str, Any]) -> None:
    """Prints what `table` made."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    teacher = report["teacher"]
    title = (
        f"{report['dataset']}: student {report['parameters']:,} parameters, "
        f"{report['compression']:.1f} times fewer than the teacher"
    )
    shown = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1)
    )
    for name in ("arm", "test accuracy", "each seed", "trained", "R²", "rate", "s"):
        side = "left" if name == "arm" else "right"
        shown.add_column(name, justify=side, no_wrap=True)
    shown.add_row("teacher", f"{100 * teacher['accuracy']:.1f}")
    for row in report["rows"]:
        spread = "" if math.isnan(row["std"]) else f" ± {100 * row['std']:.1f}"
        shown.add_row(
            row["arm"],
            f"{100 * row['mean']:.1f}{spread}",
            " ".join(f"{100 * accuracy:.1f}" for accuracy in row["seeds"]),
            f"{row['trained']}/{len(row['seeds'])}",
            f"{row['r2']:.2f}",
            f"{row['rate']:g}",
            f"{row['seconds']:.1f}",
        )
    # Rows stay whole, whatever the width of the terminal or the file.
    Console(width=max(Console().width, 120)).print(shown)
    print(
        f"Against {report['baseline']}, in points, with 95 % intervals of the paired\n"
        f"differences over the seeds:"
    )
    for name, difference in report["differences"].items():
        verdict = "" if difference["told_apart"] else "  cannot be told apart"
        print(
            f"  {name:26} {100 * difference['mean']:+6.1f} "
            f"[{100 * difference['low']:+.1f}, {100 * difference['high']:+.1f}]{verdict}"
        )
    print(
        "trained: seeds above twice chance. R²: how much of the hint's variance a linear\n"
        "map from the guided layer explains, on test images. s: seconds of training."
    )


def picture(
    setting: Setting,
    run_dir: Path,
    teacher: Variables,
    report: Mapping[str, Any],
    found: Mapping[str, Mapping[str, Any]],
) -> Path:
    """Draws comparison.png: curves, accuracies, and attention maps side by side.

    Args:
        setting: see `compare`.
        run_dir: where the runs are, and the picture goes.
        teacher: its variables.
        report: what `table` made.
        found: what `compare` returned.

    Returns:
        The path of the picture.
    """
    from hintjax import viz

    guided, hint = middle(setting.places)[-1]
    dataset = setting.dataset
    per_epoch = dataset.train.n // setting.config.batch_size
    shown = np.arange(min(_SHOWN, dataset.test.n))
    images = _images(dataset.test, shown, dataset)

    ours, theirs = setting.places.class_tokens

    def maps(network, path, class_tokens, variables):
        hints = _map(network, path, class_tokens)(variables, images)
        height, width = hints.shape[1:3]
        return np.asarray(attention_map(hints)).reshape(-1, height, width)

    attention = {f"teacher {hint}": maps(setting.teacher, hint, theirs, teacher)}
    for name, arm in found.items():
        student = load_student(run_dir / arm["runs"][0], hints_only=True)[1]
        attention[f"{name} {guided}"] = maps(setting.student, guided, ours, student)
    figure = viz.comparison(
        {
            name: [_history(run_dir / path, per_epoch) for path in arm["runs"]]
            for name, arm in found.items()
        },
        dataset.test.read(shown).image,
        attention,
        accuracies={name: arm["test"] for name, arm in found.items()},
        reference=("teacher", report["teacher"]["accuracy"]),
        title=f"{report['dataset']}: {report['compression']:.0f} times fewer parameters",
        chance=report["chance"],
    )
    path = run_dir / "comparison.png"
    figure.savefig(path)
    return path


def _history(run_dir, per_epoch):
    from hintjax import viz

    accuracies = [
        (line["step"], value)
        for line in read_metrics(run_dir)
        for name, value in line.items()
        if name.startswith("validation/") and name.endswith("/accuracy")
    ]
    at, accuracy = zip(*accuracies, strict=True)
    *before, _ = json.loads((run_dir / RESULT).read_text())["boundaries"]
    return viz.History(
        at=[step / per_epoch for step in at],
        accuracy=accuracy,
        boundary=before[-1] / per_epoch if before else None,
    )


def _machine():
    """Where numbers come from: they are worth little without."""
    names = ("hintjax", "jax", "flax", "optax", "orbax-checkpoint")
    return {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
    }


def _size(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))
