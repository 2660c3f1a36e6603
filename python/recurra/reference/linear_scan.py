"""h_t = a_t h_{t-1} + b_t."""

from __future__ import annotations

import torch
from torch import Tensor

from recurra.reference._sequences import compute, slot_step, unpack


def linear_scan(
    a: Tensor,
    b: Tensor,
    h0: Tensor | None = None,
    *,
    log_a: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loop that :func:`recurra.linear_scan` computes."""
    dtype = b.dtype
    a, b = compute(a), compute(b)
    a = (a.exp() if log_a else a).expand_as(b)

    def scan(span: slice, h: Tensor | None) -> tuple[Tensor, Tensor]:
        gate, x = a[:, span], b[:, span]
        if h is None:
            h = b.new_zeros(b.shape[0], b.shape[2])
        # unbind, because the gradient of an index would be a tensor of the whole size each time.
        steps = list(zip(gate.unbind(1), x.unbind(1), strict=True))
        states = []
        for a_t, b_t in reversed(steps) if reverse else steps:
            h = a_t * h + b_t
            states.append(h)
        if reverse:
            states.reverse()
        return (torch.stack(states, 1) if states else x), h

    h, h_last = unpack(scan, b, h0, cu_seqlens)
    return h.to(dtype), h_last


def linear_scan_step(
    h: Tensor, a: Tensor, b: Tensor, *, log_a: bool = False, slots: Tensor | None = None
) -> Tensor:
    """One step of the loop, updating ``h``."""
    a, x = compute(a), compute(b)
    a = (a.exp() if log_a else a).expand_as(x)

    def step(state: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        new = a[rows] * state + x[rows]
        return new, new

    return slot_step(step, h, slots, torch.zeros_like(b))
