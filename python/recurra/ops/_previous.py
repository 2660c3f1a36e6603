"""The state before every step, for second derivatives of scans whose backward reads it."""

from __future__ import annotations

import torch
from torch import Tensor


def _at_first(x: Tensor, reverse: bool) -> Tensor:
    """Which steps of (B, T, ...) the walk starts at, broadcast to x."""
    T = x.shape[1]
    at = torch.arange(T, device=x.device) == (T - 1 if reverse else 0)
    return at.view(1, -1, *[1] * (x.dim() - 2))


def _starts(cu_seqlens: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """The sequences that have steps, and where the walk of each starts."""
    ends = cu_seqlens.long()
    filled = torch.nonzero(ends.diff() > 0)[:, 0]
    return filled, (ends[1:] - 1 if reverse else ends[:-1])[filled]


def previous(h: Tensor, h0: Tensor | None, reverse: bool, cu_seqlens: Tensor | None) -> Tensor:
    """h_{t-1} for every t: ``h`` (B, T, ...) moved by one step, ``h0`` (S, ...) where a sequence
    starts."""
    rolled = h.roll(-1 if reverse else 1, 1)
    if cu_seqlens is None:
        start = torch.zeros_like(h) if h0 is None else h0.to(h.dtype)[:, None].expand_as(h)
        return torch.where(_at_first(h, reverse), start, rolled)
    filled, first = _starts(cu_seqlens, reverse)
    if h0 is None:
        return rolled.index_fill(1, first, 0.0)
    return rolled.index_copy(1, first, h0.to(h.dtype)[filled][None])


def from_previous(
    x: Tensor, h0: Tensor | None, reverse: bool, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The transpose of :func:`previous`: what the cotangents ``x`` of the states before every step
    are for ``h`` and ``h0``."""
    B, T = x.shape[:2]
    S = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if T == 0 or S == 0:
        return torch.zeros_like(x), None if h0 is None else torch.zeros_like(h0)
    if cu_seqlens is None:
        to_h = torch.where(_at_first(x, reverse), torch.zeros_like(x), x).roll(
            1 if reverse else -1, 1
        )
        return to_h, None if h0 is None else x[:, T - 1 if reverse else 0].to(h0.dtype)
    filled, first = _starts(cu_seqlens, reverse)
    to_h = x.index_fill(1, first, 0.0).roll(1 if reverse else -1, 1)
    if h0 is None:
        return to_h, None
    return to_h, torch.zeros_like(h0).index_copy(0, filled, x[0, first].to(h0.dtype))
