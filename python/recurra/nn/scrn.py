"""The structurally constrained recurrent network."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from recurra._check import state_dtype
from recurra.nn._config import MixerConfig, check_fields
from recurra.nn._mixer import Mixer
from recurra.nn._scan import Apply, apply, apply_step, channels


@dataclasses.dataclass(frozen=True)
class SCRNConfig(MixerConfig):
    """Sizes of an :class:`SCRN` mixer. It has no ``eig_range``: what the context units keep,
    alpha, is one positive constant, so that they are averages of their inputs.

    Attributes:
        expand: hidden units, N, as a multiple of the width of the model.
        context: context units, S, as a multiple of the width of the model.
        alpha: what a context unit keeps from step to step.

    Raises:
        ValueError: a size is out of range.
    """

    kind: ClassVar[str] = "scrn"
    letter: ClassVar[str] = "C"

    expand: float = 1
    context: float = 0.5
    alpha: float = 0.95

    def __post_init__(self) -> None:
        check_fields(self, expand=(1e-3, 1024.0), context=(1e-3, 1024.0), alpha=(0.0, 1.0))

    def make(self, d_model: int) -> SCRN:
        """The mixer."""
        return SCRN(d_model, self)


class SCRNState(NamedTuple):
    """What an :class:`SCRN` remembers.

    Attributes:
        s: the context units, (B, S).
        h: the hidden units, (B, 1, N).

    Both are float32 for 16-bit models, otherwise of the dtype of the model.
    """

    s: Tensor
    h: Tensor


class SCRN(Mixer):
    r"""Structurally constrained recurrent network: Mikolov et al., "Learning longer memory in
    recurrent neural networks" (2014), section 3.

    Slow context units :math:`s_t = \alpha s_{t-1} + (1 - \alpha) B x_t` beside hidden units
    :math:`h_t = \tanh(P s_t + A x_t + r \odot h_{t-1})`; the output is a layer over both. Two
    things differ from the paper: its full recurrent matrix R is the diagonal r, and its sigmoid is
    a tanh, which but for the first state is the same up to scales and offsets that the layers
    around it learn.

    Args:
        d_model: width of the inputs and outputs.
        config: the sizes inside.
    """

    State = SCRNState
    slotted = True

    def __init__(self, d_model: int, config: SCRNConfig | None = None):
        super().__init__(d_model)
        config = config or SCRNConfig()
        self.alpha = config.alpha
        self.N = channels("SCRN", config.expand, d_model)
        self.S = max(1, int(config.context * d_model))
        self.state_shapes = ((self.S,), (1, self.N))
        self.in_proj = nn.Linear(d_model, self.S + self.N)
        self.context_proj = nn.Linear(self.S, self.N, bias=False)
        self.recurrent = nn.Parameter(torch.empty(1, self.N))
        self.out_proj = nn.Linear(self.S + self.N, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Recurrent weights uniform from -1 to 1; everything else as in torch.nn."""
        if self.recurrent.is_meta:  # takes its time even where there is nothing to fill
            return
        for layer in (self.in_proj, self.context_proj, self.out_proj):
            layer.reset_parameters()
        nn.init.uniform_(self.recurrent, -1, 1)

    def _inputs(self, x: Tensor, linear: Apply) -> tuple[Tensor, Tensor, Tensor]:
        """Gate and input of the context units, not of 16 bits, to which alpha and 1 - alpha would
        be rounded apart, and what the hidden ones get of x."""
        b, x = linear(self.in_proj, x).split((self.S, self.N), dim=-1)
        b = b.to(state_dtype(b.dtype))
        return b.new_full([1] * b.dim(), self.alpha), (1 - self.alpha) * b, x

    def forward(
        self, x: Tensor, state: SCRNState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, SCRNState]:
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
        rows = self.check(x, state, cu_seqlens)
        s, h = state or self.initial_state(rows)
        a, b, x = self._inputs(x, apply)
        slow, s = self.ops.linear_scan(a, b, s, cu_seqlens=cu_seqlens)
        slow = slow.to(x.dtype)
        x = (x + self.context_proj(slow))[:, :, None]
        y, h, *_ = self.ops.rnn(x, self.recurrent, h, cell="tanh", cu_seqlens=cu_seqlens)
        return self.out_proj(torch.cat([slow, y], -1)), SCRNState(s, h)

    @torch.no_grad()
    def step(self, x: Tensor, state: SCRNState, slots: Tensor | None = None) -> Tensor:
        """Mixes one input, (B, d_model), and updates ``state`` in place; without gradients."""
        self.check_step(x, state, slots)
        a, b, x = self._inputs(x, apply_step)
        slow = self.ops.linear_scan_step(state.s, a, b, slots=slots).to(x.dtype)
        x = (x + apply_step(self.context_proj, slow))[:, None]
        y = self.ops.rnn_step(state.h, x, self.recurrent, cell="tanh", slots=slots)
        return apply_step(self.out_proj, torch.cat([slow, y], -1))
