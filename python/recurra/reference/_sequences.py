"""What the references share: packed sequences, slots and the dtypes of arithmetic and states."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from recurra._check import state_dtype


def compute(x: Tensor | None) -> Tensor | None:
    """``x`` in the dtype of arithmetic: float32 for 16-bit storage."""
    return None if x is None else x.to(state_dtype(x.dtype))


def spans(x: Tensor, cu_seqlens: Tensor | None) -> Iterator[tuple[int, int, int]]:
    """(batch row, begin, end) of every sequence of a (B, T, ...) tensor."""
    if cu_seqlens is None:
        for b in range(x.shape[0]):
            yield b, 0, x.shape[1]
    else:
        ends = cu_seqlens.tolist()
        for begin, end in zip(ends[:-1], ends[1:], strict=True):
            yield 0, begin, end


def unpack(scan, x: Tensor, h0: Tensor | None, cu_seqlens: Tensor | None):
    """Runs ``scan(slice, state) -> (y, last)`` over each sequence, and joins what it returns."""
    if cu_seqlens is None:
        return scan(slice(0, x.shape[1]), h0)
    outputs, states = [], []
    for n, (_, begin, end) in enumerate(spans(x, cu_seqlens)):
        y, last = scan(slice(begin, end), None if h0 is None else h0[n : n + 1])
        outputs.append(y)
        states.append(last)
    return torch.cat(outputs, 1), torch.cat(states, 0)


def slot_step(step, h: Tensor, slots: Tensor | None, out: Tensor) -> Tensor:
    """Runs ``step(row states, rows) -> (new states, outputs)`` on the rows that have a state.

    ``h`` is updated in place, ``out`` (zeros) receives the outputs. A slot below zero or past the
    last state skips its row, as on a GPU.
    """
    if slots is None:
        slots = torch.arange(h.shape[0])
    rows = torch.nonzero((slots >= 0) & (slots < h.shape[0]))[:, 0]
    used = slots[rows].long()
    new, y = step(h[used], rows)
    h[used] = new.to(h.dtype)
    out[rows] = y.to(out.dtype)
    return out
