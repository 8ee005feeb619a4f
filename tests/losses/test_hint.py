"""FitNets' hint loss against its formula, the paper's and the field's code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import losses

pytestmark = pytest.mark.usefixtures("strict")

# One program each: without it, every operation would be compiled by itself.
hint_loss, hint_loss_paper = (
    jax.jit(loss, static_argnames="batch_dims")
    for loss in (losses.hint_loss, losses.hint_loss_paper)
)


def features(seed, shape=(3, 4, 5, 6)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (3, 9, 6), (3, 6), (3,)])
def test_hint_is_the_formula(shape):
    student, teacher = features(0, shape), features(1, shape)
    squares = np.square(np.float64(student) - teacher).reshape(3, -1)
    arrays = jnp.array(student), jnp.array(teacher)
    np.testing.assert_allclose(hint_loss(*arrays), squares.mean(1), rtol=1e-6)
    np.testing.assert_allclose(hint_loss_paper(*arrays), squares.sum(1) / 2, rtol=1e-6)


@pytest.mark.parametrize("loss", [hint_loss, hint_loss_paper])
def test_any_number_of_batch_axes(loss):
    student, teacher = features(0), features(1)
    two = np.asarray(loss(student, teacher, batch_dims=2))
    assert two.shape == (3, 4)
    whole = two.mean(1) if loss is hint_loss else two.sum(1)
    np.testing.assert_allclose(loss(student, teacher), whole, rtol=1e-6)
    np.testing.assert_allclose(loss(student[0], teacher[0], batch_dims=1), two[0])


def test_hint_matches_repdistiller(golden):
    case = golden("hint/mse_equal")
    value_and_grad = jax.value_and_grad(lambda s, t: hint_loss(s, t).mean())
    value, gradient = jax.jit(value_and_grad)(case["in.f_s"], case["in.f_t"])
    assert case.error("out.loss", value) < 1e-5
    assert case.error("grad.in.f_s", gradient) < 1e-5


def test_hint_over_tokens_is_tinyberts_loss_of_hidden_states(golden):
    case = golden("transformer/hid_mse")
    value_and_grad = jax.jit(jax.value_and_grad(lambda s, t: hint_loss(s, t).mean()))
    value, gradient = value_and_grad(case["in.f_s"], case["in.f_t"])
    assert case.error("out.loss", value) < 1e-5
    assert case.error("grad.in.f_s", gradient) < 1e-5
    with jax.enable_x64(True):
        arrays = (np.float64(case.arrays[key]) for key in ("in.f_s", "in.f_t"))
        value, gradient = value_and_grad(*arrays)
        assert case.error("out.loss", value) < 1e-12
        assert case.error("grad.in.f_s", gradient) < 1e-5  # stored in float32


def test_a_mask_of_tokens_divides_by_the_tokens():
    student, teacher = features(0, (3, 5, 6)), features(1, (3, 5, 6))
    where = np.arange(5) < np.array([[5], [3], [1]])
    squares = np.square(np.float64(student) - teacher)
    want = [x[m].mean() for x, m in zip(squares, where, strict=True)]
    got = hint_loss(jnp.array(student), jnp.array(teacher), where=jnp.array(where))
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_paper_matches_equation_3(golden):
    case = golden("oracle/fitnets_paper_stage1")
    value_and_grad = jax.value_and_grad(lambda s, t: hint_loss_paper(s, t).mean())
    value, gradient = jax.jit(value_and_grad)(case["in.regressed"], case["in.hint"])
    assert case.error("out.loss", value) < 1e-5
    assert case.error("grad.in.regressed", gradient) < 1e-5


def test_conventions_to_the_paper_and_the_theano_code(golden):
    case = golden("oracle/fitnets_paper_stage1")
    student, teacher = case["in.regressed"], case["in.hint"]
    _, rows, columns, channels = student.shape
    mean = np.mean(hint_loss(student, teacher))
    assert case.error("out.loss", mean * rows * columns * channels / 2) < 1e-5
    assert case.error("out.theano_code_c01b", mean * rows / 2) < 1e-5
    assert case.error("out.theano_code_bc01", mean * channels / 2) < 1e-5


def test_a_mask_has_the_shape_of_examples_or_positions(unchecked):
    student = jnp.zeros((3, 4, 5, 6))
    for where in jnp.ones((3, 4), bool), jnp.ones((3,)), jnp.ones(student.shape, bool):
        with pytest.raises(ValueError, match=r"bool \(3,\) or \(3, 4, 5\), got"):
            hint_loss(student, student, where=where)


def test_unequal_shapes_say_what_to_do(unchecked):
    with pytest.raises(ValueError) as error:
        hint_loss(jnp.zeros((8, 16, 16, 64)), jnp.zeros((8, 8, 8, 128)))
    assert str(error.value) == (
        "hint_loss: expected student and teacher to have the same shape, got student "
        "(8, 16, 16, 64) and teacher (8, 8, 8, 128). Put a regressor between them "
        "(hintjax.regressors)."
    )
