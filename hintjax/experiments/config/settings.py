"""Settings: options that can differ between the methods of a comparison, as text."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from hintjax._checks import Refusal, described, message, nearest
from hintjax.experiments.config.options import Config


def parse_pair(pair: str) -> tuple[str, str]:
    """`guided=hint` as its two paths.

    >>> parse_pair("conv10=conv2")
    ('conv10', 'conv2')
    """
    guided, equal, hint = pair.partition("=")
    if not (guided and equal and hint):
        raise Refusal(message("config", "pairs as guided=hint", described(pair)))
    return guided, hint


def layer_rates(config: Config) -> dict[str, float]:
    """The factors on the learning rate, by layer.

    >>> layer_rates(Config(layer_rates=("group1=0.1", "group2=0.5")))
    {'group1': 0.1, 'group2': 0.5}
    """
    found = {}
    for text in config.layer_rates:
        layer, equal, factor = text.rpartition("=")
        try:
            found[layer] = float(factor)
        except ValueError:
            equal = ""
        if not (layer and equal and 0 <= found[layer] < math.inf):
            wanted = "layer_rates as layer=factor, with a factor >= 0"
            raise Refusal(message("config", wanted, described(text)))
    return found


def _parse_pairs(text: str) -> tuple[str, ...]:
    """Pairs that are joined by +."""
    for pair in text.split("+"):
        parse_pair(pair)
    return tuple(text.split("+"))


Settings = Mapping[str, Any]  # values by the name of a field of a config

# Fields that can differ between the methods of a comparison, and how they are read.
SETTINGS: Mapping[str, Callable[[str], Any]] = {
    "weight": float,
    "learning_rate": float,
    "temperature": float,
    "pairs": _parse_pairs,
    "task_weight": float,
    "kd_weight": float,
    "hinted_rate": float,
    "hint_epochs": int,
    "negatives": int,
}


def parse_setting(name: str, text: str) -> Any:
    """The value of a setting from its text.

    >>> parse_setting("pairs", "conv10=conv2+conv12=conv4")
    ('conv10=conv2', 'conv12=conv4')
    """
    if name not in SETTINGS:
        do = f"Nearest: {', '.join(nearest(name, SETTINGS))}."
        raise Refusal(message("config", "the name of a setting", described(name), do))
    try:
        return SETTINGS[name](text)
    except ValueError as error:
        if isinstance(error, Refusal):
            raise
        kind = SETTINGS[name].__name__
        got = described(text)
        raise Refusal(message("config", f"{name} to be {kind}", got)) from None


def setting_text(name: str, value: Any) -> str:
    """The text from which `parse_setting` reads a value, with its name.

    >>> setting_text("weight", 300.0)
    'weight=300'
    """
    if name == "pairs":
        return f"{name}={'+'.join(value)}"
    shortest = f"{value:g}" if float(f"{value:g}") == value else f"{value!r}"
    return f"{name}={shortest}"


def own_settings(config: Config) -> dict[str, dict[str, Any]]:
    """The settings of single methods of a comparison, by method.

    >>> own_settings(Config(settings=("at.weight=300",)))
    {'at': {'weight': 300.0}}
    """
    found: dict[str, dict[str, Any]] = {}
    for text in config.settings:
        method, dot, rest = text.partition(".")
        name, equal, value = rest.partition("=")
        if not (method and dot and name and equal and value):
            wanted = "settings as method.option=value"
            raise Refusal(message("config", wanted, described(text)))
        found.setdefault(method, {})[name] = parse_setting(name, value)
    return found


def with_settings(config: Config, own: Settings) -> Config:
    """The config with the settings of one of its methods."""
    return dataclasses.replace(config, settings=(), **own)
