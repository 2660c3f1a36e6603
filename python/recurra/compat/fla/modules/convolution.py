"""Stands in for fla.modules.convolution: (B, T, D) in, (B, T, D) out."""

from __future__ import annotations

import torch
from torch import Tensor

from recurra._check import fail
from recurra.compat import _common
from recurra.compat._common import (
    absent,
    check_dims,
    check_shape,
    kernels,
    last_inputs,
    parameter,
    state,
)

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
        x: (B, T, D), any strides, or (B, T, ...) with D numbers in what follows.
        weight: (D, W) with W >= 2; bias: (D,).
        residual: the shape of ``x``, added to the output.
        initial_state: (N, D, W), the inputs before the first, oldest first.
        output_final_state: return the last W inputs too.
        activation: None, ``"silu"`` or ``"swish"``.
        cu_seqlens: (N + 1,), the ends of N sequences packed along T; B must be 1.
        backend, cu_seqlens_cpu, chunk_indices: choose among fla's kernels; not needed here.
        cp_context: of context parallelism, which is not supported; None.

    Returns:
        The shape and dtype of ``x``, and the last inputs, (N, D, W), or None.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype or device, or there is a
            ``cp_context`` or ``seq_idx``.
    """
    op = "causal_conv1d"
    if cp_context is not None:
        fail(op, "cp_context must be None, context parallelism is not supported")
    if kwargs.get("seq_idx") is not None:
        fail(op, "seq_idx must be None, cu_seqlens tells where sequences end")
    if weight is None:
        fail(op, "weight must have shape (D, W), got None")
    check_dims(op, "weight", weight, "(D, W)")
    check_shape(op, "residual", residual, "of x", tuple(x.shape))
    shape, (D, W) = x.shape, weight.shape
    if x.dim() > 3 and x.shape[-1] != D:
        x = x.flatten(2)
    check_dims(op, "x", x, "(B, T, D)")
    h0 = None
    if initial_state is not None:
        N = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        check_shape(op, "initial_state", initial_state, "(N, D, W)", (N, D, W))
        h0 = state(initial_state[..., 1:].transpose(1, 2), x)
    y, _ = kernels(x).causal_conv1d(
        x,
        parameter(weight, x),
        parameter(bias, x),
        h0,
        activation=_common.activation(op, activation),
        cu_seqlens=cu_seqlens,
    )
    y = y.reshape(shape)
    if residual is not None:
        y = (y + residual).to(x.dtype)
    if not output_final_state:
        return y, None
    before = None if initial_state is None else initial_state.to(x.dtype)
    if cu_seqlens is not None:
        return y, last_inputs(x[0], cu_seqlens, W, before)
    if before is None:
        before = x.new_zeros(x.shape[0], D, W)
    return y, torch.cat([before, x.transpose(1, 2)], -1)[..., -W:]
