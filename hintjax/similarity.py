"""Similarity of layers: CKA and linear regression, from sums over batches.

Two kinds of sums stand for all examples. None of them stores features, so their size
does not grow with the number of examples, and both can be computed inside jit, in
parts, and merged::

    sums = begin_minibatch(layers)               moments = begin_moments(p, q)
    sums = add_minibatch(sums, features)         moments = add_moments(moments, x, y)
    sums = merge_minibatch(sums, others)         moments = merge_moments(moments, more)
    minibatch_cka(sums)                          debiased_cka(moments)
                                                 linear_cka(moments)
                                                 regression_score(moments)

Over several devices, give the functions of a jitted program a sharded batch, or merge
the sums of the parts.

| value | sums | numbers kept | examples in a batch | examples in total |
|---|---|---|---|---|
| `minibatch_cka` | products | layers^2 | at least 4 | at least 4 |
| `debiased_cka` | moments | (p + q)^2 | any number | at least 4 |
| `linear_cka` | moments | (p + q)^2 | any number | many more than p + q |
| `regression_score` | moments | (p + q)^2 | any number | many more than p |

The HSIC of the first two has no bias; with too few examples, the last two are too
large. While a batch of n examples is added, `minibatch_cka` also needs n^2 numbers for
each layer.

So `minibatch_cka` is for wide layers (whole maps), and many layers at once;
`debiased_cka` is for narrow layers (pooled maps), and gives the same value for every
order and size of batches. `regression_score` is free of bias if one set of examples
fits the map and another set judges it.

Every axis of an activation but the first is a feature. `pooled` averages maps and
tokens over their positions before; `by_position` makes every position an example.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from hintjax import _checks
from hintjax._numerics import as_float, deviations, keep, masked_mean

_EXACT = jax.lax.Precision.HIGHEST
_LEAST = 4  # examples: the unbiased estimator divides by n (n - 3)


class Products(NamedTuple):
    """Sums of HSIC over batches, for all pairs of some layers.

    Attributes:
        hsic: n (n - 3) times the unbiased HSIC of each two layers, summed over batches.
        weight: n (n - 3), summed over batches.
    """

    hsic: Float[Array, "layers layers"]
    weight: Float[Array, ""]


class Moments(NamedTuple):
    """Sums over examples, each centered at the mean, for some layers side by side.

    With z the features of all layers of one example minus their mean, and s the squared
    norms of the layers in z:

    Attributes:
        n: number of examples.
        mean: mean of each layer.
        second: sum of z z^T.
        third: sum of s z^T.
        fourth: sum of s s^T.
    """

    n: Float[Array, ""]
    mean: tuple[Float[Array, " _"], ...]
    second: Float[Array, "d d"]
    third: Float[Array, "layers d"]
    fourth: Float[Array, "layers layers"]


def pooled(
    x: Float[Array, "batch ... c"], where: Bool[Array, "batch ..."] | None = None
) -> Float[Array, "batch c"]:
    """The mean of each example's positions; vectors stay as they are.

    Args:
        x: activations (batch *positions c).
        where: mask of the valid positions (batch *positions). An example without any
            valid position is 0.

    >>> pooled(jnp.ones((2, 8, 8, 3))).shape
    (2, 3)
    """
    x = as_float("pooled", x)
    _checks.rank("pooled", 2, "batch *positions c", x=x)
    _checks.mask("pooled", where, x.shape[:-1])
    rows = jnp.moveaxis(x, -1, 1)
    mask = None
    if where is not None:
        mask = jnp.broadcast_to(where[:, None], rows.shape)
    return masked_mean(rows, mask, 2)


def by_position(
    x: Float[Array, "batch ... c"], where: Bool[Array, "batch ..."] | None = None
) -> tuple[Float[Array, "rows c"], Bool[Array, " rows"]]:
    """Every position as an example of its own, and the mask of the valid rows.

    Args:
        x: activations (batch *positions c).
        where: mask of the valid examples (batch), or of the valid positions (batch
            *positions).

    >>> rows, where = by_position(jnp.ones((2, 8, 8, 3)), jnp.array([True, False]))
    >>> rows.shape, int(where.sum())
    ((128, 3), 64)
    """
    x = as_float("by_position", x)
    _checks.rank("by_position", 2, "batch *positions c", x=x)
    _checks.mask("by_position", where, x.shape[:1], x.shape[:-1])
    valid = jnp.ones(x.shape[:-1], bool)
    if where is not None:
        axes = tuple(range(where.ndim, valid.ndim))
        valid = valid & jnp.expand_dims(where, axes)
    return x.reshape(-1, x.shape[-1]), valid.reshape(-1)


def begin_minibatch(layers: int) -> Products:
    """The sums of no batch.

    Args:
        layers: number of layers that will be compared, two or more.
    """
    _checks.positive_int("begin_minibatch", layers=layers)
    return Products(jnp.zeros((layers, layers)), jnp.zeros(()))


def add_minibatch(
    sums: Products,
    features: Sequence[Float[Array, "batch ..."]],
    *,
    where: Bool[Array, " batch"] | None = None,
) -> Products:
    """Adds a batch to the sums.

    HSIC_1(K, L) = 1 / (n (n - 3)) [tr(K' L') + 1^T K' 1 1^T L' 1 / ((n - 1) (n - 2))
                                    - 2 / (n - 2) 1^T K' L' 1]

    with K = X X^T, L = Y Y^T, and K' and L' the same without their diagonal. It is
    computed as the product of U-centered matrices, which is the same number.

    Args:
        sums: the sums so far.
        features: activations of each layer, of the same examples; all axes but the
            first are features.
        where: mask of the valid examples. A batch with fewer than 4 valid examples adds
            nothing.

    Returns:
        The new sums.

    Raises:
        ValueError: if the batch has fewer than 4 examples, or the layers differ in
            number or examples.

    References:
        Song et al. 2012, Feature Selection via Dependence Maximization (HSIC_1).
        Nguyen, Raghu, Kornblith 2021, Do Wide and Deep Networks Learn the Same Things?,
        equations 2 and 3. https://arxiv.org/abs/2010.15327
    """
    caller = "add_minibatch"
    rows = _rows(caller, features, where)
    if len(rows) != len(sums.hsic):
        wanted = f"the features of {len(sums.hsic)} layers"
        raise _checks.Refusal(_checks.message(caller, wanted, f"{len(rows)}"))
    if len(rows[0]) < _LEAST:
        wanted = f"a batch of at least {_LEAST} examples"
        do = "The unbiased estimator of HSIC divides by n (n - 3)."
        raise _checks.Refusal(_checks.message(caller, wanted, f"{len(rows[0])}", do))
    valid = jnp.ones(len(rows[0]), bool) if where is None else where
    n = jnp.sum(valid.astype(rows[0].dtype))
    enough = n >= _LEAST
    centered = [_u_centered(x, valid, jnp.maximum(n, _LEAST)) for x in rows]
    grams = jnp.stack([gram.reshape(-1) for gram in centered])
    hsic = jnp.matmul(grams, grams.T, precision=_EXACT)
    return Products(
        sums.hsic + jnp.where(enough, hsic, 0),
        sums.weight + jnp.where(enough, n * (n - 3), 0),
    )


def merge_minibatch(first: Products, second: Products) -> Products:
    """The sums of the batches of both."""
    return jax.tree.map(jnp.add, first, second)


def minibatch_cka(sums: Products) -> Float[Array, "layers layers"]:
    """Linear CKA of all pairs of layers, from the unbiased HSIC of minibatches.

    CKA = sum_b HSIC(K_b, L_b) / sqrt(sum_b HSIC(K_b, K_b) sum_b HSIC(L_b, L_b))

    Args:
        sums: the sums over the batches b.

    Returns:
        CKA of each two layers, at most 1; about 0 for layers without relation, and it
        may be a little below. 0 for a layer that does not vary.

    Convention:
        The paper averages HSIC_1 over batches of one size. Here a batch of n examples
        has the weight n (n - 3), so that a last, smaller batch adds little noise;
        batches of one size give the number of the paper.

    >>> x = jax.random.normal(jax.random.key(0), (8, 5))
    >>> sums = add_minibatch(begin_minibatch(2), [x, 3 * x])
    >>> minibatch_cka(sums).round(3)
    Array([[1., 1.],
           [1., 1.]], dtype=float32)

    References:
        Nguyen, Raghu, Kornblith 2021, Do Wide and Deep Networks Learn the Same Things?
        https://arxiv.org/abs/2010.15327
    """
    return _normalized(sums.hsic)


def begin_moments(*sizes: int) -> Moments:
    """The moments of no example.

    Args:
        *sizes: number of features of each layer; often two numbers.
    """
    _checks.sizes("begin_moments", 0, sizes=sizes)
    count, d = len(sizes), sum(sizes)
    return Moments(
        jnp.zeros(()),
        tuple(jnp.zeros(size) for size in sizes),
        *map(jnp.zeros, ((d, d), (count, d), (count, count))),
    )


def add_moments(
    moments: Moments,
    *features: Float[Array, "batch ..."],
    where: Bool[Array, " batch"] | None = None,
) -> Moments:
    """Adds a batch to the moments.

    Args:
        moments: the moments so far.
        *features: activations of each layer, of the same examples; all axes but the
            first are features.
        where: mask of the valid examples.

    Returns:
        The new moments; the same, up to rounding, for every order and size of batches.

    Raises:
        ValueError: if the layers differ in number, examples or features.
    """
    rows = _rows("add_moments", features, where)
    got = tuple(x.shape[1] for x in rows)
    sizes = tuple(mean.size for mean in moments.mean)
    if got != sizes:
        wanted = f"layers of {sizes} features"
        do = "Take one number per feature: begin_moments(*sizes)."
        raise _checks.Refusal(_checks.message("add_moments", wanted, f"{got}", do))
    valid = jnp.ones(len(rows[0]), bool) if where is None else where
    n = jnp.sum(valid.astype(rows[0].dtype))
    mean = tuple(jnp.sum(x, 0) / jnp.maximum(n, 1) for x in rows)
    parts = [_centered(x, valid) for x in rows]
    z = jnp.concatenate(parts, 1)
    norms = jnp.stack([jnp.sum(jnp.square(x), 1) for x in parts], 1)
    second, third = _product(z, z), _product(norms, z)
    new = Moments(n, mean, second, third, _product(norms, norms))
    return merge_moments(moments, new)


def merge_moments(first: Moments, second: Moments) -> Moments:
    """The moments of the examples of both."""
    n = first.n + second.n
    mean = tuple(
        a + (b - a) * (second.n / jnp.maximum(n, 1))
        for a, b in zip(first.mean, second.mean, strict=True)
    )
    first, second = _moved(first, mean), _moved(second, mean)
    summed = map(jnp.add, first[2:], second[2:])
    return Moments(n, mean, *summed)


def linear_cka(moments: Moments) -> Float[Array, "layers layers"]:
    """Linear CKA of all pairs of layers, over all examples at once.

    CKA = ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F),  X and Y centered

    Args:
        moments: the moments of the layers.

    Returns:
        CKA in [0, 1]; 0 for a layer that does not vary. It is too large unless there
        are many more examples than features: for n examples of layers without relation
        it is near 1 if n is small. See `debiased_cka`.

    References:
        Kornblith et al. 2019, Similarity of Neural Network Representations Revisited.
        https://arxiv.org/abs/1905.00414
    """
    return _normalized(_squares(moments))


def debiased_cka(moments: Moments) -> Float[Array, "layers layers"]:
    """Linear CKA of all pairs of layers, without the bias of few examples.

    D(X, Y) = ||Y^T X||_F^2 - n / (n - 2) sum_i |x_i|^2 |y_i|^2
              + ||X||_F^2 ||Y||_F^2 / ((n - 1) (n - 2)),   X and Y centered
    CKA = D(X, Y) / sqrt(D(X, X) D(Y, Y))

    D is n (n - 3) times the unbiased HSIC of all examples: a single batch gives the
    number of `minibatch_cka`.

    Args:
        moments: the moments of the layers, of at least 4 examples.

    Returns:
        CKA of each two layers, at most 1; about 0 for layers without relation, and it
        may be a little below. 0 for a layer that does not vary, or for fewer than 4
        examples.

    References:
        Kornblith et al. 2019, and the authors' code (feature_space_linear_cka,
        debiased=True). Davari et al. 2022, Reliability of CKA as a Similarity Measure
        in Deep Learning, on its limits: https://arxiv.org/abs/2210.16156
    """
    n = jnp.maximum(moments.n, _LEAST)
    norms = _norms(moments)
    debiased = (
        _squares(moments)
        - n / (n - 2) * moments.fourth
        + norms[:, None] * norms[None] / ((n - 1) * (n - 2))
    )
    return jnp.where(moments.n >= _LEAST, _normalized(debiased), 0)


def linear_map(
    moments: Moments, *, ridge: ScalarLike = 0.0
) -> tuple[Float[Array, "p q"], Float[Array, " q"]]:
    """The linear map from a first layer to a second: least squares, or ridge.

    W = (X^T X + ridge t I)^-1 X^T Y,  b = mean y - W^T mean x,  t = tr(X^T X) / p

    with X and Y centered. Directions of X that are only rounding are left out.

    Args:
        moments: the moments of two layers, x and y.
        ridge: the penalty, in mean variances of a feature of x. So the map does not
            depend on the scale of x.

    Returns:
        The weights and the bias: `x @ weights + bias` predicts y.

    Raises:
        ValueError: if these are not the moments of two layers, or the ridge is < 0.
    """
    _checks.not_negative("linear_map", ridge=ridge)
    p = _two("linear_map", moments)
    xx, xy = moments.second[:p, :p], moments.second[:p, p:]
    values, vectors = jnp.linalg.eigh(xx)
    kept = values > p * jnp.finfo(xx.dtype).eps * values[-1]
    penalty = ridge * jnp.trace(xx) / p
    scale = jnp.where(kept, 1 / jnp.where(kept, values + penalty, 1), 0)
    inner = scale[:, None] * _product(vectors, xy)
    weights = jnp.matmul(vectors, inner, precision=_EXACT)
    x, y = moments.mean
    return weights, y - jnp.matmul(x, weights, precision=_EXACT)


def regression_score(
    fit: Moments, on: Moments | None = None, *, ridge: float = 0.0
) -> Float[Array, ""]:
    """R^2 of the best linear map from a first layer to a second.

    R^2 = 1 - sum |y - W^T x - b|^2 / sum |y - mean y|^2

    Args:
        fit: the moments of two layers, on which `linear_map` is fitted.
        on: the moments of the same layers, on which it is judged; those of `fit` by
            default, and then R^2 is too large unless there are many more examples than
            features.
        ridge: see `linear_map`.

    Returns:
        At most 1; below 0 if the map is worse than the mean. 0 for a second layer that
        does not vary.

    Convention:
        Without `on` and `ridge` it is R^2_LR of Kornblith et al. 2019 (section 4),
        ||Q_X^T Y||_F^2 / ||Y||_F^2 with an orthonormal basis Q_X of X.

    References:
        Kornblith et al. 2019, Similarity of Neural Network Representations Revisited.
        https://arxiv.org/abs/1905.00414
    """
    on = fit if on is None else on
    weights, bias = linear_map(fit, ridge=ridge)
    p = _two("regression_score", on)
    xx, xy = on.second[:p, :p], on.second[:p, p:]
    total = _norms(on)[1]
    x, y = on.mean
    offset = y - jnp.matmul(x, weights, precision=_EXACT) - bias
    change = jnp.matmul(xx, weights, precision=_EXACT) - 2 * xy
    error = total + jnp.sum(weights * change) + on.n * jnp.sum(jnp.square(offset))
    return jnp.where(total > 0, 1 - error / jnp.where(total > 0, total, 1), 0)


def _rows(
    caller: str, features: Sequence[Array], where: Array | None
) -> list[Float[Array, "batch _"]]:
    """The features of each layer as rows, checked, and 0 at masked examples."""
    floats = [as_float(caller, x) for x in features]
    wide = jnp.result_type(*floats) if floats else None
    for x in floats:
        _checks.rank(caller, 2, "batch *features", layer=x)
        _checks.mask(caller, where, x.shape[:1])
    if len({len(x) for x in floats}) != 1:
        got = f"{[x.shape for x in floats]}"
        wanted = "layers of the same examples, their first axis"
        raise _checks.Refusal(_checks.message(caller, wanted, got))
    return [keep(x, where).reshape(len(x), -1).astype(wide) for x in floats]


def _centered(x: Array, valid: Array) -> Array:
    """Rows minus their mean; a constant feature is 0, exactly."""
    return deviations(x.T, valid).T


def _u_centered(x: Array, valid: Array, n: Array) -> Array:
    """The U-centered Gram matrix of the valid rows; 0 on the diagonal."""
    # HSIC does not depend on the mean; without it, fewer digits cancel.
    rows = _centered(x, valid)
    gram = jnp.matmul(rows, rows.T, precision=_EXACT)
    off = valid[:, None] & valid[None] & ~jnp.eye(len(x), dtype=bool)
    gram = jnp.where(off, gram, 0)
    sums = jnp.sum(gram, 1)
    mean = jnp.sum(sums) / ((n - 1) * (n - 2))
    gram = gram - sums[:, None] / (n - 2) - sums[None] / (n - 2) + mean
    return jnp.where(off, gram, 0)


def _normalized(products: Array) -> Array:
    """P_ij / sqrt(P_ii P_jj); 0 where a layer has no positive product with itself."""
    own = jnp.diagonal(products)
    positive = own > 0
    scale = jnp.where(positive, 1 / jnp.sqrt(jnp.where(positive, own, 1)), 0)
    return products * scale[:, None] * scale[None]


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a.T, b, precision=_EXACT)


def _blocks(moments: Moments) -> Float[Array, "d layers"]:
    """1 where a feature belongs to a layer, else 0."""
    sizes = [mean.size for mean in moments.mean]
    rows = [jnp.full((size, 1), i) for i, size in enumerate(sizes)]
    owns = jnp.concatenate(rows) == jnp.arange(len(sizes))[None]
    return owns.astype(moments.second.dtype)


def _norms(moments: Moments) -> Float[Array, " layers"]:
    """The squared norm of all centered examples of each layer."""
    return jnp.matmul(jnp.diagonal(moments.second), _blocks(moments), precision=_EXACT)


def _squares(moments: Moments) -> Float[Array, "layers layers"]:
    """||Y^T X||_F^2 of each two layers."""
    blocks = _blocks(moments)
    square = jnp.matmul(jnp.square(moments.second), blocks, precision=_EXACT)
    return _product(blocks, square)


def _moved(moments: Moments, mean: tuple[Array, ...]) -> Moments:
    """The moments around another mean.

    z becomes z + a, and s becomes s + 2 A^T z + c, with A the blocks of a, one column
    per layer, and c the squared norms of its columns. The sums of z are 0.
    """
    shift = [own - new for own, new in zip(moments.mean, mean, strict=True)]
    a = jnp.concatenate(shift)
    blocks = _blocks(moments) * a[:, None]
    c = jnp.stack([jnp.sum(jnp.square(part)) for part in shift])
    n, norms = moments.n, _norms(moments)
    turned = jnp.matmul(moments.third, blocks, precision=_EXACT)
    across = _product(blocks, moments.second)
    second = moments.second + n * a[:, None] * a[None]
    third = moments.third + (norms + n * c)[:, None] * a[None] + 2 * across
    fourth = (
        moments.fourth
        + 2 * (turned + turned.T)
        + 4 * jnp.matmul(across, blocks, precision=_EXACT)
        + norms[:, None] * c[None]
        + c[:, None] * norms[None]
        + n * c[:, None] * c[None]
    )
    return Moments(n, mean, second, third, fourth)


def _two(caller: str, moments: Moments) -> int:
    """The number of features of the first of two layers."""
    if len(moments.mean) != 2:
        got = f"{len(moments.mean)} layers"
        wanted = "the moments of two layers"
        raise _checks.Refusal(_checks.message(caller, wanted, got))
    return moments.mean[0].size
