"""The interface of implementations that solve minGRU and minLSTM in logarithms."""

from __future__ import annotations

from torch import Tensor

from recurra.ops.linear_scan import linear_scan


def log_space_scan(
    log_coeffs: Tensor,
    log_values: Tensor,
    h0: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Positive gates and inputs given by their logarithms:
    :math:`h_t = e^{\mathrm{log\_coeffs}_t} h_{t-1} + e^{\mathrm{log\_values}_t}`.

    Feng et al., "Were RNNs all we needed?" (2024), solve it by a ``logcumsumexp`` over differences
    of cumulative sums, which grow with the length and lose the last digits. Here it is
    :func:`recurra.linear_scan`, so that whole sequences and chunks give the same bits.

    Args:
        log_coeffs: logarithms of the gates, (B, T, D); -infinity is a gate of 0.
        log_values: logarithms of the inputs, (B, T, D).
        h0: the state before the first step itself, not its logarithm, of any sign; (B, D), or
            (S, D) with ``cu_seqlens``; zeros when None. Where others take its logarithm in front of
            ``log_values``, it is the exponential of that row.
        cu_seqlens: (S + 1,), the ends of S sequences packed along T; B must be 1.

    Returns:
        h: (B, T, D), not its logarithm.
        h_last: the state after the last step, to go on from.
    """
    return linear_scan(log_coeffs, log_values.exp(), h0, log_a=True, cu_seqlens=cu_seqlens)
