"""The contrastive loss against its formula, in the published form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import losses

pytestmark = pytest.mark.usefixtures("strict")

# One program each: without it, every operation would be compiled by itself.
OPTIONS = "size", "temperature"
contrastive_log_constant, contrastive_loss, contrastive_scores_loss = (
    jax.jit(loss, static_argnames=OPTIONS)
    for loss in (
        losses.contrastive_log_constant,
        losses.contrastive_loss,
        losses.contrastive_scores_loss,
    )
)


def formula(positive, negatives, size, constant, temperature):
    """-log D(positive) - sum log(1 - D(negative)), as in the code, one anchor."""
    share = len(negatives) / size
    c = share + 1e-7
    p = np.exp(np.float64(positive) / temperature) / constant
    q = np.exp(np.float64(negatives) / temperature) / constant
    return -np.log(p / (p + c)) - np.log(share / (q + c)).sum()


def scores(seed=0, batch=3, k=7):
    generator = np.random.default_rng(seed)
    return (
        generator.uniform(-1, 1, batch).astype(np.float32),
        generator.uniform(-1, 1, (batch, k)).astype(np.float32),
    )


@pytest.mark.parametrize("size", [50, 10_000_000])  # the 1e-7 of c counts in the latter
@pytest.mark.parametrize("temperature", [0.05, 0.07, 1.0, 20.0])
def test_the_loss_is_the_formula(temperature, size):
    positive, negatives = scores()
    options = {"size": size, "temperature": temperature}
    got = contrastive_scores_loss(
        jnp.array(positive), jnp.array(negatives), log_constant=5.0, **options
    )
    want = [
        formula(p, n, constant=np.exp(5.0), **options)
        for p, n in zip(positive, negatives, strict=True)
    ]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_embeddings_are_scored_by_inner_products():
    generator = np.random.default_rng(0)
    student = generator.normal(size=(3, 5)).astype(np.float32)
    teacher = generator.normal(size=(3, 4, 5)).astype(np.float32)
    options = {"size": 50, "temperature": 0.5}
    got = contrastive_loss(
        jnp.array(student), jnp.array(teacher), log_constant=2.0, **options
    )
    want = [
        formula((t @ s)[0], (t @ s)[1:], constant=np.exp(2.0), **options)
        for s, t in zip(student, teacher, strict=True)
    ]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_each_anchor_counts_its_own_valid_negatives():
    positive, negatives = scores()
    valid = np.random.default_rng(1).random(negatives.shape) < 0.5
    valid[1] = False
    hidden = np.where(valid, negatives, np.nan)
    options = {"size": 50, "temperature": 0.3}
    arrays = jnp.array(positive), jnp.array(hidden)

    def loss(*scores):
        return contrastive_scores_loss(
            *scores, log_constant=4.0, valid=jnp.array(valid), **options
        )

    got = loss(*arrays)
    want = [
        formula(p, n[keep], constant=np.exp(4.0), **options)
        for p, n, keep in zip(positive, negatives, valid, strict=True)
    ]
    np.testing.assert_allclose(got, want, rtol=1e-5)
    slopes = jax.jit(jax.grad(lambda *scores: loss(*scores).sum(), (0, 1)))
    gradients = slopes(*arrays)
    assert all(np.isfinite(g).all() for g in gradients)
    assert np.abs(gradients[1])[~valid].max() == 0


def test_the_constant_is_the_mean_over_what_counts_and_has_no_gradient():
    positive, negatives = scores()
    valid = np.random.default_rng(1).random(negatives.shape) < 0.5
    where = np.array([True, False, True])
    every = np.concatenate([positive[where], negatives[valid & where[:, None]]])
    want = np.log(50 * np.exp(np.float64(every) / 0.1).mean())
    negatives = np.where(valid, negatives, np.nan)

    def constant(positive, negatives):
        return contrastive_log_constant(
            positive,
            negatives,
            size=50,
            temperature=0.1,
            valid=jnp.array(valid),
            where=jnp.array(where),
        )

    arrays = jnp.array(positive), jnp.array(negatives)
    value, gradients = jax.jit(jax.value_and_grad(constant, (0, 1)))(*arrays)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    assert all(np.all(g == 0) for g in gradients)


def test_a_score_that_is_no_number_does_not_spoil_the_constant():
    positive, negatives = scores()
    want = contrastive_log_constant(
        jnp.array(positive[1:]), jnp.array(negatives[1:]), size=9
    )
    positive[0], negatives[0] = np.nan, np.inf
    got = contrastive_log_constant(jnp.array(positive), jnp.array(negatives), size=9)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_extreme_scores_have_finite_values_and_gradients():
    positive, negatives = scores()
    slopes = jax.jit(
        jax.value_and_grad(
            lambda *a: contrastive_scores_loss(
                *a[:2], size=50, log_constant=a[2]
            ).sum(),
            (0, 1),
        )
    )
    for scale in 1e2, 1e4:
        arrays = [np.float32(x * scale) for x in (positive, negatives)]
        log_constant = contrastive_log_constant(*arrays, size=50)
        value, gradients = slopes(*arrays, log_constant)
        assert np.isfinite([value, log_constant]).all()
        assert max(np.abs(g).max() for g in gradients) <= 1 / 0.07 + 1e-3


def test_scores_of_other_shapes_are_refused(unchecked):
    with pytest.raises(
        ValueError, match=r"scores_loss: .*positive \(3,\) and neg.*\(4"
    ):
        contrastive_scores_loss(
            jnp.zeros(3), jnp.zeros((4, 2)), size=5, log_constant=0.0
        )
    with pytest.raises(ValueError, match=r"scores_loss: expected valid to be bool"):
        contrastive_scores_loss(
            jnp.zeros(3),
            jnp.zeros((3, 2)),
            size=5,
            log_constant=0.0,
            valid=jnp.ones((3, 1), bool),
        )
