"""A Linen module as a `Network`: paths, every kind of hint, state, errors.

Hints are compared with what plain `module.apply` captures.
"""

import functools

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze

from hintjax.networks import (
    Features,
    Variables,
    Wants,
    join,
    linen,
    split,
)
from hintjax.paths import parse_path

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
    + ["a#1#2", "#1", "a:", "a:out", "a:in:in", "a:in#1", ":in", "a[", "a[]", "a[x]"]
    + ["a[-1]", "a[0]1", "a[0]:in", "[0]", "a[0]#1"],
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
    "first call": (Shared(), "shared#0", ("shared", "__call__", 0)),
    "second call": (Shared(), "shared#1", ("shared", "__call__", 1)),
    "input of second call": (Shared(), "head:in", ("shared", "__call__", 1)),
    "tuple": (TupleOutput(), "attention[1]", ("attention", "__call__", 0, 1)),
    "setup list": (SetupList(), "blocks_1", ("blocks_1", "__call__", 0)),
    "scan": (Scanned(), "layers/dense", ("layers", "dense", "__call__", 0)),
    "method": (TwoMethods(), "encoder.embed", ("encoder", "embed", 0)),
    "beside a method": (TwoMethods(), "encoder", ("encoder", "__call__", 0)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_hints_are_what_plain_apply_captures(kind):
    module, path, keys = KINDS[kind]
    network, variables = made(module)
    x = example(module)
    # The block takes (x, train): what it was given is a tuple.
    path = f"{path}[0]" if kind == "input" else path
    got = hint(network, variables, x, path)
    want = at(plain(module, variables, x, ("__call__", "embed")), *keys)
    while not isinstance(want, jax.Array):
        want = want["__call__"] if isinstance(want, dict) else want[0]
    np.testing.assert_array_equal(got, want)


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
    assert features.params["block1/conv"] is params["block1"]["conv"]
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
    ],
)
def test_a_path_that_matches_nothing_is_an_error(module, path):
    network, variables = made(module)
    with pytest.raises(ValueError, match="expected the path of a layer, got"):
        hint(network, variables, example(module), path)


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
def test_init_is_the_initialisation_of_the_module():
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
    variables = network.init(jax.random.key(0), x)

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
    variables = network.init(jax.random.key(0), batch)
    assert hint(network, variables, batch, "embed").shape == (2, 3, 4)
    assert list(network.layers(*variables, batch)) == ["embed", "head"]


def test_a_module_with_another_method_than_call():
    network = linen(Encoder(), call=lambda module, x, train: module.embed(x))
    variables = network.init(jax.random.key(0), TOKENS)
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
    names = ["blocks_2", "blocks_1", "blocks_0", "head"]
    assert list(network.layers(*variables, TOKENS)) == names
    network, variables = made(Nested())
    names = [path for path in network.layers(*variables, X) if "margin" not in path]
    inside = ["conv", "norm"]
    want = [
        f"block{i}{part}" for i in (1, 2, 3) for part in (*map("/".__add__, inside), "")
    ]
    assert names == [*want, "head"]


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
    [Nested(), Nested(wrap=True), Shared(), SetupList(), TwoMethods()],
    ids=["nested", "remat", "shared", "setup", "methods"],
)
def test_every_layer_that_is_listed_can_be_wanted(module):
    network, variables = made(module)
    layers = network.layers(*variables, example(module))
    wants = Wants(hints=tuple(layers))
    features, _ = network.apply(*variables, example(module), wants=wants, train=False)
    shapes = {path: (h.shape, h.dtype) for path, h in features.hints.items()}
    assert shapes == {path: (s.shape, s.dtype) for path, s in layers.items()}


def test_every_layer_of_a_scan_has_a_shape():
    network, variables = made(Scanned())
    assert all(hasattr(s, "shape") for s in network.layers(*variables, TOKENS).values())


def test_a_module_with_setup_comes_after_its_parts():
    network, variables = made(TwoMethods())
    order = list(network.layers(*variables, TOKENS))
    assert order.index("encoder/dense#0") < order.index("encoder")


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
