"""What several formats need."""

from __future__ import annotations

from typing import Any

from recurra._files import shown
from recurra.lm.config import LMConfig

# Our name of a field and what it is where a config.json leaves it out, by their name.
Fields = dict[str, tuple[str, Any]]


def take(values: dict[str, Any], fields: Fields) -> dict[str, Any]:
    """The fields under our names."""
    return {ours: values.get(theirs, default) for theirs, (ours, default) in fields.items()}


def give(config: Any, fields: Fields) -> dict[str, Any]:
    """The fields of a configuration under their names."""
    return {theirs: getattr(config, ours) for theirs, (ours, _) in fields.items()}


def require(values: dict[str, Any], **only: Any) -> None:
    """Refuses what no model here has: each value, where it is given, must be this one.

    Raises:
        ValueError: one is another.
    """
    for name, value in only.items():
        if values.get(name, value) != value:
            raise ValueError(f"{name} must be {value}, got {shown(values[name])}")


def end_tokens(given: Any, vocab: Any) -> tuple:
    """The tokens that an eos_token_id names."""
    tokens = given if isinstance(given, list) else [] if given is None else [given]
    # Generic files name a token that a small vocabulary does not have.
    return tuple(
        t for t in tokens if type(t) is not int or type(vocab) is not int or 0 <= t < vocab
    )


def eos_token_id(config: LMConfig) -> int | list[int] | None:
    """Those tokens in the way of a config.json."""
    ends = config.eos_token_ids
    return list(ends) if len(ends) > 1 else ends[0] if ends else None
