"""Names of networks of inverted bottlenecks."""

import re

import numpy as np

from hintjax.networks import Variables
from hintjax.weights.convert import How, Names, Rule, paths
from hintjax.weights.names import (
    COUNTED,
    VECTOR,
    batch_norm,
    conv,
    layer_norm,
    linear,
)

_BLOCK = "group<g>/block<b>"


def _conv_norm(flax: str, convolution: str, norm: str) -> tuple[Rule, ...]:
    """A convolution without a bias, then BatchNorm."""
    return *conv(f"{flax}/conv", convolution), *batch_norm(f"{flax}/norm", norm)


_TIMM, _FIRST = "blocks.<g-1>.<b-1>", "blocks.0.<b-1>"

TIMM_EFFICIENTNET_LITE = Names(
    (
        *_conv_norm("stem", "conv_stem", "bn1"),
        # The blocks of the first group have no expansion, and count from there.
        *_conv_norm("group1/block<b>/depthwise", f"{_FIRST}.conv_dw", f"{_FIRST}.bn1"),
        *_conv_norm("group1/block<b>/project", f"{_FIRST}.conv_pw", f"{_FIRST}.bn2"),
        *_conv_norm(f"{_BLOCK}/expand", f"{_TIMM}.conv_pw", f"{_TIMM}.bn1"),
        *_conv_norm(f"{_BLOCK}/depthwise", f"{_TIMM}.conv_dw", f"{_TIMM}.bn2"),
        *_conv_norm(f"{_BLOCK}/project", f"{_TIMM}.conv_pwl", f"{_TIMM}.bn3"),
        *_conv_norm("head", "conv_head", "bn2"),
        *linear("classifier", "classifier"),
    ),
    COUNTED,
)

_FLAT = "_blocks.<n>"
_BLOCKS = (
    *_conv_norm(f"{_BLOCK}/expand", f"{_FLAT}._expand_conv", f"{_FLAT}._bn0"),
    *_conv_norm(f"{_BLOCK}/depthwise", f"{_FLAT}._depthwise_conv", f"{_FLAT}._bn1"),
    *_conv_norm(f"{_BLOCK}/project", f"{_FLAT}._project_conv", f"{_FLAT}._bn2"),
)


def efficientnet_lite(like: Variables) -> Names:
    """The map of names of efficientnet-lite-pytorch, which numbers all blocks in a row.

    Args:
        like: variables of the model, or their shapes; the groups of the model say which
            block has which number.
    """
    return Names(
        (
            *_conv_norm("stem", "_conv_stem", "_bn0"),
            *_numbered(_BLOCKS, like),
            *_conv_norm("head", "_conv_head", "_bn1"),
            *linear("classifier", "_fc"),
        ),
        COUNTED,
    )


def torchvision_mobilenet_v3(like: Variables) -> Names:
    """The map of names of torchvision's MobileNetV3.

    Args:
        like: variables of the model, or their shapes; the model says which parts each
            block has, because torchvision numbers them.
    """
    leaves, rules = paths(like), []
    for number, (group, block) in enumerate(_blocks(like), start=1):
        flax, torch = f"group{group}/block{block}", f"features.{number}.block"
        known = [
            part
            for part in ("expand", "depthwise", "squeeze", "project")
            if any(path.startswith(f"params/{flax}/{part}/") for path in leaves)
        ]
        for place, part in enumerate(known):
            name = f"{torch}.{place}"
            if part == "squeeze":
                rules += conv(f"{flax}/squeeze/reduce", f"{name}.fc1", bias=True)
                rules += conv(f"{flax}/squeeze/expand", f"{name}.fc2", bias=True)
            else:
                rules += _conv_norm(f"{flax}/{part}", f"{name}.0", f"{name}.1")
    last = f"features.{len(_blocks(like)) + 1}"
    return Names(
        (
            *_conv_norm("stem", "features.0.0", "features.0.1"),
            *rules,
            *_conv_norm("head", f"{last}.0", f"{last}.1"),
            *linear("hidden", "classifier.0"),
            *linear("classifier", "classifier.3"),
        ),
        COUNTED,
    )


_OURS, _TIMMS = 1e-3, 1e-5  # epsilon of the BatchNorms of MobileNetV3 and V4
SHIFTED = How(  # a variance with which our epsilon gives the numbers of timm's
    "features",
    lambda n: [(n,)],
    lambda shape, x: x.astype(np.float64) + _TIMMS - _OURS,
)
SQUARE = How(  # a linear map that is a convolution of 1x1 in torch
    "in out", lambda i, o: [(o, i, 1, 1)], lambda shape, x: x[..., 0, 0].T
)


def _shifted(flax: str, convolution: str, norm: str) -> tuple[Rule, ...]:
    """A convolution without a bias, then BatchNorm with timm's epsilon."""
    return *conv(f"{flax}/conv", convolution), *_shifted_norm(f"{flax}/norm", norm)


def _shifted_norm(flax: str, norm: str) -> tuple[Rule, ...]:
    """BatchNorm with timm's epsilon."""
    return (
        *layer_norm(flax, norm),
        Rule(f"batch_stats/{flax}/mean", (f"{norm}.running_mean",), VECTOR),
        Rule(f"batch_stats/{flax}/var", (f"{norm}.running_var",), SHIFTED),
    )


def _squeeze(flax: str, torch: str) -> tuple[Rule, ...]:
    """Squeeze and excitation in timm."""
    return (
        *conv(f"{flax}/squeeze/reduce", f"{torch}.se.conv_reduce", bias=True),
        *conv(f"{flax}/squeeze/expand", f"{torch}.se.conv_expand", bias=True),
    )


def timm_mobilenet_v3(like: Variables) -> Names:
    """The map of names of timm's MobileNetV3 (mobilenetv3_large_100 and the like).

    Args:
        like: variables of the model, or their shapes; the head has the number of the
            last group.
    """
    last = f"blocks.{max((group for group, _ in _blocks(like)), default=0)}.0"
    first = "group1/block<b>"
    return Names(
        (
            *_shifted("stem", "conv_stem", "bn1"),
            *_shifted(
                "group1/block<b>/depthwise", f"{_FIRST}.conv_dw", f"{_FIRST}.bn1"
            ),
            *_shifted(f"{first}/project", f"{_FIRST}.conv_pw", f"{_FIRST}.bn2"),
            *_shifted(f"{_BLOCK}/expand", f"{_TIMM}.conv_pw", f"{_TIMM}.bn1"),
            *_shifted(f"{_BLOCK}/depthwise", f"{_TIMM}.conv_dw", f"{_TIMM}.bn2"),
            *_shifted(f"{_BLOCK}/project", f"{_TIMM}.conv_pwl", f"{_TIMM}.bn3"),
            *_squeeze(_BLOCK, _TIMM),
            *_shifted("head", f"{last}.conv", f"{last}.bn1"),
            Rule("params/hidden/kernel", ("conv_head.weight",), SQUARE),
            Rule("params/hidden/bias", ("conv_head.bias",), VECTOR),
            *linear("classifier", "classifier"),
        ),
        COUNTED,
    )


_FUSED = "group1/block<b>"  # fused inverted bottlenecks, or plain blocks

TIMM_MOBILENET_V4 = Names(
    (
        *_shifted("stem", "conv_stem", "bn1"),
        *_shifted(f"{_FUSED}/expand", f"{_FIRST}.conv_exp", f"{_FIRST}.bn1"),
        *_shifted(f"{_FUSED}/project", f"{_FIRST}.conv_pwl", f"{_FIRST}.bn2"),
        # A plain block has no layers of its own.
        *_shifted(_BLOCK, f"{_TIMM}.conv", f"{_TIMM}.bn1"),
        *_shifted(f"{_BLOCK}/start", f"{_TIMM}.dw_start.conv", f"{_TIMM}.dw_start.bn"),
        *_shifted(f"{_BLOCK}/expand", f"{_TIMM}.pw_exp.conv", f"{_TIMM}.pw_exp.bn"),
        *_shifted(f"{_BLOCK}/depthwise", f"{_TIMM}.dw_mid.conv", f"{_TIMM}.dw_mid.bn"),
        *_shifted(f"{_BLOCK}/project", f"{_TIMM}.pw_proj.conv", f"{_TIMM}.pw_proj.bn"),
        *_shifted("head", "blocks.4.0.conv", "blocks.4.0.bn1"),
        Rule("params/hidden/kernel", ("conv_head.weight",), SQUARE),
        *_shifted_norm("norm", "norm_head"),
        *linear("classifier", "classifier"),
    ),
    COUNTED,
    (("blocks.*.attn.*", "MobileNetV4-Hybrid, which has attention"),),
)


def _numbered(rules: tuple[Rule, ...], like: Variables) -> list[Rule]:
    """The rules of every block of a model; `<n>` is its number through all groups."""
    return [
        Rule(
            rule.flax.replace("<g>", str(group)).replace("<b>", str(block)),
            tuple(name.replace("<n>", str(number)) for name in rule.torch),
            rule.how,
        )
        for number, (group, block) in enumerate(_blocks(like))
        for rule in rules
    ]


def _blocks(like: Variables) -> list[tuple[int, int]]:
    """The blocks of a model in their order: number of the group, number in it."""
    found = (re.match(r"params/group(\d+)/block(\d+)/", path) for path in paths(like))
    return sorted({(int(one[1]), int(one[2])) for one in found if one})
