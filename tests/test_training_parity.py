"""Three whole training steps of each core method, against the same written by hand.

The reference knows nothing of hintjax, flax or optax: its own forward passes, losses
and momentum, in double precision. Everything that moves is compared.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hintjax as hj

BATCH, CLASSES, STEPS = 6, 4, 3
RATE, MOMENTUM, DECAY = 0.05, 0.9, 0.01


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
    return y + p["bias"]


def norm(x, p, stats, train):
    """The normalised x, and the statistics after it."""
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
    """Logits, the outputs of the stages, and the statistics after them."""
    outputs, moved = {}, {}
    for name, stride in (("stage1", 1), ("stage2", 2)):
        x = conv(x, params[name]["conv"], stride, 1)
        x, after = norm(x, params[name]["norm"], stats[name]["norm"], train)
        x = outputs[name] = jnp.maximum(x, 0)
        moved[name] = {"norm": after}
    head = params["head"]
    return x.mean((1, 2)) @ head["kernel"] + head["bias"], outputs, moved


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


def halved(x):
    """Means of 2x2 windows."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def attention(x):
    q = (x**2).mean(-1).reshape(len(x), -1)
    return q / jnp.sqrt((q**2).sum(-1, keepdims=True))


def attention_distance(a, b):
    return ((attention(a) - attention(b)) ** 2).mean(-1)


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


def distillation(method, **kwargs):
    def make(student, teacher, optimizer):
        return hj.distillation_stage(student, teacher, method, optimizer, **kwargs)

    return make


CONV_REG = partial(hj.regressors.conv, batch_norm=True, activation=nn.relu)
CASES = {
    "kd": (
        distillation(
            hj.objective(task=hj.weighted(TASK, 0.1), kd=hj.weighted(hj.kd(4.0), 0.9))
        ),
        reference_kd,
    ),
    "fitnets hint stage": (
        lambda student, teacher, optimizer: hj.hint_stage(
            student, teacher, hj.objective(hint=hj.fitnets([(GUIDED, HINT)])), optimizer
        ),
        reference_hint,
    ),
    "fitnets jointly": (
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
    "attention transfer": (
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
    "fitnets second stage": (
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
    ),
}
TRAINED = {"fitnets hint stage": {GUIDED}}
RATES = {"fitnets second stage": {GUIDED: 0.1}}


# Both sides


def images(seed):
    generator = np.random.default_rng(seed)
    return {
        "image": generator.normal(size=(BATCH, 8, 8, 3)),
        "label": generator.integers(0, CLASSES, BATCH).astype(np.int32),
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


def by_hintjax(stage, state, theirs):
    losses = []
    for step in range(STEPS):
        state, metrics = stage.update(state, theirs, images(step))
        losses.append(metrics["loss"])
    stats = state.state["batch_stats"]
    return losses, state.params, stats, state.memory


def by_hand(loss, params, stats, memory, theirs, trained, rates):
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
            return loss(student, stats, regressors, memory, taught, batch, step)

        return jax.value_and_grad(of, has_aux=True)(params)

    losses = []
    for step in range(STEPS):
        (value, (stats, memory)), gradient = derived(
            params, stats, memory, images(step), step
        )
        losses.append(value)
        gradient = jax.tree.map(lambda g, p: g + DECAY * p, gradient, params)
        momentum = jax.tree.map(lambda m, g: MOMENTUM * m + g, momentum, gradient)
        moved = {}
        for layer in trained:
            rate = RATE * rates.get(layer, 1.0)
            moved[layer] = stepped(
                params["student"][layer], momentum["student"][layer], rate
            )
        params = {
            "student": {**params["student"], **moved},
            "regressors": stepped(params["regressors"], momentum["regressors"], RATE),
        }
    return losses, params, stats, memory


def stepped(params, momentum, rate):
    return jax.tree.map(lambda p, m: p - rate * m, params, momentum)


@pytest.mark.parametrize("name", CASES)
def test_three_steps_equal_those_written_by_hand(name):
    make, loss = CASES[name]
    with jax.enable_x64(True):
        student, ours = made(3, 0)
        teacher, theirs = made(4, 1)
        optimizer = optax.chain(
            optax.add_decayed_weights(DECAY), optax.sgd(RATE, momentum=MOMENTUM)
        )
        stage = make(student, teacher, optimizer)
        state = double(stage.init(jax.random.key(0), ours, theirs, images(0)))
        start = jax.tree.map(np.array, (state.params, state.state, state.memory))
        params, model_state, memory = start
        want = by_hand(
            loss,
            params,
            model_state["batch_stats"],
            memory,
            theirs,
            TRAINED.get(name, set(params["student"])),
            RATES.get(name, {}),
        )
        got = by_hintjax(stage, state, theirs)
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12), got, want
        )
        # It is a real run: what should move has moved far beyond the tolerance.
        for before, after in zip(
            jax.tree.leaves(params["student"][GUIDED]),
            jax.tree.leaves(got[1]["student"][GUIDED]),
            strict=True,
        ):
            assert np.abs(before - after).max() > 1e-6
