"""A recurrent layer that real-time recurrent learning can carry the sensitivities of."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from recurra.ops import rtrl as op

# Of what a step of a linear recurrence may keep at most: online, weights never rest, and a state
# that grows does not come back.
_KEPT = 0.9999


class Layer(nn.Module):
    """x = W u + b, then a channel-wise recurrence of x.

    Args:
        inputs: D, of u.
        channels: N, of the recurrence.
        cell: one of :func:`recurra.rtrl.recurrences`.
        forget_bias: added to the bias of an input that is named forget.
        dtype, device: of the parameters.

    Attributes:
        in_proj: nn.Linear with the weight (G N, D), G rows of channels one after the other.
        params: (P, N), the parameters of the recurrence.
        out_features: of y: N, or 2 N for ``linear-complex``.

    Raises:
        RuntimeError: the cell is unknown.
    """

    def __init__(
        self,
        inputs: int,
        channels: int,
        cell: str = "elstm",
        *,
        forget_bias: float = 1.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        info = op.recurrence(cell, "Layer")
        self.cell, self.inputs, self.channels = cell, inputs, channels
        self.out_features = channels * (2 if cell == "linear-complex" else 1)
        kind = {"dtype": dtype, "device": device}
        self.in_proj = nn.Linear(inputs, len(info.inputs) * channels, **kind)
        self.params = nn.Parameter(torch.empty(len(info.params), channels, **kind))
        self._info = info
        self.reset_parameters(forget_bias)

    @torch.no_grad()
    def reset_parameters(self, forget_bias: float = 1.0) -> None:
        """Draws new parameters: small recurrent weights, and memories of a wide range of lengths
        for the linear recurrences."""
        self.in_proj.reset_parameters()
        bias = self.in_proj.bias.view(len(self._info.inputs), self.channels)
        for name, row in zip(self._info.inputs, bias, strict=True):
            if name == "forget":
                row += forget_bias
        names = self._info.params
        if self.cell == "linear-complex":
            size = self.params[0].uniform_(0.8**2, 0.999**2).sqrt()
            angle = torch.empty_like(size).uniform_(0, 2 * math.pi)
            self.params.copy_(torch.stack([size * angle.cos(), size * angle.sin()]))
        elif self.cell == "linear":
            self.params.uniform_(0.5, 0.999)
        else:
            self.params.uniform_(-0.5, 0.5)
            if "dt" in names:  # a step of time, not a weight
                self.params[names.index("dt")] = 0.5
            if "alpha" in names:
                self.params[names.index("alpha")].abs_()
        if self.cell == "linear-gated":
            self.in_proj.weight[: self.channels] *= 0.1
            bias[0].uniform_(0.5, 0.9)

    def initial_state(self, batch: int) -> Tensor:
        """(B, K, N) zeros."""
        return self.params.new_zeros(batch, len(self._info.states), self.channels)

    def initial_sensitivities(self, batch: int) -> op.Sensitivities:
        """Of a state that does not depend on the parameters: zeros."""
        kind = {"dtype": self.params.dtype, "device": self.params.device}
        return op.initial(self.cell, batch, self.inputs, self.channels, **kind)

    def project(self, u: Tensor) -> Tensor:
        """x (B, T, G, N) of u (B, T, D)."""
        return self.in_proj(u).unflatten(-1, (len(self._info.inputs), self.channels))

    def recur(
        self, x: Tensor, h0: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """:meth:`forward` of what :meth:`project` has projected."""
        return op.run(x, self.params, h0, self.cell, reset)

    def forward(
        self, u: Tensor, h0: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The layer over a chunk, differentiable.

        Args:
            u: (B, T, D).
            h0: (B, K, N), the state before; zero when None.
            reset: (B, T) of bool; where True the state before that step is zero.

        Returns:
            y: (B, T, N), or (B, T, 2 N) with the real and then the imaginary parts.
            h_last: (B, K, N).
        """
        return self.recur(self.project(u), h0, reset)

    @torch.no_grad()
    def clip(self) -> None:
        """Brings the decays of a linear recurrence back to at most 0.9999, if they left."""
        if self.cell == "linear":
            self.params.clamp_(-_KEPT, _KEPT)
        elif self.cell == "linear-complex":
            self.params.div_((self.params.norm(dim=0) / _KEPT).clamp_min(1))

    def extra_repr(self) -> str:
        return f"{self.inputs}, {self.channels}, cell={self.cell!r}"
