"""Names of the image towers of foundation models."""

import numpy as np

from hintjax.weights.convert import How, Names, Rule
from hintjax.weights.names import (
    OUT,
    TOKENS,
    VECTOR,
    attention,
    conv,
    layer_norm,
    linear,
    positions,
)

PATCHES = How(  # positions of the patches alone; the class token's are in the token
    "tokens width",
    lambda n, width: [(1, n - 1, width)],
    lambda shape, x: positions(1).convert(
        shape, np.concatenate([np.zeros_like(x[:, :1]), x], axis=1)
    ),
    lambda got, wanted: positions(0).fits(got, wanted),
)
REGISTERS = How("tokens width", lambda n, width: [(1, n, width)], lambda shape, x: x[0])
HEADS = How(  # queries, keys or values, where torch has a linear map for each
    "width heads d",
    lambda width, heads, d: [(heads * d, width)],
    lambda shape, x: x.T.reshape(shape),
)
HEADS_BIAS = How(
    "heads d", lambda heads, d: [(heads * d,)], lambda shape, x: x.reshape(shape)
)


def _half(number: int) -> tuple[How, How]:
    """Kernel and bias of the gate (0) or of the gated map (1), which torch joins."""
    kernel = How(
        "in out",
        lambda i, o: [(2 * o, i)],
        lambda shape, x: np.split(x, 2)[number].T,
    )
    bias = How("out", lambda o: [(2 * o,)], lambda shape, x: np.split(x, 2)[number])
    return kernel, bias


def _gated(joined: str, down: str) -> tuple[Rule, ...]:
    """The MLP of SwiGLU; torch joins the maps of the gate and of the gated values."""
    rules = []
    for number, name in enumerate(("gate", "up")):
        kernel, bias = _half(number)
        flax = f"params/block<b>/mlp/{name}"
        rules += [
            Rule(f"{flax}/kernel", (f"{joined}.weight",), kernel),
            Rule(f"{flax}/bias", (f"{joined}.bias",), bias),
        ]
    return (*rules, *linear("block<b>/mlp/down", down))


def _registers(torch: str) -> Rule:
    """The register tokens."""
    return Rule("params/embed/registers", (torch,), REGISTERS)


def _separate(flax: str, **torch: str) -> tuple[Rule, ...]:
    """Attention; torch has a linear map each for `query`, `key`, `value` and `out`."""
    rules = []
    for name in ("query", "key", "value"):
        rules += [
            Rule(f"params/{flax}/{name}/kernel", (f"{torch[name]}.weight",), HEADS),
            Rule(f"params/{flax}/{name}/bias", (f"{torch[name]}.bias",), HEADS_BIAS),
        ]
    return (
        *rules,
        Rule(f"params/{flax}/out/kernel", (f"{torch['out']}.weight",), OUT),
        Rule(f"params/{flax}/out/bias", (f"{torch['out']}.bias",), VECTOR),
    )


_TIMM = "blocks.<b-1>"

_BLOCKS = (  # timm's names, which are also those of DINOv2's authors
    *conv("embed/patches", "patch_embed.proj", bias=True),
    Rule("params/embed/tokens", ("cls_token",), TOKENS),
    *layer_norm("block<b>/norm<n>", f"{_TIMM}.norm<n>"),
    *attention("block<b>/attention", f"{_TIMM}.attn.qkv.", f"{_TIMM}.attn.proj"),
    Rule("params/block<b>/scale<n>/scale", (f"{_TIMM}.ls<n>.gamma",), VECTOR),
    *linear("block<b>/mlp/hidden", f"{_TIMM}.mlp.fc1"),
    *linear("block<b>/mlp/out", f"{_TIMM}.mlp.fc2"),
    *layer_norm("norm", "norm"),
)
_POSITIONS = Rule("params/embed/positions", ("pos_embed",), positions(1))
_MASK = ("*mask_token",)  # only for training

DINOV2 = Names(
    (
        *_BLOCKS,
        *_gated(f"{_TIMM}.mlp.w12", f"{_TIMM}.mlp.w3"),
        _POSITIONS,
        _registers("register_tokens"),
    ),
    _MASK,
)

_TIMM_BLOCKS = (*_BLOCKS, *_gated(f"{_TIMM}.mlp.fc1", f"{_TIMM}.mlp.fc2"))
TIMM_DINOV2 = Names((*_TIMM_BLOCKS, _POSITIONS))

TIMM_DINOV2_REGISTERS = Names(
    (
        *_TIMM_BLOCKS,
        Rule("params/embed/positions", ("pos_embed",), PATCHES),
        _registers("reg_token"),
    )
)

_HF, _INNER = "encoder.layer.<b-1>", "encoder.layer.<b-1>.attention.attention"
_HF_SCALE = Rule(
    "params/block<b>/scale<n>/scale", (f"{_HF}.layer_scale<n>.lambda1",), VECTOR
)

HF_DINOV2 = Names(
    (
        *conv("embed/patches", "embeddings.patch_embeddings.projection", bias=True),
        Rule("params/embed/tokens", ("embeddings.cls_token",), TOKENS),
        Rule(
            "params/embed/positions", ("embeddings.position_embeddings",), positions(1)
        ),
        _registers("embeddings.register_tokens"),
        *layer_norm("block<b>/norm<n>", f"{_HF}.norm<n>"),
        *_separate(
            "block<b>/attention",
            query=f"{_INNER}.query",
            key=f"{_INNER}.key",
            value=f"{_INNER}.value",
            out=f"{_HF}.attention.output.dense",
        ),
        _HF_SCALE,
        *linear("block<b>/mlp/hidden", f"{_HF}.mlp.fc1"),
        *linear("block<b>/mlp/out", f"{_HF}.mlp.fc2"),
        *_gated(f"{_HF}.mlp.weights_in", f"{_HF}.mlp.weights_out"),
        *layer_norm("norm", "layernorm"),
    ),
    _MASK,
)
