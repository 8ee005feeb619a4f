"""Similarity of layers, against the formulas in numpy at double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from hintjax import similarity
from hintjax.sharding import make_mesh
from hintjax.similarity import (
    add_minibatch,
    add_moments,
    begin_minibatch,
    begin_moments,
)

N, P, Q = 24, 5, 3
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(N, P)) + 2.0
Y = np.tanh(X @ RANDOM.normal(size=(P, Q))) + 0.3 * RANDOM.normal(size=(N, Q)) - 1.0

# One program each: without it, every operation would be compiled by itself.
add_products = jax.jit(add_minibatch)
add_sums = jax.jit(add_moments)
merge_minibatch = jax.jit(similarity.merge_minibatch)
merge_moments = jax.jit(similarity.merge_moments)
minibatch_cka = jax.jit(similarity.minibatch_cka)
debiased_cka = jax.jit(similarity.debiased_cka)
linear_cka = jax.jit(similarity.linear_cka)
linear_map = jax.jit(similarity.linear_map, static_argnames="ridge")
regression_score = jax.jit(similarity.regression_score, static_argnames="ridge")
pooled, by_position = jax.jit(similarity.pooled), jax.jit(similarity.by_position)


def f32(*arrays):
    found = [jnp.asarray(array, jnp.float32) for array in arrays]
    return found if len(found) > 1 else found[0]


def products(*batches):
    sums = begin_minibatch(2)
    for batch in batches:
        sums = add_products(sums, f32(*batch))
    return sums


def moments(*batches):
    sums = begin_moments(*(array.shape[1] for array in batches[0]))
    for batch in batches:
        sums = add_sums(sums, *f32(*batch))
    return sums


def parts(*arrays, size):
    """The arrays in batches."""
    starts = range(0, len(arrays[0]), size)
    return [[array[at : at + size] for array in arrays] for at in starts]


def hsic(x, y):
    """Song et al.'s unbiased estimator, term by term."""
    n, one = len(x), np.ones(len(x))
    k, l = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(l, 0)
    ends = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
    middle = 2 / (n - 2) * (one @ k @ l @ one)
    return (np.trace(k @ l) + ends - middle) / (n * (n - 3))


def kornblith(x, y, debiased):
    """Follows feature_space_linear_cka of Kornblith et al.'s code."""
    x, y, n = x - x.mean(0), y - y.mean(0), len(x)

    def product(a, b):
        value = np.linalg.norm(a.T @ b) ** 2
        if debiased:
            rows = (np.square(a).sum(1), np.square(b).sum(1))
            value -= n / (n - 2) * rows[0] @ rows[1]
            value += rows[0].sum() * rows[1].sum() / ((n - 1) * (n - 2))
        return value

    return product(x, y) / np.sqrt(product(x, x) * product(y, y))


def least_squares(x, y, new_x, new_y):
    x = np.column_stack([x, np.ones(len(x))])
    predicted = np.column_stack([new_x, np.ones(len(new_x))])
    error = new_y - predicted @ np.linalg.lstsq(x, y, rcond=None)[0]
    return 1 - np.square(error).sum() / np.square(new_y - new_y.mean(0)).sum()


@pytest.mark.parametrize("size", [4, 8, N])
def test_minibatch_cka_is_the_formula_of_the_paper(size):
    batches = parts(X, Y, size=size)
    sums = products(*batches)
    means = {
        name: np.mean([hsic(*pair(x, y)) for x, y in batches])
        for name, pair in {
            "xy": lambda x, y: (x, y),
            "xx": lambda x, y: (x, x),
            "yy": lambda x, y: (y, y),
        }.items()
    }
    want = means["xy"] / np.sqrt(means["xx"] * means["yy"])
    found = minibatch_cka(sums)
    found = np.asarray(found)
    np.testing.assert_allclose(found[0, 1], want, rtol=1e-4)
    np.testing.assert_allclose(found, found.T, rtol=1e-6)
    mean = np.asarray(sums.hsic)[0, 1] / np.asarray(sums.weight)
    np.testing.assert_allclose(mean, means["xy"], rtol=1e-4, atol=1e-6)


def test_cka_of_all_examples_is_kornblith_s_code():
    found = moments(*parts(X, Y, size=7))
    for value, debiased in ((linear_cka, False), (debiased_cka, True)):
        want = kornblith(X, Y, debiased)
        got = np.asarray(value(found))[0, 1]
        np.testing.assert_allclose(got, want, rtol=1e-4)


def test_one_batch_gives_one_number_by_both_unbiased_ways():
    ours, theirs = minibatch_cka(products((X, Y))), debiased_cka(moments((X, Y)))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_the_regression_score_is_least_squares_on_both_sets():
    half, other = parts(X, Y, size=N // 2)
    fit, on = moments(*parts(*half, size=5)), moments(*parts(*other, size=5))
    want = least_squares(*half, *half)
    np.testing.assert_allclose(regression_score(fit), want, rtol=1e-4)
    want = least_squares(*half, *other)
    np.testing.assert_allclose(regression_score(fit, on), want, rtol=1e-4, atol=1e-5)
    x, y = half
    basis = np.linalg.qr(x - x.mean(0))[0]
    score = np.linalg.norm(basis.T @ (y - y.mean(0))) ** 2
    score /= np.linalg.norm(y - y.mean(0)) ** 2
    np.testing.assert_allclose(regression_score(fit), score, rtol=1e-4)


def test_the_ridge_is_that_of_the_formula_whatever_the_scale_of_the_features():
    x, y = X - X.mean(0), Y - Y.mean(0)
    penalty = 0.5 * np.trace(x.T @ x) / P
    want = np.linalg.solve(x.T @ x + penalty * np.eye(P), x.T @ y)
    for scale in (1.0, 100.0):
        weights, bias = linear_map(moments((scale * X, Y)), ridge=0.5)
        np.testing.assert_allclose(
            scale * np.asarray(weights), want, rtol=1e-4, atol=1e-6
        )
        predicted = scale * X @ np.asarray(weights) + np.asarray(bias)
        np.testing.assert_allclose(predicted.mean(0), Y.mean(0), rtol=1e-4)


def test_features_that_repeat_others_do_not_change_the_score():
    twice = np.concatenate([X, X], 1)
    np.testing.assert_allclose(
        regression_score(moments((twice, Y))),
        regression_score(moments((X, Y))),
        rtol=1e-3,
    )


def test_more_features_than_examples_give_the_shortest_map():
    many = RANDOM.normal(size=(N, 3 * N)) * np.linspace(0.3, 3, 3 * N)
    want = np.linalg.lstsq(many - many.mean(0), Y - Y.mean(0), rcond=None)[0]
    found = linear_map(moments((many, Y)))[0]
    np.testing.assert_allclose(found, want, atol=1e-3)


@pytest.mark.parametrize("which", ["minibatch", "debiased", "linear", "regression"])
def test_rotation_shift_and_scale_change_nothing(which):
    turn = np.linalg.qr(RANDOM.normal(size=(P, P)))[0]
    other = np.linalg.qr(RANDOM.normal(size=(Q, Q)))[0]
    value = {
        "minibatch": lambda *pair: minibatch_cka(products(*parts(*pair, size=8))),
        "debiased": lambda *pair: debiased_cka(moments(pair)),
        "linear": lambda *pair: linear_cka(moments(pair)),
        "regression": lambda *pair: regression_score(moments(pair)),
    }[which]
    moved = value(30 * X @ turn + 7, 0.02 * Y @ other - 1)
    got, want = (
        np.asarray(x) if which == "regression" else np.asarray(x)[0, 1]
        for x in (moved, value(X, Y))
    )
    np.testing.assert_allclose(got, want, rtol=2e-3)


def test_a_layer_is_most_like_itself_and_not_like_noise():
    noise = RANDOM.normal(size=(N, 400))
    for found in (minibatch_cka(products((X, X))), debiased_cka(moments((X, X)))):
        np.testing.assert_allclose(found, 1, rtol=1e-5)
    biased, debiased, minibatch = (
        np.asarray(found)[0, 1]
        for found in (
            linear_cka(moments((X, noise))),
            debiased_cka(moments((X, noise))),
            minibatch_cka(products((X, noise))),
        )
    )
    assert biased > 0.3  # the bias of few examples
    assert abs(debiased) < 0.2
    assert abs(minibatch) < 0.2


def test_merging_is_one_pass():
    first, second = parts(X, Y, size=16)
    whole = moments((X, Y))
    for found in (
        merge_moments(moments(first), moments(second)),
        merge_moments(moments(second), moments(first)),
        moments(first, second),
        merge_moments(begin_moments(P, Q), whole),
    ):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3),
            found,
            whole,
        )
    merged = merge_minibatch(products(first), products(second))
    np.testing.assert_allclose(merged.hsic, products(first, second).hsic, rtol=1e-6)


def test_a_sharded_batch_gives_the_same_sums():
    sharding = NamedSharding(make_mesh(), PartitionSpec("data"))
    x, y = (jax.device_put(array, sharding) for array in f32(X, Y))
    found = add_products(begin_minibatch(2), [x, y])
    np.testing.assert_allclose(found.hsic, products((X, Y)).hsic, rtol=1e-5)
    found = debiased_cka(add_sums(begin_moments(P, Q), x, y))
    np.testing.assert_allclose(found, debiased_cka(moments((X, Y))), rtol=1e-5)


def test_masked_examples_do_not_count_even_if_they_are_nan():
    where = np.arange(N) % 3 != 0
    x, y = (np.where(where[:, None], array, np.nan) for array in (X, Y))
    kept = X[where], Y[where]
    found = add_products(begin_minibatch(2), f32(x, y), where=jnp.asarray(where))
    np.testing.assert_allclose(found.hsic, products(kept).hsic, rtol=1e-5)
    assert found.weight == products(kept).weight
    found = add_sums(begin_moments(P, Q), *f32(x, y), where=jnp.asarray(where))
    want = moments(kept)
    np.testing.assert_allclose(debiased_cka(found), debiased_cka(want), rtol=1e-4)
    assert found.n == where.sum()


def test_too_few_examples_add_nothing_or_are_refused(unchecked):
    three = np.arange(N) < 3
    found = add_products(begin_minibatch(2), f32(X, Y), where=three)
    assert not np.any(found.hsic) and found.weight == 0
    assert not np.any(minibatch_cka(found))
    assert not np.any(debiased_cka(moments((X[:3], Y[:3]))))
    with pytest.raises(ValueError, match="at least 4 examples, got 3. The unbiased"):
        add_minibatch(begin_minibatch(2), f32(X[:3], Y[:3]))


def test_a_layer_that_does_not_vary_is_like_no_layer():
    flat = np.full((N, P), 0.1)
    for found in (minibatch_cka(products((flat, Y))), linear_cka(moments((flat, Y)))):
        np.testing.assert_allclose(found, [[0, 0], [0, 1]], atol=1e-6)
    assert regression_score(moments((Y, flat))) == 0
    assert abs(regression_score(moments((flat, Y)))) < 1e-6


def test_the_sums_do_not_grow_with_the_examples():
    def sizes(n):
        x, y = (
            jax.ShapeDtypeStruct((n, 4, 4, P), "float32"),
            jax.ShapeDtypeStruct((n, Q), "float32"),
        )
        minibatch = jax.eval_shape(add_minibatch, begin_minibatch(2), [x, y])
        whole = jax.eval_shape(add_moments, begin_moments(16 * P, Q), x, y)
        return jax.tree.map(lambda array: array.shape, (minibatch, whole))

    assert sizes(4) == sizes(4000)
    assert sizes(4)[0].hsic == (2, 2) and sizes(4)[1].second == (16 * P + Q,) * 2


def test_maps_are_pooled_or_give_one_row_for_each_position():
    maps = RANDOM.normal(size=(6, 2, 3, P))
    where = RANDOM.random((6, 2, 3)) < 0.5
    where[0], where[1:, 0, 0] = False, True
    np.testing.assert_allclose(pooled(f32(maps)), maps.mean((1, 2)), atol=1e-6)
    found = np.asarray(pooled(f32(maps), jnp.asarray(where)))
    assert not found[0].any()
    for i in range(1, 6):
        np.testing.assert_allclose(found[i], maps[i][where[i]].mean(0), atol=1e-6)
    rows, valid = map(np.asarray, by_position(f32(maps), jnp.asarray(where)))
    np.testing.assert_allclose(rows[valid], maps[where], rtol=1e-6)
    _, valid = by_position(f32(maps), np.arange(6) > 1)
    assert valid.tolist() == 12 * [False] + 24 * [True]


def test_bfloat16_is_summed_in_float32():
    x, y = (array.astype(jnp.bfloat16) for array in (np.float32(X), np.float32(Y)))
    found = add_products(begin_minibatch(2), [x, y])
    assert found.hsic.dtype == jnp.float32
    near = minibatch_cka(products((X, Y)))
    np.testing.assert_allclose(minibatch_cka(found), near, atol=0.02)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda x, y: add_minibatch(begin_minibatch(3), [x, y]),
            "features of 3 layers",
        ),
        (lambda x, y: add_minibatch(begin_minibatch(2), [x, y[1:]]), "same examples"),
        (lambda x, y: add_moments(begin_moments(P, Q), y, x), r"of \(5, 3\) features"),
        (lambda x, y: add_moments(begin_moments(P), x.astype(int)), "floating-point"),
        (lambda x, y: linear_map(begin_moments(P)), "moments of two layers"),
        (lambda x, y: linear_map(begin_moments(P, Q), ridge=-1.0), "ridge to be >= 0"),
        (lambda x, y: begin_moments(0, 1), "sizes to be a shape"),
        (lambda x, y: begin_minibatch(0), "layers to be an integer >= 1"),
        (lambda x, y: pooled(x[:, 0]), "pooled: expected x to have"),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence(call, sentence, unchecked):
    x, y = f32(X, Y)
    with pytest.raises(ValueError, match=sentence):
        call(x, y)


def test_no_pass_promotes_a_dtype_or_a_rank(strict):
    def passes(x, y, where):
        sums = add_minibatch(begin_minibatch(2), [x, y])
        found = add_moments(begin_moments(P, Q), x, y, where=where)
        score = similarity.regression_score(found, ridge=0.1)
        cka = similarity.debiased_cka(found), similarity.linear_cka(found)
        return similarity.minibatch_cka(sums), cka, score

    jax.eval_shape(passes, *f32(X, Y), np.ones(N, bool))
