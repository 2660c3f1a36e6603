"""The hierarchically gated recurrent network."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recurra._check import state_dtype
from recurra.nn._complex import complex_scan, complex_step, to_complex, to_real
from recurra.nn._config import MixerConfig, check_eig_range, check_fields
from recurra.nn._scan import Apply, ScanMixer, channels
from recurra.nn.norm import RMSNorm


@dataclasses.dataclass(frozen=True)
class HGRNConfig(MixerConfig):
    """Sizes of an :class:`HGRN` mixer.

    Attributes:
        expand: numbers of the state, N, as a multiple of the width of the model.
        complex: whether they are complex, as in the paper; else real.
        eig_range: (low, 1), between which the gates lie; the least of the first layer is low.

    Raises:
        ValueError: a size or the range is out of range.
    """

    kind: ClassVar[str] = "hgrn"
    letter: ClassVar[str] = "H"

    expand: float = 1
    complex: bool = False
    eig_range: tuple = (0, 1)

    def __post_init__(self) -> None:
        check_fields(self, expand=(1e-3, 1024.0))
        check_eig_range(self)

    def channels(self, d_model: int) -> int:
        """N at this width of the model."""
        return channels("HGRN", self.expand, d_model)

    def shared(self, d_model: int, count: int) -> HGRNBounds | None:
        """The lower bounds of all layers; None for a single one, which has none."""
        return HGRNBounds(count, self.channels(d_model)) if count > 1 else None

    def make(self, d_model: int) -> HGRN:
        """The mixer."""
        return HGRN(d_model, self)


class HGRNBounds(nn.Module):
    """Lower bounds of the gates, which ascend from layer to layer: the paper's section 3.2.

    Args:
        count: layers.
        N: gates of a layer.
    """

    def __init__(self, count: int, N: int):
        super().__init__()
        self.Gamma = nn.Parameter(torch.empty(count, N))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Equal steps from layer to layer."""
        nn.init.zeros_(self.Gamma)

    def forward(self, index: int) -> Tensor:
        """The bound of a layer that is not the first: the sum of what the softmax over layers gives
        it and those before it, but for the first; (N,), above 0 and below 1, so that both have
        logarithms."""
        steps = self.Gamma.to(state_dtype(self.Gamma.dtype)).softmax(0)
        return steps[1 : index + 1].sum(0).clamp(1e-12, 1 - 1e-6)


class HGRN(ScanMixer):
    r"""Gated recurrence with lower bounds that ascend over layers: Qin, Yang and Zhong,
    "Hierarchically gated recurrent neural network for sequence modeling" (2023), section 3.

    :math:`h_t = f_t e^{i\theta} h_{t-1} + (1 - f_t)\,\mathrm{SiLU}(W_c x_t)` with
    :math:`f_t = \gamma + (1 - \gamma)\,\sigma(W_f x_t)`; without :math:`\theta` where numbers are
    real. What is read of the state is normed and gated. The bound :math:`\gamma` is 0 in the first
    layer, and in a mixer alone.

    Args:
        d_model: width of the inputs and outputs.
        config: the sizes inside.
    """

    def __init__(self, d_model: int, config: HGRNConfig | None = None):
        super().__init__(d_model)
        config = config or HGRNConfig()
        self.N, self.complex = config.channels(d_model), config.complex
        self.low = config.eig_range[0]
        self.state_shapes = ((self.N, 2) if config.complex else (self.N,),)
        parts = self.N * (1 + config.complex)
        self.in_proj = nn.Linear(d_model, self.N + 2 * parts, bias=False)
        self.theta = nn.Parameter(torch.empty(self.N)) if config.complex else None
        self.norm = RMSNorm(parts)
        self.out_proj = nn.Linear(parts, d_model, bias=False)
        # A tuple, since the module belongs to the model: it is no part of this one.
        self.bounds: tuple[HGRNBounds, int] | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Angles from 1 down to 1e-4, as those of positions in transformers; everything else as in
        torch.nn."""
        if self.out_proj.weight.is_meta:  # takes its time even where there is nothing to fill
            return
        for layer in (self.in_proj, self.norm, self.out_proj):
            layer.reset_parameters()
        if self.theta is not None:
            self.theta.copy_(1e4 ** -torch.linspace(0, 1, self.N, device=self.theta.device))

    def share(self, module: HGRNBounds, index: int) -> None:
        """Takes the lower bounds that the layers of a model share, of which this is one."""
        self.bounds = (module, index) if index else None

    def _gates(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """The gate, or its logarithm where it cannot be negative, and 1 less the gate."""
        low = self.low
        if self.bounds is not None:
            module, index = self.bounds
            bound = module(index)
            low = self.low + (1 - self.low) * bound
        rest = (1 - low) * torch.sigmoid(-f)
        if self.low < 0:
            return 1 - rest, rest
        log_f = F.logsigmoid(f)
        if self.bounds is not None:
            # Each is exact where the other is not, close to 1 and to 0.
            small = torch.logaddexp(bound.log(), torch.log1p(-bound) + log_f)
            log_f = torch.where(rest < 0.5, torch.log1p(-rest.clamp(max=0.5)), small)
        return log_f, rest

    def _before(self, x: Tensor, linear: Apply) -> tuple[tuple[Tensor, Tensor], Tensor]:
        parts = self.norm.weight.shape[0]
        f, c, g = linear(self.in_proj, x).split((self.N, parts, parts), dim=-1)
        gate, rest = self._gates(f.to(state_dtype(f.dtype)))
        c = F.silu(c)
        if self.complex:
            theta = self.theta.to(gate.dtype)
            # torch.polar of the gate itself would have a wrong gradient where that is negative.
            turn = 1j * theta + gate if self.low == 0 else gate * torch.exp(1j * theta)
            return (turn, to_complex(c) * rest), g
        # 16 bits keep the leading digits of a logarithm, but not what a gate close to 1 lacks.
        dtype = c.dtype if self.low == 0 else gate.dtype
        return (gate.to(dtype), (c * rest).to(dtype)), g

    def _scan(
        self, given: tuple[Tensor, Tensor], h: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        options = {"log_a": self.low == 0, "cu_seqlens": cu_seqlens}
        if self.complex:
            return complex_scan(self.ops, *given, h, **options)
        return self.ops.linear_scan(*given, h, **options)

    def _scan_step(self, given: tuple[Tensor, Tensor], h: Tensor, slots: Tensor | None) -> Tensor:
        options = {"log_a": self.low == 0, "slots": slots}
        if self.complex:
            return complex_step(self.ops, *given, h, **options)
        return self.ops.linear_scan_step(h, *given, **options)

    def _after(self, h: Tensor, g: Tensor, linear: Apply) -> Tensor:
        h = to_real(h, g.dtype) if self.complex else h.to(g.dtype)
        return linear(self.out_proj, self.norm(h) * F.silu(g))
