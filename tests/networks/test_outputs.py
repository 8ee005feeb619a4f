"""The path of a network's output, `:out`: in every kind of network, never suggested."""

import dataclasses
from typing import NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import hintjax as hj
from hintjax import pairing
from hintjax.networks.paths import Path, outermost, parse_path

pytestmark = pytest.mark.quick

KEY = jax.random.key(0)
X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 1, 1, 3)
BATCH = {"image": X, "label": np.arange(4, dtype=np.int32) % 2}


@flax.struct.dataclass
class Known:
    logits: jax.Array
    embedding: jax.Array
    note: str = flax.struct.field(pytree_node=False, default="a note")


@dataclasses.dataclass
class Unknown:
    """A dataclass that JAX does not know as a tree."""

    logits: jax.Array
    embedding: jax.Array


class Named(NamedTuple):
    logits: jax.Array
    embedding: jax.Array


FORMS = {
    "array": lambda logits, x: x,
    "tuple": lambda logits, x: (logits, x),
    "list": lambda logits, x: [logits, {"embedding": x}],
    "dict": lambda logits, x: {"logits": logits, "embedding": x, "not a path": x},
    "numbers": lambda logits, x: {"0": logits, "1": x},
    "named": Named,
    "known": Known,
    "unknown": Unknown,
}
# The paths of the embedding, and of all entries that are listed.
PATHS = {
    "array": ([":out"], [":out"]),
    "tuple": ([":out[1]"], [":out[0]", ":out[1]"]),
    "list": ([":out[1][embedding]"], [":out[0]", ":out[1][embedding]"]),
    "dict": ([":out[embedding]"], [":out[embedding]", ":out[logits]"]),
    "numbers": ([":out[1]"], [":out[0]", ":out[1]"]),
    "named": ([":out[1]", ":out[embedding]"], [":out[0]", ":out[1]"]),
    "known": ([":out[embedding]"], [":out[logits]", ":out[embedding]"]),
    "unknown": ([":out[embedding]"], [":out[embedding]", ":out[logits]"]),
}


class Net(nn.Module):
    form: str = "array"

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(5, name="low")(x.reshape(len(x), -1))
        embedding = jnp.tanh(x)  # no submodule returns it
        return FORMS[self.form](nn.Dense(2, name="head")(embedding), embedding)


class NetX(nnx.Module):
    def __init__(self, form, rngs):
        self.form = form
        self.low = nnx.Linear(3, 5, rngs=rngs)
        self.head = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        embedding = jnp.tanh(self.low(x.reshape(len(x), -1)))
        return FORMS[self.form](self.head(embedding), embedding)


def by_hand(form):
    def apply(params, state, x, train, key):
        low = x.reshape(len(x), -1) @ params["low"]["kernel"] + params["low"]["bias"]
        embedding = jnp.tanh(low)
        head = embedding @ params["head"]["kernel"]
        return FORMS[form](head, embedding), {"low": low, "head": head}, state

    return hj.function(apply)


KINDS = {
    "linen": lambda form: hj.linen(Net(form)),
    "nnx": lambda form: hj.nnx(lambda rngs: NetX(form, rngs)),
    "function": by_hand,
}
VARIABLES = hj.split(jax.tree.map(np.asarray, Net().init(KEY, X)))


def embedding(variables=VARIABLES, x=X):
    low = variables.params["low"]
    return np.tanh(x.reshape(len(x), -1) @ low["kernel"] + low["bias"])


def hint(network, path, variables=VARIABLES, **how):
    wants = hj.Wants(hints=(path,))
    how = {"train": False, **how}
    return network.apply(*variables, X, wants=wants, **how)[0].hints[path]


# The grammar


@pytest.mark.parametrize(
    ("path", "items"),
    [(":out", ()), (":out[0]", (0,)), (":out[heads][1][cls]", ("heads", 1, "cls"))],
)
def test_the_output_has_a_path_of_the_one_grammar(path, items):
    assert parse_path(path) == Path((), "", None, ":out", items)


def test_names_of_entries_are_read_back():
    assert parse_path("a/b:in[x][2]").items == ("x", 2)


@pytest.mark.parametrize("path", ["out", "output", "out:in", "a/out", "out[0]"])
def test_no_submodule_has_the_path_of_the_output(path):
    assert parse_path(path).scope and not outermost(path)


# Every kind of network


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_output_and_its_entries_are_listed_last_and_can_be_hints(kind, form):
    network = KINDS[kind](form)
    paths, listed = PATHS[form]
    layers = network.layers(*VARIABLES, X)
    assert list(layers) == ["low", "head", *listed]
    for path in paths:
        np.testing.assert_allclose(hint(network, path), embedding(), rtol=1e-5)
    for path in listed:
        assert layers[path].shape == hint(network, path).shape


def test_a_network_with_call_has_the_output_of_its_call():
    network = hj.linen(Net("tuple"), call=lambda m, x, train: 2 * m(x)[1])
    np.testing.assert_allclose(hint(network, ":out"), 2 * embedding(), rtol=1e-5)
    assert list(network.layers(*VARIABLES, X))[-1] == ":out"


def test_networks_of_networks_have_their_outputs():
    both = hj.together(big=hj.linen(Net()), pair=hj.linen(Net("tuple")))
    theirs = hj.Variables(*({"big": part, "pair": part} for part in VARIABLES))
    for path in ("big/:out", "pair/:out[1]"):
        assert path in both.layers(*theirs, X)
        np.testing.assert_allclose(hint(both, path, theirs), embedding(), rtol=1e-5)
    seen = hj.seeing(hj.linen(Net()), lambda x: 2 * x)
    np.testing.assert_allclose(hint(seen, ":out"), embedding(x=2 * X), rtol=1e-5)
    assert (
        hint(hj.computed_in(hj.linen(Net()), jnp.bfloat16), ":out").dtype == "bfloat16"
    )


def test_the_path_of_one_of_several_teachers():
    method = hj.from_teacher(hj.fitnets([(":out", ":out")]), "big")
    assert method.teacher.hints == ("big/:out",)


def test_a_layer_that_a_scan_stacked_can_be_chosen_of_the_output():
    def apply(params, state, x, train, key):
        return jax.lax.scan(lambda x, _: (2 * x, x), x, None, length=3)[1], {}, state

    network = hj.function(apply)
    assert list(network.layers({}, {}, X)) == [f":out[{i}]" for i in range(3)]
    np.testing.assert_array_equal(hint(network, ":out[2]", ({}, {})), 4 * X)


def test_a_hint_that_a_function_calls_so_is_its_own():
    network = hj.function(
        lambda p, state, x, train, key: (x, {":out": jnp.add(x, x)}, state)
    )
    np.testing.assert_array_equal(hint(network, ":out", ({}, {})), 2 * X)


def test_a_submodule_that_returns_a_dict_shows_its_entries():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Net("dict", name="inner")(x)["logits"]

    network = hj.linen(Outer())
    variables = hj.Variables({"inner": VARIABLES.params}, {})
    got = hint(network, "inner[embedding]", variables)
    np.testing.assert_allclose(got, embedding(), rtol=1e-5)
    assert "inner[embedding]" in network.layers(*variables, X)


@pytest.mark.parametrize(
    ("form", "path", "words"),
    [
        ("tuple", ":out", "to be an array, got tuple. Choose an entry with :out[0]"),
        ("dict", ":out", "got dict. Choose an entry with :out[logits]"),
        ("unknown", ":out", "got Unknown. Choose an entry with :out[logits]"),
        ("tuple", ":out[2]", "got ':out[2]'. Nearest: :out[1], :out[0]"),
        ("dict", ":out[logit]", "got ':out[logit]'. Nearest: :out[logits]"),
        ("array", ":out[0]", "got ':out[0]'. Nearest: :out"),
        ("array", ":out[logits]", "got ':out[logits]'. Nearest: :out"),
        ("known", ":out[note]", "to be an array, got str"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_an_entry_that_the_output_does_not_have(kind, form, path, words):
    with pytest.raises(hj.Refusal) as error:
        hint(KINDS[kind](form), path)
    assert words in str(error.value)


def test_an_output_that_no_transform_passes_is_refused_and_its_entry_is_not():
    network = hj.linen(Net("unknown"))
    wants = hj.Wants(output=True)
    with pytest.raises(
        TypeError, match=r"Net: expected the output.*module\(x\)\.logits"
    ):
        network.apply(*VARIABLES, X, wants=wants, train=False)
    head = hj.at_head(hj.kd(), student=":out[logits]", teacher=":out[logits]")
    stage = hj.distillation_stage(network, network, head, optax.sgd(0.1))
    assert jax.eval_shape(stage.init, KEY, VARIABLES, VARIABLES, BATCH)


# Training with it


@pytest.mark.parametrize("make", [hj.hint_stage, hj.distillation_stage])
def test_an_embedding_that_a_whole_model_returns_is_a_hint(make):
    network = hj.linen(Net())
    method = hj.objective(hint=hj.fitnets([("low", ":out")]))
    stage = make(network, network, method, optax.sgd(0.1))
    state = jax.eval_shape(stage.init, KEY, VARIABLES, VARIABLES, BATCH)
    assert set(state.params["regressors"]["hint"]) == {"low->:out"}
    assert jax.eval_shape(stage.update, state, VARIABLES, BATCH)


def test_the_hint_stage_trains_all_that_feeds_the_output():
    network = hj.linen(Net())
    stage = hj.hint_stage(
        network, network, hj.fitnets([(":out", "head")]), optax.adam(0.1)
    )
    state = jax.eval_shape(stage.init, KEY, VARIABLES, VARIABLES, BATCH)
    shapes = {leaf.shape for leaf in jax.tree.leaves(state.opt_state)}
    assert (3, 5) in shapes  # the moments of "low", which feeds the embedding
    assert not any(
        "['head']" in jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)
    )


def test_a_deployed_network_has_its_own_output():
    from hintjax.export import deployed

    class Maps(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (1, 1), name="map")(x)
            return nn.Dense(3, name="head")(x.mean((1, 2)))

    student, teacher = hj.linen(Maps()), hj.linen(Maps())
    method = hj.simkd(("map", "map"), classifier="head")
    network = deployed(student, teacher, method)
    variables = network.init(KEY, X)
    layers = network.layers(*variables, X)
    assert list(layers) == ["map", "head", ":out"] and layers[":out"].shape == (4, 3)
    wants = hj.Wants(output=True, hints=(":out", "map"))
    shown, _ = network.apply(*variables, X, wants=wants, train=False)
    np.testing.assert_array_equal(shown.hints[":out"], shown.output)
    assert hint(network, ":out", variables).shape == (4, 3)


# Suggestions


def layer(*shape):
    return jax.ShapeDtypeStruct((1, *shape), "float32")


def test_outputs_and_entries_by_name_are_never_suggested():
    inner = {f"conv{i}": layer(8, 8, 4) for i in range(1, 6)}
    inner |= {"pool": layer(4), "head": layer(10)}
    seen = {"conv3[map]": layer(8, 8, 4), ":out": layer(10), "a/:out": layer(8, 8, 4)}
    seen |= {":out[map]": layer(8, 8, 4), ":out[0]": layer(4), "head[x]": layer(2)}
    both = inner | seen
    for suggest in (pairing.suggest_pairs, pairing.stage_pairs, pairing.first_pair):
        assert suggest(both, both) == suggest(inner, inner)
    assert pairing.suggest_pairs(both, both, count=9) == pairing.suggest_pairs(
        inner, inner, count=9
    )
    assert pairing.head(both) == pairing.head(inner) == ("pool", "head")


def test_a_network_of_outputs_alone_needs_pairs():
    layers = {":out": layer(8, 8, 4)}
    with pytest.raises(ValueError, match="feature maps in the student"):
        pairing.suggest_pairs(layers, layers)
