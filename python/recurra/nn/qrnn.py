"""The quasi-recurrent network."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from recurra._check import state_dtype
from recurra.nn._config import MixerConfig, check_eig_range, check_fields
from recurra.nn._mixer import Mixer
from recurra.nn._positions import earlier
from recurra.nn._scan import apply_step, channels


@dataclasses.dataclass(frozen=True)
class QRNNConfig(MixerConfig):
    """Sizes of a :class:`QRNN` mixer.

    Attributes:
        expand: channels, N, as a multiple of the width of the model.
        window: k, inputs that the convolution reads.
        eig_range: (low, 1), between which the forget gates lie.

    Raises:
        ValueError: a size or the range is out of range.
    """

    kind: ClassVar[str] = "qrnn"
    letter: ClassVar[str] = "Q"

    expand: float = 1
    window: int = 2
    eig_range: tuple = (0, 1)

    def __post_init__(self) -> None:
        check_fields(self, expand=(1e-3, 1024.0), window=(1, 1024))
        check_eig_range(self)

    def make(self, d_model: int) -> QRNN:
        """The mixer."""
        return QRNN(d_model, self)


class QRNNState(NamedTuple):
    """What a :class:`QRNN` remembers.

    Attributes:
        conv: the last inputs, (B, k-1, d_model).
        c: the state of the pooling, (B, N).

    Both are float32 for 16-bit models, otherwise of the dtype of the model.
    """

    conv: Tensor
    c: Tensor


class QRNN(Mixer):
    r"""Quasi-recurrent network with fo-pooling: Bradbury et al., "Quasi-recurrent neural networks"
    (2017), section 2.

    A convolution over the last k inputs gives the candidate z through tanh and the gates f and o
    through sigmoids; then :math:`c_t = f_t c_{t-1} + (1 - f_t) z_t` and :math:`h_t = o_t c_t`.

    Args:
        d_model: width of the inputs and outputs.
        config: the sizes inside.
    """

    State = QRNNState

    def __init__(self, d_model: int, config: QRNNConfig | None = None):
        super().__init__(d_model)
        config = config or QRNNConfig()
        self.k, self.low = config.window, config.eig_range[0]
        N = channels("QRNN", config.expand, d_model)
        self.state_shapes = ((self.k - 1, d_model), (N,))
        # The convolution as a layer over the k inputs that it reads.
        self.in_proj = nn.Linear(self.k * d_model, 3 * N)
        self.out_proj = nn.Linear(N, d_model, bias=False)

    def reset_parameters(self) -> None:
        """As in torch.nn."""
        self.in_proj.reset_parameters()
        self.out_proj.reset_parameters()

    def _gates(self, zfo: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gate and input of the scan, and the output gate; none of them of 16 bits, in which a gate
        close to 1 would be 1."""
        z, f, o = zfo.to(state_dtype(zfo.dtype)).chunk(3, dim=-1)
        rest = (1 - self.low) * torch.sigmoid(-f)
        return 1 - rest, rest * torch.tanh(z), torch.sigmoid(o)

    def forward(
        self, x: Tensor, state: QRNNState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, QRNNState]:
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
        conv, c = state or self.initial_state(rows)
        before, conv = earlier(x, conv, cu_seqlens)
        zfo = self.in_proj(torch.cat([*before, x], -1))
        a, b, o = self._gates(zfo)
        y, c = self.ops.linear_scan(a, b, c, cu_seqlens=cu_seqlens)
        return self.out_proj((o * y).to(zfo.dtype)), QRNNState(conv, c)

    @torch.no_grad()
    def step(self, x: Tensor, state: QRNNState) -> Tensor:
        """Mixes one input, (B, d_model), and updates ``state`` in place; without gradients."""
        self.check_step(x, state)
        before, conv = earlier(x[:, None], state.conv)
        zfo = apply_step(self.in_proj, torch.cat([*before, x[:, None]], -1)[:, 0])
        a, b, o = self._gates(zfo)
        y = self.ops.linear_scan_step(state.c, a, b)
        state.conv.copy_(conv)
        return apply_step(self.out_proj, (o * y).to(zfo.dtype))
