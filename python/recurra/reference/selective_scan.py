"""h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t,  y_t = (C_t h_t + D u_t) silu(z_t)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from recurra.reference._sequences import compute, slot_step, unpack


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    h0: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loop that :func:`recurra.selective_scan` computes."""
    dtype = u.dtype
    u, delta, B, C, z = map(compute, (u, delta, B, C, z))
    A, D, delta_bias = (None if p is None else p.to(_like(p, u)) for p in (A, D, delta_bias))
    dt = delta if delta_bias is None else delta + delta_bias
    if delta_softplus:
        dt = torch.logaddexp(dt, torch.zeros_like(dt))
    B, C = _per_channel(B, u), _per_channel(C, u)
    weight = 2 if A.is_complex() else 1

    def scan(span: slice, h: Tensor | None) -> tuple[Tensor, Tensor]:
        if h is None:
            h = A.new_zeros(u.shape[0], *A.shape)
        outputs = []
        # unbind, because the gradient of an index would be a tensor of the whole size each time.
        each = (v[:, span].unbind(1) for v in (dt[..., None], u[..., None], B, C))
        for step, x, b, c in zip(*each, strict=True):
            h = (step * A).exp() * h + step * x * b
            outputs.append(weight * (c * h).sum(-1).real)
        return (torch.stack(outputs, 1) if outputs else u[:, span]), h

    y, h_last = unpack(scan, u, h0, cu_seqlens)
    if D is not None:
        y = y + D * u
    if z is not None:
        y = y * F.silu(z)
    return y.to(dtype), h_last


def _like(parameter: Tensor, u: Tensor) -> torch.dtype:
    if not parameter.is_complex():
        return u.dtype
    return torch.complex128 if u.dtype == torch.float64 else torch.complex64


def _per_channel(x: Tensor, u: Tensor) -> Tensor:
    """(B, T, N) or (B, T, G, N) -> (B, T, D or 1, N)."""
    if x.dim() == 3:
        return x[:, :, None]
    return x.repeat_interleave(u.shape[2] // x.shape[2], 2)


def selective_scan_step(
    h: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    slots: Tensor | None = None,
) -> Tensor:
    """One step of the loop, updating ``h``."""

    def step(state: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        per_token = (None if x is None else x[rows][:, None] for x in (u, delta, B, C, z))
        u1, delta1, B1, C1, z1 = per_token
        y, new = selective_scan(
            u1, delta1, A, B1, C1, D, z1, delta_bias, delta_softplus=delta_softplus, h0=state
        )
        return new, y[:, 0]

    return slot_step(step, h, slots, torch.zeros_like(u))
