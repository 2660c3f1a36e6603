"""Stands in for fla.ops.hgrn: (B, T, D) in, (B, T, D) out."""

from __future__ import annotations

import torch
from torch import Tensor

from recurra.compat._common import absent, check_dims, check_shape, kernels, state

__all__ = ["chunk_hgrn", "fused_recurrent_hgrn"]
__getattr__ = absent("fla")


def fused_recurrent_hgrn(
    x: Tensor,
    g: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """HGRN's recurrence, h_t = exp(g_t) h_{t-1} + x_t; :func:`recurra.linear_scan` under fla's
    names. Qin et al., "Hierarchically gated recurrent neural network for sequence modeling" (2023).

    Args:
        x: inputs, (B, T, D), any strides.
        g: logarithms of the gates, (B, T, D).
        initial_state: (B, D), or (S, D) with ``cu_seqlens``.
        output_final_state: return the last state too.
        cu_seqlens: (S + 1,), the ends of S sequences packed along T; B must be 1.

    Returns:
        h, (B, T, D), in the dtype of ``x``, and the last state in float32 or float64, or None.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype or device.
    """
    op = "fused_recurrent_hgrn"
    check_dims(op, "x", x, "(B, T, D)")
    check_shape(op, "g", g, "of x", tuple(x.shape))
    N = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    check_shape(op, "initial_state", initial_state, "(N, D)", (N, x.shape[2]))
    wide = torch.promote_types(x.dtype, g.dtype)
    b = x.to(wide)
    h0 = state(initial_state, b)
    h, h_last = kernels(x).linear_scan(g.to(wide), b, h0, log_a=True, cu_seqlens=cu_seqlens)
    return h.to(x.dtype), h_last if output_final_state else None


def chunk_hgrn(
    x: Tensor,
    g: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """:func:`fused_recurrent_hgrn` under the name of fla's chunked kernel."""
    return fused_recurrent_hgrn(x, g, initial_state, output_final_state)
