"""The configuration of a run: its options, their checks, and its file.

`options` are the fields, `settings` the options that a comparison can change for single
methods, `checks` what a run refuses, and `files` the way into and out of YAML.
"""

from hintjax.experiments.config.checks import check
from hintjax.experiments.config.files import FILE, from_dict, load, save
from hintjax.experiments.config.options import (
    Config,
    DataOptions,
    HardwareOptions,
    MethodOptions,
    NetworkOptions,
    OutputOptions,
    ScheduleOptions,
    joined,
    part,
)
from hintjax.experiments.config.settings import (
    SETTINGS,
    layer_rates,
    own_settings,
    parse_pair,
    parse_setting,
    setting_text,
    with_settings,
)

__all__ = [
    "FILE",
    "SETTINGS",
    "Config",
    "DataOptions",
    "HardwareOptions",
    "MethodOptions",
    "NetworkOptions",
    "OutputOptions",
    "ScheduleOptions",
    "check",
    "from_dict",
    "joined",
    "layer_rates",
    "load",
    "own_settings",
    "parse_pair",
    "parse_setting",
    "part",
    "save",
    "setting_text",
    "with_settings",
]
