"""The mixer of nonlinear recurrences: any cell of the library, in one block."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recurra._files import shown
from recurra.nn._config import MixerConfig, check_eig_range, check_fields
from recurra.nn._mixer import Mixer
from recurra.nn._scan import apply_step
from recurra.ops.rnn import cells


@dataclasses.dataclass(frozen=True)
class RNNConfig(MixerConfig):
    """Sizes of an :class:`RNN` mixer.

    Attributes:
        cell: one of ``recurra.cells()``.
        expand: channels of the cell, N, as a multiple of the width of the model.
        d_conv: W, width of the convolution before the cell; 1 for none.
        gate: whether the cell's output is multiplied by the SiLU of a projection of the input.
        eig_range: between which the factors of the state lie in minGRU and minLSTM, (0, 1) or from
            a negative number on, at least -1.

    Raises:
        ValueError: the cell is unknown, or a size is out of range.
    """

    kind: ClassVar[str] = "rnn"
    letter: ClassVar[str] = "N"

    cell: str = "paragru"
    expand: float = 1
    d_conv: int = 4
    gate: bool = True
    eig_range: tuple = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_fields(self, expand=(1e-3, 1024.0), d_conv=(1, 1024))
        if self.cell not in cells():
            known = ", ".join(cells())
            raise ValueError(f"RNNConfig: cell must be one of {known}, got {self.cell:.100}")
        check_eig_range(self)
        if self.eig_range[0] != 0 and not self.scaled:
            raise ValueError(
                f"RNNConfig: eig_range must be (0, 1) for the cell {self.cell}, "
                f"got {shown(self.eig_range)}"
            )

    @property
    def scaled(self) -> bool:
        """Whether the cell's parameter is the scale of its gate, which is not learned."""
        return cells()[self.cell].params == ("scale",)

    def channels(self, d_model: int) -> int:
        """N at this width of the model."""
        return int(self.expand * d_model)

    def parameter_count(self, d_model: int) -> int:
        """Numbers in a mixer of this width."""
        N, info = self.channels(d_model), cells()[self.cell]
        G, P = len(info.inputs), len(info.params)
        conv = N * (self.d_conv + 1) * (self.d_conv > 1)
        learned = 0 if self.scaled else P * N
        return d_model * N * (2 + self.gate) + conv + G * N * (N + 1) + learned

    def make(self, d_model: int) -> RNN:
        """The mixer."""
        return RNN(d_model, self)


class RNNState(NamedTuple):
    """What an :class:`RNN` remembers.

    Attributes:
        conv: the last inputs of the convolution, (B, W-1, N).
        h: the states of the cell, (B, K, N).

    Both are float32 for 16-bit models, otherwise of the dtype of the model.
    """

    conv: Tensor
    h: Tensor


class RNN(Mixer):
    """A nonlinear recurrence in the block of ParaRNN (Danieli et al., arXiv 2510.21450): short
    convolution, cell, gate, between two projections.

    Args:
        d_model: width of the inputs and outputs.
        config: the cell and the sizes inside.
    """

    State = RNNState
    slotted = True

    def __init__(self, d_model: int, config: RNNConfig | None = None):
        super().__init__(d_model)
        config = config or RNNConfig()
        N, info = config.channels(d_model), cells()[config.cell]
        if N < 1:
            raise ValueError(f"RNN: expand * d_model must be at least 1, got {N}")
        self.cell, self.gate, self.W = config.cell, config.gate, config.d_conv
        self.state_shapes = ((self.W - 1, N), (len(info.states), N))
        self.in_proj = nn.Linear(d_model, (1 + config.gate) * N, bias=False)
        # Holds weight (N, 1, W) and bias (N,); the op computes.
        self.conv1d = nn.Conv1d(N, N, self.W, groups=N) if self.W > 1 else None
        self.cell_proj = nn.Linear(N, len(info.inputs) * N)
        recurrent = torch.empty(len(info.params), N)
        if config.scaled:
            self.register_buffer("recurrent", recurrent)
        else:
            self.recurrent = nn.Parameter(recurrent)
        self.scale = 1.0 - config.eig_range[0]
        self.out_proj = nn.Linear(N, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Recurrent weights and the biases of the gates as in the cell's paper, see
        :func:`init_cell_`; everything else as in torch.nn."""
        if self.recurrent.is_meta:  # takes its time even where there is nothing to fill
            return
        for layer in (self.in_proj, self.conv1d, self.cell_proj, self.out_proj):
            if layer is not None:
                layer.reset_parameters()
        init_cell_(self.cell, self.recurrent, self.cell_proj.bias, self.scale)

    def _rows(self, u: Tensor) -> Tensor:
        return u.unflatten(-1, (-1, self.recurrent.shape[1]))

    def forward(
        self, x: Tensor, state: RNNState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, RNNState]:
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
        conv, h = state or self.initial_state(rows)
        u, *gate = self.in_proj(x).chunk(1 + self.gate, dim=-1)
        if self.conv1d is not None:
            weight, bias = self.conv1d.weight[:, 0], self.conv1d.bias
            u, conv = self.ops.causal_conv1d(
                u, weight, bias, conv, activation="silu", cu_seqlens=cu_seqlens
            )
        y, h, *_ = self.ops.rnn(
            self._rows(self.cell_proj(u)), self.recurrent, h, cell=self.cell, cu_seqlens=cu_seqlens
        )
        for z in gate:
            y = y * F.silu(z)
        return self.out_proj(y), RNNState(conv, h)

    @torch.no_grad()
    def step(self, x: Tensor, state: RNNState, slots: Tensor | None = None) -> Tensor:
        """Mixes one input, (B, d_model), and updates ``state`` in place; without gradients."""
        self.check_step(x, state, slots)
        u, *gate = apply_step(self.in_proj, x).chunk(1 + self.gate, dim=-1)
        if self.conv1d is not None:
            weight, bias = self.conv1d.weight[:, 0], self.conv1d.bias
            u = self.ops.causal_conv1d_step(
                state.conv, u, weight, bias, activation="silu", slots=slots
            )
        rows = self._rows(apply_step(self.cell_proj, u))
        y = self.ops.rnn_step(state.h, rows, self.recurrent, cell=self.cell, slots=slots)
        for z in gate:
            y = y * F.silu(z)
        return apply_step(self.out_proj, y)


# Initialisation -----------------------------------------------------------------------------------


def _uniform(w: Tensor) -> None:
    """As torch.nn's recurrent layers: within a root of the width."""
    bound = w.shape[-1] ** -0.5
    nn.init.uniform_(w, -bound, bound)


def _pararnn(w: Tensor) -> None:
    """ParaRNN: normal, of the variance of xLSTM's small initialisation."""
    nn.init.normal_(w, std=2 / math.sqrt(5 * w.shape[-1]))


def _zero_to_one(w: Tensor) -> None:
    """IndRNN, section 4.1: any memory, short or long; UnICORNN, appendix."""
    nn.init.uniform_(w, 0, 1)


def _sru(w: Tensor) -> None:
    """SRU, section 3.2: variance 1 / N."""
    bound = math.sqrt(3 / w.shape[-1])
    nn.init.uniform_(w, -bound, bound)


def _slow_to_fast(bias: Tensor) -> None:
    """ParaRNN: channels from even odds to slow ones."""
    bias.copy_(-torch.linspace(0, 1, bias.shape[0], dtype=bias.dtype))


def _long_memory(bias: Tensor) -> None:
    """xLSTM's sLSTM: forget gates between 3 and 6."""
    bias.copy_(torch.linspace(3, 6, bias.shape[0], dtype=bias.dtype))


def _chrono(bias: Tensor) -> None:
    """Tallec and Ollivier 2018, as JANET asks: memories uniform up to 256 steps."""
    bias.uniform_(1, 255).log_()


# Of a cell: what fills its recurrent weights, and the bias of an input, which is zero otherwise.
_CELLS: dict[str, tuple[Callable, dict[str, Callable]]] = {
    "paragru": (_pararnn, {"update": _slow_to_fast}),
    "paralstm": (_pararnn, {"forget": _slow_to_fast}),
    "indrnn": (_zero_to_one, {}),
    "sru": (_sru, {}),
    "slstm": (nn.init.zeros_, {"forget": _long_memory}),
    "janet": (_uniform, {"forget": _chrono}),
    "unicornn": (_zero_to_one, {}),
}


@torch.no_grad()
def init_cell_(cell: str, params: Tensor, bias: Tensor, scale: float = 1.0) -> None:
    """Fills a cell's parameters (P, N) and the biases of its inputs, (G N,), as in its paper;
    those of a cell that says nothing within a root of the width, with biases of zero. Steps of
    time, ``dt``, are 1, damping is slight, and gates are scaled by ``scale``."""
    info = cells()[cell]
    fill, of_inputs = _CELLS.get(cell, (_uniform, {}))
    constants = {"dt": 1.0, "alpha": 0.1, "c": 0.0, "scale": scale}
    for name, row in zip(info.params, params, strict=True):
        nn.init.constant_(row, constants[name]) if name in constants else fill(row)
    for name, row in zip(info.inputs, bias.view(len(info.inputs), -1), strict=True):
        of_inputs.get(name, nn.init.zeros_)(row)
