"""Vision transformers (ViT) for small images, with DeiT's distillation token."""

from flax import linen as nn
from jax import Array
from jaxtyping import Float

from hintjax.models.patches import PatchEmbedding, check_sides
from hintjax.models.transformer import PreNormBlock, Token, layer_norm

EPSILON = 1e-6  # of the LayerNorms of ViT and DeiT
XAVIER = nn.initializers.xavier_uniform()
SMALL = nn.initializers.normal(0.02)  # of tokens and positions


class VisionTransformer(nn.Module):
    """ViT: patches as tokens, a class token, pre-norm blocks, a linear classifier.

    Hint paths, for n tokens; the first is the class token:

    * `embed` (n, width), tokens with positions; `embed/patches` (h, w, width), a map;
    * `block1`, `block2`, ... (n, width), and inside each block `norm1`, `attention`,
      `sum` (the stream between attention and MLP), `norm2`, `mlp`, `mlp/hidden` (before
      the GELU);
    * `block1/attention/query`, `/key`, `/value` (n, heads, d), `/scores` (heads, n, n),
      before the softmax, and `/distribution` (heads, n, n), after it;
    * `norm` (n, width), `token` (the class token, width) and `classifier` (the logits).

    With `distillation`, DeiT's distillation token follows the class token. Then two
    tokens come before the patches, and `distillation_token` and
    `distillation_classifier` are hint paths too. The output is always the mean of the
    logits of both heads, as in DeiT's predictions. In training each head has its own
    teacher: with `hintjax.at_head(method, student="classifier")` a method takes the
    logits of one head as the output.

    To compare tokens with the maps of a convolutional network, arrange them on their
    grid: `hintjax.viewed` with `hintjax.regressors.to_grid`.

    Positions are parameters, so a model takes images of one size only; `from_torch` of
    `hintjax.weights` resamples the positions of a file to the model's size. There is no
    dropout and no stochastic depth, so `train` has no effect. Kernels are initialized
    as by ViT's authors, except in the classifiers: they have Flax's default
    initialization, where the authors start from 0.

    Args:
        patch: side of a patch, in pixels; divides both sides of the images.
        width: channels of a token.
        depth: number of blocks.
        heads: number of attention heads; divides the width.
        classes: number of logits.
        ratio: width of the MLPs' hidden layer, as a multiple of `width`.
        distillation: whether there are a distillation token and its classifier.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> model, images = vit_micro(classes=10), jnp.zeros((2, 8, 8, 1))
        >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
        >>> jax.eval_shape(model.apply, variables, images).shape
        (2, 10)

    References:
        Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021 (code:
        google-research/vision_transformer). Touvron et al., Training Data-Efficient
        Image Transformers and Distillation through Attention, ICML 2021 (code:
        facebookresearch/deit).
    """

    patch: int
    width: int
    depth: int
    heads: int
    classes: int
    ratio: int = 4
    distillation: bool = False

    @property
    def class_tokens(self) -> int:
        """Number of tokens before the tokens of the patches."""
        return 2 if self.distillation else 1

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch h w channels"], train: bool = False
    ) -> Float[Array, "*batch classes"]:
        """Returns the logits of a batch of images."""
        check_sides("VisionTransformer", x, self.patch)
        shape = (self.patch, self.width, SMALL, self.class_tokens)
        x = PatchEmbedding(*shape, name="embed")(x)
        shape = (self.heads, self.ratio * self.width, XAVIER, EPSILON)
        for number in range(1, self.depth + 1):
            x = PreNormBlock(*shape, name=f"block{number}")(x)
        x = layer_norm(EPSILON, name="norm")(x)
        # Class token and classifier come last; a pooled vector is expected there.
        if self.distillation:
            token = Token(1, name="distillation_token")(x)
            distilled = nn.Dense(self.classes, name="distillation_classifier")(token)
        logits = nn.Dense(self.classes, name="classifier")(Token(name="token")(x))
        return (logits + distilled) / 2 if self.distillation else logits


def vit_micro(
    classes: int, patch: int = 2, distillation: bool = False
) -> VisionTransformer:
    """4 blocks, 2 heads, width 32, patches of 2x2: for 8x8 images and the CPU.

    51,946 parameters for 10 classes and 8x8 gray images.
    """
    return VisionTransformer(patch, 32, 4, 2, classes, distillation=distillation)


def vit_mini(
    classes: int, patch: int = 4, distillation: bool = False
) -> VisionTransformer:
    """4 blocks, 4 heads, width 64, patches of 4x4: for 28x28 and 32x32 images.

    205,066 parameters for 10 classes and 28x28 gray images.
    """
    return VisionTransformer(patch, 64, 4, 4, classes, distillation=distillation)


def vit_tiny(
    classes: int, patch: int = 4, distillation: bool = False
) -> VisionTransformer:
    """ViT-Ti: 12 blocks, 3 heads, width 192, with patches of 4x4 for 32x32 images.

    5.363M parameters for 10 classes and 32x32 color images.
    """
    return VisionTransformer(patch, 192, 12, 3, classes, distillation=distillation)


def vit_small(
    classes: int, patch: int = 4, distillation: bool = False
) -> VisionTransformer:
    """ViT-S: 12 blocks, 6 heads, width 384, with patches of 4x4 for 32x32 images.

    21.342M parameters for 10 classes and 32x32 color images.
    """
    return VisionTransformer(patch, 384, 12, 6, classes, distillation=distillation)
