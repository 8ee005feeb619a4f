"""An NNX model as a `Network`: the numbers of the same network in Linen.

One network is written twice, with every place where hints hide, and given one set of
weights. What Linen's network shows has tests of its own; here NNX's equals it.
"""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import hintjax as hj
from hintjax.training import open_checkpoints

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (4, 5, 4))
WIDTH, LAYERS, CLASSES = 4, 3, 3

# The network in Linen


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(WIDTH, name="dense")(x)
        self.sow("intermediates", "margin", 2 * x)
        return nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))


class Encoder(nn.Module):
    def setup(self):
        self.dense = nn.Dense(WIDTH)

    def embed(self, x):
        return self.dense(x)

    def __call__(self, x):
        return nn.relu(self.dense(x))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(WIDTH, name="values")(x)
        return x, nn.softmax(x @ x.swapaxes(-1, -2))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(WIDTH, name="dense")(x)), None


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = Block(name="first")(x, train)
        x = nn.remat(Block, static_argnums=(2,))(name="rematted")(x, train)
        shared = nn.Dense(WIDTH, name="shared")
        x = shared(nn.relu(shared(x)))
        encoder = Encoder(name="encoder")
        x = encoder(x) + encoder.embed(x) ** 2
        x, weights = Attention(name="attention")(x)
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=LAYERS,
        )
        x, _ = layers(name="layers")(weights @ x, None)
        return nn.Dense(CLASSES, name="head")(x.mean(1))


# The same in NNX, with the same names


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)

    def __call__(self, x):
        x = self.dense(x)
        self.sow(nnx.Intermediate, "margin", 2 * x)
        return nnx.relu(self.norm(x))


class Rematted(NnxBlock):
    __call__ = nnx.remat(NnxBlock.__call__)


class NnxEncoder(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def embed(self, x):
        return self.dense(x)

    def __call__(self, x):
        return nnx.relu(self.dense(x))


class Heir(NnxEncoder):
    """Has nothing of its own: NNX's capture passes over inherited methods."""


class NnxAttention(nnx.Module):
    def __init__(self, rngs):
        self.values = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = self.values(x)
        return x, nnx.softmax(x @ x.swapaxes(-1, -2))


class NnxLayer(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return nnx.tanh(self.dense(x)), None


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.first, self.rematted = NnxBlock(rngs), Rematted(rngs)
        self.shared = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.encoder, self.attention = Heir(rngs), NnxAttention(rngs)
        split = nnx.split_rngs(splits=LAYERS)
        self.layers = split(nnx.vmap(NnxLayer, in_axes=0, out_axes=0))(rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = self.rematted(self.first(x))
        x = self.shared(nnx.relu(self.shared(x)))
        x = self.encoder(x) + self.encoder.embed(x) ** 2
        x, weights = self.attention(x)
        scan = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0))
        x, _ = scan(weights @ x, self.layers)
        return self.head(x.mean(1))


class Listed(nnx.Module):
    """Executed in the order in which it is not written."""

    def __init__(self, rngs):
        self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(3)])
        self.tail = nnx.Sequential(nnx.relu, nnx.Linear(4, 2, rngs=rngs))

    def __call__(self, x):
        for block in reversed(self.blocks):
            x = block(x)
        return self.tail(x)


class Noisy(nnx.Module):
    def __init__(self, rngs):
        self.one, self.two = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, x):
        return self.two(self.one(x)) * self.scale


@functools.cache
def networks():
    return hj.linen(Net()), hj.nnx(NnxNet)


@functools.cache
def weights(seed=0):
    """One set of weights, as Linen's variables and as NNX's."""
    linen = filled(jax.eval_shape(networks()[0].init, KEY, X), seed)
    return linen, hj.Variables(linen.params, linen.state["batch_stats"])


def filled(shapes, seed=0):
    generator = np.random.default_rng(seed)

    def draw(leaf):
        low = 0.1 if leaf.ndim < 2 else -0.5  # variances are positive
        return jnp.array(generator.uniform(low, 0.5, leaf.shape), leaf.dtype)

    return jax.tree.map(draw, shapes)


@functools.cache
def small(model):
    network = hj.nnx(model)
    return network, filled(jax.eval_shape(network.init, KEY, X))


def shown(network, variables, *hints, train=False, x=X, **kwargs):
    wants = hj.Wants(output=True, hints=hints)
    return network.apply(*variables, x, wants=wants, train=train, **kwargs)


def close(got, want):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, want
    )


# Hints

HINTS = (
    *("first", "first/dense", "first/margin", "first/norm:in"),
    *("rematted", "rematted/norm", "rematted/margin", "rematted/dense:in"),
    *("shared#0", "shared#1", "shared#1:in"),
    *("encoder", "encoder.embed", "encoder.embed:in", "encoder/dense#1"),
    *("attention[0]", "attention[1]", "attention:in", "attention.__call__#0[1]"),
    *("layers/dense", "layers/dense[2]", "layers/dense:in[0]", "layers[0][1]"),
    *("head", "head:in"),
)


@pytest.mark.quick
def test_every_kind_of_hint_is_that_of_linen():
    # Both train=True and False, with BatchNorm's statistics after each.
    for train in (False, True):
        got, want = (
            shown(network, variables, *HINTS, train=train, key=KEY)
            for network, variables in zip(
                networks()[::-1], weights()[::-1], strict=True
            )
        )
        close(got[0], want[0])
        close(got[1], want[1]["batch_stats"])


@pytest.mark.quick
def test_layers_are_those_of_linen_in_the_same_order():
    linen, mine = (
        network.layers(*variables, X)
        for network, variables in zip(networks(), weights(), strict=True)
    )
    assert list(mine.items()) == list(linen.items())
    last = ["layers/dense[2]", "layers[0][2]", "head", ":out"]
    assert list(mine)[-4:] == last


@pytest.mark.quick
def test_a_list_has_numbers_and_layers_come_in_the_order_of_execution():
    network, variables = small(Listed)
    names = ["blocks/2", "blocks/1", "blocks/0", "tail/layers/1", "tail", ":out"]
    assert list(network.layers(*variables, X)) == names
    rematted = hj.nnx(Listed, call=lambda m, x, _: nnx.remat(Listed.__call__)(m, x))
    assert list(rematted.layers(*variables, X)) == names
    features, _ = shown(network, variables, "blocks/1")
    block = variables.params["blocks"]["2"]
    x = X @ block["kernel"] + block["bias"]
    block = variables.params["blocks"]["1"]
    close(features.hints["blocks/1"], x @ block["kernel"] + block["bias"])
    wants = hj.Wants(params=("blocks/1", "blocks/2/bias"))
    params = network.apply(*variables, X, wants=wants, train=False)[0].params
    assert params["blocks/1"] == block
    assert params["blocks/2/bias"] is variables.params["blocks"]["2"]["bias"]


def test_the_hint_of_one_network_leaves_another_of_its_class_alone():
    """NNX's method_outputs would change the class of both."""
    model = Listed(rngs=nnx.Rngs(0))
    network = hj.nnx(model, call=lambda m, x, train: m(x) + model(x))
    features, _ = shown(network, network.init(KEY, X), "blocks/1", "tail")
    np.testing.assert_array_equal(features.output, 2 * model(X))
    assert type(model.tail.layers[1]) is nnx.Linear
    assert not hasattr(model.tail, "__captures__")


def test_what_does_not_feed_a_hint_is_not_computed():
    network, variables = networks()[1], weights()[1]

    def flops(*hints, output=False):
        wants = hj.Wants(output, hints)
        run = jax.jit(lambda v: network.apply(*v, X, wants=wants, train=False)[0])
        return run.lower(variables).compile().cost_analysis()["flops"]

    assert 2 * flops("first") < flops(output=True)


# Errors


def test_it_is_imported_when_used_and_nothing_else_is():
    with pytest.raises(AttributeError, match="'hintjax' has no attribute 'nxx'"):
        assert hj.nxx
    assert {"nnx", "nnx_update"} < set(hj.__all__)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("frist/dense", r"got 'frist/dense'\. Nearest: first/dense, .*hintjax layers"),
        ("encoder.embd", r"Nearest: encoder\.embed, "),
        ("first#1", r"expected the path of a layer, got 'first#1'"),
        ("first[0]", r"expected the path of a layer, got 'first\[0\]'"),
        ("layers/dense[3]", r"Nearest: layers/dense\[[0-2]\]"),
        ("shared", r"got 2 calls\. Choose one of shared#0 to shared#1"),
        ("first..dense", "path: expected scope/name"),
    ],
)
def test_a_path_that_is_wrong(path, message):
    with pytest.raises(ValueError, match=message):
        shown(networks()[1], weights()[1], path)


def test_an_activation_that_is_no_array():
    with pytest.raises(TypeError, match=r"got tuple\. Choose .* attention\[0\]"):
        shown(networks()[1], weights()[1], "attention")


@pytest.mark.parametrize("method", ["unused", "checkpointed", "closed_over"])
def test_a_module_that_shows_nothing_says_why(method):
    class Hiding(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(4, 4, rngs=rngs)

        def unused(self, x):
            return x

        def checkpointed(self, x):
            return jax.checkpoint(lambda dense, x: dense(x))(self.dense, x)

        def closed_over(self, x):
            return jax.checkpoint(lambda x: self.dense(x))(x)

    network = hj.nnx(Hiding, call=lambda m, x, train: getattr(m, method)(x))
    variables = network.init(KEY, X)
    assert list(network.layers(*variables, X)) == [":out"]
    with pytest.raises(ValueError, match=r"shows none\. It is not called, or in a "):
        shown(network, variables, "dense")


@pytest.mark.usefixtures("unchecked")
def test_a_model_that_cannot_be_called():
    class Two(Listed):
        def __call__(self, x, mask):
            return x * mask

    class Silent(nnx.Module):
        pass

    with pytest.raises(
        TypeError, match=r"nnx: expected Two.*\(x, mask\).* call=lambda"
    ):
        hj.nnx(lambda rngs: Two(rngs))
    with pytest.raises(
        TypeError, match="nnx: expected Silent to have __call__, got no"
    ):
        hj.nnx(Silent())


def test_variables_of_another_model():
    network, variables = small(Listed)
    wrong = variables._replace(params={"tail": variables.params["tail"]})
    message = "of this model, got none at ('blocks', 0, 'bias')."
    with pytest.raises(ValueError, match=re.escape(message)):
        shown(network, wrong)


# Variables and randomness


def test_a_factory_draws_from_the_key_and_a_model_gives_its_own():
    network = hj.nnx(Listed)
    one, same, other = (network.init(jax.random.key(k), X) for k in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert (
        one.params["tail"]["layers"]["1"]["kernel"]
        != other.params["tail"]["layers"]["1"]["kernel"]
    ).any()
    jax.tree.map(
        np.testing.assert_array_equal,
        one.params["blocks"]["0"]["kernel"],
        Listed(rngs=nnx.Rngs(jax.random.key(1))).blocks[0].kernel[...],
    )
    model = Listed(rngs=nnx.Rngs(3))
    given = hj.nnx(model).init(jax.random.key(1), X)
    np.testing.assert_array_equal(shown(hj.nnx(model), given)[0].output, model(X))
    jax.tree.map(np.testing.assert_array_equal, given, hj.nnx(model).init(KEY, X))


def test_variables_are_written_into_a_model():
    model = NnxNet(rngs=nnx.Rngs(5))
    hj.nnx_update(model, weights()[1])
    jax.tree.map(
        np.testing.assert_array_equal, hj.nnx(model).init(KEY, X), weights()[1]
    )
    with pytest.raises(
        ValueError, match="params: expected the variables of this model"
    ):
        hj.nnx_update(model, small(Listed)[1])


@pytest.mark.quick
def test_dropout_is_that_of_the_key():
    network = hj.nnx(Noisy)
    x = jnp.ones((4, 64))
    variables = network.init(KEY, x)
    assert variables.state == {}

    def output(train, key=None):
        features, state = shown(network, variables, train=train, key=key, x=x)
        assert state == {}
        return features.output

    np.testing.assert_array_equal(output(False), x)
    one, two = output(True, jax.random.key(1)), output(True, jax.random.key(2))
    np.testing.assert_array_equal(one, output(True, jax.random.key(1)))
    assert (one != two).any()
    # Two layers of one key draw two masks: a quarter survives, four times as large.
    assert set(np.unique(one)) == {0, 4}
    assert 0.15 < (one > 0).mean() < 0.35
    model = Noisy(nnx.Rngs(0))
    model.eval()
    network = hj.nnx(model)  # however the model was left
    np.testing.assert_array_equal(output(True, jax.random.key(1)), one)
    with pytest.raises(ValueError, match="Noisy: expected a key in training, got None"):
        output(True)


def test_the_state_moves_in_training_only():
    network, variables = networks()[1], weights()[1]
    _, state = shown(network, variables)
    assert state is variables.state
    _, state = shown(network, variables, train=True)
    assert jax.tree.structure(state) == jax.tree.structure(variables.state)
    assert (
        state["first"]["norm"]["mean"] != variables.state["first"]["norm"]["mean"]
    ).all()


def test_train_is_given_to_a_model_that_takes_it():
    class Told(Listed):
        def __call__(self, x, train):
            return x if train else -x

    network, variables = small(Told)
    for train, sign in ((True, 1), (False, -1)):
        got = shown(network, variables, train=train)[0].output
        np.testing.assert_array_equal(got, sign * X)


# Stages

SEES = {"inputs": lambda batch: batch["x"], "teacher_inputs": lambda b: b["x"]}


def batches():
    generator = np.random.default_rng(2)
    return [
        {
            "x": generator.normal(size=X.shape).astype(np.float32),
            "label": generator.integers(0, CLASSES, len(X)).astype(np.int32),
        }
        for _ in range(3)
    ]


@pytest.mark.quick
def test_both_stages_give_the_numbers_of_linen(tmp_path):
    """Hint stage and distillation stage, three updates each, and a checkpoint."""
    pairs = [("first", "rematted"), ("layers/dense[0]", "layers/dense[1]")]
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    objective = hj.objective(
        task=hj.task(cross_entropy), kd=hj.kd(), hint=hj.fitnets(pairs)
    )

    def trained(number):
        network = networks()[number]
        student, teacher = weights()[number], weights(1)[number]
        optimizer = optax.sgd(0.01, momentum=0.9)
        stages = (
            hj.hint_stage(
                network,
                network,
                hj.objective(hint=hj.fitnets(pairs)),
                optimizer,
                **SEES,
            ),
            hj.distillation_stage(network, network, objective, optimizer, **SEES),
        )
        carry, history = None, []
        for stage in stages:
            state = stage.init(KEY, student, teacher, batches()[0], carry=carry)
            for batch in batches():
                state, metrics = stage.update(state, teacher, batch)
                history.append(metrics)
            student, carry = hj.student_variables(state), state
        return stages[-1], state, history

    _, linen, want = trained(0)
    stage, state, got = trained(1)
    close(got, want)
    close(state.params, linen.params)
    close(state.state, linen.state["batch_stats"])
    losses = [metrics["loss"] for metrics in got]
    assert np.isfinite(losses).all() and losses[2] < losses[0]

    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(6, state)
        restored, _ = checkpoints.restore(jax.eval_shape(lambda: state))
    batch, teacher = batches()[0], weights(1)[1]
    one, two = (stage.update(s, teacher, batch)[0] for s in (restored, state))
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)


def test_the_hint_stage_freezes_what_does_not_feed_the_hint():
    network, variables = networks()[1], weights()[1]
    method = hj.objective(hint=hj.fitnets([("shared#0", "shared#0")]))
    decay = optax.adamw(0.1, weight_decay=0.1)
    stage = hj.hint_stage(network, network, method, decay, **SEES)
    batch = batches()[0]
    state = stage.init(KEY, variables, weights(1)[1], batch)
    after, _ = stage.update(state, weights(1)[1], batch)
    moved = {
        name: any(
            not np.array_equal(a, b)
            for a, b in zip(*map(jax.tree.leaves, (tree, before)), strict=True)
        )
        for (name, tree), before in zip(
            after.params["student"].items(), variables.params.values(), strict=True
        )
    }
    assert {name for name, it in moved.items() if it} == {"first", "rematted", "shared"}


@pytest.mark.quick
def test_adapters_of_nnx_are_layers_like_others():
    class Adapted(nnx.Module):
        def __init__(self, rngs):
            self.one = nnx.LoRALinear(4, 6, lora_rank=2, rngs=rngs)
            base = nnx.Linear(6, 3, rngs=rngs)
            self.two = nnx.LoRA(6, 2, 3, base_module=base, rngs=rngs)

        def __call__(self, x):
            return self.two(nnx.relu(self.one(x)))

    network, variables = small(Adapted)
    layers = network.layers(*variables, X)
    assert list(layers) == ["one/lora", "one", "two/base_module", "two", ":out"]
    features, _ = shown(network, variables, "one")
    one, x = variables.params["one"], X
    lora = x @ one["lora"]["lora_a"] @ one["lora"]["lora_b"]
    close(features.hints["one"], x @ one["kernel"] + one["bias"] + lora)
