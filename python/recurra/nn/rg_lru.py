"""The recurrent block of Griffin and Hawk: a real-gated linear recurrent unit."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recurra._check import state_dtype
from recurra.nn._config import MixerConfig, check_fields
from recurra.nn._mixer import Mixer
from recurra.nn._positions import positions
from recurra.nn._scan import apply_step

_C = 8.0  # of equation 6
_MAX_SQRT_GRADIENT = 1000.0


@dataclasses.dataclass(frozen=True)
class RGLRUConfig(MixerConfig):
    """Sizes of an :class:`RGLRU` mixer. It has no ``eig_range``: its gate, the exponential of
    -8 r softplus(recurrent_param), is positive by construction.

    Attributes:
        expand: channels of the recurrence, D, as a multiple of the width of the model.
        heads: blocks of the block-diagonal gates, which must divide D.
        d_conv: W, width of the convolution.

    Raises:
        ValueError: a size is out of range.
    """

    kind: ClassVar[str] = "rg_lru"
    letter: ClassVar[str] = "R"

    expand: float = 1
    heads: int = 4
    d_conv: int = 4

    def __post_init__(self) -> None:
        check_fields(self, expand=(1e-3, 1024.0), heads=(1, 1 << 20), d_conv=(2, 1024))

    def channels(self, d_model: int) -> int:
        """D at this width of the model."""
        return round(self.expand * d_model)

    def make(self, d_model: int) -> RGLRU:
        """The mixer."""
        return RGLRU(d_model, self)


class RGLRUState(NamedTuple):
    """What an :class:`RGLRU` remembers.

    Attributes:
        conv: the last inputs of the convolution, (B, W-1, D).
        h: the state of the recurrence, (B, D).
        seen: how many inputs came so far, (B,), int64.

    The first two are float32 for 16-bit models, otherwise of the dtype of the model.
    """

    conv: Tensor
    h: Tensor
    seen: Tensor


def _factor(log_a: Tensor) -> Tensor:
    """sqrt(1 - a^2), exact near a = 1."""
    return torch.expm1(2 * log_a).neg_().sqrt_()


def _slope(log_a: Tensor, factor: Tensor) -> Tensor:
    """That of the factor, in which the slope of the root is held to 1000."""
    return -torch.exp(2 * log_a) / factor.clamp(min=0.5 / _MAX_SQRT_GRADIENT)


class _InputFactor(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(log_a: Tensor) -> Tensor:
        return _factor(log_a)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * _slope(*ctx.saved_tensors)


def _input_factor(log_a: Tensor) -> Tensor:
    """The factor of the input with its slope, from log a."""
    if not torch.compiler.is_compiling():
        return _InputFactor.apply(log_a)
    # The compiler fails at a second autograd.Function where sizes are symbols, as in a model of
    # any length. 0 with the slope; below -1e3, where that is 0, none of an infinite product.
    with torch.no_grad():
        factor = _factor(log_a)
        slope = _slope(log_a, factor)
    line = log_a.clamp(min=-1e3) * slope
    return factor + (line - line.detach())


def _rows(slots: Tensor, states: int) -> tuple[Tensor, Tensor]:
    """Where each row looks for its state, and whether it has one: on CUDA the ops skip slots past
    the last as they skip those below 0, so neither may be looked up here."""
    rows = slots.clamp(0, states - 1)
    return rows, rows == slots


class RGLRU(Mixer):
    """Recurrent block with an RG-LRU, De et al., "Griffin: mixing gated linear recurrences with
    local attention for efficient language models" (2024), section 2.4, equations 1 to 6.

    The first input of a sequence is not scaled, as in RecurrentGemma. Parameters have the names of
    transformers' RecurrentGemmaRecurrentBlock, whose ``linear_out`` is ``out_proj``.

    Args:
        d_model: width of the inputs and outputs.
        config: the sizes inside.
    """

    State = RGLRUState
    slotted = True

    def __init__(self, d_model: int, config: RGLRUConfig | None = None):
        super().__init__(d_model)
        config = config or RGLRUConfig()
        D, H = config.channels(d_model), config.heads
        if D < 1 or D % H:
            raise ValueError(f"RGLRU: heads must divide expand * d_model = {D}, got {H}")
        self.state_shapes = ((config.d_conv - 1, D), (D,), ())
        self.linear_x = nn.Linear(d_model, D)
        self.linear_y = nn.Linear(d_model, D)
        # Holds weight (D, 1, W) and bias (D,); the op computes.
        self.conv1d = nn.Conv1d(D, D, config.d_conv, groups=D)
        self.recurrent_param = nn.Parameter(torch.empty(D))
        self.recurrent_gate_weight = nn.Parameter(torch.empty(H, D // H, D // H))
        self.recurrent_gate_bias = nn.Parameter(torch.empty(H, D // H))
        self.input_gate_weight = nn.Parameter(torch.empty(H, D // H, D // H))
        self.input_gate_bias = nn.Parameter(torch.empty(H, D // H))
        self.out_proj = nn.Linear(D, d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """a^(1/8r) uniform in the ring from 0.9 to 0.999, as in section 2.4; gates normal of the
        variance of their blocks' width, without bias; everything else as in torch.nn."""
        if self.recurrent_param.is_meta:  # takes its time even where there is nothing to fill
            return
        for layer in (self.linear_x, self.linear_y, self.conv1d, self.out_proj):
            layer.reset_parameters()
        for weight in (self.recurrent_gate_weight, self.input_gate_weight):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        for bias in (self.recurrent_gate_bias, self.input_gate_bias):
            nn.init.zeros_(bias)
        rate = torch.empty_like(self.recurrent_param).uniform_(0.9**2, 0.999**2).log_().mul_(-0.5)
        self.recurrent_param.copy_(rate.expm1_().log_())

    def state_dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
        """Of the three tensors of a state."""
        return (*super().state_dtypes(dtype)[:2], torch.int64)

    def _gate(self, u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Sigmoid of a block-diagonal layer over the rows of u (N, D)."""
        blocks = u.unflatten(-1, bias.shape).transpose(0, 1)
        gate = torch.baddbmm(bias[:, None], blocks, weight).transpose(0, 1).flatten(1)
        return torch.sigmoid(gate.to(state_dtype(gate.dtype)))

    def _gates(self, u: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """log a and the input of the recurrence, for u (..., D) and whether it is a first (...)."""
        rows = u.reshape(-1, u.shape[-1])
        r = self._gate(rows, self.recurrent_gate_weight, self.recurrent_gate_bias)
        i = self._gate(rows, self.input_gate_weight, self.input_gate_bias)
        log_a = r * (-_C * F.softplus(self.recurrent_param.to(r.dtype)))
        factor = _input_factor(log_a).masked_fill(first.reshape(-1, 1), 1)
        return log_a.view(u.shape), (rows * i * factor).view(u.shape)

    def forward(
        self, x: Tensor, state: RGLRUState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, RGLRUState]:
        """Mixes whole sequences, or the next chunk of them.

        Args:
            x: (B, T, d_model).
            state: what the last call returned; that of nothing seen when None. With
                ``cu_seqlens`` one row for each sequence.
            cu_seqlens: (S + 1,), the ends of S sequences packed along T; B must be 1.

        Returns:
            y, shape of ``x``, and the state after the last input. Gradients flow through both.

        Raises:
            ValueError: ``x`` is none of this mixer, or ``cu_seqlens`` or the state does not fit it.
        """
        rows = self.check(x, state, cu_seqlens)
        conv, h, seen = state or self.initial_state(rows)
        weight, bias = self.conv1d.weight[:, 0], self.conv1d.bias
        u, conv = self.ops.causal_conv1d(
            self.linear_x(x), weight, bias, conv, cu_seqlens=cu_seqlens
        )
        here, seen = positions(seen, x.shape[1], cu_seqlens)
        log_a, b = self._gates(u, here == 0)
        y, h = self.ops.linear_scan(log_a, b, h, log_a=True, cu_seqlens=cu_seqlens)
        gate = F.gelu(self.linear_y(x), approximate="tanh")
        return self.out_proj(y.to(gate.dtype) * gate), RGLRUState(conv, h, seen)

    @torch.no_grad()
    def step(self, x: Tensor, state: RGLRUState, slots: Tensor | None = None) -> Tensor:
        """Mixes one input, (B, d_model), and updates ``state`` in place; without gradients."""
        self.check_step(x, state, slots)
        u = self.ops.causal_conv1d_step(
            state.conv,
            apply_step(self.linear_x, x),
            self.conv1d.weight[:, 0],
            self.conv1d.bias,
            slots=slots,
        )
        rows, here = (None, None) if slots is None else _rows(slots, state.seen.shape[0])
        log_a, b = self._gates(
            u, (state.seen if rows is None else state.seen.index_select(0, rows)) == 0
        )
        y = self.ops.linear_scan_step(state.h, log_a, b, log_a=True, slots=slots)
        if rows is None:
            state.seen.add_(1)
        else:
            state.seen.index_add_(0, rows, here.to(state.seen.dtype))
        gate = apply_step(self.linear_y, x)
        y = y.to(gate.dtype) * F.gelu(gate, approximate="tanh")
        return apply_step(self.out_proj, y)
