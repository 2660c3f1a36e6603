"""The Mamba mixer."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recurra._check import state_dtype
from recurra.nn._config import MixerConfig, check_fields
from recurra.nn._mixer import Kept, Mixer
from recurra.ops.linear_step import linear_step


@dataclasses.dataclass(frozen=True)
class MambaConfig(MixerConfig):
    """Sizes of a :class:`Mamba` mixer. It has no ``eig_range``: its gates exp(dt A) are positive
    by construction.

    Attributes:
        d_state: N, states of a channel.
        expand: channels inside, D, as a multiple of the width of the model.
        d_conv: W, width of the convolution.
        dt_rank: rank of the projection to the time step; a sixteenth of the width when None.
        bias: whether the projections in and out have a bias.
        conv_bias: whether the convolution has one.

    Raises:
        ValueError: a size is out of range.
    """

    kind: ClassVar[str] = "mamba"
    letter: ClassVar[str] = "M"

    d_state: int = 16
    expand: float = 2
    d_conv: int = 4
    dt_rank: int | None = None
    bias: bool = False
    conv_bias: bool = True

    def __post_init__(self) -> None:
        check_fields(
            self, d_state=(1, 65536), expand=(1e-3, 1024.0), d_conv=(1, 1024), dt_rank=(1, 1 << 20)
        )

    def sizes(self, d_model: int) -> tuple[int, int]:
        """D and the rank of the time step at this width of the model."""
        return int(self.expand * d_model), self.dt_rank or math.ceil(d_model / 16)

    def parameter_count(self, d_model: int) -> int:
        """Numbers in a mixer of this width."""
        D, rank = self.sizes(d_model)
        N, W = self.d_state, self.d_conv
        projections = 3 * d_model * D + D * (rank + 2 * N) + rank * D
        biases = (2 * D + d_model) * self.bias + D * self.conv_bias
        return projections + biases + D * (N + W + 2)

    def make(self, d_model: int) -> Mamba:
        """The mixer."""
        return Mamba(d_model, self)


class MambaState(NamedTuple):
    """What a :class:`Mamba` remembers.

    Attributes:
        conv: the last inputs of the convolution, (B, W-1, D).
        ssm: the state of the scan, (B, D, N).

    Both are float32 for 16-bit models, otherwise of the dtype of the model.
    """

    conv: Tensor
    ssm: Tensor


@torch.no_grad()
def init_time_steps_(bias: Tensor, dt_min: float, dt_max: float, floor: float = 1e-4) -> None:
    """Fills a bias so that its softplus, the time step, is log-uniform between the bounds."""
    low, high = math.log(dt_min), math.log(dt_max)
    dt = torch.empty_like(bias).uniform_(low, high).exp_().clamp_(min=floor)
    bias.copy_(dt + torch.log(-torch.expm1(-dt)))


def decay_rates(A_log: Tensor) -> Tensor:
    """A of the scan, negative, in float32 for 16-bit parameters."""
    return -torch.exp(A_log.to(state_dtype(A_log.dtype)))


class Mamba(Mixer):
    """Selective state space mixer, Gu and Dao, "Mamba: linear-time sequence modeling with selective
    state spaces" (2023), section 3.4 and algorithm 2.

    Parameters have the names and shapes of mamba_ssm's and transformers' mixers.

    Args:
        d_model: width of the inputs and outputs.
        config: the sizes inside.
    """

    State = MambaState
    slotted = True

    def __init__(self, d_model: int, config: MambaConfig | None = None):
        super().__init__(d_model)
        config = config or MambaConfig()
        (D, self.dt_rank), N = config.sizes(d_model), config.d_state
        if D < 1:
            raise ValueError(f"Mamba: expand * d_model must be at least 1, got {D}")
        self.in_proj = nn.Linear(d_model, 2 * D, bias=config.bias)
        # Holds weight (D, 1, W) and bias (D,); the op computes.
        self.conv1d = nn.Conv1d(D, D, config.d_conv, groups=D, bias=config.conv_bias)
        self.x_proj = nn.Linear(D, self.dt_rank + 2 * N, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, D)
        self.A_log = nn.Parameter(torch.empty(D, N))
        self.D = nn.Parameter(torch.empty(D))
        self.out_proj = nn.Linear(D, d_model, bias=config.bias)
        self.state_shapes = ((max(config.d_conv, 2) - 1, D), (D, N))
        self._kept = Kept()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, dt_min: float = 0.001, dt_max: float = 0.1) -> None:
        """A = -(1, ..., N), S4D's real initialisation; time steps log-uniform between the bounds;
        everything else as in torch.nn."""
        if self.D.is_meta:  # takes its time even where there is nothing to fill
            return
        for layer in (self.in_proj, self.conv1d, self.x_proj, self.out_proj):
            layer.reset_parameters()
        bound = self.dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        init_time_steps_(self.dt_proj.bias, dt_min, dt_max)
        D, N = self.A_log.shape
        self.A_log.copy_(torch.arange(1, N + 1, dtype=self.A_log.dtype).log().expand(D, N))
        nn.init.ones_(self.D)

    def _conv_weight(self) -> Tensor:
        weight = self.conv1d.weight[:, 0]
        return weight if weight.shape[1] > 1 else F.pad(weight, (1, 0))

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        N = self.A_log.shape[1]
        return x.split((self.dt_rank, N, N), dim=-1)

    def _A(self) -> Tensor:
        return decay_rates(self.A_log)

    def forward(
        self, x: Tensor, state: MambaState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, MambaState]:
        """Mixes whole sequences, or the next chunk of them.

        Args:
            x: (B, T, d_model).
            state: what the last call returned; zeros when None. With ``cu_seqlens`` one row for
                each sequence.
            cu_seqlens: (S + 1,), the ends of S sequences packed along T; B must be 1.

        Returns:
            y, shape of ``x``, and the state after the last input. Gradients flow through both.

        Raises:
            ValueError: ``x`` is none of this mixer, or ``cu_seqlens`` or the state does not fit it.
        """
        self.check(x, state, cu_seqlens)
        conv, ssm = state or (None, None)
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u, conv = self.ops.causal_conv1d(
            u, self._conv_weight(), self.conv1d.bias, conv, activation="silu", cu_seqlens=cu_seqlens
        )
        dt, B, C = self._split(self.x_proj(u))
        y, ssm = self.ops.selective_scan(
            u,
            F.linear(dt, self.dt_proj.weight),
            self._A(),
            B,
            C,
            self.D,
            z,
            self.dt_proj.bias,
            delta_softplus=True,
            h0=ssm,
            cu_seqlens=cu_seqlens,
        )
        return self.out_proj(y), MambaState(conv, ssm)

    @torch.no_grad()
    def step(self, x: Tensor, state: MambaState, slots: Tensor | None = None) -> Tensor:
        """Mixes one input, (B, d_model), and updates ``state`` in place; without gradients."""
        self.check_step(x, state, slots)
        u, z = linear_step(x, self.in_proj.weight, self.in_proj.bias).chunk(2, dim=-1)
        u = self.ops.causal_conv1d_step(
            state.conv, u, self._conv_weight(), self.conv1d.bias, activation="silu", slots=slots
        )
        dt, B, C = self._split(linear_step(u, self.x_proj.weight))
        y = self.ops.selective_scan_step(
            state.ssm,
            u,
            linear_step(dt, self.dt_proj.weight),
            self._kept(self._A, self.A_log),  # a twentieth of the time of a step
            B,
            C,
            self.D,
            z,
            self.dt_proj.bias,
            delta_softplus=True,
            slots=slots,
        )
        return linear_step(y, self.out_proj.weight, self.out_proj.bias)
