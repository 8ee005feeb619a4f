"""Three whole training steps of each core method, against the same written by hand.

The reference knows nothing of hintjax, flax or optax: its own forward passes, losses
and momentum, in double precision. Everything that moves is compared.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hintjax as hj

BATCH, CLASSES, STEPS = 6, 4, 3
RATE, MOMENTUM, DECAY = 0.05, 0.9, 0.01
SIZE, NEGATIVES = 24, 5  # of the training set, and how many each anchor is given
LABELS = np.arange(SIZE, dtype=np.int32) % CLASSES


# The networks, for hintjax


class Stage(nn.Module):
    width: int
    stride: int

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(
            self.width,
            (3, 3),
            (self.stride,) * 2,
            padding=((1, 1), (1, 1)),
            name="conv",
        )(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)
        return nn.relu(x)


class Net(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = Stage(self.width, 1, name="stage1")(x, train)
        x = Stage(2 * self.width, 2, name="stage2")(x, train)
        return nn.Dense(CLASSES, name="head")(x.mean((1, 2)))


# The same, by hand


def conv(x, p, stride, pad):
    y = jax.lax.conv_general_dilated(
        x,
        p["kernel"],
        (stride, stride),
        ((pad, pad), (pad, pad)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y + p.get("bias", 0)


def norm(x, p, stats, train):
    """The normalized x, and the statistics after it."""
    mean, var = stats["mean"], stats["var"]
    if train:
        mean = jnp.mean(x, (0, 1, 2))
        var = jnp.mean((x - mean) ** 2, (0, 1, 2))
        stats = {
            "mean": 0.9 * stats["mean"] + 0.1 * mean,
            "var": 0.9 * stats["var"] + 0.1 * var,
        }
    return (x - mean) / jnp.sqrt(var + 1e-5) * p["scale"] + p["bias"], stats


def forward(params, stats, x, train):
    """Logits, what the layers give, and the statistics after them."""
    outputs, moved = {}, {}
    for name, stride in (("stage1", 1), ("stage2", 2)):
        x = conv(x, params[name]["conv"], stride, 1)
        x, after = norm(x, params[name]["norm"], stats[name]["norm"], train)
        x = outputs[name] = jnp.maximum(x, 0)
        moved[name] = {"norm": after}
    x = outputs["head:in"] = x.mean((1, 2))
    return x @ params["head"]["kernel"] + params["head"]["bias"], outputs, moved


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - jnp.log(jnp.exp(z).sum(-1, keepdims=True))


def cross_entropy(logits, label):
    return -log_softmax(logits)[jnp.arange(len(label)), label]


def divergence(logits, teacher, temperature):
    p = jnp.exp(log_softmax(teacher / temperature))
    ratio = log_softmax(teacher / temperature) - log_softmax(logits / temperature)
    return temperature**2 * (p * ratio).sum(-1)


def soft_cross_entropy(logits, teacher, temperature):
    p = jnp.exp(log_softmax(teacher / temperature))
    return -(p * log_softmax(logits / temperature)).sum(-1)


def squares(a, b):
    return ((a - b) ** 2).mean((1, 2, 3))


def halved(x, reduce=jnp.mean):
    """Means of 2x2 windows, or another reduction of them."""
    b, h, w, c = x.shape
    return reduce(x.reshape(b, h // 2, 2, w // 2, 2, c), (2, 4))


def attention(x):
    q = (x**2).mean(-1).reshape(len(x), -1)
    return q / jnp.sqrt((q**2).sum(-1, keepdims=True))


def attention_distance(a, b):
    return ((attention(a) - attention(b)) ** 2).mean(-1)


def flow(first, second):
    """FSP's matrix of two maps of one size."""
    return jnp.einsum("bhwm,bhwn->bmn", first, second) / first[0, ..., 0].size


def unit(x):
    return x / jnp.sqrt((x**2).sum(-1, keepdims=True))


def contrast(anchors, bank, log_z, batch):
    """One direction of CRD, as published, and log Z, which the first batch sets."""
    candidates = bank[batch["candidates"]]
    e = jnp.exp(jnp.einsum("bd,bkd->bk", anchors, candidates) / 0.07)
    of_batch = jax.lax.stop_gradient(jnp.log(SIZE * mean_of(e.mean(1), batch)))
    log_z = jnp.where(jnp.isneginf(log_z), of_batch, log_z)
    p = e / jnp.exp(log_z)
    share = NEGATIVES / SIZE
    c = share + 1e-7
    values = -jnp.log(p[:, 0] / (p[:, 0] + c))
    return values - jnp.log(share / (p[:, 1:] + c)).sum(1), log_z


def remembered(bank, v, batch):
    """The bank after a step: rows of before it are mixed and written in order."""
    rows = unit(0.5 * bank[batch["index"]] + 0.5 * v)
    for i, index in enumerate(batch["index"]):
        bank = jnp.where(batch["where"][i], bank.at[index].set(rows[i]), bank)
    return bank


def nearest(x, size):
    """Torch's nearest resize of a square map."""
    index = jnp.array([i * x.shape[1] // size for i in range(size)])
    return x[:, index][:, :, index]


def pooled(x, size):
    """Means over the windows [floor(i n / l), ceil((i + 1) n / l)) of a square map."""
    n = x.shape[1]
    bins = [slice(i * n // size, -(-(i + 1) * n // size)) for i in range(size)]
    rows = [jnp.stack([x[:, i, j].mean((1, 2)) for j in bins], 1) for i in bins]
    return jnp.stack(rows, 1)


def context(a, b):
    """HCL of one stage."""
    total, weights, weight = squares(a, b), 1.0, 1.0
    for size in (4, 2, 1):
        if size < a.shape[1]:
            weight = weight / 2
            weights = weights + weight
            total = total + weight * squares(pooled(a, size), pooled(b, size))
    return total / weights


def fused(p, stats, x, deeper, size):
    """ABF: what it predicts, the fusion, and the statistics after it."""
    x, first = norm(
        conv(x, p["reduce"], 1, 0), p["reduce_norm"], stats["reduce_norm"], True
    )
    if deeper is not None:
        y = nearest(deeper, x.shape[1])
        z = conv(jnp.concatenate([x, y], -1), p["attention"], 1, 0)
        z = 1 / (1 + jnp.exp(-z))
        x = x * z[..., :1] + y * z[..., 1:]
    x = nearest(x, size)
    y, last = norm(
        conv(x, p["expand"], 1, 1), p["expand_norm"], stats["expand_norm"], True
    )
    return y, x, {"reduce_norm": first, "expand_norm": last}


def reviewed(pairs, regressors, memory, outputs, taught):
    """ReviewKD's loss of pairs from shallow to deep, and the statistics after it."""
    total, deeper, moved = 0.0, None, {}
    for guided, hint in reversed(pairs):
        name = f"{guided}->{hint}"
        x, t = (
            a if a.ndim == 4 else a[:, None, None]
            for a in (outputs[guided], taught[hint])
        )
        stats = memory[name]["batch_stats"]
        y, deeper, stats = fused(regressors[name], stats, x, deeper, t.shape[1])
        moved[name] = {"batch_stats": stats}
        total = total + context(y, t)
    return total, moved


def mean_of(values, batch):
    where = batch.get("where", jnp.ones(len(values), bool))
    return jnp.where(where, values, 0).sum() / where.sum()


# The methods: for hintjax, and the loss by hand
#
# A loss by hand is (params, stats, regressors, memory, taught, batch, step) -> value,
# and what the statistics of student and regressors are after it.

GUIDED, HINT = "stage1", "stage2"  # 8x8 and 4x4: the regressor is 3x3, stride 2
PAIR = f"{GUIDED}->{HINT}"
TASK = hj.task(optax.softmax_cross_entropy_with_integer_labels)


def reference_kd(params, stats, regressors, memory, taught, batch, step):
    logits, _, moved = forward(params, stats, batch["image"], True)
    values = 0.1 * cross_entropy(logits, batch["label"])
    values += 0.9 * divergence(logits, taught["logits"], 4.0)
    return mean_of(values, batch), (moved, memory)


def reference_hint(params, stats, regressors, memory, taught, batch, step):
    _, outputs, moved = forward(params, stats, batch["image"], True)
    layer = regressors["hint"][PAIR]["layers_0"]
    values = squares(conv(outputs[GUIDED], layer, 2, 1), taught[HINT])
    # Above the guided layer not even the statistics move.
    kept = {GUIDED: moved[GUIDED], "stage2": stats["stage2"]}
    return mean_of(values, batch), (kept, memory)


def reference_joint(params, stats, regressors, memory, taught, batch, step):
    """CRD's ConvReg, weight 100."""
    logits, outputs, moved = forward(params, stats, batch["image"], True)
    p = regressors["hint"][PAIR]
    old = memory["hint"][PAIR]["batch_stats"]["BatchNorm_0"]
    y, new = norm(
        conv(outputs[GUIDED], p["layers_0"], 2, 1), p["BatchNorm_0"], old, True
    )
    values = cross_entropy(logits, batch["label"])
    values += 100.0 * squares(jnp.maximum(y, 0), taught[HINT])
    memory = {"task": {}, "hint": {PAIR: {"batch_stats": {"BatchNorm_0": new}}}}
    return mean_of(values, batch), (moved, memory)


def reference_attention(params, stats, regressors, memory, taught, batch, step):
    logits, outputs, moved = forward(params, stats, batch["image"], True)
    values = cross_entropy(logits, batch["label"])
    for student, teacher in (
        (outputs["stage1"], taught["stage1"]),
        (halved(outputs["stage1"]), taught["stage2"]),
        (outputs["stage2"], taught["stage2"]),
    ):
        values += 1000.0 * attention_distance(student, teacher)
    return mean_of(values, batch), (moved, memory)


def reference_second(params, stats, regressors, memory, taught, batch, step):
    """FitNets' Eq. 2; two steps are an epoch, so that lambda is 4, 4, 2.5."""
    logits, _, moved = forward(params, stats, batch["image"], True)
    decay = jnp.array([4.0, 4.0, 2.5])[step]
    values = cross_entropy(logits, batch["label"])
    values += decay * soft_cross_entropy(logits, taught["logits"], 3.0)
    return mean_of(values, batch), (moved, memory)


def reference_fsp(params, stats, regressors, memory, taught, batch, step):
    """The benchmark's form, between networks of the same widths."""
    _, outputs, moved = forward(params, stats, batch["image"], True)
    s, t = (flow(halved(maps["stage1"]), maps["stage2"]) for maps in (outputs, taught))
    return mean_of(((s - t) ** 2).mean((1, 2)), batch), (moved, memory)


def reference_fsp_jointly(params, stats, regressors, memory, taught, batch, step):
    """The paper's form: maximum, Frobenius norm; behind linear regressors."""
    logits, outputs, moved = forward(params, stats, batch["image"], True)
    maps = {
        name: conv(
            outputs[name], {**layer, "kernel": layer["kernel"][None, None]}, 1, 0
        )
        for name in ("stage1", "stage2")
        for layer in [regressors["fsp"][f"{name}->{name}"]["layers_0"]]
    }
    s, t = (flow(halved(m["stage1"], jnp.max), m["stage2"]) for m in (maps, taught))
    values = cross_entropy(logits, batch["label"]) + 0.1 * ((s - t) ** 2).sum((1, 2))
    return mean_of(values, batch), (moved, memory)


def reference_crd(params, stats, regressors, memory, taught, batch, step):
    logits, outputs, moved = forward(params, stats, batch["image"], True)
    s, t = (
        unit(x.mean((1, 2)) @ head["kernel"] + head["bias"])
        for x, head in (
            (outputs["stage2"], regressors["crd"]["student"]["linear"]),
            (taught["stage2"], regressors["crd"]["teacher"]["linear"]),
        )
    )
    bank = memory["crd"]["bank"]
    of_student, z_student = contrast(s, bank.teacher, bank.student_constant, batch)
    of_teacher, z_teacher = contrast(t, bank.student, bank.teacher_constant, batch)
    values = cross_entropy(logits, batch["label"]) + 0.8 * (of_student + of_teacher)
    bank = type(bank)(
        remembered(bank.student, s, batch),
        remembered(bank.teacher, t, batch),
        z_student,
        z_teacher,
    )
    memory = {"task": {}, "crd": {**memory["crd"], "bank": bank}}
    return mean_of(values, batch), (moved, memory)


STAGES = [("stage1", "stage1"), ("stage2", "stage2"), ("head:in", "head:in")]
CROSSED = [("stage1", "stage2"), ("stage2", "stage1")]  # smaller; larger


def reference_review(params, stats, regressors, memory, taught, batch, step):
    """Two epochs of warm-up, of one step each."""
    logits, outputs, moved = forward(params, stats, batch["image"], True)
    values, after = reviewed(
        STAGES, regressors["review"], memory["review"], outputs, taught
    )
    values = cross_entropy(logits, batch["label"]) + 5.0 * values * step / 2
    return mean_of(values, batch), (moved, {"task": {}, "review": after})


def reference_crossed(params, stats, regressors, memory, taught, batch, step):
    _, outputs, moved = forward(params, stats, batch["image"], True)
    values, after = reviewed(CROSSED, regressors, memory, outputs, taught)
    return mean_of(values, batch), (moved, after)


def distillation(method, **kwargs):
    def make(student, teacher, optimizer):
        return hj.distillation_stage(student, teacher, method, optimizer, **kwargs)

    return make


def hint(method):
    def make(student, teacher, optimizer):
        return hj.hint_stage(student, teacher, method, optimizer)

    return make


class Case(NamedTuple):
    """A stage and its loss by hand."""

    make: Callable
    loss: Callable
    trained: tuple[str, ...] = ("stage1", "stage2", "head")
    rates: Mapping[str, float] = MappingProxyType({})
    width: int = 3  # of the student; the teacher's is 4
    side: int = 8  # of the images


CONV_REG = partial(hj.regressors.conv, batch_norm=True, activation=nn.relu)
FLOWS = hj.flows([("stage1", "stage1"), ("stage2", "stage2")])
CASES = {
    "kd": Case(
        distillation(
            hj.objective(task=hj.weighted(TASK, 0.1), kd=hj.weighted(hj.kd(4.0), 0.9))
        ),
        reference_kd,
    ),
    "fitnets hint stage": Case(
        hint(hj.objective(hint=hj.fitnets([(GUIDED, HINT)]))),
        reference_hint,
        trained=(GUIDED,),
    ),
    "fitnets jointly": Case(
        distillation(
            hj.objective(
                task=TASK,
                hint=hj.weighted(
                    hj.fitnets([(GUIDED, HINT)], regressor=CONV_REG), 100.0
                ),
            )
        ),
        reference_joint,
    ),
    "attention transfer": Case(
        distillation(
            hj.objective(
                task=TASK,
                at=hj.weighted(
                    hj.attention_transfer(
                        [
                            ("stage1", "stage1"),
                            ("stage1", "stage2"),
                            ("stage2", "stage2"),
                        ]
                    ),
                    1000.0,
                ),
            )
        ),
        reference_attention,
    ),
    "fitnets second stage": Case(
        distillation(
            hj.objective(
                task=TASK,
                soft=hj.weighted(
                    hj.soft_targets(3.0),
                    hj.lambda_decay(4.0, 1.0, start=1, saturate=2, steps_per_epoch=2),
                ),
            ),
            rates={GUIDED: 0.1},
        ),
        reference_second,
        rates={GUIDED: 0.1},
    ),
    "fsp hint stage": Case(
        hint(hj.fsp(FLOWS)), reference_fsp, trained=("stage1", "stage2"), width=4
    ),
    "fsp jointly": Case(
        distillation(
            hj.objective(
                task=TASK,
                fsp=hj.weighted(
                    hj.fsp(
                        FLOWS,
                        matrix=hj.losses.fsp_matrix_paper,
                        loss=hj.losses.fsp_matrix_loss_paper,
                        regressor=hj.regressors.linear,
                    ),
                    0.1,
                ),
            )
        ),
        reference_fsp_jointly,
    ),
    "crd": Case(
        distillation(
            hj.objective(
                task=TASK,
                crd=hj.weighted(
                    hj.crd(
                        ("stage2", "stage2"),
                        negatives=hj.GivenNegatives(),
                        feature_dim=7,
                    ),
                    0.8,
                ),
            )
        ),
        reference_crd,
    ),
    "review": Case(
        distillation(
            hj.objective(
                task=TASK,
                review=hj.weighted(
                    hj.review(STAGES), hj.warm_up(5.0, epochs=2, steps_per_epoch=1)
                ),
            )
        ),
        reference_review,
        side=9,
    ),
    "review hint stage": Case(
        hint(hj.review(CROSSED)),
        reference_crossed,
        trained=("stage1", "stage2"),
        side=9,
    ),
}


# Both sides


def images(seed, side=8):
    """A batch: one example is not to count, one is there twice."""
    generator = np.random.default_rng(seed)
    index = generator.permutation(SIZE)[:BATCH]
    index[5] = index[3]
    others = generator.integers(1, CLASSES, (BATCH, NEGATIVES)) + index[:, None]
    others = (others + CLASSES * generator.integers(0, SIZE, others.shape)) % SIZE
    return {
        "image": generator.normal(size=(BATCH, side, side, 3)),
        "label": LABELS[index],
        "index": index.astype(np.int32),
        "candidates": np.column_stack([index, others]).astype(np.int32),
        "where": np.arange(BATCH) != seed,
    }


def made(width, seed):
    network = hj.linen(Net(width))
    shapes = jax.eval_shape(network.init, jax.random.key(0), images(0)["image"])
    generator = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            return generator.uniform(0.5, 1.5, leaf.shape)
        return 0.4 * generator.normal(size=leaf.shape)

    return network, jax.tree_util.tree_map_with_path(draw, shapes)


def double(tree):
    def one(x):
        return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(one, tree)


def by_hintjax(stage, state, theirs, side):
    losses, memories = [], []
    for step in range(STEPS):
        state, metrics = stage.update(state, theirs, images(step, side))
        losses.append(metrics["loss"])
        memories.append(jax.device_get(state.memory))
    return losses, memories, state.params, state.state["batch_stats"]


def by_hand(case, params, stats, memory, theirs):
    """SGD with weight decay and momentum, on what is trained."""
    momentum = jax.tree.map(np.zeros_like, params)

    @jax.jit
    def derived(params, stats, memory, batch, step):
        logits, outputs, _ = forward(
            theirs.params, theirs.state["batch_stats"], batch["image"], False
        )
        taught = {"logits": logits, **outputs}

        def of(params):
            student, regressors = params["student"], params["regressors"]
            return case.loss(student, stats, regressors, memory, taught, batch, step)

        return jax.value_and_grad(of, has_aux=True)(params)

    losses, memories = [], []
    for step in range(STEPS):
        (value, (stats, memory)), gradient = derived(
            params, stats, memory, images(step, case.side), step
        )
        losses.append(value)
        memories.append(memory)
        gradient = jax.device_get(gradient)  # numpy compiles nothing
        gradient = jax.tree.map(lambda g, p: g + DECAY * p, gradient, params)
        momentum = jax.tree.map(lambda m, g: MOMENTUM * m + g, momentum, gradient)
        moved = {}
        for layer in case.trained:
            rate = RATE * case.rates.get(layer, 1.0)
            moved[layer] = stepped(
                params["student"][layer], momentum["student"][layer], rate
            )
        params = {
            "student": {**params["student"], **moved},
            "regressors": stepped(params["regressors"], momentum["regressors"], RATE),
        }
    return losses, memories, params, stats


def stepped(params, momentum, rate):
    return jax.tree.map(lambda p, m: p - rate * m, params, momentum)


def floats(tree):
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]


@pytest.mark.parametrize("name", CASES)
def test_three_steps_equal_those_written_by_hand(name):
    case = CASES[name]
    with jax.enable_x64(True):
        student, ours = made(case.width, 0)
        teacher, theirs = made(4, 1)
        optimizer = optax.chain(
            optax.add_decayed_weights(DECAY), optax.sgd(RATE, momentum=MOMENTUM)
        )
        stage = case.make(student, teacher, optimizer)
        batch, data = images(0, case.side), hj.Data(LABELS)
        state = double(stage.init(jax.random.key(0), ours, theirs, batch, data))
        start = jax.tree.map(np.array, (state.params, state.state, state.memory))
        params, model_state, memory = start
        want = by_hand(case, params, model_state["batch_stats"], memory, theirs)
        got = by_hintjax(stage, state, theirs, case.side)
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12), got, want
        )
        # It is a real run: what should move has moved far beyond the tolerance.
        after = jax.device_get((got[2]["student"][GUIDED], floats(got[1][-1])))
        before = params["student"][GUIDED], floats(memory)
        for x, y in zip(*map(jax.tree.leaves, (before, after)), strict=True):
            assert np.abs(x - y).max() > 1e-6
