"""Checks of configurations, in one sentence each."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_type_hints

from recurra._files import shown


def check_fields(config: Any, **ranges: tuple[float, float]) -> None:
    """Checks the fields of a dataclass against their annotations and ranges.

    Args:
        config: an instance of a dataclass whose fields are int, float, bool, str or one of these
            or None.
        ranges: least and largest value by the name of a field.

    Raises:
        ValueError: the first field that does not hold what it must.
    """
    kind = type(config)
    hints = get_type_hints(kind)
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        allowed = getattr(hint, "__args__", (hint,))
        if not any(_is_a(value, t) for t in allowed):
            names = " or ".join("None" if t is type(None) else t.__name__ for t in allowed)
            raise ValueError(
                f"{kind.__name__}: {field.name} must be {names}, got {shown(value)} "
                f"({type(value).__name__})"
            )
        if type(value) not in (int, float):
            continue
        low, high = ranges.get(field.name, (-math.inf, math.inf))
        if not low <= value <= high:
            raise ValueError(
                f"{kind.__name__}: {field.name} must be from {low} to {high}, got {shown(value)}"
            )


def _is_a(value: Any, kind: type) -> bool:
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind or (dataclasses.is_dataclass(kind) and isinstance(value, kind))
