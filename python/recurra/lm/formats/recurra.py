"""The library's own words, for every model that transformers does not know."""

from __future__ import annotations

import dataclasses
from typing import Any

from recurra._files import shown
from recurra.lm.config import LMConfig
from recurra.lm.formats._common import end_tokens, eos_token_id
from recurra.nn import FFNS, MIXERS

# By what a config.json calls them.
_MIXERS = {mixer.kind: mixer for mixer in MIXERS}
_FFNS = {ffn.kind: ffn for ffn in FFNS}
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


def from_dict(values: dict[str, Any]) -> LMConfig:
    """The configuration that a config.json describes."""
    given = values.get("mixer")
    if isinstance(given, list):
        if len(given) > len(_MIXERS):
            raise ValueError(f"mixer must hold at most {len(_MIXERS)}, got {len(given)}")
        mixer = tuple(_part("mixer", each, _MIXERS) for each in given)
    elif given is None and values.get("pattern"):
        mixer = LMConfig.mixer  # all that the pattern names have their defaults
    else:
        mixer = _part("mixer", given, _MIXERS)
    ffn = values.get("ffn")
    ffn = None if ffn is None else _part("ffn", ffn, _FFNS)
    ends = end_tokens(values.get("eos_token_id"), values.get("vocab_size"))
    rest = {name: values[name] for name in _OWN if name in values}
    return LMConfig(mixer=mixer, ffn=ffn, eos_token_ids=ends, **rest)


def to_dict(config: LMConfig) -> dict[str, Any]:
    """What a config.json says of this configuration."""

    def part(each: Any) -> dict[str, Any]:
        return {"kind": each.kind} | dataclasses.asdict(each)

    many = isinstance(config.mixer, tuple)
    return {
        "model_type": "recurra",
        "mixer": [part(m) for m in config.mixer] if many else part(config.mixer),
        "ffn": config.ffn and part(config.ffn),
        "eos_token_id": eos_token_id(config),
    } | {name: getattr(config, name) for name in _OWN}


def our_name(name: str) -> str:
    """What we call a parameter of the file."""
    return name


def stored_name(name: str, config: LMConfig) -> str:
    """What the file calls one of our parameters."""
    return name
