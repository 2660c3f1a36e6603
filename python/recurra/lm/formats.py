"""What a config.json says: transformers' Mamba, or one of the library's other models in its own
words."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch

from recurra._files import shown
from recurra.lm.config import LMConfig
from recurra.nn import FFNS, MIXERS, MambaConfig

# Our names by those of transformers' MambaConfig, whose defaults a config.json may leave out.
_FIELDS = {
    "vocab_size": ("vocab_size", 50280),
    "hidden_size": ("d_model", 768),
    "num_hidden_layers": ("n_layers", 32),
    "layer_norm_epsilon": ("norm_eps", 1e-5),
    "tie_word_embeddings": ("tie_embeddings", True),
    "residual_in_fp32": ("residual_in_fp32", True),
}
_MIXER_FIELDS = {
    "state_size": ("d_state", 16),
    "expand": ("expand", 2),
    "conv_kernel": ("d_conv", 4),
    "time_step_rank": ("dt_rank", None),
    "use_bias": ("bias", False),
    "use_conv_bias": ("conv_bias", True),
}
# By what a config.json calls them.
_MIXERS = {mixer.kind: mixer for mixer in MIXERS}
_FFNS = {ffn.kind: ffn for ffn in FFNS}


def config_from_dict(values: dict[str, Any]) -> LMConfig:
    """The configuration that a config.json describes.

    Raises:
        ValueError: it is of another architecture, or a value is out of range.
    """
    kind = values.get("model_type")
    if kind == "mamba":
        return _from_mamba(values)
    if kind == "recurra":
        return _from_recurra(values)
    raise ValueError(f"model_type must be mamba or recurra, got {shown(kind)}")


def config_to_dict(config: LMConfig, dtype: torch.dtype) -> dict[str, Any]:
    """What a config.json says of this configuration."""
    common = {"dtype": str(dtype).removeprefix("torch.")}
    if _is_mamba(config):
        return _to_mamba(config) | common
    return _to_recurra(config) | common


def _is_mamba(config: LMConfig) -> bool:
    """Whether this is a model that transformers calls Mamba."""
    if not isinstance(config.mixer, MambaConfig):
        return False
    fields = {name: getattr(config, name) for name, _ in _FIELDS.values()}
    return config == LMConfig(mixer=config.mixer, eos_token_ids=config.eos_token_ids, **fields)


def stored_name(config: LMConfig, name: str) -> str:
    """What the file of weights calls one of our parameters."""
    if not _is_mamba(config) or name.startswith("lm_head."):
        return name
    return f"backbone.{name}"


def our_name(name: str) -> str:
    """What we call a parameter in a file of weights."""
    # Early files say embedding, and a MambaModel saved without its head has no backbone.
    name = re.sub(r"^backbone\.", "", name)
    return re.sub(r"^embedding\.", "embeddings.", name)


def _from_mamba(values: dict[str, Any]) -> LMConfig:
    if values.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act must be silu, got {shown(values['hidden_act'])}")

    def take(table: dict[str, tuple[str, Any]]) -> dict[str, Any]:
        return {ours: values.get(theirs, default) for theirs, (ours, default) in table.items()}

    mixer = take(_MIXER_FIELDS)
    if mixer["dt_rank"] == "auto":
        mixer["dt_rank"] = None
    rest = take(_FIELDS)
    ends = _end_tokens(values.get("eos_token_id", 0), rest["vocab_size"])
    return LMConfig(mixer=MambaConfig(**mixer), eos_token_ids=ends, **rest)


def _end_tokens(given: Any, vocab: Any) -> tuple:
    tokens = given if isinstance(given, list) else [] if given is None else [given]
    # Generic files name a token that a small vocabulary does not have.
    return tuple(
        t for t in tokens if type(t) is not int or type(vocab) is not int or 0 <= t < vocab
    )


def _to_mamba(config: LMConfig) -> dict[str, Any]:
    values = {theirs: getattr(config, ours) for theirs, (ours, _) in _FIELDS.items()}
    values |= {theirs: getattr(config.mixer, ours) for theirs, (ours, _) in _MIXER_FIELDS.items()}
    values["time_step_rank"] = config.mixer.dt_rank or "auto"
    return {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "hidden_act": "silu",
        "bos_token_id": None,
        "pad_token_id": None,
        "eos_token_id": _to_end_tokens(config),
    } | values


def _to_end_tokens(config: LMConfig) -> int | list[int] | None:
    ends = config.eos_token_ids
    return list(ends) if len(ends) > 1 else ends[0] if ends else None


_OWN = [
    f.name for f in dataclasses.fields(LMConfig) if f.name not in ("mixer", "ffn", "eos_token_ids")
]


def _part(name: str, given: Any, known: dict[str, Any]) -> Any:
    """The configuration of a mixer or a feed-forward layer."""
    if not isinstance(given, dict):
        raise ValueError(f"{name} must be an object, got {shown(given)}")
    kind = given.get("kind")
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(f"the kind of {name} must be {', '.join(known)}, got {shown(kind)}")
    fields = [f.name for f in dataclasses.fields(known[kind])]
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k != "kind"}
    if unknown := sorted(set(values) - set(fields)):
        raise ValueError(
            f"a {name} of kind {kind} has {', '.join(fields)}, got {shown(unknown[0])}"
        )
    return known[kind](**values)


def _from_recurra(values: dict[str, Any]) -> LMConfig:
    given = values.get("mixer")
    if isinstance(given, list):
        if len(given) > len(_MIXERS):
            raise ValueError(f"mixer must hold at most {len(_MIXERS)}, got {len(given)}")
        mixer = tuple(_part("mixer", each, _MIXERS) for each in given)
    else:
        mixer = _part("mixer", given, _MIXERS)
    ffn = values.get("ffn")
    ffn = None if ffn is None else _part("ffn", ffn, _FFNS)
    ends = _end_tokens(values.get("eos_token_id"), values.get("vocab_size"))
    rest = {name: values[name] for name in _OWN if name in values}
    return LMConfig(mixer=mixer, ffn=ffn, eos_token_ids=ends, **rest)


def _to_recurra(config: LMConfig) -> dict[str, Any]:
    def part(each: Any) -> dict[str, Any]:
        return {"kind": each.kind} | dataclasses.asdict(each)

    many = isinstance(config.mixer, tuple)
    return {
        "model_type": "recurra",
        "mixer": [part(m) for m in config.mixer] if many else part(config.mixer),
        "ffn": config.ffn and part(config.ffn),
        "eos_token_id": _to_end_tokens(config),
    } | {name: getattr(config, name) for name in _OWN}
