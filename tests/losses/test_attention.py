"""AT against its formula, the paper's and the authors' code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import losses

pytestmark = pytest.mark.usefixtures("strict")

# One program each: without it, every operation would be compiled by itself.
attention_map = jax.jit(losses.attention_map, static_argnames="power")
attention_map_code = jax.jit(losses.attention_map_code, static_argnames="power")
attention_maps = jax.jit(losses.attention_maps)
attention_transfer_loss, attention_transfer_loss_paper = (
    jax.jit(loss, static_argnames=("power", "attention"))
    for loss in (losses.attention_transfer_loss, losses.attention_transfer_loss_paper)
)
factor_loss = jax.jit(losses.factor_loss)


def features(seed, shape=(3, 4, 5, 6)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def formula_map(features, power):
    """sum_c |F_c|^p over its norm, one example at a time."""
    maps = []
    for example in np.float64(features):
        energy = sum(abs(channel) ** power for channel in np.moveaxis(example, -1, 0))
        maps.append(energy.ravel() / np.sqrt((energy**2).sum()))
    return np.array(maps)


def formula_pool(features, height, width):
    """Adaptive average pooling, bin by bin."""
    _, h, w, _ = features.shape
    pooled = np.zeros((len(features), height, width, features.shape[-1]))
    for i in range(height):
        for j in range(width):
            rows = slice(i * h // height, -(-(i + 1) * h // height))
            columns = slice(j * w // width, -(-(j + 1) * w // width))
            pooled[:, i, j] = features[:, rows, columns].mean((1, 2))
    return pooled


@pytest.mark.parametrize("power", [1, 2, 3])
def test_map_is_the_formula(power):
    got = attention_map(jnp.array(features(0)), power=power)
    np.testing.assert_allclose(got, formula_map(features(0), power), rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 4, 5, 2), (3, 8, 10, 2), (3, 7, 5, 6)])
@pytest.mark.parametrize("power", [1, 2])
def test_transfer_is_the_formula(shape, power):
    student, teacher = features(0), features(1, shape)
    maps = formula_map(student, power), formula_map(formula_pool(teacher, 4, 5), power)
    squares = np.square(maps[0] - maps[1])
    for loss, want in (
        (attention_transfer_loss, squares.mean(1)),
        (attention_transfer_loss_paper, np.sqrt(squares.sum(1))),
    ):
        got = loss(jnp.array(student), jnp.array(teacher), power=power)
        np.testing.assert_allclose(got, want, rtol=1e-5)
        swapped = loss(jnp.array(teacher), jnp.array(student), power=power)
        np.testing.assert_allclose(swapped, want, rtol=1e-5)


def test_each_axis_is_pooled_to_the_smaller():
    student, teacher = features(0, (3, 4, 10, 6)), features(1, (3, 8, 5, 6))
    maps = attention_maps(jnp.array(student), jnp.array(teacher))
    for got, of in zip(maps, (student, teacher), strict=True):
        want = formula_map(formula_pool(of, 4, 5), 2)
        np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "student", "teacher"),
    [
        ("at/rep_equal", "f_s", "f_t"),
        ("at/rep_teacher_larger_8_16", "f_s", "f_t"),
        ("at/szagoruyko_equal", "x", "y"),
    ],
)
def test_transfer_matches_the_code(golden, name, student, teacher):
    case = golden(name)
    value_and_grad = jax.value_and_grad(
        lambda s, t: losses.attention_transfer_loss(s, t).mean()
    )
    arrays = case[f"in.{student}"], case[f"in.{teacher}"]
    value, gradient = jax.jit(value_and_grad)(*arrays)
    assert case.error("out.loss", value) < 1e-5
    assert case.error(f"grad.in.{student}", gradient) < 1e-5


def test_maps_match_the_code(golden):
    case = golden("at/rep_equal")
    maps = attention_maps(case["in.f_s"], case["in.f_t"])
    assert case.error("out.map_s", maps[0]) < 1e-5
    assert case.error("out.map_t", maps[1]) < 1e-5


def test_paper_matches_equation_2(golden):
    case = golden("oracle/at_paper_eq2_halfbeta_norm")
    value_and_grad = jax.value_and_grad(
        lambda s, t: losses.attention_transfer_loss_paper(s, t).mean() / 2
    )
    value, gradient = jax.jit(value_and_grad)(case["in.f_s"], case["in.f_t"])
    assert case.error("out.loss", value) < 1e-5
    assert case.error("grad.in.f_s", gradient) < 1e-5


def test_convention_between_code_and_paper(golden):
    case = golden("oracle/at_paper_eq2_halfbeta_norm")
    values = attention_transfer_loss(case["in.f_s"], case["in.f_t"])
    mean = np.mean(values)
    assert case.error("out.squared_variant", mean * 64 / 2) < 1e-5


@pytest.mark.parametrize(
    "loss", [attention_transfer_loss, attention_transfer_loss_paper]
)
def test_scale_and_order_of_channels_do_not_matter(loss):
    student, teacher = features(0), features(1)
    scale = np.float32([1e-3, 1.0, 1e3])[:, None, None, None]
    want = loss(student, teacher)
    got = loss((student * scale)[..., ::-1], teacher[..., ::-1] * 7)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_maps_first_and_compared_later_under_vmap():
    student, teacher = jnp.array(features(0)), jnp.array(features(1, (3, 8, 10, 2)))
    maps = attention_maps(student, teacher)
    stacked = [np.stack([m, m[::-1]]) for m in map(np.asarray, maps)]
    for compare, loss in (
        (losses.attention_map_loss, attention_transfer_loss),
        (losses.attention_map_loss_paper, attention_transfer_loss_paper),
    ):
        want = np.asarray(loss(student, teacher))
        got = jax.jit(jax.vmap(compare))(*stacked)
        np.testing.assert_allclose(got, [want, want[::-1]], rtol=1e-6)


def test_a_single_position_has_no_signal():
    student, teacher = jnp.array(features(0)), jnp.array(features(1, (3, 1, 1, 9)))
    value_and_grad = jax.value_and_grad(
        lambda s, t: losses.attention_transfer_loss(s, t).sum()
    )
    value, gradient = jax.jit(value_and_grad)(student, teacher)
    assert value < 1e-12
    assert np.abs(gradient).max() < 1e-6


def test_a_mask_covers_positions_of_the_smaller_map():
    student, teacher = features(0), features(1, (3, 8, 10, 2))
    pooled = formula_pool(teacher, 4, 5)
    where = np.random.default_rng(2).random((3, 4, 5)) < 0.5
    arrays = jnp.array(student), jnp.array(teacher)
    got = np.asarray(attention_transfer_loss(*arrays, where=jnp.array(where)))
    for i in range(3):
        maps = [formula_map(x[i][where[i]][None], 2) for x in (student, pooled)]
        want = np.square(maps[0] - maps[1]).mean()
        np.testing.assert_allclose(got[i], want, rtol=1e-5)


@pytest.mark.parametrize("power", [0, -2, 1.5])
def test_a_power_is_a_positive_integer(unchecked, power):
    with pytest.raises(ValueError, match="attention_map: .*power.*integer >= 1"):
        losses.attention_map(jnp.zeros((1, 2, 2, 3)), power=power)


def test_tokens_are_not_a_map(unchecked):
    with pytest.raises(ValueError, match=r"at least 3 axes.*shape \(4, 3\)"):
        losses.attention_map(jnp.zeros((4, 3)))


@pytest.mark.parametrize("power", [1, 2, 3])
def test_the_codes_map_keeps_the_signs_of_odd_powers(power):
    x = features(0)
    energy = (np.float64(x) ** power).mean(-1).reshape(3, -1)
    want = energy / np.linalg.norm(energy, axis=1, keepdims=True)
    got = attention_map_code(jnp.array(x), power=power)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    if power % 2 == 0:
        same = attention_map(jnp.array(x), power=power)
        np.testing.assert_array_equal(got, same)


@pytest.mark.parametrize(
    "loss", [attention_transfer_loss, attention_transfer_loss_paper]
)
def test_the_map_is_an_argument_of_the_loss(loss):
    student, teacher = features(0), features(1)
    ours, theirs = (
        attention_map_code(jnp.array(x), power=3) for x in (student, teacher)
    )
    got = loss(
        jnp.array(student),
        jnp.array(teacher),
        power=3,
        attention=losses.attention_map_code,
    )
    squares = np.square(np.float64(ours) - np.float64(theirs))
    paper = loss is attention_transfer_loss_paper
    want = np.sqrt(squares.sum(1)) if paper else squares.mean(1)
    np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.parametrize("loss", [attention_transfer_loss, factor_loss])
def test_masked_positions_of_a_larger_map_are_not_read(loss):
    """A position is read if it is in the bin of any unmasked position."""
    student, teacher = features(0), features(1, (3, 7, 5, 6))
    where = np.ones((3, 4, 5), bool)
    where[:, 1:] = False  # the first bin of 7 -> 4 rows is rows 0 and 1
    where = jnp.array(where)
    broken = teacher.copy()
    broken[:, 2:] = np.nan
    run = jax.jit(jax.grad(lambda s, t: loss(s, t, where=where).sum(), (0, 1)))
    got, want = run(student, broken), run(student, teacher)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(
        loss(jnp.array(student), jnp.array(broken), where=where),
        loss(jnp.array(student), jnp.array(teacher), where=where),
    )
