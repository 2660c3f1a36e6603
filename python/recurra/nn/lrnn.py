"""The mixer for regular languages: a small matrix for each block, made of the input."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, nn

from recurra._check import state_dtype
from recurra.nn._config import MixerConfig, check_fields
from recurra.nn._scan import Apply, ScanMixer, ScanState
from recurra.nn.norm import RMSNorm


@dataclasses.dataclass(frozen=True)
class LRNNConfig(MixerConfig):
    """Sizes of an :class:`LRNN` mixer.

    Attributes:
        block: k, numbers of a block of the state.
        expand: channels, which are rounded up to whole blocks, as a multiple of the width of the
            model.
        p: of the norm that each column of a matrix is divided by. With 1 no state can grow. With
            more, memories last, but a state may grow by up to k^(1 - 1/p) a step, by default 1.26:
            where all numbers of a block and of its matrices are alike, the square of a state, and
            with it the output, leaves float32 after some 190 steps and the state after 380.

    Raises:
        ValueError: a size is out of range.
    """

    kind: ClassVar[str] = "lrnn"
    letter: ClassVar[str] = "B"

    block: int = 4
    expand: float = 1
    p: float = 1.2

    def __post_init__(self) -> None:
        check_fields(self, block=(1, 16), expand=(1e-3, 1024.0), p=(1.0, 2.0))

    def blocks(self, d_model: int) -> int:
        """N, blocks at this width of the model."""
        return max(1, -(-int(self.expand * d_model) // self.block))

    def make(self, d_model: int) -> LRNN:
        """The mixer."""
        return LRNN(d_model, self)


class LRNN(ScanMixer):
    r"""Block-diagonal input-dependent recurrence :math:`h_t = A(x_t) h_{t-1} + V x_t`, Fan, Chi and
    Rudnicky, "Advancing regular language reasoning in linear recurrent neural networks" (2024).

    The columns of :math:`A(x_t)` have the p-norm 1, so permutations, with which a block follows any
    group, are within reach and keep what they carry for ever. The first state is learned. Since
    sums of inputs may grow, what is read of the state is normed.

    Two things of the authors' code are left out on purpose. They subtract the mean of each column:
    what is left of a permutation forgets, by 1.23 a step in blocks of 4. And they divide all
    columns of a matrix by the largest norm among them: what the others carry would be forgotten.

    Args:
        d_model: width of the inputs and outputs.
        config: the sizes inside.
    """

    def __init__(self, d_model: int, config: LRNNConfig | None = None):
        super().__init__(d_model)
        config = config or LRNNConfig()
        N, k, self.p = config.blocks(d_model), config.block, config.p
        self.state_shapes = ((N, k),)
        self.matrix_proj = nn.Linear(d_model, N * k * k)
        self.in_proj = nn.Linear(d_model, N * k, bias=False)
        self.h0 = nn.Parameter(torch.empty(N, k))
        self.norm = RMSNorm(N * k)
        self.out_proj = nn.Linear(N * k, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A standard normal first state; everything else as in torch.nn."""
        if self.h0.is_meta:  # takes its time even where there is nothing to fill
            return
        for layer in (self.matrix_proj, self.in_proj, self.norm, self.out_proj):
            layer.reset_parameters()
        nn.init.normal_(self.h0)

    def initial_state(self, batch: int) -> ScanState:
        """The learned state before the first input, for ``batch`` sequences."""
        h0 = self.h0.to(state_dtype(self.h0.dtype))
        return ScanState(h0.expand(batch, *h0.shape).clone())

    def _before(self, x: Tensor, linear: Apply) -> tuple[tuple[Tensor, Tensor], torch.dtype]:
        N, k = self.h0.shape
        A = linear(self.matrix_proj, x)
        dtype = A.dtype
        # In 16 bits the norm of a column would not be 1 but only close to it, at every step anew.
        A = A.to(state_dtype(dtype)).unflatten(-1, (N, k, k))
        # A column of zeros, which has no direction, stays one.
        size = torch.linalg.vector_norm(A, self.p, dim=-2, keepdim=True)
        b = linear(self.in_proj, x).unflatten(-1, (N, k)).to(A.dtype)
        return (A / size.clamp(min=1e-4), b), dtype

    def _scan(
        self, given: tuple[Tensor, Tensor], h: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return self.ops.block_scan(*given, h, cu_seqlens=cu_seqlens)

    def _scan_step(self, given: tuple[Tensor, Tensor], h: Tensor, slots: Tensor | None) -> Tensor:
        return self.ops.block_scan_step(h, *given, slots=slots)

    def _after(self, h: Tensor, dtype: torch.dtype, linear: Apply) -> Tensor:
        return linear(self.out_proj, self.norm(h.flatten(-2).to(dtype)))
