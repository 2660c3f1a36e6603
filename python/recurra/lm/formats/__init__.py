"""What a config.json says and what a file of weights calls its parameters: a module for each
architecture of transformers, and the library's own words for every other model.

A format has ``from_dict(values)``, the configuration that a config.json describes;
``to_dict(config)``, what a config.json says of a configuration, None where it is of another
architecture; ``our_name(name)`` and ``stored_name(name, config)``, of parameters.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch

from recurra._files import shown
from recurra.lm.config import LMConfig
from recurra.lm.formats import mamba, recurra, recurrent_gemma, rwkv

# By their model_type; the first that can say all of a configuration writes it.
FORMATS: dict[str, ModuleType] = {
    "mamba": mamba,
    "rwkv": rwkv,
    "recurrent_gemma": recurrent_gemma,
    "recurra": recurra,
}


def config_from_dict(values: dict[str, Any]) -> LMConfig:
    """The configuration that a config.json describes.

    Raises:
        ValueError: it is of another architecture, or a value is out of range.
    """
    return format_of_dict(values).from_dict(values)


def config_to_dict(config: LMConfig, dtype: torch.dtype) -> dict[str, Any]:
    """What a config.json says of this configuration."""
    return format_of(config).to_dict(config) | {"dtype": str(dtype).removeprefix("torch.")}


def format_of_dict(values: dict[str, Any]) -> ModuleType:
    """The format of a config.json.

    Raises:
        ValueError: it is of another architecture.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FORMATS:
        *others, last = FORMATS
        raise ValueError(f"model_type must be {', '.join(others)} or {last}, got {shown(kind)}")
    return FORMATS[kind]


@functools.lru_cache(8)
def format_of(config: LMConfig) -> ModuleType:
    """The format that a model of this configuration is saved in."""
    for each in FORMATS.values():
        values = each.to_dict(config)
        if values is not None and each.from_dict(values) == config:
            return each
    return recurra
