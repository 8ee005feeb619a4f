"""Small BERT-like encoders over token ids, with a padding mask."""

from collections.abc import Mapping

from flax import linen as nn
from jax import Array
from jaxtyping import Bool, Float, Int

from hintjax._checks import Refusal, message
from hintjax.models.transformer import FeedForward, SelfAttention, Token, layer_norm

EPSILON = 1e-12  # of BERT's LayerNorms
SMALL = nn.initializers.truncated_normal(0.02)


class Embedding(nn.Module):
    """Token ids as vectors, plus learned positions, normalized.

    Args:
        vocabulary: number of token ids.
        length: number of positions.
        width: channels of a token.
    """

    vocabulary: int
    length: int
    width: int

    @nn.compact
    def __call__(self, ids: Int[Array, "*batch n"]) -> Float[Array, "*batch n width"]:
        """Returns the normalized embeddings of a batch of token ids."""
        n = ids.shape[-1]
        if n > self.length:
            wanted = f"at most {self.length} tokens"
            do = "Cut the texts, or build the encoder with a greater length."
            raise Refusal(message("Encoder", wanted, f"{n}", do))
        words = nn.Embed(
            self.vocabulary, self.width, embedding_init=SMALL, name="words"
        )
        positions = self.param("positions", SMALL, (self.length, self.width))
        return layer_norm(EPSILON, name="norm")(words(ids) + positions[:n])


class Block(nn.Module):
    """Post-norm block; its layer `norm1` is the stream between attention and MLP."""

    heads: int
    ratio: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*batch n width"],
        where: Bool[Array, "*batch n"] | None = None,
    ) -> Float[Array, "*batch n width"]:
        """Returns the tokens after attention and the MLP."""
        y = SelfAttention(self.heads, SMALL, name="attention")(x, where)
        x = layer_norm(EPSILON, name="norm1")(x + y)
        hidden = self.ratio * x.shape[-1]
        y = FeedForward(hidden, SMALL, name="mlp")(x)
        return layer_norm(EPSILON, name="norm2")(x + y)


class Encoder(nn.Module):
    """BERT's encoder: post-norm blocks over token ids, the first token classified.

    The inputs are a dict: `tokens`, ids (*batch n), and optionally `mask`, bool
    (*batch n), True where a token counts. No token attends to a padding token, so
    padding does not change the other tokens. The outputs at padding tokens have no
    meaning, and methods must leave them out (`padding="mask"`).

    Hint paths, of n tokens:

    * `embed` (n, width), normalized, and `embed/words`, before positions are added;
    * `block1`, `block2`, ... (n, width), and inside each block `attention`, `norm1`
      (the stream between attention and MLP), `mlp`, `mlp/hidden` (before the GELU);
    * `block1/attention/query`, `/key`, `/value` (n, heads, d), `/scores` (heads, n, n),
      before the softmax and the mask, and `/distribution` (heads, n, n), after both;
    * `token` (the first token, width) and `classifier` (the logits).

    Parts of BERT that this encoder lacks: token types, the dense layer with a tanh on
    the first token, and dropout.

    Args:
        vocabulary: number of token ids.
        width: channels of a token.
        depth: number of blocks.
        heads: number of attention heads; divides the width.
        classes: number of logits.
        length: largest number of tokens of a text.
        ratio: width of the MLPs' hidden layer, as a multiple of `width`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> model, ids = encoder_tiny(classes=2), jnp.zeros((3, 16), jnp.int32)
        >>> inputs = {"tokens": ids, "mask": ids == 0}
        >>> variables = jax.eval_shape(model.init, jax.random.key(0), inputs)
        >>> jax.eval_shape(model.apply, variables, inputs).shape
        (3, 2)

    References:
        Devlin et al., BERT: Pre-training of Deep Bidirectional Transformers for
        Language Understanding, NAACL 2019. Turc et al., Well-Read Students Learn
        Better, 2019 (the sizes).
    """

    vocabulary: int
    width: int
    depth: int
    heads: int
    classes: int
    length: int = 512
    ratio: int = 4

    @nn.compact
    def __call__(
        self, inputs: Mapping[str, Array], train: bool = False
    ) -> Float[Array, "*batch classes"]:
        """Returns the logits of a batch of token ids."""
        if "tokens" not in inputs:
            do = 'Name the token ids "tokens" and their padding mask "mask".'
            raise Refusal(
                message("Encoder", "'tokens' in the inputs", f"{sorted(inputs)}", do)
            )
        where = inputs.get("mask")
        embed = Embedding(self.vocabulary, self.length, self.width, name="embed")
        x = embed(inputs["tokens"])
        for number in range(1, self.depth + 1):
            x = Block(self.heads, self.ratio, name=f"block{number}")(x, where)
        return nn.Dense(self.classes, name="classifier")(Token(name="token")(x))


def encoder_tiny(classes: int, vocabulary: int = 30_522) -> Encoder:
    """BERT-Tiny's size: 2 blocks, 2 heads, width 128.

    4.369M parameters for 2 classes.
    """
    return Encoder(vocabulary, 128, 2, 2, classes)


def encoder_mini(classes: int, vocabulary: int = 30_522) -> Encoder:
    """BERT-Mini's size: 4 blocks, 4 heads, width 256.

    11.105M parameters for 2 classes.
    """
    return Encoder(vocabulary, 256, 4, 4, classes)


def encoder_small(classes: int, vocabulary: int = 30_522) -> Encoder:
    """BERT-Small's size: 4 blocks, 8 heads, width 512.

    28.501M parameters for 2 classes.
    """
    return Encoder(vocabulary, 512, 4, 8, classes)
