"""Names of networks of inverted bottlenecks."""

import re

from hintjax.networks import Variables
from hintjax.weights.convert import Names, Rule, paths
from hintjax.weights.names import COUNTED, batch_norm, conv, linear

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
