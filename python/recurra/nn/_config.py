"""What the configurations of mixers have in common, and their checks, in one sentence each."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, get_type_hints

import torch
from torch import nn

from recurra._files import shown


@dataclasses.dataclass(frozen=True)
class MixerConfig:
    """What makes a mixer at any width of the model.

    Attributes:
        kind: what a config.json calls it.
        letter: what a pattern calls it.
    """

    kind: ClassVar[str]
    letter: ClassVar[str]

    def make(self, d_model: int) -> nn.Module:
        """The mixer."""
        raise NotImplementedError

    def shared(self, d_model: int, count: int) -> nn.Module | None:
        """What ``count`` mixers of this kind in one model have in common, if anything; each is
        then given it with ``share(module, index)``."""
        return None

    def empty(self, d_model: int, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The mixer on the meta device, where it takes no memory.

        Raises:
            ValueError: a parameter has more bytes than torch counts.
        """
        try:
            with torch.device("meta"):
                made = self.make(d_model)
                # Fake tensors cannot be converted in place.
                return made if dtype == torch.get_default_dtype() else made.to(dtype)
        except RuntimeError as error:
            if "overflow" not in str(error):
                raise
            raise ValueError(
                f"{type(self).__name__}: a parameter at d_model = {d_model} has more bytes than "
                "64 bits count"
            ) from None

    def parameter_count(self, d_model: int) -> int:
        """Numbers in a mixer of this width."""
        return sum(p.numel() for p in self.empty(d_model).parameters())

    def state(self, d_model: int, dtype: torch.dtype = torch.float32) -> Any:
        """The state of one sequence in a mixer of this width, on the meta device."""
        with torch.device("meta"):
            return self.empty(d_model, dtype).initial_state(1)


def check_eig_range(config: Any) -> None:
    """Checks ``config.eig_range``, between which the gates lie: from at least -1 to 1, with 0 in
    it.

    Raises:
        ValueError: it is not that.
    """
    given = config.eig_range
    numbers = isinstance(given, tuple) and [type(x) in (int, float) for x in given] == [True, True]
    if not numbers or not -1 <= given[0] <= 0 or given[1] != 1:
        raise ValueError(
            f"{type(config).__name__}: eig_range must be (low, 1) with low from -1 to 0, "
            f"got {shown(given)}"
        )


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
