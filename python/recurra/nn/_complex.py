"""Complex states of models whose parameters and layers are real."""

from __future__ import annotations

import torch
from torch import Tensor

from recurra._check import state_dtype
from recurra.nn._scan import ScanMixer


def to_complex(x: Tensor) -> Tensor:
    """(..., 2N), real and imaginary parts in turn, as N complex numbers; complex128 for float64,
    complex64 for all others."""
    x = x.to(state_dtype(x.dtype)).contiguous()
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def to_real(x: Tensor, dtype: torch.dtype) -> Tensor:
    """N complex numbers as (..., 2N) real ones. A real layer over them is Re(C x), with the real
    parts of C and the negated imaginary ones in turn as its weights."""
    return torch.view_as_real(x).flatten(-2).to(dtype)


class ComplexScanMixer(ScanMixer):
    """A mixer around ``linear_scan`` of N complex numbers with a gate (1, N) constant over time.

    The state is (B, N, 2), real and imaginary parts, since files of weights have no complex128.
    """

    def _scan(
        self, given: tuple[Tensor, Tensor], h: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        a, b = given
        y, last = self.ops.linear_scan(a[None], b, torch.view_as_complex(h), cu_seqlens=cu_seqlens)
        return y, torch.view_as_real(last)

    def _scan_step(self, given: tuple[Tensor, Tensor], h: Tensor) -> Tensor:
        return self.ops.linear_scan_step(torch.view_as_complex(h), *given)
