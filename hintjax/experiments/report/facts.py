"""The facts of a finished run that its report shows beside the metrics.

They are kept in facts.json in the run directory: the sizes of the networks, R^2 of the
pair, and how the deployed network does on the test split, class by class. A report is
then made from files alone.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hintjax._checks import Refusal
from hintjax.data import evaluation_batches
from hintjax.experiments.attachment import middle
from hintjax.experiments.comparison_table import machine_of, size_of
from hintjax.experiments.explained import explained_by
from hintjax.experiments.finished import evaluation_size, load_student
from hintjax.experiments.setting import Setting
from hintjax.networks import Network, Variables, Wants
from hintjax.training.run_directory import write_text

FACTS = "facts.json"
BINS = 15  # of the calibration; equally wide
SHOWN = 50  # classes, up to which the whole confusion matrix is kept
_CONFUSIONS = 100  # the most frequent confusions, which are kept of more classes
_POSITIONS = 2**16  # of the maps from which R^2 is computed


class Pair(NamedTuple):
    """A pair of layers, and how much of the hint the guided layer explains.

    Attributes:
        guided: path of the guided layer.
        hint: path of the hint layer.
        explained: computes R^2 for a student's variables.
        before: R^2 for a student before training.
    """

    guided: str
    hint: str
    explained: Callable[[Variables], float]
    before: float


def pair_of(setting: Setting, teacher: Variables | None) -> Pair | None:
    """The pair of a run whose R^2 is reported; None if there is none.

    Args:
        setting: setting of the run.
        teacher: variables of the teacher, if the run has one.
    """
    if teacher is None:
        return None
    try:
        guided, hint = middle(setting.places)[-1]
        explained = explained_by(setting, teacher, _POSITIONS)
    except Refusal:  # a network without feature maps has no such pair
        return None
    key = jax.random.key(setting.config.seed)
    fresh = setting.student.init(key, setting.inputs)
    return Pair(guided, hint, explained, explained(fresh))


def classes_by(
    setting: Setting, network: Network
) -> Callable[[Variables], dict[str, Any] | None]:
    """Makes the function that judges the classes of a network on the test split.

    Args:
        setting: setting of the runs.
        network: the network.

    Returns:
        `(variables) -> facts`; None for a task without classes. The facts are the
        number of `examples`, the number of examples that are `right`, `confusions`
        (class, predicted class, number of examples), whether these are `complete`, the
        `bins` of the calibration (number, right, sum of the confidences), and `ece`.
    """

    @jax.jit
    def predicted(variables, image):
        wants = Wants(output=True)
        shown, _ = network.apply(*variables, image, wants=wants, train=False)
        chances = jax.nn.softmax(shown.output.astype(jnp.float32), -1)
        return chances.argmax(-1), chances.max(-1)

    def judged(variables: Variables) -> dict[str, Any] | None:
        if setting.task.targets is not None or not setting.dataset.labeled:
            return None
        test, standardize = setting.dataset.test, setting.dataset.standardize
        size = evaluation_size(test, setting.config)
        found = []
        for batch in evaluation_batches(test, size, standardize):
            where = np.asarray(batch["where"])
            rows = (batch["label"], *predicted(variables, batch["image"]))
            found.append([np.asarray(row)[where] for row in rows])
        return _counted(*map(np.concatenate, zip(*found, strict=True)))

    return judged


def _counted(
    label: np.ndarray, guess: np.ndarray, confidence: np.ndarray
) -> dict[str, Any]:
    """Confusions and calibration of predictions; JSON."""
    pairs = Counter(zip(label.tolist(), guess.tolist(), strict=True))
    complete = max(label.max(), guess.max()) < SHOWN
    if not complete:
        wrong = Counter({pair: n for pair, n in pairs.items() if pair[0] != pair[1]})
        pairs = dict(wrong.most_common(_CONFUSIONS))
    right = label == guess
    at = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    sums = [
        np.bincount(at, weights, BINS).tolist() for weights in (None, right, confidence)
    ]
    bins = [list(one) for one in zip(*sums, strict=True)]
    return {
        "examples": len(label),
        "right": int(right.sum()),
        "confusions": [[*pair, n] for pair, n in sorted(pairs.items())],
        "complete": bool(complete),
        "bins": bins,
        "ece": calibration_error(bins),
    }


def calibration_error(bins: Sequence[Sequence[float | int]]) -> float:
    r"""The expected calibration error (ECE).

    $$\sum_b \frac{n_b}{n} |\mathrm{accuracy}_b - \mathrm{confidence}_b|$$

    Args:
        bins: for each bin of the confidence, the number of examples, the number of
            examples that are right, and the sum of their confidences.

    Returns:
        The error, in [0, 1]; 0 is a network whose confidence is its accuracy.

    >>> calibration_error([(10, 5, 7.0), (0, 0, 0.0), (10, 9, 9.0)])
    0.1

    References:
        Guo et al. 2017, On Calibration of Modern Neural Networks.
    """
    gaps = sum(abs(right - confidence) for _, right, confidence in bins)
    return float(gaps) / max(sum(count for count, _, _ in bins), 1)


def write_facts(
    setting: Setting,
    run_dir: Path,
    teacher: Variables | None,
    judged: dict[str, Any] | None,
    taught: dict[str, Any] | None = None,
    pair: dict[str, Any] | None = None,
) -> None:
    """Writes facts.json of a finished run.

    Args:
        setting: setting of the run.
        run_dir: run directory.
        teacher: variables of the teacher, if the run has one.
        judged: result of the function that `classes_by` makes, for the student.
        taught: the same for the teacher, if it knows the classes.
        pair: the pair whose R^2 is reported: `guided`, `hint`, and R^2 `before` and
            `after` training, or None where it is not known.
    """
    _, student = load_student(run_dir, hints_only=True)
    sizes = {"student": size_of(student.params)}
    if teacher is not None:
        sizes["teacher"] = size_of(teacher.params)
    facts = {
        "machine": machine_of(setting),
        "train": setting.dataset.train.n,
        "test": setting.dataset.test.n,
        "parameters": sizes,
        "classes": judged,
        "teacher": taught,
        "pair": pair,
    }
    write_text(run_dir / FACTS, json.dumps(facts))
