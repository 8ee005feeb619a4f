"""Shared parts of transformers: attention, MLPs, and blocks; each part is a hint."""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jaxtyping import Bool, Float

from hintjax._checks import Refusal, message
from hintjax.models.blocks import Sum

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


def exact_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """GELU without an approximation; Flax's default approximates it by a tanh."""
    return nn.gelu(x, approximate=False)


class FeedForward(nn.Module):
    """Two linear maps around an activation, which may be gated.

    Without a gate, out(a(hidden(x))). With a gate, down(silu(gate(x)) up(x)), the
    SwiGLU of Shazeer, GLU Variants Improve Transformer, 2020.

    Args:
        hidden: number of channels between both maps.
        kernel_init: initializer of the kernels.
        activation: the function a; None for the gate.
    """

    hidden: int
    kernel_init: nn.initializers.Initializer
    activation: Callable[[Array], Array] | None = exact_gelu

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch n width"]
    ) -> Float[Array, "*batch n width"]:
        """Returns the tokens after both linear maps."""
        width = x.shape[-1]
        linear = partial(nn.Dense, kernel_init=self.kernel_init)
        if self.activation is None:
            gate = linear(self.hidden, name="gate")(x)
            y = nn.silu(gate) * linear(self.hidden, name="up")(x)
            return linear(width, name="down")(y)
        y = self.activation(linear(self.hidden, name="hidden")(x))
        return linear(width, name="out")(y)


class Scale(nn.Module):
    """A learned factor for each channel: LayerScale of Touvron et al., 2021."""

    @nn.compact
    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Returns the scaled channels."""
        init = nn.initializers.constant(1e-5)
        return x * self.param("scale", init, x.shape[-1:])


class PreNormBlock(nn.Module):
    """Pre-norm block; its layer `sum` is the stream between attention and MLP.

    Args:
        heads: number of attention heads.
        hidden: number of channels of the MLP's hidden layer.
        kernel_init: initializer of the kernels.
        epsilon: constant of the LayerNorms.
        activation: activation of the MLP; None for SwiGLU.
        scaled: whether LayerScale follows attention and MLP.
    """

    heads: int
    hidden: int
    kernel_init: nn.initializers.Initializer
    epsilon: float
    activation: Callable[[Array], Array] | None = exact_gelu
    scaled: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch n width"], rotation: Rotation | None = None
    ) -> Float[Array, "*batch n width"]:
        """Returns the tokens after attention and the MLP."""
        init = self.kernel_init
        y = layer_norm(self.epsilon, name="norm1")(x)
        y = SelfAttention(self.heads, init, name="attention")(y, rotation=rotation)
        y = Scale(name="scale1")(y) if self.scaled else y
        x = Sum(name="sum")(x, y)
        y = layer_norm(self.epsilon, name="norm2")(x)
        y = FeedForward(self.hidden, init, self.activation, name="mlp")(y)
        y = Scale(name="scale2")(y) if self.scaled else y
        return x + y


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
