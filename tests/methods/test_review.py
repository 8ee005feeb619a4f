"""ReviewKD: the ABF and the whole method against the authors' code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import regressors, review, warm_up
from hintjax.method import Context
from hintjax.networks import Features, Wants

pytestmark = pytest.mark.usefixtures("strict")

KEY = jax.random.key(0)
LAYERS = {"reduce": "conv1.0", "expand": "conv2.0", "attention": "att_conv.0"}
NORMS = {"reduce_norm": "conv1.1", "expand_norm": "conv2.1"}


def abf_params(case, prefix="", kind="param"):
    """The official module's parameters (or their gradients) under our names."""

    def entries(name):
        found = {"kernel": f"{name}.weight", "bias": f"{name}.bias"}
        return {ours: f"{kind}.{prefix}{theirs}" for ours, theirs in found.items()}

    names = {ours: entries(theirs) for ours, theirs in LAYERS.items()}
    for ours, theirs in NORMS.items():
        names[ours] = {"scale": entries(theirs)["kernel"], **entries(theirs)}
        del names[ours]["kernel"]
    names = {
        layer: {ours: key for ours, key in keys.items() if key in case.arrays}
        for layer, keys in names.items()
    }
    return {layer: keys for layer, keys in names.items() if keys}


def statistics(prefix="", kind="state"):
    return {
        "batch_stats": {
            ours: {
                "mean": f"{kind}.{prefix}{theirs}.running_mean",
                "var": f"{kind}.{prefix}{theirs}.running_var",
            }
            for ours, theirs in NORMS.items()
        }
    }


def read(case, names):
    return jax.tree.map(lambda name: case[name], names)


def unbiased(before, after, count):
    """Torch's running variance: n / (n - 1) times the biased one is mixed in."""
    kept = 0.9 * before
    return kept + (after - kept) * count / (count - 1)


def assert_statistics(case, prefix, after, counts):
    before = read(case, statistics(prefix))["batch_stats"]
    names = statistics(prefix, "state_out")["batch_stats"]
    for layer, count in zip(NORMS, counts, strict=True):
        got = after["batch_stats"][layer]
        assert case.error(names[layer]["mean"], got["mean"]) < 1e-5
        var = unbiased(before[layer]["var"], got["var"], count)
        assert case.error(names[layer]["var"], var) < 1e-5


@pytest.mark.parametrize("train", [False, True])
def test_abf_is_the_code(golden, train):
    case = golden(f"reviewkd/abf_fuse_{'train' if train else 'eval'}")
    module = regressors.ABF(10, 12, (8, 8))
    names = abf_params(case)

    @functools.partial(jax.jit)
    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def run(params, x, y):
        (output, fusion), changed = module.apply(
            {"params": params, **read(case, statistics())},
            x,
            y,
            train,
            mutable=["batch_stats"] if train else [],
        )
        value = (output * case["in.cot_out"]).sum() + (
            fusion * case["in.cot_res"]
        ).sum()
        return value, (output, fusion, changed)

    (value, (output, fusion, changed)), gradients = run(
        read(case, names), case["in.x"], case["in.y"]
    )
    assert case.error("out.abf_out", output) < 1e-5
    assert case.error("out.abf_res", fusion) < 1e-5
    assert case.error("out.loss", value) < 1e-5
    assert case.error("grad.in.x", gradients[1]) < 1e-5
    assert case.error("grad.in.y", gradients[2]) < 1e-5
    for layer, keys in abf_params(case, kind="grad.param").items():
        for ours, theirs in keys.items():
            assert case.error(theirs, gradients[0][layer][ours]) < 1e-5
    if train:
        assert_statistics(case, "", changed, (4 * 8 * 8, 4 * 8 * 8))


PAIRS = [(f"s{i}", f"t{i}") for i in range(4)]
NAMES = ["s0->t0", "s1->t1", "s2->t2", "s3->t3"]


def test_the_method_is_the_code(golden):
    """One training step's loss, gradients and BatchNorm statistics."""
    case = golden("reviewkd/full_train")
    method = review(PAIRS)
    student, teacher = (
        {f"{network}{i}": case[f"in.f{network}.{i}"] for i in range(4)}
        for network in "st"
    )
    names = {name: abf_params(case, f"abfs.{3 - i}.") for i, name in enumerate(NAMES)}
    memory = {
        name: read(case, statistics(f"abfs.{3 - i}.")) for i, name in enumerate(NAMES)
    }
    shapes = jax.eval_shape(lambda: (Features(hints=student), Features(hints=teacher)))
    made = jax.eval_shape(lambda key: method.init(key, *shapes, None), KEY)
    given = read(case, names), memory
    assert jax.tree.map(jnp.shape, given) == jax.tree.map(jnp.shape, made)

    @functools.partial(jax.jit)
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def run(params, hints):
        values, after, metrics = method.apply(
            params,
            memory,
            Features(hints=hints),
            Features(hints=teacher),
            {},
            Context(KEY, jnp.int32(0), True),
        )
        return values.mean(), (after, metrics)

    (value, (after, metrics)), (by_params, by_hints) = run(given[0], student)
    assert case.error("out.loss", value) < 1e-5
    np.testing.assert_allclose(sum(metrics.values()), value, rtol=1e-6)
    for i, name in enumerate(NAMES):
        assert case.error(f"grad.in.fs.{i}", by_hints[f"s{i}"]) < 1e-5
        prefix = f"abfs.{3 - i}."
        for layer, keys in abf_params(case, prefix, "grad.param").items():
            for ours, theirs in keys.items():
                assert case.error(theirs, by_params[name][layer][ours]) < 1e-5
        side = student[f"s{i}"].shape[1]
        count = len(student[f"s{i}"]) * side**2
        assert_statistics(case, prefix, after[name], (count, count))


def drawn(shapes, batch=2):
    generator = np.random.default_rng(0)
    return Features(
        hints={
            name: jnp.array(generator.normal(size=(batch, *shape)), jnp.float32)
            for name, shape in shapes.items()
        }
    )


def test_all_sizes_come_from_the_features():
    """Unequal sizes and channels, vectors, a hint map larger than the guided one."""
    method = review([("a", "x"), ("b", "y"), ("c", "z")])
    assert method.student == Wants(hints=("a", "b", "c"))
    assert method.teacher == Wants(hints=("x", "y", "z"))
    student = drawn({"a": (6, 5, 3), "b": (4, 4, 600), "c": (700,)})
    teacher = drawn({"x": (9, 7, 4), "y": (3, 3, 5), "z": (6,)})
    shapes = jax.eval_shape(lambda: (student, teacher))
    params, _ = jax.eval_shape(lambda key: method.init(key, *shapes, None), KEY)
    kernels = {
        name: [abf[layer]["kernel"].shape for layer in ("reduce", "expand")]
        for name, abf in params.items()
    }
    assert kernels == {
        "c->z": [(1, 1, 700, 512), (3, 3, 512, 6)],
        "b->y": [(1, 1, 600, 512), (3, 3, 512, 5)],
        "a->x": [(1, 1, 3, 512), (3, 3, 512, 4)],
    }
    fused = {name for name, abf in params.items() if "attention" in abf}
    assert fused == {"a->x", "b->y"}


def test_the_attention_is_torchs_and_the_rest_is_wide():
    module = regressors.ABF(8, 4, (2, 2))
    x, y = jnp.zeros((1, 2, 2, 200)), jnp.zeros((1, 1, 1, 8))
    params = jax.jit(module.init)(KEY, x, y)["params"]
    for layer, bound in (
        ("reduce", (3 / 200) ** 0.5),
        ("expand", (3 / 72) ** 0.5),
        ("attention", (1 / 16) ** 0.5),
    ):
        for leaf in jax.tree.leaves(params[layer]):
            assert jnp.abs(leaf).max() <= bound
        assert jnp.abs(params[layer]["kernel"]).max() > 0.8 * bound
    assert jnp.abs(params["attention"]["bias"]).min() > 0


def test_warm_up_is_constant_within_an_epoch():
    schedule = warm_up(8.0, epochs=4, steps_per_epoch=3)
    got = [float(schedule(jnp.int32(step))) for step in range(18)]
    assert got == [8 * min(1, (step // 3) / 4) for step in range(18)]


@pytest.mark.parametrize("counts", [{"epochs": 0}, {"steps_per_epoch": 1.5}])
def test_a_warm_up_has_whole_counts(counts, unchecked):
    with pytest.raises(ValueError, match="warm_up: expected .*integer >= 1"):
        warm_up(1.0, **{"epochs": 20, "steps_per_epoch": 10} | counts)


def test_what_cannot_be_reviewed_is_refused():
    with pytest.raises(ValueError, match="review: expected at least one pair"):
        review([])
    with pytest.raises(ValueError, match="review: expected each pair once"):
        review([("a", "x"), ("a", "x")])
    method = review([("a", "x")])
    tokens = drawn({"a": (5, 3)}), drawn({"x": (2, 2, 3)})
    with pytest.raises(ValueError, match=r"review: expected a to be a map .*\(5, 3\)"):
        jax.eval_shape(lambda: method.init(KEY, *tokens, None))
