"""The image towers of foundation models: teachers whose output is a vector."""

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jaxtyping import Float

from hintjax._checks import Refusal, message
from hintjax.models.patches import PatchEmbedding, check_sides
from hintjax.models.transformer import (
    FeedForward,
    PreNormBlock,
    Rotation,
    SelfAttention,
    Token,
    exact_gelu,
    layer_norm,
)

SMALL = nn.initializers.truncated_normal(0.02)
IMAGENET = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # mean and std of pixels in 0..1


def quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """CLIP's approximation of GELU: x sigmoid(1.702 x)."""
    return x * nn.sigmoid(1.702 * x)


class AttentionPool(nn.Module):
    """SigLIP's pooling: one learned query attends to all tokens, then an MLP.

    Its layers are those of a block: `attention`, `norm` and `mlp`.
    """

    heads: int
    hidden: int
    activation: Callable[[Array], Array] | None
    epsilon: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch n width"]
    ) -> Float[Array, "*batch width"]:
        """Returns one vector for each image."""
        probe = self.param("probe", SMALL, (1, x.shape[-1])).astype(x.dtype)
        probe = jnp.broadcast_to(probe, (*x.shape[:-2], *probe.shape))
        y = SelfAttention(self.heads, SMALL, name="attention")(x, queries=probe)
        z = layer_norm(self.epsilon, name="norm")(y)
        y = y + FeedForward(self.hidden, SMALL, self.activation, name="mlp")(z)
        return y[..., 0, :]


class ImageTower(nn.Module):
    """Vision transformer of a foundation model; the output is a vector, not logits.

    Hint paths, for n tokens; the class token comes first, then the registers, then the
    patches in reading order:

    * `embed` (n, width), tokens with positions; `embed/patches` (h, w, width), a map;
    * `embed_norm` (n, width), in CLIP;
    * `block1`, `block2`, ... (n, width), and inside each block `norm1`, `attention`,
      `scale1`, `sum` (the stream between attention and MLP), `norm2`, `mlp`,
      `mlp/hidden` (`mlp/gate` and `mlp/up` for SwiGLU) and `scale2`;
    * `block1/attention/query`, `/key`, `/value` (n, heads, d), `/scores` (heads, n, n),
      before the softmax, and `/distribution` (heads, n, n), after it;
    * `norm` (n, width): the normalized tokens, whose patches are the dense features;
    * `token` (the class token, width), or `pool` (SigLIP, width);
    * `projection`, in CLIP: the embedding that is compared with texts.

    The output is the last vector of this list. There are no logits: KD needs a student
    with as many outputs. Methods that match features are meant for such a teacher.

    To compare tokens with the maps of a convolutional network, arrange them on their
    grid: `hintjax.viewed` with `hintjax.regressors.to_grid(drop=class_tokens)`.

    The command standardizes images by their dataset. With `--weights`, it converts them
    to `image_normalization` for the teacher.

    Args:
        patch: side of a patch, in pixels; divides both sides of the images.
        width: channels of a token.
        depth: number of blocks.
        heads: number of attention heads; divides the width.
        hidden: number of channels of the MLPs' hidden layer.
        class_token: whether there is a class token; without, attention pools.
        registers: number of register tokens (Darcet et al., 2024).
        activation: activation of the MLPs; None for SwiGLU.
        scaled: whether LayerScale follows attention and MLP.
        epsilon: constant of the LayerNorms.
        rotated: whether rotary positions (RoPE) replace learned ones, as in DINOv3.
        norm_first: whether a LayerNorm follows the embedding, as in CLIP.
        projection: number of channels of the projected embedding; None for none.
        image_normalization: mean and standard deviation of the channels, for pixels
            from 0 to 1, of the images that the network was trained on.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> model = ImageTower(patch=2, width=8, depth=1, heads=2, hidden=16)
        >>> images = jnp.zeros((2, 8, 8, 3))
        >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
        >>> jax.eval_shape(model.apply, variables, images).shape
        (2, 8)

    References:
        Oquab et al., DINOv2: Learning Robust Visual Features without Supervision, TMLR
        2024; Darcet et al., Vision Transformers Need Registers, ICLR 2024; Simeoni et
        al., DINOv3, 2025; Radford et al., Learning Transferable Visual Models from
        Natural Language Supervision (CLIP), ICML 2021; Zhai et al., Sigmoid Loss for
        Language Image Pre-Training (SigLIP), ICCV 2023.
    """

    patch: int
    width: int
    depth: int
    heads: int
    hidden: int
    class_token: bool = True
    registers: int = 0
    activation: Callable[[Array], Array] | None = exact_gelu
    scaled: bool = False
    epsilon: float = 1e-6
    rotated: bool = False
    norm_first: bool = False
    projection: int | None = None
    image_normalization: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET

    @property
    def class_tokens(self) -> int:
        """Number of tokens before the tokens of the patches."""
        return int(self.class_token) + self.registers

    @property
    def has_logits(self) -> bool:
        """False: labels cannot train this network, so it needs weights."""
        return False

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch h w channels"], train: bool = False
    ) -> Float[Array, "*batch features"]:
        """Returns one vector for each image of a batch."""
        check_sides("ImageTower", x, self.patch)
        h, w = (side // self.patch for side in x.shape[-3:-1])
        special = (int(self.class_token), self.registers, not self.rotated)
        x = PatchEmbedding(self.patch, self.width, SMALL, *special, name="embed")(x)
        if self.norm_first:
            x = layer_norm(self.epsilon, name="embed_norm")(x)
        d = self.width // self.heads
        rotation = rotations(h, w, d) if self.rotated else None
        shape, how = (self.heads, self.hidden), (self.activation, self.scaled)
        for number in range(1, self.depth + 1):
            block = PreNormBlock(
                *shape, SMALL, self.epsilon, *how, name=f"block{number}"
            )
            x = block(x, rotation)
        x = layer_norm(self.epsilon, name="norm")(x)
        if self.class_token:
            x = Token(name="token")(x)
        else:
            x = AttentionPool(*shape, self.activation, self.epsilon, name="pool")(x)
        if self.projection is not None:
            x = nn.Dense(self.projection, use_bias=False, name="projection")(x)
        return x


def rotations(h: int, w: int, d: int) -> Rotation:
    """The cosines and sines of DINOv3's rotary positions.

    The patch in row i and column j has the coordinates y = (2 i + 1) / h - 1 and x = (2
    j + 1) / w - 1. Its angles are 2 pi y / 100^(4 k / d) for k = 0, ..., d / 4 - 1,
    then the same for x, then all of these once more.

    Args:
        h: number of rows of patches.
        w: number of columns of patches.
        d: number of channels of a head; a multiple of 4.

    Returns:
        Cosines and sines, each (h w, d).

    Raises:
        Refusal: if d is no multiple of 4.

    >>> cosines, sines = rotations(3, 3, 8)
    >>> cosines.shape, float(cosines[4].min()), float(abs(sines[4]).max())
    ((9, 8), 1.0, 0.0)
    """
    if d % 4:
        wanted = "heads whose channels are a multiple of 4"
        raise Refusal(message("ImageTower", wanted, f"{d}"))
    frequencies = 100.0 ** -(np.arange(0, d, 4) / d)
    y, x = ((2 * np.arange(n) + 1) / n - 1 for n in (h, w))
    grid = np.stack(np.meshgrid(y, x, indexing="ij"), axis=-1).reshape(h * w, 2, 1)
    angles = (2 * math.pi * grid * frequencies).reshape(h * w, d // 2)
    angles = np.tile(angles, 2)
    return jnp.float32(np.cos(angles)), jnp.float32(np.sin(angles))
