"""h_t = A_t h_{t-1} + b_t in blocks of k numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from recurra.reference._sequences import compute, slot_step, unpack


def block_scan(
    A: Tensor,
    b: Tensor,
    h0: Tensor | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loop that :func:`recurra.block_scan` computes."""
    dtype = b.dtype
    A, b = compute(A), compute(b)
    A = A.expand(*b.shape, b.shape[3])

    def scan(span: slice, h: Tensor | None) -> tuple[Tensor, Tensor]:
        matrices, x = A[:, span], b[:, span]
        if h is None:
            h = b.new_zeros(b.shape[0], *b.shape[2:])
        # unbind, because the gradient of an index would be a tensor of the whole size each time.
        steps = list(zip(matrices.unbind(1), x.unbind(1), strict=True))
        states = []
        for A_t, b_t in reversed(steps) if reverse else steps:
            h = (A_t * h[..., None, :]).sum(-1) + b_t
            states.append(h)
        if reverse:
            states.reverse()
        return (torch.stack(states, 1) if states else x), h

    h, h_last = unpack(scan, b, h0, cu_seqlens)
    return h.to(dtype), h_last


def block_scan_step(h: Tensor, A: Tensor, b: Tensor, *, slots: Tensor | None = None) -> Tensor:
    """One step of the loop, updating ``h``."""
    A, x = compute(A), compute(b)
    A = A.expand(*x.shape, x.shape[2])

    def step(state: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        new = (A[rows] * state[..., None, :]).sum(-1) + x[rows]
        return new, new

    return slot_step(step, h, slots, torch.zeros_like(b))
