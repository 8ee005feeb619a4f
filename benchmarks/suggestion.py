"""Whether the pair that `hintjax suggest` measures is better than other pairs.

    python benchmarks/suggestion.py --work DIR \
        --out benchmarks/results/suggestion_cpu.json

Device: any. Minutes: about 20 of processor time. Expected: the suggestion is better
than the last stages for the plain student, and cannot be told apart from the others.

FitNets trains a student on 300 of the digits: a hint stage for half of the epochs, then
KD. The teacher has seen all images of the training split. Two pairs of networks:

    plain    plain_thin, a plain network of 20 thin layers that hardly trains without
             hints, from resnet20
    wrn      wrn_16_1, which trains well without hints, from wrn_16_2

The arms differ in nothing but the pair of layers:

    suggestion    the pair that the rule of `hintjax suggest` chooses
    middle third  the pair of `suggest_pairs` without measurements
    last stage    the ends of the last stages
    random        one of all pairs of layers between which a default regressor fits
    no hint       no pair: KD for all epochs

The suggestion is measured anew for each seed: the trained teacher and a fresh student
of this seed see the 300 training images of the student, and no others. The random pair
is drawn anew for each seed, by a generator with a fixed seed. The other pairs follow
from shapes.

All arms have one learning rate, batch size and number of steps. The hint stage trains
the hint loss alone, so no weight of a loss has to be chosen. The first two seeds of all
arms try all `--rates`, and the mean validation accuracy over these runs chooses one
rate for all. No arm has a rate of its own. The test split chooses nothing: its accuracy
is read after the rate is chosen, for the runs with this rate.

Differences of arms are paired by seed, with 95 % t-intervals that are not corrected for
the number of comparisons. A run that is finished in `--work` is not run again, so an
interrupted benchmark continues. Arms whose pairs are equal share their runs.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import measure
import numpy as np

from hintjax import regressors
from hintjax._checks import Refusal
from hintjax.experiments.attachment import Places
from hintjax.experiments.comparison import side_by_side
from hintjax.experiments.config import Config
from hintjax.experiments.distill import keep_compiled
from hintjax.experiments.finished import RESULT
from hintjax.experiments.recipes import FITNETS, SOFT, Recipe
from hintjax.experiments.run import run
from hintjax.experiments.setting import Setting, prepare
from hintjax.experiments.statistics import paired, summary
from hintjax.experiments.suggestion import measured, some_batches
from hintjax.experiments.teaching import teacher_variables
from hintjax.networks import Variables
from hintjax.pairing import candidates, stage_pairs, suggest_pairs

Pair = tuple[str, str] | None  # guided layer and hint layer; None for no hint
NETWORKS = {  # student and teacher
    "plain": ("hintjax.models:plain_thin", "hintjax.models:resnet20"),
    "wrn": ("hintjax.models:wrn_16_1", "hintjax.models:wrn_16_2"),
    "small": ("hintjax.models:plain_wide",) * 2,  # for a test
}
SUGGESTION = "suggestion"
ARMS = (SUGGESTION, "middle third", "last stage", "random", "no hint")
TUNING = 2  # seeds that try all rates


class Exactly(NamedTuple):
    """The place of a recipe's method: this pair of layers."""

    pair: tuple[str, str]

    def __call__(self, places: Places) -> tuple[tuple[str, str], ...]:
        """The pair."""
        return (self.pair,)


class Bench(NamedTuple):
    """The parts that the runs of one pair of networks share."""

    setting: Setting
    teacher: Variables
    folder: Path


class Job(NamedTuple):
    """One run."""

    pair: Pair
    rate: float
    seed: int


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints the table, and returns the record that `--out` writes."""
    options = _options(arguments)
    machine = measure.machine()
    _same_options(options)
    keep_compiled(options.work / "compiled")
    start = time.perf_counter()
    record = {
        "benchmark": "suggestion",
        "machine": machine,
        "options": _plain(options),
        "seeds": options.seeds,
        "networks": {},
    }
    for name in options.networks:
        record["networks"][name] = _compared(name, options)
        record["minutes"] = (time.perf_counter() - start) / 60
        if options.out:
            measure.write(options.out, record)
    print(table(record))
    return record


def _compared(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All runs of one pair of networks, and what they say."""
    bench = _prepared(name, options)
    suggestions = [_suggestion(bench, seed) for seed in range(options.seeds)]
    pairs = pairs_of(bench.setting.places, [one["pair"] for one in suggestions])
    print(f"{name}: {json.dumps(pairs)}", flush=True)
    rates = {
        rate: _finished(bench, pairs, rate, range(min(TUNING, options.seeds)))
        for rate in options.rates
    }
    validation = {
        rate: float(np.mean([_values(runs, "validation") for runs in arms.values()]))
        for rate, arms in rates.items()
    }
    rate = max(validation, key=lambda one: validation[one])
    print(f"{name}: rate {rate:g} of {validation}", flush=True)
    runs = _finished(bench, pairs, rate, range(options.seeds))
    test = {arm: _values(own, "test") for arm, own in runs.items()}
    return {
        "student": bench.setting.config.student,
        "teacher": bench.setting.config.teacher,
        "teacher_test_accuracy": _read(bench.folder / "teacher")["test/accuracy"],
        "pairs": pairs,
        "measured": [one["candidates"] for one in suggestions],
        "validation": {f"{one:g}": value for one, value in validation.items()},
        "rate": rate,
        "test_accuracy": test,
        "arms": {arm: _summary(own, bench) for arm, own in test.items()},
        "suggestion_minus": {
            arm: paired(test[SUGGESTION], test[arm])._asdict() for arm in ARMS[1:]
        },
    }


def _prepared(name: str, options: argparse.Namespace) -> Bench:
    """The data, the networks, and the teacher, which is trained unless it is there."""
    student, teacher = NETWORKS[name]
    config = Config(
        dataset="digits",
        limit=options.limit,
        student=student,
        teacher=teacher,
        teacher_epochs=options.teacher_epochs,
        method="fitnets",
        epochs=options.epochs,
        batch_size=options.batch,
        cosine=True,
        evaluate_every=options.epochs,
        checkpoint_every=options.epochs,
        devices=1,
    )
    setting, folder = prepare(config, teach=True), options.work / name
    variables = teacher_variables(setting, folder, show=lambda *step: None)
    return Bench(setting, variables, folder)


# The pairs of the arms


def pairs_of(
    places: Places, suggested: Sequence[tuple[str, str]]
) -> dict[str, list[Pair]]:
    """The pair of each seed, for each arm.

    Args:
        places: layers of both networks.
        suggested: the suggestion of each seed.
    """
    layers = places.student, places.teacher
    (middle,), last = suggest_pairs(*layers), stage_pairs(*layers)[-1]
    fitting, random = fitting_pairs(places), np.random.default_rng(0)
    seeds = len(suggested)
    drawn = [fitting[random.integers(len(fitting))] for _ in range(seeds)]
    found = ([*suggested], [middle] * seeds, [last] * seeds, drawn, [None] * seeds)
    return dict(zip(ARMS, found, strict=True))


def fitting_pairs(places: Places) -> list[tuple[str, str]]:
    """All pairs of layers worth measuring between which a default regressor fits."""

    def fits(guided: str, hint: str) -> bool:
        ours, theirs = places.student[guided], places.teacher[hint]
        try:
            regressors.fit(ours.shape[1:], theirs.shape[1:])
        except Refusal:
            return False
        return True

    return [
        (guided, hint)
        for guided in candidates(places.student)
        for hint in candidates(places.teacher)
        if fits(guided, hint)
    ]


def _suggestion(bench: Bench, seed: int) -> dict[str, Any]:
    """The pair that is suggested for the student of a seed, and its reasons."""
    path = bench.folder / "suggested" / f"seed{seed}.json"
    if not path.exists():
        measure.write(path, suggestion(bench.setting, bench.teacher, seed))
    found = json.loads(path.read_text())
    return found | {"pair": tuple(found["pair"])}


def suggestion(setting: Setting, teacher: Variables, seed: int) -> dict[str, Any]:
    """Measures a fresh student of a seed on its training images.

    Args:
        setting: setting of the runs.
        teacher: variables of the trained teacher.
        seed: seed of the student.

    Returns:
        The suggested pair, and the measurements of all candidates.
    """
    config = dataclasses.replace(setting.config, seed=seed)
    setting = setting._replace(config=config)
    batches = some_batches(setting, setting.dataset.train.n)
    found = measured(setting, teacher, batches)
    layers = setting.places.student, setting.places.teacher
    (pair,) = suggest_pairs(*layers, measured=found)
    rows = [one._asdict() for one in found.candidates]
    return {"pair": pair, "chance": found.chance, "candidates": rows}


# Runs


def _finished(
    bench: Bench, pairs: Mapping[str, Sequence[Pair]], rate: float, seeds: range
) -> dict[str, list[dict[str, Any]]]:
    """The results of all arms with a rate, which are trained unless they are there."""

    def folder(job: Job) -> Path:
        name = "none" if job.pair is None else "=".join(job.pair).replace("/", ".")
        return bench.folder / "runs" / name / f"rate{job.rate:g}-seed{job.seed}"

    def train(job: Job) -> None:
        if (folder(job) / RESULT).exists():
            return
        how = {"learning_rate": job.rate, "seed": job.seed, "resume": True}
        quiet = {"show": lambda *step: None}
        recipe = recipe_of(job.pair)
        run(bench.setting, folder(job), recipe, teacher=bench.teacher, **how, **quiet)
        print(f"{folder(job).relative_to(bench.folder)} is done", flush=True)

    jobs = {arm: [Job(pairs[arm][seed], rate, seed) for seed in seeds] for arm in ARMS}
    # In the order of seeds, and each run once.
    by_seed = zip(*jobs.values(), strict=True)
    each = dict.fromkeys(job for arms in by_seed for job in arms)
    side_by_side(train, [(job,) for job in each], 2)
    return {arm: [_read(folder(job)) for job in own] for arm, own in jobs.items()}


def recipe_of(pair: Pair) -> Recipe:
    """FitNets with a pair; its second stage alone without one."""
    return SOFT if pair is None else FITNETS._replace(where=Exactly(pair))


def _read(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / RESULT).read_text())


def _values(results: Sequence[Mapping[str, Any]], split: str) -> list[float]:
    return [one[f"{split}/accuracy"] for one in results]


# The record


def _summary(accuracy: Sequence[float], bench: Bench) -> dict[str, Any]:
    """Mean and spread of an arm, and the number of students that know anything."""
    found = summary(accuracy)
    twice_chance = 2 / bench.setting.dataset.classes
    trained = sum(one > twice_chance for one in accuracy)
    return {"mean": found.mean, "std": found.std, "trained": trained}


def table(record: Mapping[str, Any]) -> str:
    """The record as text, in percent."""
    machine, options = record["machine"], record["options"]
    size = f"{options['limit']} digits, {record['seeds']} seeds"
    where = f"{machine['device']} ({machine['processor']})"
    lines = [f"{size} of {options['epochs']} epochs on {where}"]
    for name, found in record["networks"].items():
        teacher = f"{found['teacher']} ({100 * found['teacher_test_accuracy']:.1f})"
        lines += [
            "",
            f"{name}: {found['student']} from {teacher}, rate {found['rate']:g}",
            f"{'arm':14}{'mean':>7}{'std':>7}{'suggestion minus':>18}{'95 %':>18}",
        ]
        for arm, one in found["arms"].items():
            line = f"{arm:14}{100 * one['mean']:7.1f}{100 * one['std']:7.1f}"
            if arm in found["suggestion_minus"]:
                less = found["suggestion_minus"][arm]
                interval = f"{100 * less['low']:+.1f} to {100 * less['high']:+.1f}"
                line += f"{100 * less['mean']:+18.1f}{interval:>18}  {less['verdict']}"
            lines.append(line)
    return "\n".join(lines)


def _plain(options: argparse.Namespace) -> dict[str, Any]:
    """The options that decide the numbers of a run."""
    left_out = ("work", "out", "seeds", "networks")
    return {name: v for name, v in vars(options).items() if name not in left_out}


def _same_options(options: argparse.Namespace) -> None:
    """Refuses a folder whose finished runs have other options."""
    path, own = options.work / "options.json", _plain(options)
    if path.exists() and json.loads(path.read_text()) != own:
        raise SystemExit(f"{path} has other options. Give another --work.")
    measure.write(path, own)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    usual = ["plain", "wrn"]
    add("--networks", nargs="+", choices=NETWORKS, default=usual, help="which pairs")
    add("--seeds", type=int, default=5, help="runs of each arm")
    add("--limit", type=int, default=300, help="training images of the student")
    add("--epochs", type=int, default=40, help="epochs of the student")
    add("--teacher-epochs", type=int, default=6, help="epochs of the teacher")
    add("--rates", type=float, nargs="+", default=[1e-3, 3e-3], help="learning rates")
    add("--batch", type=int, default=16, help="examples in a batch")
    add("--work", type=Path, required=True, help="directory of the runs")
    add("--out", type=Path, help="JSON file to write the results to")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
