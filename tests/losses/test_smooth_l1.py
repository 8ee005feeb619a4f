"""Smooth L1 and its sum with the cosine, against the formulas and UNIC's code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import losses

pytestmark = pytest.mark.usefixtures("strict")

# One program each: without it, every operation would be compiled by itself.
smooth_l1_loss = jax.jit(losses.smooth_l1_loss, static_argnames="beta")
WEIGHTS = "cosine", "smooth_l1", "mse", "beta"
cosine_smooth_l1_loss, cosine_smooth_l1_map_loss = (
    jax.jit(loss, static_argnames=WEIGHTS)
    for loss in (losses.cosine_smooth_l1_loss, losses.cosine_smooth_l1_map_loss)
)


def maps(shape=(3, 4, 2, 5)):
    generator = np.random.default_rng(0)
    return [generator.normal(size=shape) * 2 for _ in "st"]


def smooth(s, t, beta):
    d = np.abs(s - t)
    return np.where(d < beta, d**2 / (2 * beta), d - beta / 2).mean()


def cosines(s, t):
    lengths = np.linalg.norm(s, axis=-1) * np.linalg.norm(t, axis=-1)
    return (s * t).sum(-1) / lengths


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_losses_are_the_formulas(beta):
    s, t = maps()
    weights = {"cosine": 0.7, "smooth_l1": 0.2, "mse": 0.3}
    position, whole, edge = [], [], []
    for one, other in zip(s, t, strict=True):
        edge.append(smooth(one, other, beta))
        rest = 0.2 * edge[-1] + 0.3 * np.mean((one - other) ** 2)
        position.append(0.7 * np.mean(1 - cosines(one, other)) + rest)
        whole.append(0.7 * (1 - cosines(one.ravel(), other.ravel())) + rest)
    with jax.enable_x64(True):
        arrays = jnp.array(s), jnp.array(t)
        got = smooth_l1_loss(*arrays, beta=beta)
        np.testing.assert_allclose(got, edge, rtol=1e-12)
        got = cosine_smooth_l1_loss(*arrays, **weights, beta=beta)
        np.testing.assert_allclose(got, position, rtol=1e-12)
        got = cosine_smooth_l1_map_loss(*arrays, **weights, beta=beta)
        np.testing.assert_allclose(got, whole, rtol=1e-12)


def test_the_sum_is_unics_code(golden):
    case = golden("unic/two_teachers_dropping")

    def run(student, name):
        parts = []
        for part, s in student.items():
            stats = f"state.{name}.{part}"
            mean, deviation = case.arrays[f"{stats}.mean"], case.arrays[f"{stats}.std"]
            hint = (case.arrays[f"in.{part}_t.{name}"] - mean) / (deviation + 1e-6)
            weights = {"cosine": 0.5, "smooth_l1": 0.5}
            parts.append(cosine_smooth_l1_loss(s, hint, **weights))
        values = sum(parts) / 2
        kept = case.arrays["out.keep"]
        return (kept[int(name[1])] * values).sum() / kept.sum(), values

    for name in "t0", "t1":
        student = {part: case[f"in.{part}_s.{name}"] for part in ("cls", "patch")}
        of_student = jax.jit(jax.grad(run, has_aux=True), static_argnums=1)
        grads, values = of_student(student, name)
        assert case.error(f"out.per_example.{name}", values) < 1e-5
        for part, gradient in grads.items():
            assert case.error(f"grad.in.{part}_s.{name}", gradient) < 1e-5


def test_a_mask_leaves_positions_out():
    s, t = (x.astype(np.float32) for x in maps())
    where = np.zeros((3, 4, 2), bool)
    where[:, :2] = True
    where[2] = False
    for loss in cosine_smooth_l1_loss, cosine_smooth_l1_map_loss:
        hidden = (np.where(where[..., None], x, np.float32(np.nan)) for x in (s, t))
        want = np.array(loss(s[:, :2], t[:, :2]))
        want[2] = 0
        got = loss(*hidden, where=where)
        np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.usefixtures("unchecked")
def test_a_weight_is_not_negative_and_beta_is_positive():
    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match="smooth_l1_loss: expected beta to be > 0"):
        losses.smooth_l1_loss(x, x, beta=0.0)
    for loss in losses.cosine_smooth_l1_loss, losses.cosine_smooth_l1_map_loss:
        with pytest.raises(ValueError, match="expected mse to be >= 0"):
            loss(x, x, mse=-1.0)
