"""k-NN and the linear probe against numpy and DINO's code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import probes, similarity

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("strict")]

# One program each: without it, every operation would be compiled by itself. Labels are
# compared with the classes only where they are known, so refusals have no program.
knn_scores = jax.jit(probes.knn_scores, static_argnames=("classes", "k", "temperature"))
linear_scores = jax.jit(probes.linear_scores, static_argnames=("classes", "ridge"))
linear_map = jax.jit(similarity.linear_map, static_argnames="ridge")
add_moments = jax.jit(similarity.add_moments)


def rows(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape) + 1


@pytest.mark.parametrize("k", [5, 20])
def test_votes_are_dinos(golden, k):
    case = golden("knn/n300_c7")
    scores = knn_scores(
        case["in.test"], case["in.train"], case["int.train_labels"], classes=7, k=k
    )
    found = np.argmax(scores, -1)
    np.testing.assert_array_equal(found, case[f"out.pred.k{k}"])
    right = (found == case.arrays["int.test_labels"]).mean()
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


@pytest.mark.parametrize("ridge", [1e-3, 1.0, 100.0])
def test_a_linear_probe_is_the_least_squares_solution(ridge):
    """A row of sqrt(penalty) for each weight, and a column of ones for the bias."""
    x, y = rows(20, 4), np.eye(3)[np.arange(20) % 3]
    penalty = ridge * np.square(x - x.mean(0)).sum() / 4
    top = np.hstack([x, np.ones((20, 1))])
    bottom = np.hstack([np.sqrt(penalty) * np.eye(4), np.zeros((4, 1))])
    goal = np.vstack([y, np.zeros((4, 3))])
    want = np.linalg.lstsq(np.vstack([top, bottom]), goal, rcond=None)[0]
    with jax.enable_x64(True):
        moments = similarity.begin_moments(4, 3)
        for part in slice(0, 14), slice(14, 20):
            moments = add_moments(moments, jnp.array(x[part]), jnp.array(y[part]))
        weights, bias = linear_map(moments, ridge=ridge)
        np.testing.assert_allclose(weights, want[:4], rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(bias, want[4], rtol=1e-6)
        # Rows that do not count change nothing.
        known, labels = np.vstack([x, 9 * rows(2, 4)]), np.arange(22) % 3
        arrays = map(jnp.array, (x, known, labels))
        where = np.arange(22) < 20
        scores = linear_scores(*arrays, classes=3, ridge=ridge, where=where)
        np.testing.assert_allclose(scores, x @ want[:4] + want[4], rtol=1e-6)


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_evaluated_is_refused():
    x, labels = jnp.ones((3, 2)), jnp.arange(3)
    with pytest.raises(ValueError, match="k up to the 3 known features, got 20"):
        probes.knn_scores(x, x, labels, classes=3)
    with pytest.raises(ValueError, match=r"labels in 0..1, got 0..2"):
        probes.knn_scores(x, x, labels, classes=2, k=1)
    with pytest.raises(ValueError, match=r"knn_scores: expected features \(n, c\)"):
        probes.knn_scores(x, jnp.ones((3, 4)), labels, classes=3, k=1)
    with pytest.raises(ValueError, match=r"linear_scores: expected features \(n, c\)"):
        probes.linear_scores(x, jnp.ones((3, 4)), labels, classes=3)
    with pytest.raises(ValueError, match="ridge to be >= 0, got -1"):
        probes.linear_scores(x, x, labels, classes=3, ridge=-1)
