"""transformers' RecurrentGemmaForCausalLM: Griffin, and Hawk where it has no attention."""

from __future__ import annotations

from typing import Any

from recurra._files import shown
from recurra.lm.config import LMConfig, gemma_scale
from recurra.lm.formats._common import Fields, end_tokens, eos_token_id, give, require, take
from recurra.nn import AttentionConfig, GLUConfig, RGLRUConfig

_FIELDS: Fields = {
    "vocab_size": ("vocab_size", 256000),
    "hidden_size": ("d_model", 2560),
    "num_hidden_layers": ("n_layers", 26),
    "rms_norm_eps": ("norm_eps", 1e-6),
    "logits_soft_cap": ("logits_soft_cap", 30.0),
    "tie_word_embeddings": ("tie_embeddings", True),
}
_RECURRENT: Fields = {
    "num_attention_heads": ("heads", 10),
    "conv1d_width": ("d_conv", 4),
}
_ATTENTION: Fields = {
    "num_attention_heads": ("heads", 10),
    "head_dim": ("head_dim", None),
    "attention_window_size": ("window", 2048),
    "attention_bias": ("bias", False),
}
_ROPE: Fields = {
    "rope_theta": ("rope_theta", 10000.0),
    "partial_rotary_factor": ("rotary", 0.5),
}
_LETTERS = {"recurrent": "R", "attention": "A"}
# Names of modules, ours by theirs: at the ends of the model, in a block, in a part of a block.
_ENDS = {"embed_tokens": "embeddings", "final_norm": "norm_f"}
_BLOCK = {
    "temporal_pre_norm": "norm",
    "temporal_block": "mixer",
    "channel_pre_norm": "ffn_norm",
    "mlp_block": "ffn",
}
_RECURRENT_PART = {"conv_1d": "conv1d", "linear_out": "out_proj"}
_ATTENTION_PART = {"o_proj": "out_proj"}
_FFN_PART = {"down_proj": "out_proj"}


def from_dict(values: dict[str, Any]) -> LMConfig:
    """The configuration that a config.json describes."""
    require(values, hidden_activation="gelu_pytorch_tanh", attention_dropout=0.0)
    rest = take(values, _FIELDS)
    width = _size("hidden_size", rest["d_model"])
    lru_width = _size("lru_width", values.get("lru_width") or width)
    inside = _size("intermediate_size", values.get("intermediate_size", 7680)) // 2
    pattern = _pattern(values.get("block_types", ["recurrent", "recurrent", "attention"]))
    mixers = []
    if "R" in pattern:
        mixers.append(RGLRUConfig(expand=lru_width / width, **take(values, _RECURRENT)))
    if "A" in pattern:
        mixers.append(_attention(values, width))
    return LMConfig(
        mixer=tuple(mixers),
        pattern=pattern,
        ffn=GLUConfig(expand=inside / width, activation="gelu_tanh", bias=True),
        norm="gemma",
        embed_scale=gemma_scale(width),
        residual_in_fp32=False,
        eos_token_ids=end_tokens(values.get("eos_token_id", 1), rest["vocab_size"]),
        **rest,
    )


def _size(name: str, given: Any) -> int:
    if type(given) is not int or not 1 <= given <= 1 << 30:
        raise ValueError(f"{name} must be a positive integer, got {shown(given)}")
    return given


def _pattern(given: Any) -> str:
    if not isinstance(given, list) or not given or not all(str(x) in _LETTERS for x in given):
        raise ValueError(f"block_types must list {' and '.join(_LETTERS)}, got {shown(given)}")
    return "".join(_LETTERS[str(x)] for x in given)


def _attention(values: dict[str, Any], width: int) -> AttentionConfig:
    # Older files have no rope_parameters, but what these hold beside the rest.
    rope: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        given = values.get(name) or {}
        if not isinstance(given, dict):
            raise ValueError(f"{name} must be an object, got {shown(given)}")
        require(given, rope_type="default", type="default")
        rope |= given
    fields = take(values, _ATTENTION) | take(values | rope, _ROPE)
    heads, kv_heads = fields["heads"], values.get("num_key_value_heads")
    if type(heads) is int and heads and fields["head_dim"] == width // heads:
        fields["head_dim"] = None
    kv_heads = heads if kv_heads is None else kv_heads
    return AttentionConfig(kv_heads=kv_heads, out_bias=True, **fields)


def to_dict(config: LMConfig) -> dict[str, Any] | None:
    """What a config.json says of this configuration; None where it is of another architecture."""
    given = config.mixer if isinstance(config.mixer, tuple) else ()
    mixers = {m.letter: m for m in given}
    known = set(config.pattern) == set(mixers) <= set(_LETTERS.values())
    if not mixers or not known or not isinstance(config.ffn, GLUConfig):
        return None
    # transformers repeats the blocks at most a hundred times, and divides by the cap.
    if config.n_layers > 100 * len(config.pattern) or not config.logits_soft_cap:
        return None
    kinds = {letter: kind for kind, letter in _LETTERS.items()}
    width = config.d_model
    attention = mixers.get("A") or AttentionConfig(heads=mixers["R"].heads)
    recurrent = mixers.get("R") or RGLRUConfig(heads=attention.heads)
    values = give(config, _FIELDS) | give(recurrent, _RECURRENT) | give(attention, _ATTENTION)
    values["head_dim"] = attention.head_dim or width // attention.heads
    return {
        "architectures": ["RecurrentGemmaForCausalLM"],
        "model_type": "recurrent_gemma",
        "hidden_activation": "gelu_pytorch_tanh",
        "block_types": [kinds[letter] for letter in config.pattern],
        "lru_width": recurrent.channels(width),
        "intermediate_size": 2 * config.ffn.channels(width),
        "num_key_value_heads": attention.kv_heads,
        "rope_parameters": give(attention, _ROPE) | {"rope_type": "default"},
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "pad_token_id": None,
        "eos_token_id": eos_token_id(config),
    } | values


def our_name(name: str) -> str:
    """What we call a parameter of the file."""
    # A RecurrentGemmaModel saved without its head has no model.
    first, *rest = name.removeprefix("model.").split(".")
    if first != "layers" or len(rest) < 3:
        return ".".join([_ENDS.get(first, first), *rest])
    layer, part, *inside = rest
    if inside[0] == "rg_lru":
        inside = inside[1:]
    names = _FFN_PART if part == "mlp_block" else _RECURRENT_PART | _ATTENTION_PART
    inside[:1] = [names.get(x, x) for x in inside[:1]]
    return ".".join([first, layer, _BLOCK.get(part, part), *inside])


def stored_name(name: str, config: LMConfig) -> str:
    """What the file calls one of our parameters."""
    first, *rest = name.split(".")
    if first == "lm_head":
        return name
    if first != "layers":
        return ".".join(["model", _theirs(_ENDS, first), *rest])
    layer, part, *inside = rest
    if part == "mixer":
        recurrent = config.mixers()[int(layer)].letter == "R"
        inside[0] = _theirs(_RECURRENT_PART if recurrent else _ATTENTION_PART, inside[0])
        if recurrent and len(inside) == 1:
            inside.insert(0, "rg_lru")
    elif part == "ffn":
        inside[0] = _theirs(_FFN_PART, inside[0])
    return ".".join(["model", first, layer, _theirs(_BLOCK, part), *inside])


def _theirs(names: dict[str, str], ours: str) -> str:
    return next((k for k, v in names.items() if v == ours), ours)
