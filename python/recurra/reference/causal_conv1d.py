"""y_t = act(bias + sum_{j<W} w_j x_{t-W+1+j})."""

from __future__ import annotations

import torch
from torch import Tensor

from recurra.reference._sequences import compute, slot_step, unpack


def _activate(s: Tensor, activation: str | None) -> Tensor:
    if activation not in (None, "silu"):
        raise RuntimeError(f'causal_conv1d: activation must be None or "silu", got "{activation}"')
    return s * torch.sigmoid(s) if activation else s


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum that :func:`recurra.causal_conv1d` computes."""
    dtype = x.dtype
    x = compute(x)
    weight, bias = (None if p is None else p.to(x.dtype) for p in (weight, bias))
    W = weight.shape[1]

    def convolve(span: slice, h: Tensor | None) -> tuple[Tensor, Tensor]:
        part = x[:, span]
        if h is None:
            h = x.new_zeros(x.shape[0], W - 1, x.shape[2])
        inputs = torch.cat([h, part], 1)
        T = part.shape[1]
        s = torch.zeros_like(part) if bias is None else bias.expand_as(part)
        for j in range(W):
            s = s + weight[:, j] * inputs[:, j : j + T]
        return _activate(s, activation), inputs[:, T:]

    y, h_last = unpack(convolve, x, h0, cu_seqlens)
    return y.to(dtype), h_last


def causal_conv1d_step(
    h: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """One step of the sum, shifting ``h``."""
    now = compute(x)

    def step(state: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        recent = state[:, state.shape[1] - (weight.shape[1] - 1) :]
        y, _ = causal_conv1d(now[rows, None], weight, bias, recent, activation=activation)
        return torch.cat([state[:, 1:], now[rows, None].to(state.dtype)], 1), y[:, 0]

    return slot_step(step, h, slots, torch.zeros_like(x))
