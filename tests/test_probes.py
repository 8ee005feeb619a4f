"""k-NN and the linear probe against numpy and DINO's code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax.losses import merge_moments
from hintjax.probes import knn_scores, probe_moments, ridge_probe

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("strict")]


def rows(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape) + 1


@pytest.mark.parametrize("k", [5, 20])
def test_votes_are_dinos(golden, k):
    case = golden("knn/n300_c7")
    scores = knn_scores(
        case["in.test"], case["in.train"], case["int.train_labels"], classes=7, k=k
    )
    np.testing.assert_array_equal(jnp.argmax(scores, -1), case[f"out.pred.k{k}"])
    right = (jnp.argmax(scores, -1) == case["int.test_labels"]).mean()
    np.testing.assert_allclose(100 * right, case[f"out.top1.k{k}"], rtol=1e-6)
    unseen = float(np.log(np.float32(1e-30)))
    want = case.arrays[f"out.log_votes.k{k}"]
    got = np.where(np.isneginf(scores), unseen, scores)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_votes_are_the_formula_at_any_temperature():
    x, known, labels = rows(4, 6), rows(9, 6, seed=1), np.arange(9) % 3
    lengths = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(known, axis=1)
    cosines = x @ known.T / lengths
    with jax.enable_x64(True):
        for temperature in 0.5, 1e-3:
            got = knn_scores(
                *map(jnp.array, (x, known, labels)),
                classes=4,
                k=5,
                temperature=temperature,
            )
            for row, scores in zip(cosines, np.asarray(got), strict=True):
                nearest = np.argsort(-row, kind="stable")[:5]
                for c in range(4):
                    votes = row[nearest[labels[nearest] == c]] / temperature
                    want = np.logaddexp.reduce(votes) if votes.size else -np.inf
                    np.testing.assert_allclose(scores[c], want, rtol=1e-10)


@pytest.mark.parametrize("penalty", [1e-3, 1.0, 100.0])
def test_the_probe_is_the_least_squares_solution(penalty):
    """A row of sqrt(penalty) for each weight, and a column of ones for the bias."""
    x, y = rows(20, 4), np.eye(3)[np.arange(20) % 3]
    top = np.hstack([x, np.ones((20, 1))])
    bottom = np.hstack([np.sqrt(penalty) * np.eye(4), np.zeros((4, 1))])
    goal = np.vstack([y, np.zeros((4, 3))])
    want = np.linalg.lstsq(np.vstack([top, bottom]), goal, rcond=None)[0]
    with jax.enable_x64(True):
        where = np.arange(8) < 6
        last = [np.vstack([a[14:], np.full((2, a.shape[1]), np.nan)]) for a in (x, y)]
        moments = merge_moments(
            probe_moments(jnp.array(x[:14]), jnp.array(y[:14])),
            probe_moments(*map(jnp.array, last), where=jnp.array(where)),
        )
        probe = ridge_probe(moments, targets=3, penalty=penalty)
        np.testing.assert_allclose(probe.kernel, want[:4], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(probe.bias, want[4], rtol=1e-9)
    single = probe_moments(jnp.array(x, jnp.float32), jnp.array(y, jnp.float32))
    solve = jax.vmap(lambda p: ridge_probe(single, targets=3, penalty=p))
    many = solve(jnp.array([penalty, 2 * penalty], jnp.float32))
    np.testing.assert_allclose(many.kernel[0], want[:4], atol=1e-5)


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_evaluated_is_refused():
    x, labels = jnp.ones((3, 2)), jnp.arange(3)
    with pytest.raises(ValueError, match="k up to the 3 known features, got 20"):
        knn_scores(x, x, labels, classes=3)
    with pytest.raises(ValueError, match=r"labels in 0..1, got 0..2"):
        knn_scores(x, x, labels, classes=2, k=1)
    with pytest.raises(ValueError, match=r"knn_scores: expected features \(n, c\)"):
        knn_scores(x, jnp.ones((3, 4)), labels, classes=3, k=1)
    with pytest.raises(ValueError, match="probe_moments: .*one_hot"):
        probe_moments(x, jnp.ones(3))
    with pytest.raises(ValueError, match="4 columns for 5 targets"):
        ridge_probe(probe_moments(x, x), targets=5, penalty=1.0)
