"""h_t = cell(x_t, h_{t-1}, p), one step at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from recurra.ops.rnn import cells as cell_infos
from recurra.reference import cells
from recurra.reference._sequences import compute, slot_step, unpack


def rnn(
    x: Tensor,
    params: Tensor,
    h0: Tensor | None = None,
    *,
    cell: str,
    algorithm: str = "auto",
    chunk: int | None = None,
    max_passes: int | None = None,
    on_fail: str = "sequential",
    return_states: bool = False,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loop that :func:`recurra.rnn` computes, whichever algorithm is asked for."""
    step, info = getattr(cells, cell), cell_infos()[cell]
    xs, p = compute(x), params.to(compute(x).dtype)[:, None]

    def scan(span: slice, h: Tensor | None) -> tuple[Tensor, Tensor]:
        if h is None:
            h = xs.new_zeros(xs.shape[0], len(info.states), xs.shape[3])
        empty = [None] * xs.shape[1] if reset is None else reset.unbind(1)
        states = []
        for row, emptied in zip(xs[:, span].unbind(1), empty[span], strict=True):
            if emptied is not None:
                h = torch.where(emptied[:, None, None], 0, h)
            h = step(row.transpose(0, 1), h.transpose(0, 1), p).transpose(0, 1)
            states.append(h)
        shape = (xs.shape[0], 0, len(info.states), xs.shape[3])
        return (torch.stack(states, 1) if states else xs.new_zeros(shape)), h

    states, h_last = unpack(scan, xs, h0, cu_seqlens)
    y = states if return_states else states[:, :, info.states.index(info.output)]
    zero = h_last.new_zeros(())
    return y.to(x.dtype), h_last, zero.to(torch.int32), zero


def rnn_step(
    h: Tensor, x: Tensor, params: Tensor, *, cell: str, slots: Tensor | None = None
) -> Tensor:
    """One step of the loop, updating ``h``."""

    def step(state: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        y, new, *_ = rnn(x[rows, None], params, state, cell=cell)
        return new, y[:, 0]

    return slot_step(step, h, slots, torch.zeros_like(x[:, 0]))
