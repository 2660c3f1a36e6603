"""Stands in for fla.modules.convolution: (B, T, D) in, (B, T, D) out."""

from __future__ import annotations

import torch
from torch import Tensor

from recurra._check import fail
from recurra.compat import _common
from recurra.compat._common import absent, kernels, last_inputs, parameter, state

__all__ = ["causal_conv1d"]
__getattr__ = absent("fla")


def causal_conv1d(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    activation: str | None = None,
    backend: str | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: object | None = None,
    **kwargs: object,
) -> tuple[Tensor, Tensor | None]:
    """Depthwise causal convolution; :func:`recurra.causal_conv1d` under fla's names.

    Args:
        x: (B, T, D), any strides.
        weight: (D, W) with W >= 2; bias: (D,).
        residual: (B, T, D), added to the output.
        initial_state: (N, D, W), the inputs before the first, oldest first.
        output_final_state: return the last W inputs too.
        activation: None, ``"silu"`` or ``"swish"``.
        cu_seqlens: (N + 1,), the ends of N sequences packed along T; B must be 1.
        backend, cu_seqlens_cpu, chunk_indices: choose among fla's kernels; not needed here.
        cp_context: of context parallelism, which is not supported; None.

    Returns:
        (B, T, D) in the dtype of ``x``, and the last inputs, (N, D, W), or None.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype or device, or there is a
            ``cp_context``.
    """
    if cp_context is not None:
        fail("causal_conv1d", "cp_context must be None, context parallelism is not supported")
    if weight is None or weight.dim() != 2:
        got = None if weight is None else tuple(weight.shape)
        fail("causal_conv1d", f"weight must have shape (D, W), got {got}")
    h0 = None
    if initial_state is not None:
        h0 = state(initial_state[..., 1:].transpose(1, 2), x)
    y, _ = kernels(x).causal_conv1d(
        x,
        parameter(weight, x),
        parameter(bias, x),
        h0,
        activation=_common.activation(activation),
        cu_seqlens=cu_seqlens,
    )
    if residual is not None:
        y = y + residual
    if not output_final_state:
        return y, None
    width = weight.shape[1]
    before = None if initial_state is None else initial_state.to(x.dtype)
    if cu_seqlens is not None:
        return y, last_inputs(x[0], cu_seqlens, width, before)
    if before is None:
        before = x.new_zeros(x.shape[0], x.shape[2], width)
    return y, torch.cat([before, x.transpose(1, 2)], -1)[..., -width:]
