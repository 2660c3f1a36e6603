"""Attention as a recurrence: softmax attention with one learned query."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, nn

from recurra.nn._config import MixerConfig, check_fields
from recurra.nn._scan import Apply, ScanMixer, ScanState, see_nothing_


@dataclasses.dataclass(frozen=True)
class AarenConfig(MixerConfig):
    """Sizes of an :class:`Aaren` mixer. It has no ``eig_range``: the weights of a softmax are
    positive.

    Attributes:
        heads: queries, each over keys and values of d_model / heads numbers.

    Raises:
        ValueError: a size is out of range.
    """

    kind: ClassVar[str] = "aaren"
    letter: ClassVar[str] = "E"

    heads: int = 4

    def __post_init__(self) -> None:
        check_fields(self, heads=(1, 65536))

    def make(self, d_model: int) -> Aaren:
        """The mixer."""
        return Aaren(d_model, self)


class Aaren(ScanMixer):
    r"""Attention as a recurrence: Feng et al., "Attention as an RNN" (2024), section 3.3.

    :math:`o_t = \sum_{i \le t} \mathrm{softmax}_i(q \cdot k_i / \sqrt{w})\,v_i` for each head of w
    numbers, with a learned query q instead of one that the input asks.

    Args:
        d_model: width of the inputs and outputs.
        config: the heads.

    Raises:
        ValueError: the width is not a multiple of the heads.
    """

    def __init__(self, d_model: int, config: AarenConfig | None = None):
        super().__init__(d_model)
        heads = (config or AarenConfig()).heads
        if d_model % heads:
            raise ValueError(f"Aaren: heads must divide d_model, {d_model}, got {heads}")
        self.state_shapes = ((3, d_model),)
        self.query = nn.Parameter(torch.empty(heads, d_model // heads))
        self.in_proj = nn.Linear(d_model, 2 * d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Standard normal queries; everything else as in torch.nn."""
        if self.query.is_meta:  # takes its time even where there is nothing to fill
            return
        self.in_proj.reset_parameters()
        self.out_proj.reset_parameters()
        nn.init.normal_(self.query)

    def initial_state(self, batch: int) -> ScanState:
        """The state that has seen nothing, for ``batch`` sequences, (B, 3, d_model): see
        :func:`recurra.softmax_scan`."""
        state = super().initial_state(batch)
        see_nothing_(state.h)
        return state

    def _before(self, x: Tensor, linear: Apply) -> tuple[tuple[Tensor, Tensor], None]:
        k, v = linear(self.in_proj, x).chunk(2, dim=-1)
        heads, width = self.query.shape
        scores = (k.unflatten(-1, (heads, width)) * self.query).sum(-1) * width**-0.5
        # One score for each head, which all of its channels share.
        return (scores.to(v.dtype).repeat_interleave(width, -1), v), None

    def _scan(
        self, given: tuple[Tensor, Tensor], h: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return self.ops.softmax_scan(*given, h, cu_seqlens=cu_seqlens)

    def _scan_step(self, given: tuple[Tensor, Tensor], h: Tensor, slots: Tensor | None) -> Tensor:
        return self.ops.softmax_scan_step(h, *given, slots=slots)
