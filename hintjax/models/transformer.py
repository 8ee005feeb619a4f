"""Shared parts of transformers: attention, each part of it a possible hint, and MLP."""

from functools import partial

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jaxtyping import Bool, Float

from hintjax._checks import Refusal, message

Rotation = tuple[Float[Array, "m d"], Float[Array, "m d"]]  # cosines and sines


class Scores(nn.Module):
    """Scaled products of queries and keys, <q_i, k_j> / sqrt(d), before the softmax.

    The scores are not masked: whoever reads them must leave out the hidden keys.
    """

    @nn.compact
    def __call__(
        self,
        query: Float[Array, "*batch q heads d"],
        key: Float[Array, "*batch n heads d"],
    ) -> Float[Array, "*batch heads q n"]:
        """Returns the scores of every query (row) for every key (column)."""
        return jnp.einsum("...ihd,...jhd->...hij", query / query.shape[-1] ** 0.5, key)


class Distribution(nn.Module):
    """The attention weights of each token: the softmax over the keys that count."""

    @nn.compact
    def __call__(
        self,
        scores: Float[Array, "*batch heads q n"],
        where: Bool[Array, "*batch n"] | None = None,
    ) -> Float[Array, "*batch heads q n"]:
        """Returns the attention weights; each row sums to 1."""
        if where is not None:
            # Not -inf: with all keys hidden, -inf gives nan and this is uniform.
            hidden = jnp.finfo(scores.dtype).min / 2
            scores = jnp.where(where[..., None, None, :], scores, hidden)
        return nn.softmax(scores)


class SelfAttention(nn.Module):
    """Multi-head self-attention.

    Hint paths inside it: `query`, `key`, `value` (*batch n heads d), `scores` and
    `distribution` (*batch heads n n), and `out`, its output.

    Rotary positions (RoPE) turn queries and keys before the scores: the channels u and
    v, d / 2 apart, become u cos - v sin and v cos + u sin. The hints `query` and `key`
    come before the turn.

    Args:
        heads: number of heads; divides the width.
        kernel_init: initializer of the four linear maps.
    """

    heads: int
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*batch n width"],
        where: Bool[Array, "*batch n"] | None = None,
        *,
        rotation: Rotation | None = None,
        queries: Float[Array, "*batch q width"] | None = None,
    ) -> Float[Array, "*batch q width"]:
        """Returns the attended tokens; `where` is True where a token counts.

        Args:
            x: the tokens that are attended to.
            where: True where a token counts.
            rotation: cosines and sines of the last m tokens.
            queries: the tokens that attend, instead of `x`.
        """
        width = x.shape[-1]
        if width % self.heads:
            wanted = f"heads to divide the width {width}"
            do = "Choose another number of heads."
            raise Refusal(message("SelfAttention", wanted, f"{self.heads}", do))
        linear = partial(nn.DenseGeneral, kernel_init=self.kernel_init)
        query, key, value = (
            linear((self.heads, width // self.heads), name=name)(tokens)
            for name, tokens in zip(
                ("query", "key", "value"),
                (x if queries is None else queries, x, x),
                strict=True,
            )
        )
        if rotation is not None:
            query, key = rotated(query, rotation), rotated(key, rotation)
        scores = Scores(name="scores")(query, key)
        distribution = Distribution(name="distribution")(scores, where)
        together = jnp.einsum("...hij,...jhd->...ihd", distribution, value)
        return linear(width, axis=(-2, -1), name="out")(together)


def rotated(
    x: Float[Array, "*batch n heads d"], rotation: Rotation
) -> Float[Array, "*batch n heads d"]:
    """The channels of the last m tokens, turned; the first tokens stay as they are."""
    cosines, sines = (turn[:, None, :].astype(x.dtype) for turn in rotation)
    first, last = jnp.split(x, [x.shape[-3] - len(cosines)], axis=-3)
    u, v = jnp.split(last, 2, axis=-1)
    last = last * cosines + jnp.concatenate([-v, u], axis=-1) * sines
    return jnp.concatenate([first, last], axis=-3)


class Perceptron(nn.Module):
    """Two linear maps around a GELU; its layer `hidden` comes before the GELU.

    The GELU is exact; Flax's default approximates it by a tanh.

    Args:
        ratio: width of the hidden layer, as a multiple of the input width.
        kernel_init: initializer of both kernels.
    """

    ratio: int
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch n width"]
    ) -> Float[Array, "*batch n width"]:
        """Returns the tokens after both linear maps."""
        width, init = x.shape[-1], self.kernel_init
        x = nn.Dense(self.ratio * width, kernel_init=init, name="hidden")(x)
        x = nn.gelu(x, approximate=False)
        return nn.Dense(width, kernel_init=init, name="out")(x)


class Token(nn.Module):
    """One token; a module, so that the classified vector can be a hint."""

    index: int = 0

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch n width"]
    ) -> Float[Array, "*batch width"]:
        """Returns the token at `index`."""
        return x[..., self.index, :]


def layer_norm(epsilon: float, *, name: str) -> nn.LayerNorm:
    """LayerNorm of each token, with the exact variance.

    The fast variance E[x^2] - E[x]^2 cancels when the mean is large.
    """
    return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, name=name)
