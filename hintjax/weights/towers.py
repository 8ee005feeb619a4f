"""Names of the image towers of foundation models."""

import numpy as np

from hintjax._checks import Refusal, message
from hintjax.weights.convert import How, Names, Rule
from hintjax.weights.names import (
    LINEAR,
    OUT,
    TOKENS,
    VECTOR,
    ZEROS,
    attention,
    conv,
    joined,
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
ONE_TOKEN = How("tokens width", lambda n, width: [(width,)], lambda shape, x: x[None])
NO_HEADS_BIAS = How("heads d", lambda heads, d: [], lambda shape: np.zeros(shape))
REGISTERS = How("tokens width", lambda n, width: [(1, n, width)], lambda shape, x: x[0])
HEADS = How(  # queries, keys or values, where torch has a linear map for each
    "width heads d",
    lambda width, heads, d: [(heads * d, width)],
    lambda shape, x: x.T.reshape(shape),
)
HEADS_BIAS = How(
    "heads d", lambda heads, d: [(heads * d,)], lambda shape, x: x.reshape(shape)
)


def _unbiased(
    shape: tuple[int, ...], kernel: np.ndarray, bias: np.ndarray
) -> np.ndarray:
    """The kernel of a linear map, whose bias must be 0."""
    if bias.any():
        wanted = "the projection of CLIP, which has no bias"
        do = "A file that was trained further, as a classifier, has no projection."
        raise Refusal(message("from_torch", wanted, "head.bias that is not 0", do))
    return kernel.T


PROJECTION = How("in out", lambda i, o: [(o, i), (o,)], _unbiased)


def _table(class_tokens: int) -> How:
    """Learned positions as an embedding table, (tokens, width)."""
    whole = positions(class_tokens)
    return How(
        "tokens width",
        lambda n, width: [(n, width)],
        lambda shape, x: whole.convert(shape, x[None]),
        lambda got, wanted: len(got) == 2 and whole.fits((1, *got), (1, *wanted)),
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


def _dinov3(*biases: Rule) -> Names:
    """DINOv3 in timm; queries, keys and values without a rule have no bias."""
    return Names(
        (
            *biases,
            *(
                Rule(f"params/block<b>/attention/{name}/bias", (), NO_HEADS_BIAS)
                for name in ("query", "key", "value")
            ),
            Rule("params/block<b>/scale<n>/scale", (f"{_TIMM}.gamma_<n>",), VECTOR),
            *linear("block<b>/mlp/gate", f"{_TIMM}.mlp.fc1_g"),
            *linear("block<b>/mlp/up", f"{_TIMM}.mlp.fc1_x"),
            *linear("block<b>/mlp/down", f"{_TIMM}.mlp.fc2"),
            *_BLOCKS,
            _registers("reg_token"),
        )
    )


TIMM_DINOV3 = _dinov3()
TIMM_DINOV3_BIASES = _dinov3(
    *(
        Rule(
            f"params/block<b>/attention/{name}/bias",
            (f"{_TIMM}.attn.{name[0]}_bias",),
            HEADS_BIAS,
        )
        for name in ("query", "value")
    )
)

TIMM_CLIP = Names(
    (
        Rule("params/embed/patches/bias", (), ZEROS),
        *_BLOCKS,
        _POSITIONS,
        *layer_norm("embed_norm", "norm_pre"),
        Rule("params/projection/kernel", ("head.weight", "head.bias"), PROJECTION),
    )
)

_POOL = "params/pool/attention"

TIMM_SIGLIP = Names(
    (
        *_BLOCKS,
        Rule("params/embed/positions", ("pos_embed",), positions(0)),
        Rule("params/pool/probe", ("attn_pool.latent",), TOKENS),
        Rule(f"{_POOL}/query/kernel", ("attn_pool.q.weight",), HEADS),
        Rule(f"{_POOL}/query/bias", ("attn_pool.q.bias",), HEADS_BIAS),
        *(
            Rule(f"{_POOL}/{name}/{leaf}", (f"attn_pool.kv.{torch}",), how)
            for number, name in enumerate(("key", "value"))
            for leaf, torch, how in zip(
                ("kernel", "bias"), ("weight", "bias"), joined(number, 2), strict=True
            )
        ),
        Rule(f"{_POOL}/out/kernel", ("attn_pool.proj.weight",), OUT),
        Rule(f"{_POOL}/out/bias", ("attn_pool.proj.bias",), VECTOR),
        *layer_norm("pool/norm", "attn_pool.norm"),
        *linear("pool/mlp/hidden", "attn_pool.mlp.fc1"),
        *linear("pool/mlp/out", "attn_pool.mlp.fc2"),
    )
)

_HF, _INNER = "encoder.layer.<b-1>", "encoder.layer.<b-1>.attention.attention"

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
        Rule(
            "params/block<b>/scale<n>/scale", (f"{_HF}.layer_scale<n>.lambda1",), VECTOR
        ),
        *linear("block<b>/mlp/hidden", f"{_HF}.mlp.fc1"),
        *linear("block<b>/mlp/out", f"{_HF}.mlp.fc2"),
        *_gated(f"{_HF}.mlp.weights_in", f"{_HF}.mlp.weights_out"),
        *layer_norm("norm", "layernorm"),
    ),
    _MASK,
)

_DINOV3 = "layer.<b-1>"

HF_DINOV3 = Names(
    (
        *conv("embed/patches", "embeddings.patch_embeddings", bias=True),
        Rule("params/embed/tokens", ("embeddings.cls_token",), TOKENS),
        _registers("embeddings.register_tokens"),
        *layer_norm("block<b>/norm<n>", f"{_DINOV3}.norm<n>"),
        Rule("params/block<b>/attention/key/bias", (), NO_HEADS_BIAS),
        *_separate(
            "block<b>/attention",
            query=f"{_DINOV3}.attention.q_proj",
            key=f"{_DINOV3}.attention.k_proj",
            value=f"{_DINOV3}.attention.v_proj",
            out=f"{_DINOV3}.attention.o_proj",
        ),
        Rule(
            "params/block<b>/scale<n>/scale",
            (f"{_DINOV3}.layer_scale<n>.lambda1",),
            VECTOR,
        ),
        *linear("block<b>/mlp/hidden", f"{_DINOV3}.mlp.up_proj"),
        *linear("block<b>/mlp/out", f"{_DINOV3}.mlp.down_proj"),
        *linear("block<b>/mlp/gate", f"{_DINOV3}.mlp.gate_proj"),
        *linear("block<b>/mlp/up", f"{_DINOV3}.mlp.up_proj"),
        *linear("block<b>/mlp/down", f"{_DINOV3}.mlp.down_proj"),
        *layer_norm("norm", "norm"),
    ),
    _MASK,
)


def _contrastive(prefix: str, class_tokens: int) -> tuple[Rule, ...]:
    """The parts that the image towers of CLIP and SigLIP share, in transformers."""
    layer = f"{prefix}encoder.layers.<b-1>"
    return (
        Rule(
            "params/embed/positions",
            (f"{prefix}embeddings.position_embedding.weight",),
            _table(class_tokens),
        ),
        *layer_norm("block<b>/norm<n>", f"{layer}.layer_norm<n>"),
        *_separate(
            "block<b>/attention",
            query=f"{layer}.self_attn.q_proj",
            key=f"{layer}.self_attn.k_proj",
            value=f"{layer}.self_attn.v_proj",
            out=f"{layer}.self_attn.out_proj",
        ),
        *linear("block<b>/mlp/hidden", f"{layer}.mlp.fc1"),
        *linear("block<b>/mlp/out", f"{layer}.mlp.fc2"),
        *layer_norm("norm", f"{prefix}post_layernorm"),
    )


# A file of the whole model has the tower of texts too.
_TEXTS = ("text_model.*", "text_projection.*", "logit_*", "*position_ids")
_CLIP = "vision_model."

HF_CLIP = Names(
    (
        *conv("embed/patches", f"{_CLIP}embeddings.patch_embedding"),
        Rule("params/embed/patches/bias", (), ZEROS),
        Rule("params/embed/tokens", (f"{_CLIP}embeddings.class_embedding",), ONE_TOKEN),
        *layer_norm("embed_norm", f"{_CLIP}pre_layrnorm"),
        *_contrastive(_CLIP, class_tokens=1),
        Rule("params/projection/kernel", ("visual_projection.weight",), LINEAR),
    ),
    _TEXTS,
)


def _siglip(prefix: str) -> Names:
    """SigLIP; a file of the tower alone has no prefix since transformers 5."""
    head = f"{prefix}head"
    return Names(
        (
            *conv("embed/patches", f"{prefix}embeddings.patch_embedding", bias=True),
            *_contrastive(prefix, class_tokens=0),
            Rule("params/pool/probe", (f"{head}.probe",), TOKENS),
            *attention(
                "pool/attention",
                f"{head}.attention.in_proj_",
                f"{head}.attention.out_proj",
            ),
            *layer_norm("pool/norm", f"{head}.layernorm"),
            *linear("pool/mlp/hidden", f"{head}.mlp.fc1"),
            *linear("pool/mlp/out", f"{head}.mlp.fc2"),
        ),
        _TEXTS,
    )


HF_SIGLIP, HF_SIGLIP_TOWER = _siglip("vision_model."), _siglip("")
