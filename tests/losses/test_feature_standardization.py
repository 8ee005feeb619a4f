"""Standardizations of features against the authors' code, and their promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import losses
from hintjax.losses.hadamard import hadamard_matrix

pytestmark = pytest.mark.usefixtures("strict")

# One program each: without it, every operation would be compiled by itself.
feature_moments = jax.jit(losses.feature_moments)
merge_moments = jax.jit(losses.merge_moments)
standardize_features = jax.jit(losses.standardize_features)
restore_features = jax.jit(losses.restore_features)
WHITENINGS = {
    "pca": losses.pca_whitening,
    "zca": losses.zca_whitening,
    "hca": losses.hadamard_whitening,
}
ALL = WHITENINGS | {
    "global": losses.global_standardization,
    "channel": losses.channel_standardization,
    "phis": losses.phi_standardization,
}
ALL = {name: jax.jit(transform) for name, transform in ALL.items()}


def rows(n=60, c=4):
    """Correlated features of unequal scale, far from 0."""
    generator = np.random.default_rng(0)
    mix = generator.normal(size=(c, c)) * np.arange(1, c + 1)
    return generator.normal(size=(n, c)) @ mix + 5


def aligned(name, z, case):
    """Features with the signs that the eigenvectors of the case have."""
    h = {"pca": np.eye(24)}.get(name, np.float64(case["state.hadamard"]))
    want = case.arrays[f"out.{name}"] @ h
    return np.sign((z @ h * want).sum(0)) * (z @ h) @ h.T


@pytest.mark.parametrize("name", ALL)
def test_the_features_are_standardized_as_published(golden, name):
    case = golden("oracle/standardisations_d24")
    with jax.enable_x64(True):
        tokens = jnp.asarray(case.arrays["in.tokens"], jnp.float64)
        transform = ALL[name](feature_moments(tokens))
        z = np.asarray(standardize_features(tokens, transform))
    if name in ("pca", "hca", "phis"):
        z = aligned(name, z, case)
    assert case.error(f"out.{name}", z) < 1e-6


def test_phi_s_is_the_code(golden):
    """Only what does not depend on the signs of eigenvectors."""
    case = golden("phis/d48_sylvester4_x_paley12")
    assert case.error("state.hadamard", hadamard_matrix(48)) < 1e-6
    with jax.enable_x64(True):
        tokens = jnp.asarray(case.arrays["in.tokens"], jnp.float64)
        transform = ALL["phis"](feature_moments(tokens))
        z = np.asarray(standardize_features(tokens, transform))
        matrix = np.asarray(transform.matrix)
        assert case.error("out.mean", transform.mean) < 1e-6
    gram = matrix.T @ matrix
    assert case.error("out.gram_whiten", gram) < 1e-6
    assert case.error("out.variance_diag", np.var(z, 0, ddof=1)) < 1e-5


def test_merged_masked_moments_are_the_code(golden):
    case = golden("phis/running_3_batches_masked")
    parts = [
        feature_moments(case[f"in.f_t.{i}"], where=case.arrays[f"int.mask.{i}"] != 0)
        for i in range(3)
    ]
    merged = None
    for part, alpha in zip(parts, case.arrays["out.alpha_after_each"], strict=True):
        merged = part if merged is None else merge_moments(merged, part)
        matrix = np.asarray(ALL["phis"](merged).matrix)
        gram = matrix.T @ matrix
        np.testing.assert_allclose(np.diag(gram), alpha**2, rtol=1e-4)
    assert case.error("state_out.num_samples", merged.count) == 0
    assert case.error("state_out.mean", merged.mean) < 1e-5
    covariance = np.asarray(merged.scatter) / (np.asarray(merged.count) - 1)
    assert case.error("state_out.covariance", covariance) < 1e-5
    assert case.error("out.gram_whiten", gram) < 1e-5


def test_the_inverse_can_be_folded_into_the_last_layer(golden):
    case = golden("phis/running_3_batches_masked")
    mean, matrix = case["state_out.mean"], case["state_out.whiten"]
    inverse = case["state_out.inv_whiten"]
    transform = losses.Standardization(mean, matrix, inverse)
    kernel = np.linspace(-1, 1, 72, dtype=np.float32).reshape(24, 3)
    bias = np.linspace(0, 1, 24, dtype=np.float32)
    folded = (kernel.T @ np.asarray(inverse).T).T
    assert case.error("out.folded_weight", folded) < 1e-5
    folded = restore_features(bias, transform)
    assert case.error("out.folded_bias", folded) < 1e-5


@pytest.mark.parametrize("name", ALL)
def test_moments_of_parts_give_the_transform_of_the_whole(name):
    features = rows().astype(np.float32)
    whole = feature_moments(features)
    where = np.arange(15) < 13
    hidden = np.full((2, 4), np.nan, np.float32)
    parts = [
        feature_moments(features[:20].reshape(4, 5, 4)),
        feature_moments(np.concatenate([features[20:33], hidden]), where=where),
        feature_moments(np.zeros((3, 4), np.float32), where=np.zeros(3, bool)),
        feature_moments(features[33:]),
    ]
    merged = parts[0]
    for part in parts[1:]:
        merged = merge_moments(merged, part)
    got, want = (
        np.asarray(standardize_features(features, ALL[name](moments)))
        for moments in (merged, whole)
    )
    got, want = (np.abs(x) if name == "pca" else x for x in (got, want))
    if name in ("hca", "phis"):
        h = np.asarray(hadamard_matrix(4))
        got, want = (np.abs(x @ h) for x in (got, want))
    np.testing.assert_allclose(got, want, atol=1e-3)


@pytest.mark.parametrize("name", ALL)
def test_the_inverse_gives_the_features_back(name):
    features = rows().astype(np.float32).reshape(3, 4, 5, 4)
    transform = ALL[name](feature_moments(features))
    z = standardize_features(features, transform)
    back = restore_features(z, transform)
    np.testing.assert_allclose(back, features, atol=1e-3)
    variance = np.cov(np.asarray(z).reshape(-1, 4).T)
    if name in WHITENINGS:
        np.testing.assert_allclose(variance, np.eye(4), atol=1e-3)
    if name in ("channel", "phis"):
        np.testing.assert_allclose(np.diag(variance), 1, rtol=1e-3)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("n", [0, 1, 3])
def test_directions_without_variance_stay_finite(name, n):
    """Fewer vectors than channels, and channels that are constant."""
    features = np.zeros((5, 4), np.float32)
    features[:, 1], features[:n, 0] = 3, np.arange(n)
    transform = ALL[name](feature_moments(features))
    z = np.asarray(standardize_features(features, transform))
    assert np.isfinite(np.concatenate([*transform[1:], z])).all()
    assert np.abs(z).max() < 10
    back = restore_features(z, transform)
    if name != "global":
        np.testing.assert_allclose(back, features, atol=1e-4)


@pytest.mark.usefixtures("unchecked")
def test_a_transform_of_other_channels_is_refused():
    transform = losses.channel_standardization(losses.feature_moments(jnp.ones((3, 4))))
    with pytest.raises(ValueError, match="standardize_features: .*4 channels"):
        losses.standardize_features(jnp.ones((2, 5)), transform)
    with pytest.raises(TypeError, match="merge_moments: expected second"):
        losses.merge_moments(losses.feature_moments(jnp.ones((3, 4))), jnp.ones(3))
