"""Complex states of models whose parameters and layers are real."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recurra._check import state_dtype


def to_complex(x: Tensor) -> Tensor:
    """(..., 2N), real and imaginary parts in turn, as N complex numbers; complex128 for float64,
    complex64 for all others."""
    x = x.to(state_dtype(x.dtype)).contiguous()
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def to_real(x: Tensor, dtype: torch.dtype) -> Tensor:
    """N complex numbers as (..., 2N) real ones. A real layer over them is Re(C x), with the real
    parts of C and the negated imaginary ones in turn as its weights."""
    return torch.view_as_real(x).flatten(-2).to(dtype)


def complex_scan(
    ops: Any, a: Tensor, b: Tensor, h: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """``ops.linear_scan`` of N complex numbers whose state is (B, N, 2), real and imaginary parts,
    since files of weights have no complex128."""
    y, last = ops.linear_scan(a, b, torch.view_as_complex(h), **options)
    return y, torch.view_as_real(last)


def complex_step(ops: Any, a: Tensor, b: Tensor, h: Tensor, **options: Any) -> Tensor:
    """One step of :func:`complex_scan`, which updates ``h``."""
    return ops.linear_scan_step(torch.view_as_complex(h), a, b, **options)
