"""Names of ConvNeXt."""

from hintjax.weights.convert import How, Names, Rule
from hintjax.weights.names import VECTOR, conv, layer_norm, linear

CHANNELS = How(  # torchvision scales maps whose channels come first
    "features", lambda n: [(n, 1, 1)], lambda shape, x: x[:, 0, 0]
)
GROUPS = (1, 2, 3, 4)


def _block(
    flax: str, torch: str, parts: tuple[str, str, str, str], scale: str, how: How
) -> tuple[Rule, ...]:
    """One block; `parts` are the convolution, the norm and both linear maps."""
    depthwise, norm, hidden, out = (f"{torch}.{part}" for part in parts)
    return (
        *conv(f"{flax}/depthwise", depthwise, bias=True),
        *layer_norm(f"{flax}/norm", norm),
        *linear(f"{flax}/hidden", hidden),
        *linear(f"{flax}/out", out),
        Rule(f"params/{flax}/scale/scale", (f"{torch}.{scale}",), how),
    )


def _patches(flax: str, convolution: str, norm: str) -> tuple[Rule, ...]:
    """The stem, or the start of a group."""
    return (
        *conv(f"{flax}/conv", convolution, bias=True),
        *layer_norm(f"{flax}/norm", norm),
    )


_BLOCK, _DOWN = "group<g>/block<b>", "group<g>/downsample"

TIMM_CONVNEXT = Names(
    (
        *_patches("stem", "stem.0", "stem.1"),
        *_patches(_DOWN, "stages.<g-1>.downsample.1", "stages.<g-1>.downsample.0"),
        *_block(
            _BLOCK,
            "stages.<g-1>.blocks.<b-1>",
            ("conv_dw", "norm", "mlp.fc1", "mlp.fc2"),
            "gamma",
            VECTOR,
        ),
        *layer_norm("norm", "head.norm"),
        *linear("classifier", "head.fc"),
    )
)

_LAYERS = ("block.0", "block.2", "block.3", "block.5")

# Each group has a number of its own, and its start the number before.
_NUMBERED = tuple(
    rule
    for group in GROUPS
    for rule in (
        *_block(
            f"group{group}/block<b>",
            f"features.{2 * group - 1}.<b-1>",
            _LAYERS,
            "layer_scale",
            CHANNELS,
        ),
        *_patches(
            f"group{group}/downsample",
            f"features.{2 * group - 2}.1",
            f"features.{2 * group - 2}.0",
        ),
    )
)

TORCHVISION_CONVNEXT = Names(
    (
        *_patches("stem", "features.0.0", "features.0.1"),
        *_NUMBERED,
        *layer_norm("norm", "classifier.0"),
        *linear("classifier", "classifier.2"),
    )
)

_HF = "convnext.encoder.stages.<g-1>"

HF_CONVNEXT = Names(
    (
        *_patches(
            "stem",
            "convnext.embeddings.patch_embeddings",
            "convnext.embeddings.layernorm",
        ),
        *_patches(_DOWN, f"{_HF}.downsampling_layer.1", f"{_HF}.downsampling_layer.0"),
        *_block(
            _BLOCK,
            f"{_HF}.layers.<b-1>",
            ("dwconv", "layernorm", "pwconv1", "pwconv2"),
            "layer_scale_parameter",
            VECTOR,
        ),
        *layer_norm("norm", "convnext.layernorm"),
        *linear("classifier", "classifier"),
    )
)
