"""A Linen module, or a function, as a `Network`: paths, hints, state, errors.

Hints of Linen are compared with what plain `module.apply` captures.
"""

import functools
import re

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import freeze

import hintjax as hj
from hintjax.networks import (
    Features,
    Variables,
    Wants,
    function,
    join,
    linen,
    split,
)
from hintjax.networks.paths import parse_path

X = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
TOKENS = jax.random.normal(jax.random.key(1), (2, 5, 4))


class Block(nn.Module):
    width: int = 4

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Conv(self.width, (3, 3), name="conv")(x)
        self.sow("intermediates", "margin", 2 * x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)
        return nn.relu(x)


class Nested(nn.Module):
    """Blocks in sequence; `wrap` puts each of them in a lifted transform."""

    wrap: bool = False

    @nn.compact
    def __call__(self, x, train: bool = False):
        block = nn.remat(Block, static_argnums=(2,)) if self.wrap else Block
        for i in (1, 2, 3):
            x = block(name=f"block{i}")(x, train)
        return nn.Dense(5, name="head")(x.mean((1, 2)))


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
        shared = nn.Dense(4, name="shared")
        return nn.Dense(2, name="head")(shared(nn.relu(shared(x))))


class Encoder(nn.Module):
    def setup(self):
        self.dense = nn.Dense(4)

    def embed(self, x):
        return self.dense(x)

    def __call__(self, x):
        return nn.relu(self.dense(x))


class TwoMethods(nn.Module):
    def setup(self):
        self.encoder = Encoder()

    def __call__(self, x):
        return self.encoder(x) + self.encoder.embed(x) ** 2


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="values")(x)
        return x, nn.softmax(x @ x.swapaxes(-1, -2))


class TupleOutput(nn.Module):
    @nn.compact
    def __call__(self, x):
        x, weights = Attention(name="attention")(x)
        return x.sum() + weights.sum()


class SetupList(nn.Module):
    """Defined in one order, executed in the other."""

    def setup(self):
        self.head = nn.Dense(2)
        self.blocks = [nn.Dense(4) for _ in range(3)]

    def __call__(self, x):
        for block in reversed(self.blocks):
            x = nn.relu(block(x))
        return self.head(x)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.Dense(4, name="dense")(x)), None


class Scanned(nn.Module):
    """Five layers as one scan: their activations come stacked."""

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=5,
        )
        x, _ = layers(name="layers")(x, None)
        return nn.Dense(2, name="head")(x)


class Grouped(nn.Module):
    """Two scans of a scan of three layers each."""

    @nn.compact
    def __call__(self, x):
        lift = {
            "variable_axes": {"params": 0, "intermediates": 0},
            "split_rngs": {"params": True},
        }
        group = nn.scan(nn.scan(Layer, length=3, **lift), length=2, **lift)
        return group(name="groups")(x, None)[0]


class Kept(nn.Module):
    """A scan that keeps what its layers show to itself."""

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(Layer, {"params": 0}, split_rngs={"params": True}, length=2)
        return layers(name="layers")(x, None)[0]


class Summed(nn.Module):
    """Sows with a reduction of its own."""

    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x = nn.Dense(4, name=f"dense{i}")(x)
            self.sow("intermediates", "sum", x, jnp.add, lambda: 0)
        return x


class Deterministic(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic: bool):
        x = nn.Dropout(0.5)(x, deterministic=deterministic)
        return nn.Dropout(0.5, name="second")(x, deterministic=deterministic)


def example(module):
    return X if isinstance(module, Nested) else TOKENS


@functools.cache
def made(module):
    """A network and variables for it, drawn by numpy: that is much faster."""
    network = linen(module)
    shapes = jax.eval_shape(network.init, jax.random.key(2), example(module))
    generator = np.random.default_rng(0)

    def draw(leaf):
        return jnp.array(generator.uniform(0.1, 0.5, leaf.shape), leaf.dtype)

    return network, jax.tree.map(draw, shapes)


def hint(network, variables, x, path, train=False, **kwargs):
    features, _ = network.apply(
        *variables, x, wants=Wants(hints=(path,)), train=train, **kwargs
    )
    assert list(features.hints) == [path]
    return features.hints[path]


def plain(module, variables, x, methods=("__call__",), **kwargs):
    """What Flax itself captures."""
    _, captured = module.apply(
        join(variables),
        x,
        capture_intermediates=lambda _, name: name in methods,
        mutable=["intermediates"],
        **kwargs,
    )
    return captured["intermediates"]


def at(tree, *keys):
    for key in keys:
        tree = tree[key]
    return tree


# Paths

NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)
NUMBERS = st.none() | st.integers(0, 99)


@pytest.mark.quick
@hypothesis.settings(max_examples=100)
@hypothesis.given(
    scope=st.lists(NAMES, min_size=1, max_size=4),
    method=st.none() | NAMES,
    call=NUMBERS,
    side=st.sampled_from(["", ":in"]),
    items=st.lists(st.integers(0, 99), max_size=3),
)
def test_a_path_is_read_back_as_it_was_written(scope, method, call, side, items):
    text = "/".join(scope)
    text += "" if method is None else f".{method}"
    text += "" if call is None else f"#{call}"
    text += side
    text += "".join(f"[{item}]" for item in items)
    parts = (tuple(scope), method or "__call__", call, side, tuple(items))
    assert tuple(parse_path(text)) == parts


@pytest.mark.quick
@pytest.mark.parametrize(
    "path",
    ["", "/", "/a", "a/", "a//b", "a.", ".a", "a.b.c", "a.b/c", "a#", "a#x", "a#-1"]
    + ["a#1#2", "#1", "a:", "a:out", "a:in:in", "a:in#1", ":in", "a[", "a[]", "a[x y]"]
    + ["a[-1]", "a[0]1", "a[0]:in", "[0]", "a[0]#1"]
    + [":out:in", ":out#0", "a/:out", ":out.a", ":output", ":out[]"],
)
def test_a_path_outside_the_grammar_is_refused_with_the_text(path):
    with pytest.raises(ValueError, match="path: expected scope/name") as error:
        parse_path(path)
    assert repr(path) in str(error.value)


# Hints

KINDS = {
    "nested": (Nested(), "block2/conv", ("block2", "conv", "__call__", 0)),
    "block": (Nested(), "block2", ("block2", "__call__", 0)),
    "sown": (Nested(), "block3/margin", ("block3", "margin", 0)),
    "input": (Nested(), "block3:in", ("block2", "__call__", 0)),
    "inner input": (Nested(), "block2/norm:in", ("block2", "conv", "__call__", 0)),
    "explicit call": (Nested(), "block2/conv.__call__#0", ("block2", "conv")),
    "remat": (Nested(wrap=True), "block2/conv", ("block2", "conv", "__call__", 0)),
    "remat block": (Nested(wrap=True), "block2", ("block2", "__call__", 0)),
    "remat sown": (Nested(wrap=True), "block2/margin", ("block2", "margin", 0)),
    "remat input": (Nested(wrap=True), "block2/norm:in", ("block2", "conv")),
    "remat block's input": (Nested(wrap=True), "block3:in[0]", ("block2",)),
    "first call": (Shared(), "shared#0", ("shared", "__call__", 0)),
    "second call": (Shared(), "shared#1", ("shared", "__call__", 1)),
    "input of second call": (Shared(), "head:in", ("shared", "__call__", 1)),
    "tuple": (TupleOutput(), "attention[1]", ("attention", "__call__", 0, 1)),
    "setup list": (SetupList(), "blocks_1", ("blocks_1", "__call__", 0)),
    "scan": (Scanned(), "layers/dense", ("layers", "dense", "__call__", 0)),
    "scan's tuple": (Scanned(), "layers[0]", ("layers", "__call__", 0, 0)),
    "layer of a scan": (Scanned(), "layers/dense[2]", ("layers", "dense"), 2),
    "of the scan's tuple": (Scanned(), "layers[0][4]", ("layers",), 4),
    "its input": (Scanned(), "layers/dense:in[3]", ("layers",), 2),
    "scan of scans": (Grouped(), "groups/dense[1][2]", ("groups", "dense"), (1, 2)),
    "method": (TwoMethods(), "encoder.embed", ("encoder", "embed", 0)),
    "beside a method": (TwoMethods(), "encoder", ("encoder", "__call__", 0)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_hints_are_what_plain_apply_captures(kind):
    module, path, keys, *layer = KINDS[kind]
    network, variables = made(module)
    x = example(module)
    # The block takes (x, train): what it was given is a tuple.
    path = f"{path}[0]" if kind == "input" else path
    got = hint(network, variables, x, path)
    want = at(plain(module, variables, x, ("__call__", "embed")), *keys)
    while not isinstance(want, jax.Array):
        want = want["__call__"] if isinstance(want, dict) else want[0]
    np.testing.assert_array_equal(got, want[layer[0]] if layer else want)


@pytest.mark.quick
def test_a_scan_over_layers_gives_their_activations_stacked():
    network, variables = made(Scanned())
    stacked = hint(network, variables, TOKENS, "layers/dense")
    assert stacked.shape == (5, 2, 5, 4)
    x, params = TOKENS, variables.params["layers"]["dense"]
    for i in range(5):
        x = x @ params["kernel"][i] + params["bias"][i]
        np.testing.assert_allclose(stacked[i], x, atol=1e-5)
        x = nn.relu(x)


def test_the_layers_of_a_scan_above_the_hint_have_no_gradient():
    network, variables = made(Scanned())

    def loss(params):
        return hint(
            network, variables._replace(params=params), TOKENS, "layers/dense[2]"
        ).sum()

    kernel = jax.grad(loss)(variables.params)["layers"]["dense"]["kernel"]
    assert [bool(layer.any()) for layer in kernel] == [True] * 3 + [False] * 2


def test_a_value_sown_with_a_reduction_is_one_value():
    network, variables = made(Summed())
    *dense, total = (
        hint(network, variables, TOKENS, path)
        for path in ("dense0", "dense1", "dense2", "sum")
    )
    np.testing.assert_allclose(total, sum(dense), rtol=1e-6)
    assert list(network.layers(*variables, TOKENS))[-2:] == ["sum", ":out"]
    with pytest.raises(ValueError, match="got 'sum#1'"):
        hint(network, variables, TOKENS, "sum#1")


@pytest.mark.quick
def test_output_hints_and_parameters_come_from_one_pass():
    module = Nested()
    network, variables = made(module)
    wants = Wants(output=True, hints=("block1", "block3:in[0]"), params=("head",))
    features, _ = network.apply(*variables, X, wants=wants, train=False)
    np.testing.assert_array_equal(features.output, module.apply(join(variables), X))
    assert list(features.hints) == ["block1", "block3:in[0]"]
    assert features.params == {"head": variables.params["head"]}


def test_a_parameter_is_wanted_by_the_path_of_a_module_or_of_itself():
    network, variables = made(Nested())
    wants = Wants(params=("block1/conv", "block2/norm/scale"))
    features, _ = network.apply(*variables, X, wants=wants, train=False)
    params = variables.params
    found = features.params["block1/conv"]
    assert found.keys() == params["block1"]["conv"].keys()
    for name, array in params["block1"]["conv"].items():
        assert found[name] is array
    assert features.params["block2/norm/scale"] is params["block2"]["norm"]["scale"]


@pytest.mark.quick
def test_nothing_wanted_is_nothing_shown():
    network, variables = made(Nested())
    features, _ = network.apply(*variables, X, wants=Wants(), train=False)
    assert features == Features(output=None, hints={}, params={})


def test_what_does_not_feed_a_hint_is_not_computed():
    network, variables = made(Nested())

    def flops(*hints, output=False):
        wants = Wants(output, hints)
        run = jax.jit(lambda v, x: network.apply(*v, x, wants=wants, train=False)[0])
        return run.lower(variables, X).compile().cost_analysis()["flops"]

    one, three = flops("block1"), flops(output=True)
    assert 2 * one < three
    assert flops("block3:in[0]") < three < 1.02 * flops("block1", output=True)


def test_gradients_flow_through_hints():
    network, variables = made(Nested())

    def loss(params):
        return hint(network, variables._replace(params=params), X, "block2").sum()

    gradient = jax.grad(loss)(variables.params)
    assert jnp.abs(gradient["block1"]["conv"]["kernel"]).max() > 0
    assert not gradient["block3"]["conv"]["kernel"].any()


# Errors of paths


@pytest.mark.quick
def test_an_unknown_layer_names_exactly_three_nearest():
    network, variables = made(Nested())
    with pytest.raises(ValueError) as error:
        hint(network, variables, X, "blok2/conv")
    message = str(error.value)
    assert message.startswith("Nested: expected the path of a layer, got 'blok2/conv'.")
    near = message.partition("Nearest: ")[2].partition(";")[0].split(", ")
    assert len(near) == 3
    assert near[0] == "block2/conv"
    assert set(near) <= set(network.layers(*variables, X))


@pytest.mark.parametrize(
    ("module", "path"),
    [
        (Nested(), "block4"),
        (Nested(), "conv"),
        (Nested(), "margin"),
        (Nested(), "block1#1"),
        (Nested(), "block1[0]"),
        (Nested(), "block1.embed"),
        (Nested(), "block1/conv/kernel"),
        (Nested(), "block4:in"),
        (Nested(), "block1:in[2]"),
        (Shared(), "shared#2"),
        (Scanned(), "layers/dense[5]"),
        (Scanned(), "layers/dense[0][0]"),
        (Scanned(), "layers/dense:in[5]"),
        (Scanned(), "head[0]"),
        (Grouped(), "groups/dense[1][3]"),
    ],
)
def test_a_path_that_matches_nothing_is_an_error(module, path):
    network, variables = made(module)
    with pytest.raises(ValueError, match="expected the path of a layer, got"):
        hint(network, variables, example(module), path)


@pytest.mark.parametrize("path", ["layers/dense", "layers/dense:in", "layers"])
def test_a_scan_that_keeps_its_activations_says_what_to_do(path):
    network, variables = made(Kept())
    with pytest.raises(ValueError, match=r"shows none\. Give nn\.scan or nn\.vmap var"):
        hint(network, variables, TOKENS, path)


def test_a_method_is_among_the_nearest():
    network, variables = made(TwoMethods())
    with pytest.raises(ValueError, match=r"Nearest: encoder\.embed, "):
        hint(network, variables, TOKENS, "encoder.embd")


def test_an_unknown_parameter_names_the_nearest():
    network, variables = made(Nested())
    wants = Wants(params=("block1/cnv",))
    with pytest.raises(ValueError, match=r"got 'block1/cnv'\. Nearest: block1/conv"):
        network.apply(*variables, X, wants=wants, train=False)


@pytest.mark.quick
def test_two_calls_need_a_number():
    network, variables = made(Shared())
    message = r"got 2 calls\. Choose one of shared#0 to shared#1"
    with pytest.raises(ValueError, match=message):
        hint(network, variables, TOKENS, "shared")


def test_a_tuple_needs_an_entry():
    network, variables = made(TupleOutput())
    with pytest.raises(TypeError, match=r"got tuple\. Choose .* attention\[0\]"):
        hint(network, variables, TOKENS, "attention")
    with pytest.raises(ValueError, match="attention"):
        hint(network, variables, TOKENS, "attention[2]")


def test_the_calls_that_an_error_offers_can_be_asked_for():
    network, variables = made(Shared())
    with pytest.raises(ValueError) as error:
        hint(network, variables, TOKENS, "shared:in")
    offered = str(error.value).partition("Choose one of ")[2].split(" to ")[0]
    assert hint(network, variables, TOKENS, offered).shape == TOKENS.shape


@pytest.mark.parametrize("path", ["block1/margin:in", "block1/margin.embed"])
def test_a_sown_value_has_no_input_and_no_method(path):
    network, variables = made(Nested())
    with pytest.raises(ValueError, match="expected the path of a layer"):
        hint(network, variables, X, path)


# State and randomness


@pytest.mark.quick
def test_init_is_the_initialization_of_the_module():
    module = Block()
    want = jax.jit(module.init)(jax.random.key(2), X)
    got = join(linen(module).init(jax.random.key(2), X))
    assert set(got) == {"params", "batch_stats"}
    jax.tree.map(np.testing.assert_array_equal, got["params"], want["params"])
    jax.tree.map(np.testing.assert_array_equal, got["batch_stats"], want["batch_stats"])


@pytest.mark.quick
def test_the_state_moves_in_training_and_only_there():
    module = Nested()
    network, variables = made(module)
    wants = Wants(output=True, hints=("block1",))
    _, state = network.apply(*variables, X, wants=wants, train=False)
    same = jax.tree.map(lambda a, b: a is b, state, variables.state)
    assert all(jax.tree.leaves(same))
    features, state = network.apply(*variables, X, wants=wants, train=True)
    output, want = module.apply(join(variables), X, train=True, mutable=["batch_stats"])
    np.testing.assert_array_equal(features.output, output)
    assert set(state) == {"batch_stats"}
    jax.tree.map(np.testing.assert_array_equal, state, dict(want))
    mean = np.mean(hint(network, variables, X, "block1/conv"), (0, 1, 2))
    before, after = (
        tree["batch_stats"]["block1"]["norm"]["mean"]
        for tree in (variables.state, state)
    )
    np.testing.assert_allclose(after, 0.9 * before + 0.1 * mean, atol=1e-6)


def test_hints_in_training_are_those_of_training():
    module = Nested()
    network, variables = made(module)
    got = hint(network, variables, X, "block2", train=True)
    _, captured = module.apply(
        join(variables),
        X,
        train=True,
        capture_intermediates=True,
        mutable=["intermediates", "batch_stats"],
    )
    np.testing.assert_array_equal(
        got, captured["intermediates"]["block2"]["__call__"][0]
    )
    assert not np.allclose(got, hint(network, variables, X, "block2"))


def test_a_module_without_state_has_none():
    network, variables = made(Shared())
    assert variables.state == {}
    wants = Wants(output=True)
    assert network.apply(*variables, TOKENS, wants=wants, train=True)[1] == {}


@pytest.mark.quick
def test_dropout_works_with_one_key():
    network = linen(Deterministic(), call=lambda module, x, train: module(x, not train))
    x = jnp.ones((4, 64))
    variables = jax.jit(network.init)(jax.random.key(0), x)

    def output(train, key=None):
        wants = Wants(output=True)
        return network.apply(*variables, x, wants=wants, train=train, key=key)[0].output

    np.testing.assert_array_equal(output(False), x)
    one, two = output(True, jax.random.key(1)), output(True, jax.random.key(2))
    np.testing.assert_array_equal(one, output(True, jax.random.key(1)))
    assert (one != two).any()
    # Two layers of one key draw two masks: a quarter survives, four times as large.
    assert set(np.unique(one)) == {0, 4}
    assert 0.15 < (one > 0).mean() < 0.35


@pytest.mark.quick
def test_a_module_called_in_its_own_way_needs_call():
    with pytest.raises(TypeError, match="linen: expected Deterministic.* call=lambda"):
        linen(Deterministic())


def test_a_module_without_call_needs_call():
    class Silent(nn.Module):
        pass

    with pytest.raises(TypeError, match="linen: expected Silent to have __call__"):
        linen(Silent())


class Moded(nn.Module):
    """The mode is an attribute, not an argument."""

    train: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="low")(x)
        x = nn.BatchNorm(use_running_average=not self.train, name="norm")(x)
        return nn.Dropout(0.5, deterministic=not self.train, name="dropout")(x)


class ModedSetup(nn.Module):
    train: bool = False

    def setup(self):
        self.low = nn.Dense(4)
        self.norm = nn.BatchNorm(use_running_average=not self.train)

    def __call__(self, x):
        return self.norm(self.low(x))


@pytest.mark.quick
@pytest.mark.parametrize("cls", [Moded, ModedSetup])
def test_a_module_with_train_as_an_attribute_is_called_by_its_clone(cls):
    (line,) = re.findall(r"`(lambda m, x, train: m\.clone.*?)`", linen.__doc__)
    network = linen(cls(), call=eval(line))
    variables = jax.jit(network.init)(jax.random.key(0), TOKENS)
    key, wants = jax.random.key(1), Wants(True, ("low", "norm"))
    for train in (False, True):
        shown, state = network.apply(
            *variables, TOKENS, wants=wants, train=train, key=key
        )
        want, changed = cls(train=train).apply(
            join(variables), TOKENS, rngs={"dropout": key}, mutable=["batch_stats"]
        )
        assert shown.hints["low"].shape == TOKENS.shape
        if cls is ModedSetup:
            np.testing.assert_array_equal(shown.output, want)
        else:  # another stream of the same key
            assert (shown.output == 0).any() == train
        jax.tree.map(np.testing.assert_array_equal, state, dict(changed))


def test_adapters_beside_a_dense_layer_are_layers_like_others():
    class Adapted(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x):
            low = nn.Dense(2, use_bias=False, name="a")(x)
            delta = nn.Dense(self.width, use_bias=False, name="b")(low)
            return nn.Dense(self.width, name="base")(x) + delta

    class Whole(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Adapted(3, name="two")(nn.relu(Adapted(4, name="one")(x)))

    network, variables = made(Whole())
    parts = [f"{at}/{name}" for at in ("one", "two") for name in ("a", "b", "base")]
    assert {"one", "two", ":out", *parts} == set(network.layers(*variables, TOKENS))
    got = hint(network, variables, TOKENS, "one/base")
    want = plain(Whole(), variables, TOKENS)["one"]["base"]["__call__"][0]
    np.testing.assert_array_equal(got, want)


def test_a_layer_that_rounds_its_weights_shows_its_activations():
    """A student that is trained for int8, with straight-through gradients."""

    def rounded(a, b, *rest, **how):
        def one(x):
            return x + jax.lax.stop_gradient(jnp.round(x * 127) / 127 - x)

        return jax.lax.dot_general(one(a), one(b), *rest, **how)

    class Quantized(nn.Module):
        @nn.compact
        def __call__(self, x):
            low = nn.Dense(4, dot_general=rounded, name="low")(x)
            return nn.Dense(3, dot_general=rounded, name="head")(low)

    network, variables = made(Quantized())
    assert hint(network, variables, TOKENS, "low").shape == (2, 5, 4)

    def total(params):
        return hint(network, Variables(params, {}), TOKENS, ":out").sum()

    grads = jax.grad(total)(variables.params)
    assert jnp.abs(grads["low"]["kernel"]).sum() > 0


def test_inputs_may_be_any_tree():
    class Language(nn.Module):
        @nn.compact
        def __call__(self, ids, mask):
            x = nn.Embed(11, 4, name="embed")(ids) * mask[..., None]
            return nn.Dense(3, name="head")(x)

    batch = {"ids": jnp.arange(6).reshape(2, 3), "mask": jnp.ones((2, 3))}
    network = linen(
        Language(), call=lambda module, x, train: module(x["ids"], x["mask"])
    )
    variables = jax.jit(network.init)(jax.random.key(0), batch)
    assert hint(network, variables, batch, "embed").shape == (2, 3, 4)
    assert list(network.layers(*variables, batch)) == ["embed", "head", ":out"]


def test_a_module_with_another_method_than_call():
    network = linen(Encoder(), call=lambda module, x, train: module.embed(x))
    variables = jax.jit(network.init)(jax.random.key(0), TOKENS)
    np.testing.assert_array_equal(
        hint(network, variables, TOKENS, "dense"),
        Encoder().apply(join(variables), TOKENS, method="embed"),
    )


def test_the_state_keeps_its_structure_when_a_model_sows_a_loss():
    class Auxiliary(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.sow("losses", "balance", x.mean())
            return nn.Dense(2)(x)

    network, variables = made(Auxiliary())
    wants = Wants(output=True)
    _, state = network.apply(*variables, TOKENS, wants=wants, train=True)
    assert jax.tree.structure(state) == jax.tree.structure(variables.state)


# Layers


@pytest.mark.quick
def test_layers_are_in_the_order_of_execution():
    network, variables = made(SetupList())
    names = ["blocks_2", "blocks_1", "blocks_0", "head", ":out"]
    assert list(network.layers(*variables, TOKENS)) == names
    network, variables = made(Nested())
    names = [path for path in network.layers(*variables, X) if "margin" not in path]
    inside = ["conv", "norm"]
    want = [
        f"block{i}{part}" for i in (1, 2, 3) for part in (*map("/".__add__, inside), "")
    ]
    assert names == [*want, "head", ":out"]


@pytest.mark.quick
def test_layers_cost_no_operation():
    """Shapes go in, shapes come out."""
    network = linen(Nested())
    x = jax.ShapeDtypeStruct((64, 512, 512, 3), jnp.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), x)
    layers = network.layers(*variables, x)
    assert layers["block2"] == jax.ShapeDtypeStruct((64, 512, 512, 4), jnp.float32)
    assert layers["head"] == jax.ShapeDtypeStruct((64, 5), jnp.float32)


@pytest.mark.parametrize(
    "module",
    [Nested(), Nested(wrap=True), Shared(), SetupList(), TwoMethods(), Grouped()],
    ids=["nested", "remat", "shared", "setup", "methods", "scans"],
)
def test_every_layer_that_is_listed_can_be_wanted(module):
    network, variables = made(module)
    layers = network.layers(*variables, example(module))
    wants = Wants(hints=tuple(layers))
    features, _ = network.apply(*variables, example(module), wants=wants, train=False)
    shapes = {path: (h.shape, h.dtype) for path, h in features.hints.items()}
    assert shapes == {path: (s.shape, s.dtype) for path, s in layers.items()}


def test_every_layer_of_a_scan_is_listed():
    network, variables = made(Scanned())
    layers = network.layers(*variables, TOKENS)
    inside = [
        path for i in range(5) for path in (f"layers/dense[{i}]", f"layers[0][{i}]")
    ]
    assert list(layers) == [*inside, "head", ":out"]
    assert {layer.shape for layer in layers.values()} == {(2, 5, 4), (2, 5, 2)}


def test_a_module_with_setup_comes_after_its_parts():
    network, variables = made(TwoMethods())
    order = list(network.layers(*variables, TOKENS))
    assert order.index("encoder/dense#0") < order.index("encoder")


def test_the_inside_of_a_remat_is_in_the_order_of_execution():
    plain, wrapped = (
        made(Nested(wrap=wrap))[0].layers(*made(Nested(wrap=wrap))[1], X)
        for wrap in (False, True)
    )
    assert list(plain) == list(wrapped)


def test_calls_of_a_shared_module_are_in_the_order_of_execution():
    class Around(nn.Module):
        @nn.compact
        def __call__(self, x):
            shared = nn.Dense(x.shape[-1], name="shared")
            return shared(nn.Dense(x.shape[-1], name="between")(shared(x)))

    network, variables = made(Around())
    assert list(network.layers(*variables, TOKENS)) == [
        "shared#0",
        "between",
        "shared#1",
        ":out",
    ]


# Variables


@pytest.mark.quick
@pytest.mark.parametrize("wrap", [dict, freeze])
def test_split_and_join_are_inverse(wrap):
    flax = {
        "params": {"a": {"w": 1}},
        "batch_stats": {"a": {"m": 2}},
        "cache": {"k": 3},
    }
    variables = split(wrap(flax))
    assert variables == Variables(
        {"a": {"w": 1}}, {"batch_stats": {"a": {"m": 2}}, "cache": {"k": 3}}
    )
    assert join(variables) == flax
    assert split(join(variables)) == variables


def test_split_leaves_the_argument_alone_and_drops_what_was_sown():
    flax = {"params": {"w": 1}, "intermediates": {"a": (2,)}}
    assert split(flax) == Variables({"w": 1}, {})
    assert set(flax) == {"params", "intermediates"}
    assert split({"batch_stats": {}}).params == {}


# Any function


def perceptron(params, state, inputs, train, key):
    """Two layers by hand, a scan, a running mean, and hints of every shape."""
    inner = inputs @ params["layers"][0]["w"]
    mean = inner.mean(0) if train else state["mean"]
    outer = (inner - mean) @ params["layers"][1]["w"]
    last, stacked = jax.lax.scan(lambda x, _: (2 * x, x), outer, None, length=3)
    hints = {
        "outer": outer,
        "layers.0/act[0]": inner,  # the key of another framework, taken as it is
        "nested": {"pair": (inner, outer), "text": "none"},
        "stacked": stacked,
        "last": last,
    }
    return last, hints, {"mean": mean}


def perceptron_init(key, inputs):
    keys = jax.random.split(key)
    layers = [{"w": jax.random.normal(k, (4, 4))} for k in keys]
    return {"layers": layers}, {"mean": jnp.zeros((5, 4))}


@functools.cache
def by_hand():
    network = function(perceptron, init=perceptron_init)
    return network, jax.jit(network.init)(jax.random.key(0), TOKENS)


def test_a_function_shows_what_it_returns():
    network, variables = by_hand()
    assert isinstance(variables, Variables)
    _, hints, _ = perceptron(*variables, TOKENS, train=False, key=None)
    wants = {
        "outer": hints["outer"],
        "layers.0/act[0]": hints["layers.0/act[0]"],
        "nested/pair[1]": hints["outer"],
        "stacked": hints["stacked"],
        "stacked[2]": 4 * hints["outer"],
    }
    for path, want in wants.items():
        np.testing.assert_array_equal(hint(network, variables, TOKENS, path), want)


def test_the_layers_of_a_function_are_in_the_order_of_execution():
    network, variables = by_hand()
    layers = network.layers(*variables, TOKENS)
    first, second = {"layers.0/act[0]", "nested/pair[0]"}, {"outer", "nested/pair[1]"}
    assert set(list(layers)[:2]) == first and set(list(layers)[2:4]) == second
    after = ["stacked[0]", "stacked[1]", "stacked[2]", "last", ":out"]
    assert list(layers)[4:] == after
    wants = Wants(hints=tuple(layers))
    features, _ = network.apply(*variables, TOKENS, wants=wants, train=False)
    assert {p: h.shape for p, h in features.hints.items()} == {
        path: layer.shape for path, layer in layers.items()
    }


def test_the_state_of_a_function_moves_in_training_only():
    network, variables = by_hand()
    wants = Wants(output=True, params=("layers/1", "layers/0/w"))
    features, state = network.apply(*variables, TOKENS, wants=wants, train=False)
    assert state is variables.state
    assert features.params["layers/0/w"] is variables.params["layers"][0]["w"]
    assert features.params["layers/1"].keys() == {"w"}
    assert features.params["layers/1"]["w"] is variables.params["layers"][1]["w"]
    _, state = network.apply(*variables, TOKENS, wants=wants, train=True)
    assert state["mean"].any()
    with pytest.raises(ValueError, match=r"got 'layers/2'\. Nearest: layers/"):
        wants = Wants(params=("layers/2",))
        network.apply(*variables, TOKENS, wants=wants, train=False)


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("outr", ValueError, r"perceptron: expected the path.*Nearest: outer, "),
        ("outer[0]", ValueError, r"got 'outer\[0\]'\. Nearest: outer, "),
        ("last[0]", ValueError, r"got 'last\[0\]'\. Nearest: last, "),
        ("stacked[3]", ValueError, r"got 'stacked\[3\]'\. Nearest: stacked\["),
        ("nested/pair[2]", ValueError, r"Nearest: nested/pair\["),
        ("nested/pair", TypeError, r"got tuple\. Choose an entry"),
        ("nested/text", TypeError, "to be an array, got str"),
    ],
)
def test_a_hint_that_a_function_does_not_return(path, error, message):
    network, variables = by_hand()
    with pytest.raises(error, match=message):
        hint(network, variables, TOKENS, path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: function(lambda p, s, x, t, k: x), r"\(params, state, inputs, train="),
        (lambda: function(lambda params, x: x), r"train=, key=\), got \(params, x\)"),
        (lambda: function(perceptron, init=lambda key: {}), r"init to take \(key, inp"),
        (lambda: linen(nn.Dense(3), call=lambda m, x: m(x)), "call to take .*train"),
        (lambda: hj.nnx(lambda: None), r"to take \(rngs=\), got \(\)\. Pass a model"),
    ],
)
def test_a_function_that_takes_other_arguments_is_refused_at_once(make, words):
    with pytest.raises(TypeError, match=words):
        make()


def test_an_init_that_returns_parameters_alone_is_refused():
    network = function(perceptron, init=lambda key, x: {"a": x, "b": x})
    with pytest.raises(TypeError, match=r"init to return \(params, state\), got dict"):
        network.init(jax.random.key(0), X)


def test_a_hint_may_be_a_constant_of_numpy():
    constant = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    network = function(lambda params, state, x, train, key: (x, {"h": constant}, state))
    features, _ = network.apply({}, {}, X, wants=Wants(hints=("h",)), train=False)
    assert isinstance(features.hints["h"], jax.Array)
    np.testing.assert_array_equal(features.hints["h"], constant)


def test_a_function_that_returns_something_else():
    network = function(lambda params, state, x, train, key: (x, state))
    message = r"to return \(output, dict of hints, state\), got \(.*, dict\)"
    with pytest.raises(TypeError, match=message):
        network.layers({}, {}, TOKENS)
    with pytest.raises(ValueError, match="function: expected init, got None"):
        network.init(jax.random.key(0), TOKENS)


def test_equinox_in_both_stages():
    eqx = pytest.importorskip("equinox")

    class MLP(eqx.Module):
        layers: list

        def __init__(self, width, key):
            sizes = [(4, width), (width, width), (width, 3)]
            keys = jax.random.split(key, 3)
            self.layers = [
                eqx.nn.Linear(*size, key=k) for size, k in zip(sizes, keys, strict=True)
            ]

        def __call__(self, x):
            hints = {}
            for i, layer in enumerate(self.layers[:-1]):
                x = hints[f"layers/{i}"] = jax.nn.relu(layer(x))
            return self.layers[-1](x), hints

    def network(width):
        # What is no array (none here, activations often) stays out of the parameters.
        shape = eqx.filter_eval_shape(MLP, width, jax.random.key(0))
        static = eqx.partition(shape, lambda leaf: hasattr(leaf, "shape"))[1]

        def apply(params, state, x, train, key):
            output, hints = jax.vmap(eqx.combine(params, static))(x)
            return output, hints, state

        def init(key, inputs):
            return eqx.filter(MLP(width, key), eqx.is_array), {}

        return function(apply, init=init)

    student, teacher = network(3), network(5)
    batch = {"x": TOKENS[:, 0], "label": jnp.array([0, 2])}
    inputs = {"inputs": lambda batch: batch["x"], "teacher_inputs": lambda b: b["x"]}
    variables, theirs = (
        net.init(jax.random.key(k), batch["x"])
        for k, net in enumerate((student, teacher))
    )
    paths = list(student.layers(*variables, batch["x"]))
    assert paths == ["layers/0", "layers/1", ":out"]
    hint_method = hj.fitnets([("layers/0", "layers/1")])
    first = hj.hint_stage(
        student, teacher, hj.objective(hint=hint_method), optax.adamw(0.05), **inputs
    )
    task = hj.task(optax.softmax_cross_entropy_with_integer_labels)
    second = hj.distillation_stage(
        student,
        teacher,
        hj.objective(task=task, kd=hj.kd(), hint=hint_method),
        optax.adamw(0.05),
        **inputs,
    )
    state = first.init(jax.random.key(2), variables, theirs, batch)
    for _ in range(3):
        state, _ = first.update(state, theirs, batch)
    trained = hj.student_variables(state)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), trained, variables)
    # The first layer alone feeds the hint: weight decay reaches no other.
    assert [one.weight for one in moved.params.layers] == [True, False, False]
    state = second.init(jax.random.key(3), trained, theirs, batch, carry=state)
    before = second.evaluate(state, theirs, batch)["loss"]
    for _ in range(3):
        state, _ = second.update(state, theirs, batch)
    assert second.evaluate(state, theirs, batch)["loss"] < before
    assert isinstance(state.params["student"], MLP)
