"""transformers' RwkvForCausalLM, which is RWKV-4."""

from __future__ import annotations

from typing import Any

from recurra._files import shown
from recurra.lm.config import LMConfig
from recurra.lm.formats._common import Fields, end_tokens, eos_token_id, give, take
from recurra.nn import RWKV4ChannelConfig, RWKV4Config

_FIELDS: Fields = {
    "vocab_size": ("vocab_size", 50277),
    "hidden_size": ("d_model", 4096),
    "num_hidden_layers": ("n_layers", 32),
    "layer_norm_epsilon": ("norm_eps", 1e-5),
    "rescale_every": ("rescale_every", 6),
    "tie_word_embeddings": ("tie_embeddings", False),
}
# What transformers adds in the last norm, whatever layer_norm_epsilon is.
_FINAL_EPS = 1e-5
# Parts of their names and of ours, to be replaced in this order either way.
_NAMES = (
    ("blocks.0.pre_ln.", "embed_norm."),
    ("blocks.", "layers."),
    (".ln1.", ".norm."),
    (".ln2.", ".ffn_norm."),
    (".attention.output.", ".mixer.out_proj."),
    (".attention.", ".mixer."),
    (".feed_forward.value.", ".ffn.out_proj."),
    (".feed_forward.", ".ffn."),
    ("ln_out.", "norm_f."),
    ("head.", "lm_head."),
)


def from_dict(values: dict[str, Any]) -> LMConfig:
    """The configuration that a config.json describes."""
    rest = take(values, _FIELDS)
    every = rest["rescale_every"]
    width = rest["d_model"]
    return LMConfig(
        mixer=RWKV4Config(_expand(values, "attention_hidden_size", width, 1)),
        ffn=RWKV4ChannelConfig(_expand(values, "intermediate_size", width, 4)),
        norm="layer",
        embed_norm=True,
        final_norm_eps=None if rest["norm_eps"] == _FINAL_EPS else _FINAL_EPS,
        eos_token_ids=end_tokens(values.get("eos_token_id", 0), rest["vocab_size"]),
        # There, a negative number says never as well.
        **rest | {"rescale_every": max(every, 0) if type(every) is int else every},
    )


def _expand(values: dict[str, Any], name: str, width: Any, default: int) -> float:
    inside = values.get(name)
    if inside is not None and (type(inside) is not int or not 1 <= inside <= 1 << 31):
        raise ValueError(f"{name} must be an integer from 1 to {1 << 31}, got {shown(inside)}")
    # A width that is none is refused with the other sizes.
    return default if inside is None or type(width) is not int or width < 1 else inside / width


def to_dict(config: LMConfig) -> dict[str, Any] | None:
    """What a config.json says of this configuration."""
    mixer, ffn = config.mixer, config.ffn
    if not isinstance(mixer, RWKV4Config) or not isinstance(ffn, RWKV4ChannelConfig):
        return None
    return {
        "architectures": ["RwkvForCausalLM"],
        "model_type": "rwkv",
        "attention_hidden_size": mixer.channels(config.d_model),
        "intermediate_size": ffn.channels(config.d_model),
        "bos_token_id": None,
        "eos_token_id": eos_token_id(config),
    } | give(config, _FIELDS)


def our_name(name: str) -> str:
    """What we call a parameter of the file."""
    name = name.removeprefix("rwkv.")
    for theirs, ours in _NAMES:
        name = name.replace(theirs, ours)
    return name


def stored_name(name: str, config: LMConfig) -> str:
    """What the file calls one of our parameters."""
    for theirs, ours in _NAMES:
        name = name.replace(ours, theirs)
    return name if name.startswith("head.") else f"rwkv.{name}"
