"""Parameters whose axes have names from Flax: on which devices they are stored."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import hintjax as hj
from hintjax.sharding import Layout, check_rules, make_mesh, place, stored
from hintjax.training import load_tree, open_checkpoints, save_tree

KEY = jax.random.key(0)
P = PartitionSpec
CLASSES = 4
INIT = nn.linear.default_kernel_init


class Net(nn.Module):
    """A module with names of mesh axes, other names, and no names."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = x.reshape(len(x), -1)
        physical = nn.with_partitioning(INIT, ("fsdp", "model"))
        x = nn.Dense(8, kernel_init=physical, name="first")(x)
        ones = nn.with_partitioning(nn.initializers.ones, ("model",))
        x = nn.BatchNorm(use_running_average=not train, scale_init=ones, name="norm")(x)
        x = nn.relu(nn.Dense(16, name="middle")(x))
        logical = nn.with_logical_partitioning(INIT, ("embed", "classes"))
        return nn.Dense(CLASSES, kernel_init=logical, name="head")(x)


def named(rngs):
    """The same module in NNX."""
    init = nnx.initializers.lecun_normal()
    physical = nnx.with_partitioning(init, ("fsdp", "model"))
    logical = nnx.with_partitioning(init, ("embed", "classes"))
    return nnx.Sequential(
        partial(jnp.reshape, shape=(-1, 4)),
        nnx.Linear(4, 8, kernel_init=physical, rngs=rngs),
        nnx.BatchNorm(8, rngs=rngs),
        nnx.Linear(8, 16, rngs=rngs),
        nnx.Linear(16, CLASSES, kernel_init=logical, rngs=rngs),
    )


def layout():
    names = {"embed": None, "classes": "model"}
    return Layout(make_mesh(fsdp=2, model=4), at_least=100, logical=names)


def images(seed=0):
    generator = np.random.default_rng(seed)
    return {
        "image": generator.normal(size=(8, 2, 2, 1)),
        "label": np.arange(8, dtype=np.int32) % CLASSES,
    }


def double(tree):
    def one(x):
        return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(one, tree)


TASK = hj.task(optax.softmax_cross_entropy_with_integer_labels)


def trained(make, network, pair, mesh):
    """Runs some steps under a teacher with the same names."""
    hint = hj.fitnets([pair])
    terms = {} if make is hj.hint_stage else {"task": TASK, "kd": hj.kd()}
    method = hj.objective(hint=hint, **terms)
    optimizer = optax.sgd(0.05, momentum=0.9)
    stage = make(network, network, method, optimizer, mesh=mesh)
    ours, theirs = (
        double(network.init(jax.random.key(seed), images()["image"])) for seed in (1, 2)
    )
    state = double(stage.init(KEY, ours, theirs, images()))
    if mesh is not None:
        theirs = place(theirs, mesh)
    for seed in range(3):
        state, metrics = stage.update(state, theirs, images(seed))
    return state, metrics


NETWORKS = {
    "linen": (lambda: hj.linen(Net()), ("first",), ("head",), "norm", "middle"),
    "nnx": (
        lambda: hj.nnx(named),
        ("layers", "1"),
        ("layers", "4"),
        "layers/2",
        "layers/3",
    ),
}


@pytest.fixture(autouse=True)
def in_double_precision():
    with jax.enable_x64(True), nnx.use_eager_sharding(False):
        yield


@pytest.mark.parametrize("make", [hj.hint_stage, hj.distillation_stage])
@pytest.mark.parametrize("kind", NETWORKS)
def test_eight_devices_store_what_is_named_in_shares_and_give_the_numbers_of_one(
    kind, make
):
    network, first, head, norm, middle = NETWORKS[kind]
    network = network()
    one, eight = (
        trained(make, network, (norm, norm), mesh) for mesh in (None, layout())
    )
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12),
        *((state._replace(key=None), metrics) for state, metrics in (eight, one)),
    )
    state = eight[0]

    def at(tree, path):
        for name in path:
            tree = tree[name]
        return tree["kernel"]

    def shares(tree, path):
        """The shapes on devices, and the number of different shards."""
        box = at(tree, path)
        pieces = getattr(box, "value", box).addressable_shards
        return {s.data.shape for s in pieces}, len({str(s.index) for s in pieces})

    params = state.params["student"]
    assert shares(params, first) == ({(2, 2)}, 8)
    assert shares(params, head) == ({(16, 1)}, 4)
    assert shares(params, tuple(middle.split("/"))) == ({(8, 8)}, 2)  # by the rule
    momenta = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if f"{'/'.join(first)}/kernel"
        in jax.tree_util.keystr(path, simple=True, separator="/")
    ]
    assert [m.sharding for m in momenta] == [at(params, first).value.sharding]
    assert nn.get_partition_spec(at(params, head)) == P("embed", "classes")


@pytest.mark.quick
def test_students_and_checkpoints_are_what_flax_knows(tmp_path):
    """Parameters are in boxes, as from module.init; a method sees the contents."""
    network = hj.linen(Net())
    stage = hj.distillation_stage(
        network, None, hj.objective(task=TASK), optax.adam(1e-3), mesh=layout()
    )
    ours = network.init(KEY, images()["image"])
    state = stage.init(KEY, ours, None, images())
    shipped = hj.student_variables(state)
    assert jax.tree.structure(shipped) == jax.tree.structure(ours)
    output = Net().apply(hj.join(shipped), images()["image"])
    np.testing.assert_allclose(
        output, Net().apply(nn.unbox(hj.join(ours)), images()["image"]), rtol=1e-6
    )
    wants = hj.Wants(params=("norm/scale", "head"))
    shown, _ = network.apply(*ours, images()["image"], wants=wants, train=False)
    assert shown.params["norm/scale"].shape == (8,)
    assert shown.params["head"]["kernel"].shape == (16, CLASSES)
    with pytest.raises(ValueError, match="Nearest: norm/scale"):
        network.apply(
            *ours, images()["image"], wants=hj.Wants(params=("norm/scal",)), train=False
        )

    file = tmp_path / "student"
    with pytest.raises(TypeError, match="save_tree: .*got Partitioned"):
        save_tree(file, hj.join(shipped))
    save_tree(file, nn.unbox(hj.join(shipped)))
    jax.tree.map(
        np.testing.assert_array_equal, load_tree(file), nn.unbox(hj.join(ours))
    )

    checkpoints = open_checkpoints(tmp_path / "run")
    checkpoints.save(1, state)
    again, _ = checkpoints.restore(state)
    checkpoints.close()
    assert jax.tree.structure(again) == jax.tree.structure(state)
    for read, written in zip(*map(jax.tree.leaves, (again, state)), strict=True):
        assert read.sharding == written.sharding


@pytest.mark.quick
def test_an_nnx_model_is_given_what_is_in_the_boxes():
    network = hj.nnx(named)
    x = images()["image"]
    variables = network.init(KEY, x)
    model = named(nnx.Rngs(1))
    hj.nnx_update(model, variables)
    model.eval()
    wants = hj.Wants(output=True)
    for params in (variables.params, nn.unbox(variables.params)):
        shown, _ = network.apply(params, variables.state, x, wants=wants, train=False)
        np.testing.assert_allclose(shown.output, model(x), rtol=1e-6)
    kernel = variables.params["layers"]["4"]["kernel"]
    assert nn.get_partition_spec(kernel) == P("embed", "classes")
    assert variables.params["layers"]["3"]["kernel"].shape == (8, 16)


def boxed(names, shape=(8, 16), **more):
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    if more:
        return {"student": {"kernel": nn.LogicallyPartitioned(leaf, names, **more)}}
    return {"student": {"kernel": nn.Partitioned(leaf, names)}}


def spec(params, **fields):
    layout = Layout(make_mesh(fsdp=2, model=4), **fields)
    check_rules(layout, params)
    return stored(layout, params)["student"]["kernel"].value.spec


RULES = (("embed", "model"), ("heads", None))


@pytest.mark.quick
@pytest.mark.parametrize(
    "names, fields, want",
    [
        (("fsdp", "model"), {}, P("fsdp", "model")),
        ((None, ("fsdp", "model")), {}, P(None, ("fsdp", "model"))),
        # A rule can map a name to another axis of the mesh.
        (("fsdp", "model"), {"logical": {"model": None}}, P("fsdp", None)),
        (
            (None, "mlp"),
            {"logical": {"mlp": ("fsdp", "model")}},
            P(None, ("fsdp", "model")),
        ),
        # As in Flax, the first of two names takes the axis.
        (("a", "b"), {"logical": {"b": "model", "a": "model"}}, P(None, "model")),
        # If metadata split nothing, the rule for large parameters does nothing.
        ((None, None), {"at_least": 1}, P(None, None)),
        # The user's rules come first; they see the contents of boxes.
        (("x", "y"), {"rules": {"kernel$": P("model")}}, P("model")),
    ],
)
def test_rules_come_first_then_metadata_then_the_size(names, fields, want):
    assert spec(boxed(names), **fields) == want


@pytest.mark.quick
def test_flaxs_own_rules_come_after_the_layouts():
    params = boxed(("embed", "heads"), rules=RULES)
    assert spec(params) == P("model", None)
    assert spec(params, logical={"heads": "model"}) == P(None, "model")


@pytest.mark.quick
@pytest.mark.parametrize(
    "params, fields, complaint",
    [
        (boxed(("modle", None)), {}, "'modle' of 'student/kernel'. Nearest: model,"),
        (
            boxed(("embd", None)),
            {"logical": {"embed": None}},
            "Nearest: embed, .*; or a",
        ),
        (
            boxed(("a", None)),
            {"logical": {"a": "rows"}},
            "metadata: expected axes among",
        ),
        (boxed(("model",), (6,)), {}, r"divide 'student/kernel' evenly.*4 devices"),
        (boxed((None, "model"), (8,)), {}, "at most the 1 axes of 'student/kernel'"),
    ],
)
def test_metadata_that_cannot_be_followed(params, fields, complaint):
    with pytest.raises(ValueError, match=f"^layout.*{complaint}"):
        spec(params, **fields)
