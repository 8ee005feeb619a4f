"""The recipes of the published methods: where each attaches, its weight, its phases.

A recipe that needs more than its pairs has a function that makes its method.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hintjax import regressors
from hintjax.data.images import UNLABELED
from hintjax.experiments.attachment import (
    Places,
    before_relu,
    but_last,
    classifier,
    first_and_stages,
    hidden_and_scores,
    inside,
    last_maps,
    last_relations,
    last_stage,
    middle,
    middle_stage,
    one,
    outputs,
    pooled,
    stages,
    stages_and_pooled,
    without_class_tokens,
)
from hintjax.experiments.config import Config
from hintjax.experiments.recipes.kinds import (
    Alone,
    BeforeTask,
    Beside,
    Falling,
    Grown,
    Make,
    PlannedPhase,
    backprop,
)
from hintjax.experiments.tasks import TASKS
from hintjax.losses import Standardization
from hintjax.losses.hadamard import hadamard_matrix
from hintjax.method import Applied, Method
from hintjax.methods import (
    AnchorNegatives,
    BatchNegatives,
    SharedNegatives,
    activation_boundary,
    attention_transfer,
    channel_wise,
    class_attention,
    correlation_congruence,
    cosine,
    crd,
    crd_bytes,
    decoupled_kd,
    dense_matching,
    dist,
    factor_transfer,
    fitnets,
    flows,
    fsp,
    hard_labels,
    kd,
    masked_generation,
    minilm,
    orthogonal_projection,
    overhaul,
    patient,
    probability_transfer,
    queue_similarity,
    relational,
    review,
    selectivity,
    similarity_preserving,
    simkd,
    soft_targets,
    standardized_kd,
    tinybert,
    token_gram,
    variational,
)
from hintjax.methods._negatives import Negatives
from hintjax.sharding import shares


def soft_or_task(
    config: Config, places: Places, per_epoch: int, epochs: int | None = None
) -> Sequence[PlannedPhase]:
    """The recipe of soft targets; of the task alone if the outputs differ in shape.

    A teacher of other classes has no targets for the student, but its hints help.
    """
    if places.same_outputs:
        return SOFT(config, places, per_epoch, epochs)
    (phase,) = backprop(config, places, per_epoch, epochs)
    note = "backprop: the teacher has other classes, so this stage has no soft targets"
    return [phase._replace(note=note)]


def _softened(method: Callable[..., Method], temperature: float) -> Make:
    """A method of outputs, at the temperature of the config or the published one."""

    def make(config: Config, places: Places) -> Method:
        usual = temperature if config.temperature is None else config.temperature
        return method(temperature=usual)

    return make


def _kd(config: Config, places: Places) -> Method:
    usual = 4.0 if config.temperature is None else config.temperature
    return TASKS[config.task].kd(usual)


def _soft_targets(config: Config, places: Places) -> Method:
    usual = 3.0 if config.temperature is None else config.temperature
    return TASKS[config.task].soft(usual)


def _hard(config: Config, places: Places) -> Method:
    return hard_labels()


def _hints_jointly(config: Config, places: Places) -> Method:
    sizing = functools.partial(regressors.conv, batch_norm=True, activation=nn.relu)
    return fitnets(middle_stage(places), regressor=sizing)


def _flows(config: Config, places: Places) -> Method:
    pairs = first_and_stages(places)
    known = [
        (places.student[guided].shape[-1], places.teacher[hint].shape[-1])
        for guided, hint in pairs
        if guided in places.student and hint in places.teacher
    ]
    unequal = any(ours != theirs for ours, theirs in known)
    return fsp(flows(pairs), regressor=regressors.linear if unequal else None)


def _contrastive(name: str, negatives: Callable[[int], Negatives]) -> Beside:
    def kind(config: Config, places: Places) -> Negatives:
        return negatives(min(config.negatives, places.examples))

    def make(config: Config, places: Places) -> Method:
        drawn = kind(config, places)
        mesh = None if isinstance(drawn, BatchNegatives) else places.mesh
        return crd(one(pooled(places)), negatives=drawn, mesh=mesh)

    def note(config: Config, places: Places) -> str:
        size, drawn = places.examples, kind(config, places)
        needs = crd_bytes(drawn, size=size, batch=config.batch_size)
        bank, step = (needs[part] / 2**20 for part in ("bank", "step"))
        if places.mesh is None:
            needed = f"{bank:.1f} MiB for the memory bank, {step:.1f} MiB in a step"
        else:
            bank /= shares(places.mesh)
            needed = f"{bank:.1f} MiB for the memory bank on each device"
        return f"{name}: {needed}"

    return Beside(crd, pooled, 0.8, make, note=note, name=name)


def _overhaul(config: Config, places: Places) -> Method:
    norms = [places.norms.get(hint, hint) for _, hint in stages(places)]
    return overhaul(before_relu(places), norms)


def _class_attention(config: Config, places: Places) -> Method:
    heads = classifier(places.student), classifier(places.teacher)
    return class_attention(one(last_maps(places)), heads)


def _tinybert(config: Config, places: Places) -> Method:
    hidden = stages(places)
    return tinybert(hidden, inside(places, hidden, "scores"))


def _minilm(config: Config, places: Places) -> Method:
    relations = last_relations(places)
    widths = [
        math.prod(layers[path].shape[2:])
        for layers, path in zip(
            (places.student, places.teacher), relations[0], strict=True
        )
    ]
    # 48 heads between widths of 384 and 768, as published.
    return minilm(relations, heads=max(1, math.gcd(*widths) // 8))


def _reused(config: Config, places: Places) -> Method:
    ignore = () if places.labels is None else UNLABELED
    pair, head = one(last_maps(places)), classifier(places.teacher)
    method = simkd(pair, head, ignore=ignore)
    return method if places.labels != 0 else _unmeasured(method)


def _unmeasured(method: Method) -> Method:
    """The method without its metrics, which would compare with missing labels."""

    def apply(*arguments: Any) -> Applied:
        values, memory, _ = method.apply(*arguments)
        return values, memory, {}

    return method._replace(apply=apply)


def _channels(config: Config, places: Places) -> Method:
    return channel_wise(last_stage(places), regressor=regressors.fit)


def _dense(config: Config, places: Places) -> Method:
    return without_class_tokens(dense_matching(last_stage(places)), places)


def _phi_s(config: Config, places: Places) -> Method:
    pairs = last_stage(places)

    def of(hint: str) -> Standardization:
        if hint in places.standardizations:
            return places.standardizations[hint]
        channels = places.teacher[hint].shape[-1]
        jax.eval_shape(lambda: hadamard_matrix(channels))  # raises
        eye = jnp.eye(channels)
        return Standardization(jnp.zeros(channels), eye, eye)

    transforms = [of(hint) for _, hint in pairs]
    return without_class_tokens(
        dense_matching(pairs, standardization=transforms), places
    )


def _queue(config: Config, places: Places) -> Method:
    return queue_similarity(one(pooled(places)))


SOFT = Beside(soft_targets, outputs, Falling(4.0, 1.0), _soft_targets)
FITNETS = BeforeTask(fitnets, middle, after=soft_or_task, part=2)
HINTS_THEN_TASK = BeforeTask(fitnets, middle, part=2)
FITNETS_JOINTLY = Beside(
    fitnets, middle_stage, 100.0, _hints_jointly, name="fitnets_jointly"
)
KD = Beside(kd, outputs, 0.9, _kd, task_weight=0.1)
STANDARDIZED_KD = Beside(standardized_kd, outputs, 9.0, _softened(standardized_kd, 2.0))
DKD = Beside(decoupled_kd, outputs, Grown(1.0), _softened(decoupled_kd, 4.0))
HARD_LABELS = Beside(hard_labels, outputs, 0.5, _hard, task_weight=0.5)
DIST = Beside(dist, outputs, 1.0, _softened(dist, 1.0))
AT = Beside(attention_transfer, stages, 1000.0)
FSP = BeforeTask(fsp, first_and_stages, _flows)
CRD = _contrastive("crd", AnchorNegatives)
CRD_SHARED = _contrastive("crd_shared", SharedNegatives)
CRD_IN_BATCH = _contrastive("crd_in_batch", lambda number: BatchNegatives())
REVIEW = Beside(review, stages_and_pooled, Grown(5.0))
SP = Beside(similarity_preserving, last_stage, 3000.0)
RKD = Beside(relational, pooled, 1.0)
PKT = Beside(probability_transfer, pooled, 30000.0)
VID = Beside(variational, stages, 1.0)
NST = Beside(selectivity, stages, 50.0)
AB = BeforeTask(activation_boundary, before_relu)
FT = Beside(factor_transfer, last_stage, 200.0)
CC = Beside(correlation_congruence, pooled, 0.02)
OFD = Beside(overhaul, before_relu, 1e-3, _overhaul)
SIMKD = Alone(simkd, last_maps, _reused)
CAT_KD = Beside(class_attention, last_maps, 400.0, _class_attention)
MGD = Beside(masked_generation, last_stage, 7e-5)
TINYBERT = BeforeTask(tinybert, hidden_and_scores, _tinybert, soft_or_task, part=2)
MINILM = BeforeTask(minilm, last_relations, _minilm, part=2)
PKD = Beside(patient, but_last, 250.0)  # 500 in all: a plain network has two such ends
COSINE = Beside(cosine, last_stage, 1.0)
GRAM = Beside(token_gram, stages, 1.0)
DENSE = BeforeTask(dense_matching, last_stage, _dense, part=2)
PHI_S = BeforeTask(dense_matching, last_stage, _phi_s, part=2)
QUEUE = BeforeTask(queue_similarity, pooled, _queue, part=2)
VKD = BeforeTask(orthogonal_projection, pooled, part=2)
CWD = Beside(channel_wise, last_stage, 5.0, _channels)
