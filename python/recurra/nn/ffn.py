"""Feed-forward layers: what a block may do after its mixer, at each time alone."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recurra.nn._config import MixerConfig, check_fields
from recurra.nn._scan import apply_step

_ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}


@dataclasses.dataclass(frozen=True)
class GLUConfig(MixerConfig):
    """Sizes of a :class:`GLU`.

    Attributes:
        expand: channels inside as a multiple of the width of the model.
        activation: silu, gelu or gelu_tanh.
        bias: whether its projections have one.

    Raises:
        ValueError: the activation is unknown, or a size is out of range.
    """

    kind: ClassVar[str] = "glu"

    expand: float = 3
    activation: str = "silu"
    bias: bool = False

    def __post_init__(self) -> None:
        check_fields(self, expand=(1e-3, 1024.0))
        if self.activation not in _ACTIVATIONS:
            known = ", ".join(_ACTIVATIONS)
            raise ValueError(
                f"GLUConfig: activation must be one of {known}, got {self.activation:.100}"
            )

    def channels(self, d_model: int) -> int:
        """Channels inside at this width of the model."""
        return round(self.expand * d_model)

    def make(self, d_model: int) -> GLU:
        """The layer."""
        return GLU(d_model, self)


class GLU(nn.Module):
    """Gated linear unit: out(act(gate(x)) * up(x)).

    Shazeer, "GLU variants improve transformer" (2020). It remembers nothing: its state is None.

    Args:
        d_model: width of the inputs and outputs.
        config: the sizes inside.
    """

    stateful = False

    def __init__(self, d_model: int, config: GLUConfig | None = None):
        super().__init__()
        config = config or GLUConfig()
        inside = config.channels(d_model)
        if inside < 1:
            raise ValueError(f"GLU: expand * d_model must be at least 1, got {inside}")
        self.act = _ACTIVATIONS[config.activation]
        self.gate_proj = nn.Linear(d_model, inside, bias=config.bias)
        self.up_proj = nn.Linear(d_model, inside, bias=config.bias)
        self.out_proj = nn.Linear(inside, d_model, bias=config.bias)

    def reset_parameters(self) -> None:
        """As in torch.nn."""
        for layer in (self.gate_proj, self.up_proj, self.out_proj):
            layer.reset_parameters()

    def initial_state(self, batch: int) -> None:
        """None."""

    def forward(
        self, x: Tensor, state: None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """(B, T, d_model) to the same."""
        return self.out_proj(self.act(self.gate_proj(x)) * self.up_proj(x)), None

    @torch.no_grad()
    def step(self, x: Tensor, state: None = None) -> Tensor:
        """(B, d_model) to the same."""
        gate = self.act(apply_step(self.gate_proj, x))
        return apply_step(self.out_proj, gate * apply_step(self.up_proj, x))
