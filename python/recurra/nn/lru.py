"""The linear recurrent unit."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recurra._check import state_dtype
from recurra.nn._complex import complex_scan, complex_step, to_complex, to_real
from recurra.nn._config import MixerConfig, check_fields
from recurra.nn._scan import Apply, ScanMixer, channels


@dataclasses.dataclass(frozen=True)
class LRUConfig(MixerConfig):
    """Sizes of an :class:`LRU` mixer and the ring on which its eigenvalues begin.

    Attributes:
        expand: complex numbers of the state, N, as a multiple of the width of the model.
        r_min: least modulus at the beginning.
        r_max: largest; close to 1 for long memories.
        max_phase: largest argument; small for long memories.

    Raises:
        ValueError: a size is out of range, or r_min is above r_max.
    """

    kind: ClassVar[str] = "lru"
    letter: ClassVar[str] = "L"

    expand: float = 1
    r_min: float = 0.0
    r_max: float = 1.0
    max_phase: float = 2 * math.pi

    def __post_init__(self) -> None:
        check_fields(
            self,
            expand=(1e-3, 1024.0),
            r_min=(0.0, 1.0),
            r_max=(0.0, 1.0),
            max_phase=(1e-6, 2 * math.pi),
        )
        if self.r_min > self.r_max:
            raise ValueError(
                f"LRUConfig: r_min must be at most r_max, {self.r_max}, got {self.r_min}"
            )

    def make(self, d_model: int) -> LRU:
        """The mixer."""
        return LRU(d_model, self)


class LRU(ScanMixer):
    r"""Linear recurrent unit, Orvieto et al., "Resurrecting recurrent neural networks for long
    sequences" (2023), sections 3.3 and 3.4 and its block.

    :math:`h_t = \lambda h_{t-1} + \gamma \odot B x_t` and :math:`y_t = \mathrm{Re}(C h_t) + D x_t`
    with complex diagonal :math:`\lambda = \exp(-e^\nu + i e^\theta)`; then GELU and a gated linear
    unit.

    Rounding an angle turns its state a little more with each input. Cast to bfloat16 as a whole, a
    new mixer is 2 to 15 % off over 1024 inputs; with ``theta_log`` left in float32, as it may be
    and as autocast leaves it, 0.5 %.

    Args:
        d_model: width of the inputs and outputs.
        config: the sizes inside.
    """

    def __init__(self, d_model: int, config: LRUConfig | None = None):
        super().__init__(d_model)
        self.config = config or LRUConfig()
        N = channels("LRU", self.config.expand, d_model)
        self.state_shapes = ((N, 2),)
        self.nu_log, self.theta_log, self.gamma_log = (
            nn.Parameter(torch.empty(N)) for _ in range(3)
        )
        self.D = nn.Parameter(torch.empty(d_model))
        # Complex matrices as real ones: B to both parts of the state, C from both.
        self.in_proj = nn.Linear(d_model, 2 * N, bias=False)
        self.state_proj = nn.Linear(2 * N, d_model, bias=False)
        self.out_proj = nn.Linear(d_model, 2 * d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Eigenvalues uniform on the ring, gamma the root of 1 - |lambda|^2; B, C and D
        normal, as in the paper; the last layer as in torch.nn."""
        if self.D.is_meta:  # takes its time even where there is nothing to fill
            return
        c, width = self.config, self.D.shape[0]
        uniform = torch.rand(2, self.nu_log.shape[0], device=self.D.device, dtype=torch.float64)
        # Neither 0, which would have no logarithm, nor 1, which would have no decay.
        squared = (uniform[0] * (c.r_max**2 - c.r_min**2) + c.r_min**2).clamp(1e-8, 1 - 1e-7)
        self.nu_log.copy_((-0.5 * squared.log()).log())
        self.theta_log.copy_((uniform[1] * c.max_phase).clamp(min=1e-8).log())
        self.gamma_log.copy_(0.5 * (-torch.expm1(squared.log())).log())
        nn.init.normal_(self.in_proj.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(self.state_proj.weight, std=self.nu_log.shape[0] ** -0.5)
        nn.init.normal_(self.D)
        self.out_proj.reset_parameters()

    def eigenvalues(self) -> Tensor:
        """Lambda, (N,), complex128 for float64 models and complex64 for all others."""
        nu, theta = (p.to(state_dtype(p.dtype)).exp() for p in (self.nu_log, self.theta_log))
        return torch.polar(torch.exp(-nu), theta)

    def _before(self, x: Tensor, linear: Apply) -> tuple[tuple[Tensor, Tensor], Tensor]:
        gamma = self.gamma_log.to(state_dtype(self.gamma_log.dtype)).exp()
        return (self.eigenvalues()[None], to_complex(linear(self.in_proj, x)) * gamma), x

    def _scan(
        self, given: tuple[Tensor, Tensor], h: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        a, b = given
        return complex_scan(self.ops, a[None], b, h, cu_seqlens=cu_seqlens)

    def _scan_step(self, given: tuple[Tensor, Tensor], h: Tensor, slots: Tensor | None) -> Tensor:
        return complex_step(self.ops, *given, h, slots=slots)

    def _after(self, h: Tensor, x: Tensor, linear: Apply) -> Tensor:
        y = linear(self.state_proj, to_real(h, x.dtype)) + self.D * x
        return F.glu(linear(self.out_proj, F.gelu(y)), dim=-1)
