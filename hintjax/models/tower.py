"""The image towers of foundation models: teachers whose output is a vector."""

import math
from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jaxtyping import Float

from hintjax._checks import Refusal, message
from hintjax.models.blocks import Sum
from hintjax.models.transformer import Rotation, SelfAttention, Token, layer_norm

SMALL = nn.initializers.truncated_normal(0.02)
IMAGENET = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # mean and std of pixels in 0..1


def exact_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """GELU without an approximation."""
    return nn.gelu(x, approximate=False)


def quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """CLIP's approximation of GELU: x sigmoid(1.702 x)."""
    return x * nn.sigmoid(1.702 * x)


class FeedForward(nn.Module):
    """Two linear maps around an activation, which may be gated.

    Without a gate, out(a(hidden(x))). With a gate, down(silu(gate(x)) up(x)), the
    SwiGLU of Shazeer, GLU Variants Improve Transformer, 2020.

    Args:
        hidden: number of channels between both maps.
        activation: the function a; None for the gate.
    """

    hidden: int
    activation: Callable[[Array], Array] | None

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch n width"]
    ) -> Float[Array, "*batch n width"]:
        """Returns the tokens after both linear maps."""
        width = x.shape[-1]
        linear = partial(nn.Dense, kernel_init=SMALL)
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


class Embedding(nn.Module):
    """Patches as tokens, after the class token and the registers.

    Args:
        patch: side of a patch, in pixels.
        width: channels of a token.
        class_token: whether a class token comes first.
        registers: number of register tokens, which have no positions.
        positions: whether the class token and the patches have learned positions.
    """

    patch: int
    width: int
    class_token: bool
    registers: int
    positions: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch h w channels"]
    ) -> Float[Array, "*batch n width"]:
        """Returns the class token, the registers and the tokens of the patches."""
        if any(side % self.patch or not side for side in x.shape[-3:-1]):
            wanted = f"images whose sides are multiples of the patch, {self.patch}"
            got = f"{x.shape[-3]}x{x.shape[-2]}"
            near = max(1, round(x.shape[-3] / self.patch)) * self.patch
            do = f"Resize the images, for example to {near}x{near}."
            raise Refusal(message("ImageTower", wanted, got, do))
        sides = (self.patch, self.patch)
        patches = nn.Conv(self.width, sides, sides, "VALID", name="patches")
        x = patches(x)
        x = x.reshape(*x.shape[:-3], -1, self.width)
        if self.class_token:
            x = jnp.concatenate([self._tokens("tokens", 1, x), x], axis=-2)
        if self.positions:
            x = x + self.param("positions", SMALL, x.shape[-2:])
        if self.registers:
            first, rest = jnp.split(x, [int(self.class_token)], axis=-2)
            registers = self._tokens("registers", self.registers, x)
            x = jnp.concatenate([first, registers, rest], axis=-2)
        return x

    def _tokens(self, name: str, n: int, x: Array) -> Array:
        """Learned tokens, for every image of a batch."""
        tokens = self.param(name, SMALL, (n, self.width)).astype(x.dtype)
        return jnp.broadcast_to(tokens, (*x.shape[:-2], n, self.width))


class Block(nn.Module):
    """Pre-norm block; its layer `sum` is the stream between attention and MLP."""

    heads: int
    hidden: int
    activation: Callable[[Array], Array] | None
    scaled: bool
    epsilon: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch n width"], rotation: Rotation | None = None
    ) -> Float[Array, "*batch n width"]:
        """Returns the tokens after attention and the MLP."""
        y = layer_norm(self.epsilon, name="norm1")(x)
        y = SelfAttention(self.heads, SMALL, name="attention")(y, rotation=rotation)
        y = Scale(name="scale1")(y) if self.scaled else y
        x = Sum(name="sum")(x, y)
        y = layer_norm(self.epsilon, name="norm2")(x)
        y = FeedForward(self.hidden, self.activation, name="mlp")(y)
        y = Scale(name="scale2")(y) if self.scaled else y
        return x + y


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
        y = y + FeedForward(self.hidden, self.activation, name="mlp")(z)
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
        h, w = (side // self.patch for side in x.shape[-3:-1])
        special = (self.class_token, self.registers, not self.rotated)
        x = Embedding(self.patch, self.width, *special, name="embed")(x)
        if self.norm_first:
            x = layer_norm(self.epsilon, name="embed_norm")(x)
        d = self.width // self.heads
        rotation = rotations(h, w, d) if self.rotated else None
        shape = (self.heads, self.hidden, self.activation)
        for number in range(1, self.depth + 1):
            block = Block(*shape, self.scaled, self.epsilon, name=f"block{number}")
            x = block(x, rotation)
        x = layer_norm(self.epsilon, name="norm")(x)
        if self.class_token:
            x = Token(name="token")(x)
        else:
            x = AttentionPool(*shape, self.epsilon, name="pool")(x)
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
