"""transformers' MambaForCausalLM, and the files of mamba_ssm that have its names."""

from __future__ import annotations

import re
from typing import Any

from recurra.lm.config import LMConfig
from recurra.lm.formats._common import Fields, end_tokens, eos_token_id, give, require, take
from recurra.nn import MambaConfig

_FIELDS: Fields = {
    "vocab_size": ("vocab_size", 50280),
    "hidden_size": ("d_model", 768),
    "num_hidden_layers": ("n_layers", 32),
    "layer_norm_epsilon": ("norm_eps", 1e-5),
    "tie_word_embeddings": ("tie_embeddings", True),
    "residual_in_fp32": ("residual_in_fp32", True),
}
_MIXER_FIELDS: Fields = {
    "state_size": ("d_state", 16),
    "expand": ("expand", 2),
    "conv_kernel": ("d_conv", 4),
    "time_step_rank": ("dt_rank", None),
    "use_bias": ("bias", False),
    "use_conv_bias": ("conv_bias", True),
}


def from_dict(values: dict[str, Any]) -> LMConfig:
    """The configuration that a config.json describes."""
    require(values, hidden_act="silu")
    mixer = take(values, _MIXER_FIELDS)
    if mixer["dt_rank"] == "auto":
        mixer["dt_rank"] = None
    rest = take(values, _FIELDS)
    ends = end_tokens(values.get("eos_token_id", 0), rest["vocab_size"])
    return LMConfig(mixer=MambaConfig(**mixer), eos_token_ids=ends, **rest)


def to_dict(config: LMConfig) -> dict[str, Any] | None:
    """What a config.json says of this configuration."""
    if not isinstance(config.mixer, MambaConfig):
        return None
    values = give(config, _FIELDS) | give(config.mixer, _MIXER_FIELDS)
    values["time_step_rank"] = config.mixer.dt_rank or "auto"
    return {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "hidden_act": "silu",
        "bos_token_id": None,
        "pad_token_id": None,
        "eos_token_id": eos_token_id(config),
    } | values


def our_name(name: str) -> str:
    """What we call a parameter of the file."""
    # Early files say embedding, and a MambaModel saved without its head has no backbone.
    name = re.sub(r"^backbone\.", "", name)
    return re.sub(r"^embedding\.", "embeddings.", name)


def stored_name(name: str, config: LMConfig) -> str:
    """What the file calls one of our parameters."""
    return name if name.startswith("lm_head.") else f"backbone.{name}"
