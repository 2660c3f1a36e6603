"""o_t = sum_i w_ti v_i / sum_i w_ti with w_ti = exp(s_i - (t - i) decay), one step at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from recurra.reference._sequences import compute, slot_step, unpack

# The maximum of a state that has seen nothing: -infinity, but a number.
EMPTY = -1e38
# Larger ones, infinity among them, would be seen in that state.
_LARGEST_DECAY = {torch.float32: 1e30, torch.float64: 1e21}


def _weights(*logarithms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The larger of two logarithms, and the exponentials of both relative to it."""
    top = torch.maximum(*logarithms)
    return top, *((x - top).exp() for x in logarithms)


def _mean(total: Tensor, weight: Tensor) -> Tensor:
    empty = weight == 0
    return torch.where(empty, 0, total / torch.where(empty, 1, weight))


def softmax_scan(
    s: Tensor,
    v: Tensor,
    h0: Tensor | None = None,
    *,
    decay: Tensor | None = None,
    bonus: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loop that :func:`recurra.softmax_scan` computes."""
    dtype = v.dtype
    s, v = compute(s), compute(v)
    decay, bonus = (None if p is None else p.to(v.dtype) for p in (decay, bonus))
    if decay is not None:
        largest = _LARGEST_DECAY[v.dtype]
        decay = decay.clamp(-largest, largest)
    s = s.expand_as(v)

    def scan(span: slice, h: Tensor | None) -> tuple[Tensor, Tensor]:
        if h is None:
            zero = v.new_zeros(v.shape[0], v.shape[2])
            h = torch.stack([zero + EMPTY, zero, zero], 1)
        m, c, a = h.unbind(1)
        m = m.clamp(min=EMPTY)
        outputs = []
        # unbind, because the gradient of an index would be a tensor of the whole size each time.
        for score, x in zip(s[:, span].unbind(1), v[:, span].unbind(1), strict=True):
            if bonus is not None:
                _, past, now = _weights(m, score + bonus)
                outputs.append(_mean(past * a + now * x, past * c + now))
            m, past, now = _weights(m if decay is None else m - decay, score)
            c, a = past * c + now, past * a + now * x
            if bonus is None:
                outputs.append(_mean(a, c))
        return (torch.stack(outputs, 1) if outputs else v[:, span]), torch.stack([m, c, a], 1)

    o, h_last = unpack(scan, v, h0, cu_seqlens)
    return o.to(dtype), h_last


def softmax_scan_step(
    h: Tensor,
    s: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    bonus: Tensor | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """One step of the loop, updating ``h``."""
    score = s.expand_as(v)

    def step(state: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        o, new = softmax_scan(score[rows, None], v[rows, None], state, decay=decay, bonus=bonus)
        return new, o[:, 0]

    return slot_step(step, h, slots, torch.zeros_like(v))
