"""Names of the parts of torchvision's and timm's models, and the layouts of torch."""

import numpy as np

from hintjax.weights.convert import How, Names, Rule
from hintjax.weights.positions import resample_positions, side_of

# Layouts of the tensors of torch's layers.

VECTOR = How("features", lambda n: [(n,)], lambda shape, x: x)
CONV = How(
    "height width in out",
    lambda h, w, i, o: [(o, i, h, w)],
    lambda shape, x: x.transpose(2, 3, 1, 0),
)
LINEAR = How("in out", lambda i, o: [(o, i)], lambda shape, x: x.T)
OUT = How(  # output of attention; torch joins the heads
    "heads d width",
    lambda heads, d, width: [(width, heads * d)],
    lambda shape, x: x.T.reshape(shape),
)
TOKENS = How(
    "tokens width",
    lambda tokens, width: tokens * [(1, 1, width)],
    lambda shape, *tokens: np.concatenate(tokens)[:, 0],
)
ZEROS = How("features", lambda n: [], lambda shape: np.zeros(shape))  # no bias in torch

# The number of batches that BatchNorm has seen; only torch counts them.
COUNTED = ("*.num_batches_tracked",)


def positions(class_tokens: int) -> How:
    """Learned positions, resampled if the square grids of file and model differ."""

    def convert(shape: tuple[int, ...], x: np.ndarray) -> np.ndarray:
        side = side_of(shape[0], class_tokens)
        if x.shape[1] == shape[0] or side is None:
            return x[0]
        return resample_positions(x, (side, side), class_tokens)[0]

    def fits(got: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
        squares = len(got) == 3 and all(
            side_of(shape[1], class_tokens) for shape in (got, wanted)
        )
        return got == wanted or (squares and got[::2] == wanted[::2])

    return How("tokens width", lambda n, width: [(1, n, width)], convert, fits)


def joined(number: int, count: int) -> tuple[How, How]:
    """Kernel and bias of one of the maps that torch joins, by its number from 0.

    Args:
        number: the number of the map; for queries, keys and values 0, 1 and 2.
        count: the number of joined maps.
    """
    kernel = How(
        "width heads d",
        lambda width, heads, d: [(count * heads * d, width)],
        lambda shape, x: x.T.reshape(shape[0], count, *shape[1:])[:, number],
    )
    bias = How(
        "heads d",
        lambda heads, d: [(count * heads * d,)],
        lambda shape, x: x.reshape(count, *shape)[number],
    )
    return kernel, bias


def conv(flax: str, torch: str, bias: bool = False) -> tuple[Rule, ...]:
    """A convolution; torch's kernel is (out, in, height, width)."""
    kernel = Rule(f"params/{flax}/kernel", (f"{torch}.weight",), CONV)
    return (kernel, *_bias(flax, f"{torch}.bias")) if bias else (kernel,)


def linear(flax: str, torch: str) -> tuple[Rule, ...]:
    """A linear map with a bias; torch's kernel is (out, in)."""
    kernel = Rule(f"params/{flax}/kernel", (f"{torch}.weight",), LINEAR)
    return kernel, *_bias(flax, f"{torch}.bias")


def layer_norm(flax: str, torch: str) -> tuple[Rule, ...]:
    """LayerNorm; torch's weight is Flax's scale."""
    scale = Rule(f"params/{flax}/scale", (f"{torch}.weight",), VECTOR)
    return scale, *_bias(flax, f"{torch}.bias")


def batch_norm(flax: str, torch: str) -> tuple[Rule, ...]:
    """BatchNorm, with its running statistics."""
    return (
        *layer_norm(flax, torch),
        Rule(f"batch_stats/{flax}/mean", (f"{torch}.running_mean",), VECTOR),
        Rule(f"batch_stats/{flax}/var", (f"{torch}.running_var",), VECTOR),
    )


def attention(flax: str, qkv: str, out: str) -> tuple[Rule, ...]:
    """Self-attention; torch has one linear map for queries, keys and values.

    `qkv` is the part of the map's names before "weight" and "bias".
    """
    rules = []
    for number, name in enumerate(("query", "key", "value")):
        kernel, bias = joined(number, 3)
        rules += [
            Rule(f"params/{flax}/{name}/kernel", (f"{qkv}weight",), kernel),
            Rule(f"params/{flax}/{name}/bias", (f"{qkv}bias",), bias),
        ]
    kernel = Rule(f"params/{flax}/out/kernel", (f"{out}.weight",), OUT)
    return (*rules, kernel, *_bias(f"{flax}/out", f"{out}.bias"))


def _bias(flax: str, torch: str) -> tuple[Rule, ...]:
    return (Rule(f"params/{flax}/bias", (torch,), VECTOR),)


_BLOCK, _LAYER = "group<g>/block<b>", "layer<g>.<b-1>"

RESNET = Names(
    (
        *conv("stem/conv", "conv1"),
        *batch_norm("stem/norm", "bn1"),
        *conv(f"{_BLOCK}/conv<c>", f"{_LAYER}.conv<c>"),
        *batch_norm(f"{_BLOCK}/norm<c>", f"{_LAYER}.bn<c>"),
        *conv(f"{_BLOCK}/shortcut_conv", f"{_LAYER}.downsample.0"),
        *batch_norm(f"{_BLOCK}/shortcut_norm", f"{_LAYER}.downsample.1"),
        *linear("classifier", "fc"),
    ),
    COUNTED,
)

TIMM_VIT = Names(
    (
        *conv("embed/patches", "patch_embed.proj", bias=True),
        Rule("params/embed/tokens", ("cls_token",), TOKENS),
        Rule("params/embed/positions", ("pos_embed",), positions(1)),
        *layer_norm("block<b>/norm<n>", "blocks.<b-1>.norm<n>"),
        *attention(
            "block<b>/attention", "blocks.<b-1>.attn.qkv.", "blocks.<b-1>.attn.proj"
        ),
        *linear("block<b>/mlp/hidden", "blocks.<b-1>.mlp.fc1"),
        *linear("block<b>/mlp/out", "blocks.<b-1>.mlp.fc2"),
        *layer_norm("norm", "norm"),
        *linear("classifier", "head"),
    )
)

TIMM_DEIT = Names(
    (
        Rule("params/embed/tokens", ("cls_token", "dist_token"), TOKENS),
        Rule("params/embed/positions", ("pos_embed",), positions(2)),
        *linear("distillation_classifier", "head_dist"),
        *TIMM_VIT.rules,
    )
)

_ENCODER = "encoder.layers.encoder_layer_<b-1>"

TORCHVISION_VIT = Names(
    (
        *conv("embed/patches", "conv_proj", bias=True),
        Rule("params/embed/tokens", ("class_token",), TOKENS),
        Rule("params/embed/positions", ("encoder.pos_embedding",), positions(1)),
        *layer_norm("block<b>/norm<n>", f"{_ENCODER}.ln_<n>"),
        *attention(
            "block<b>/attention",
            f"{_ENCODER}.self_attention.in_proj_",
            f"{_ENCODER}.self_attention.out_proj",
        ),
        *linear("block<b>/mlp/hidden", f"{_ENCODER}.mlp.0"),
        *linear("block<b>/mlp/out", f"{_ENCODER}.mlp.3"),
        *layer_norm("norm", "encoder.ln"),
        *linear("classifier", "heads.head"),
    )
)
