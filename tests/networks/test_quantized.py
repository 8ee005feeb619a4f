"""Fake quantization: values on a grid, straight gradients, ranges as state."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hintjax as hj
from hintjax.networks import quantized

# One program each: without it, every operation would be compiled by itself.
fake_quantized_activation = jax.jit(
    quantized.fake_quantized_activation, static_argnums=2
)
fake_quantized_kernel = jax.jit(
    quantized.fake_quantized_kernel, static_argnums=1, static_argnames="bits"
)

KEY = jax.random.key(0)
HINT = "conv2"
METHOD = hj.objective(
    task=hj.task(optax.softmax_cross_entropy_with_integer_labels),
    kd=hj.kd(),
    hint=hj.fitnets([(HINT, HINT)]),
)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Conv(4, (3, 3), name="conv1")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm1")(x))
        x = nn.Conv(6, (3, 3), strides=2, name="conv2")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm2")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def batch():
    generator = np.random.default_rng(0)
    return {
        "image": generator.normal(size=(16, 6, 6, 2)).astype(np.float32),
        "label": np.arange(16, dtype=np.int32) % 3,
    }


def drawn(*shape):
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def arrays(*trees):
    return zip(*map(jax.tree.leaves, trees), strict=True)


def output(network, variables, x, **how):
    how = {"wants": hj.Wants(output=True), "train": False, **how}
    return jax.jit(lambda *variables: network.apply(*variables, x, **how))(*variables)


def begun(network, x):
    return jax.jit(network.init)(KEY, x)


def calibrated(network, variables, x):
    def run(*variables):
        return hj.calibrated(network, hj.Variables(*variables), x)

    return jax.jit(run)(*variables)


@pytest.fixture(scope="module")
def plain():
    """The plain network, and variables whose statistics are not those at the start."""
    network = hj.linen(Net())
    params, state = begun(network, batch()["image"])
    _, state = output(network, (params, state), batch()["image"], train=True)
    return network, hj.Variables(params, state)


@pytest.fixture(scope="module")
def stepped(plain):
    """A stage of the fake-quantized student, its state after a step, and metrics."""
    network, variables = plain
    student = hj.fake_quantized(network)
    stage = hj.distillation_stage(student, network, METHOD, optax.sgd(0.1))
    state = stage.init(KEY, begun(student, batch()["image"]), variables, batch())
    before = jax.tree.map(np.asarray, state.params)
    return stage, before, *stage.update(state, variables, batch())


@pytest.mark.parametrize("bits", [4, 8])
def test_values_on_the_grid_stay(bits):
    n = 2 ** (bits - 1) - 1
    w = np.arange(-n, n + 1, dtype=np.float32)[:, None] / np.float32([8, 128])
    np.testing.assert_array_equal(fake_quantized_kernel(w, bits=bits), w)
    limits = jnp.array([-2.0, 2**bits - 3.0])
    x = np.arange(-2, 2**bits - 2, dtype=np.float32)
    np.testing.assert_array_equal(fake_quantized_activation(x, limits, bits), x)
    # And whatever is rounded is on the grid.
    x, limits = drawn(8, 5), jnp.array([-1.3, 2.1])
    for rounded in (
        lambda x: fake_quantized_kernel(x, bits=bits),
        lambda x: fake_quantized_activation(x, limits, bits),
    ):
        once = rounded(x)
        np.testing.assert_allclose(rounded(once), once, rtol=1e-6, atol=1e-6)
        assert not np.allclose(once, x)


def test_a_kernel_has_one_scale_for_each_output_channel():
    w = drawn(3, 3, 4, 5) * np.float32(10) ** np.arange(5, dtype=np.float32)
    largest = np.abs(w).max((0, 1, 2))
    rounded = np.asarray(fake_quantized_kernel(w))
    error = np.abs(rounded - w).max((0, 1, 2))
    assert (error <= 1.0001 * largest / 127 / 2).all()
    steps = rounded / (largest / 127)
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-3)
    assert np.abs(steps).max() == pytest.approx(127)
    # A transposed kernel has its output channels elsewhere; zeros stay.
    turned = fake_quantized_kernel(w.swapaxes(-1, -2), (-2,))
    np.testing.assert_array_equal(np.swapaxes(turned, -1, -2), rounded)
    assert not np.any(fake_quantized_kernel(jnp.zeros((2, 3))))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_folded_norm_does_not_change_the_integers(bits):
    w = drawn(3, 3, 4, 5)
    fold = np.float32([0.3, -2.0, 1e-3, 7.0, -0.9])  # gamma / sqrt(var + epsilon)
    want = np.asarray(fake_quantized_kernel(w, bits=bits)) * fold
    got = fake_quantized_kernel(w * fold, bits=bits)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_zero_stays_zero_and_values_outside_are_clipped():
    limits = jnp.array([-0.37, 1.0])
    x = jnp.array([-5.0, 0.0, 0.5, 5.0])
    low, zero, middle, high = np.asarray(fake_quantized_activation(x, limits))
    assert zero == 0
    scale = 1.37 / 255
    assert abs(low + 0.37) <= scale / 2 and abs(high - 1) <= scale / 2 + 1e-6
    assert abs(middle - 0.5) <= scale / 2


def test_the_gradient_goes_straight_through():
    x, limits = jnp.array([-5.0, -0.3, 0.0, 0.77, 1.0, 5.0]), jnp.array([-0.5, 1.0])
    total = jax.grad(lambda x: fake_quantized_activation(x, limits).sum())
    gradient = jax.jit(total)(x)
    np.testing.assert_allclose(gradient, [0, 1, 1, 1, 1, 0], rtol=1e-6)
    w = drawn(4, 5)
    gradient = jax.jit(jax.grad(lambda w: fake_quantized_kernel(w).sum()))(w)
    np.testing.assert_allclose(gradient, np.ones((4, 5)), rtol=1e-6)


def test_parameters_hints_and_layers_are_those_of_the_plain_network(plain):
    network, variables = plain
    student, x = hj.fake_quantized(network), batch()["image"]
    params, state = begun(student, x)
    for own, theirs in arrays(params, begun(network, x).params):
        np.testing.assert_array_equal(own, theirs)
    ranges = state.pop("quantization")
    assert jax.tree.structure((params, state)) == jax.tree.structure(tuple(variables))
    assert set(ranges) == {"conv1", "conv2", "head"}
    own = calibrated(network, variables, x)
    assert student.layers(*own, x) == network.layers(*variables, x)
    # The parameters of the student are shipped in the plain network.
    output(network, hj.Variables(params, {**state, "quantization": ranges}), x)


def test_eight_bits_are_near_the_plain_network_and_four_are_farther(plain):
    network, variables = plain
    x = batch()["image"]
    want = np.asarray(output(network, variables, x)[0].output)
    own = calibrated(network, variables, x)

    def error(bits):
        rounded = hj.fake_quantized(network, weight_bits=bits, activation_bits=bits)
        return np.abs(output(rounded, own, x)[0].output - want).max()

    assert 0 < error(8) < 0.02 * np.abs(want).max()
    assert error(4) > 4 * error(8)


def test_a_layer_takes_a_rounded_input_and_a_rounded_kernel(plain):
    network, variables = plain
    x = batch()["image"]
    own = calibrated(network, variables, x)
    wants = hj.Wants(hints=("conv2:in", "conv2"))
    student = hj.fake_quantized(network)
    shown = output(student, own, x, wants=wants)[0].hints
    limits = own.state["quantization"]["conv2"]["range"]
    given = fake_quantized_activation(shown["conv2:in"], limits)
    conv = own.params["conv2"]
    rounded = {"params": conv | {"kernel": fake_quantized_kernel(conv["kernel"])}}
    want = jax.jit(nn.Conv(6, (3, 3), strides=2).apply)(rounded, given)
    np.testing.assert_allclose(shown["conv2"], want, rtol=1e-5, atol=1e-6)


def test_ranges_move_in_training_only(plain):
    network, _ = plain
    student, x = hj.fake_quantized(network, decay=0.75), batch()["image"]
    params, state = begun(student, x)
    assert not any(map(np.any, jax.tree.leaves(state["quantization"])))

    def limits(state):
        return np.asarray(state["quantization"]["conv1"]["range"])

    def same(params, state):
        wants = hj.Wants(output=True)
        assert student.apply(params, state, x, wants=wants, train=False)[1] is state

    def assert_same(*variables):
        jax.eval_shape(same, *variables)

    assert_same(params, state)
    _, first = output(student, (params, state), x, train=True)
    np.testing.assert_allclose(limits(first), [x.min(), x.max()], rtol=1e-6)
    _, second = output(student, (params, first), 2 * x, train=True)
    np.testing.assert_allclose(limits(second), 1.25 * limits(first), rtol=1e-6)
    assert_same(params, second)


def kept(network, variables, x):
    """Traced: the other collections are the same objects."""
    variables = hj.Variables(*variables)
    own = hj.calibrated(network, variables, x)
    assert own.state["batch_stats"] is variables.state["batch_stats"]


def test_calibrated_ranges_are_those_of_the_plain_network(plain):
    network, variables = plain
    x = batch()["image"]
    own = calibrated(network, variables, x)
    shown = output(network, variables, x, wants=hj.Wants(hints=("norm1",)))[0]
    limits = own.state["quantization"]["conv2"]["range"]
    largest = np.max(shown.hints["norm1"])
    np.testing.assert_allclose(limits, [0, largest], rtol=1e-6)
    jax.eval_shape(lambda *variables: kept(network, variables, x), *variables)


def test_a_stage_trains_every_parameter_and_every_range(stepped):
    _, before, state, metrics = stepped
    assert np.isfinite([float(value) for value in metrics.values()]).all()
    for old, new in arrays(before, jax.device_get(state.params)):
        assert np.any(old != new)
    for limits in jax.tree.leaves(jax.device_get(state.state["quantization"])):
        assert limits[0] < limits[1]


@pytest.mark.parametrize("devices", [8])
def test_several_devices_take_the_same_step(plain, stepped, devices):
    network, variables = plain
    student, x = hj.fake_quantized(network), batch()["image"]
    stage = hj.distillation_stage(
        student, network, METHOD, optax.sgd(0.1), mesh=hj.data_mesh()
    )
    assert jax.device_count() == devices
    state = stage.init(KEY, begun(student, x), variables, batch())
    state, metrics = stage.update(state, variables, batch())
    _, _, want, expected = stepped
    # Sums in another order can round a value to the neighbor on the grid.
    assert metrics["loss"] == pytest.approx(float(expected["loss"]), rel=1e-3)
    for got, one in arrays((state.params, state.state), (want.params, want.state)):
        np.testing.assert_allclose(got, one, rtol=1e-2, atol=1e-3)


def test_the_hint_stage_moves_only_the_ranges_that_feed_the_hint(plain):
    network, variables = plain
    student, x = hj.fake_quantized(network), batch()["image"]
    method = hj.fitnets([(HINT, HINT)])
    stage = hj.hint_stage(student, network, method, optax.sgd(0.1))
    state = stage.init(KEY, begun(student, x), variables, batch())
    state, _ = stage.update(state, variables, batch())
    moved = {name: np.any(one["range"]) for name, one in _ranges(state).items()}
    assert moved == {"conv1": True, "conv2": True, "head": False}


def _ranges(state):
    return state.state["quantization"]


class Layers(nn.Module):
    """Layers of each kind, one of them called twice."""

    @nn.compact
    def __call__(self, x):
        x = nn.ConvTranspose(3, (2, 2), transpose_kernel=True)(x)
        x = nn.ConvTranspose(4, (2, 2))(x)
        x = nn.Conv(4, (3, 3), feature_group_count=4)(x)
        again = nn.Dense(4, kernel_init=nn.with_partitioning(nn.ones, ("in", "out")))
        x = again(nn.tanh(again(x)))
        x = nn.DenseGeneral((2, 3))(x)
        return nn.DenseGeneral(5, axis=(-2, -1))(inputs=x)


def test_layers_of_each_kind_are_rounded():
    network, x = hj.linen(Layers()), batch()["image"]
    student = hj.fake_quantized(network)
    variables = begun(student, x)
    assert len(variables.state["quantization"]) == 6
    _, after = output(student, variables, x, train=True)
    assert all(map(np.any, jax.tree.leaves(after["quantization"])))
    want = np.asarray(output(network, variables, x)[0].output)
    got = np.asarray(output(student, (variables.params, after), x)[0].output)
    assert 0 < np.abs(got - want).max() < 0.1 * np.abs(want).max()
    with pytest.raises(hj.Refusal, match="2 calls"):
        hj.calibrated(network, variables, x)


class Scanned(nn.Module):
    axes: dict[str, int]

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            lambda dense, x, _: (dense(x), None),
            variable_axes=self.axes,
            split_rngs={"params": True},
            length=3,
        )
        return scan(nn.Dense(x.shape[-1]), x, None)[0]


def test_each_layer_of_a_scan_has_a_range():
    x = batch()["image"]
    student = hj.fake_quantized(hj.linen(Scanned({"params": 0, "quantization": 0})))
    params, state = begun(student, x)
    _, after = output(student, (params, state), x, train=True)
    (limits,) = map(np.asarray, jax.tree.leaves(after["quantization"]))
    assert limits.shape == (3, 2) and len({*map(float, limits[:, 1])}) == 3
    with pytest.raises(hj.Refusal, match="variable_axes="):
        hj.fake_quantized(hj.linen(Scanned({"params": 0}))).init(KEY, x)


def test_rounding_and_bfloat16_go_together(plain):
    network, variables = plain
    x = batch()["image"]
    own = calibrated(network, variables, x)
    low = hj.computed_in(hj.fake_quantized(network), jnp.bfloat16)
    shown, after = output(low, own, x, train=True)
    assert shown.output.dtype == jnp.bfloat16
    want = np.asarray(output(network, variables, x, train=True)[0].output)
    assert np.abs(np.float32(shown.output) - want).mean() < 0.1 * np.abs(want).mean()
    for old, new in arrays(own.state, after):
        assert old.dtype == new.dtype


def test_settings_that_have_no_meaning_are_refused(plain):
    network, variables = plain
    for wrong in ({"weight_bits": 1}, {"activation_bits": 9}, {"decay": 1.0}):
        with pytest.raises(hj.Refusal, match=f"fake_quantized: .*{min(wrong)}"):
            hj.fake_quantized(network, **wrong)
    with pytest.raises(hj.Refusal, match="Use hj.calibrated"):
        output(hj.fake_quantized(network), variables, batch()["image"])
    function = hj.function(
        lambda params, state, x, train, key: (x * params, {}, state),
        init=lambda key, x: (jnp.ones(()), {}),
    )
    with pytest.raises(hj.Refusal, match="Pass hj.linen"):
        hj.fake_quantized(function).init(KEY, batch()["image"])
