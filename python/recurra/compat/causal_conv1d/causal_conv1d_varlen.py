"""Stands in for causal_conv1d.causal_conv1d_varlen."""

from __future__ import annotations

import torch
from torch import Tensor

from recurra._check import fail
from recurra.compat._common import (
    absent,
    assert_compiled,
    check_dims,
    check_indices,
    last_inputs,
    readable,
)

__getattr__ = absent("causal_conv1d")


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last inputs of each packed sequence, from which decoding goes on. Differentiable.

    Args:
        x: (total, dim), any dtype and strides.
        cu_seqlens: (batch + 1,) int32 or int64, the ends of the sequences, from 0 to total.
        state_len: how many inputs.

    Returns:
        (batch, dim, state_len), the dtype of ``x``; zeros before the start of a sequence.

    Raises:
        RuntimeError: an argument has the wrong shape or dtype, ``cu_seqlens`` does not ascend from
            0 to total, or ``state_len`` is negative. Where the kernels of CUDA run, the values of
            ``cu_seqlens`` are not looked at.
    """
    _check(x, cu_seqlens, state_len)
    return last_inputs(x, cu_seqlens, state_len)


def causal_conv1d_varlen_states_ref(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """:func:`causal_conv1d_varlen_states`, sequence by sequence."""
    _check(x, cu_seqlens, state_len)
    states = []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        taken = x[max(start, end - state_len) : end].T
        states.append(torch.nn.functional.pad(taken, (state_len - taken.shape[1], 0)))
    return torch.stack(states) if states else x.new_zeros(0, x.shape[1], state_len)


def _check(x: Tensor, cu_seqlens: Tensor, state_len: int) -> None:
    op = "causal_conv1d_varlen_states"
    check_dims(op, "x", x, "(total, dim)")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        fail(op, f"cu_seqlens must have shape (batch + 1,), got {tuple(cu_seqlens.shape)}")
    check_indices(op, "cu_seqlens", cu_seqlens, len(cu_seqlens))
    if state_len < 0:
        fail(op, f"state_len must be at least 0, got {state_len}")
    if not readable(cu_seqlens):
        sentence = f"{op}: cu_seqlens must ascend from 0 to the number of rows of x"
        assert_compiled(cu_seqlens, lambda: _ascends(cu_seqlens, x.shape[0]), sentence)
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != x.shape[0] or ends != sorted(ends):
        fail(op, f"cu_seqlens must ascend from 0 to {x.shape[0]}, got {ends[0]} to {ends[-1]}")


def _ascends(cu_seqlens: Tensor, total: int) -> Tensor:
    """What must all be true."""
    ends = torch.stack([cu_seqlens[0] == 0, cu_seqlens[-1] == total])
    return torch.cat([ends, cu_seqlens[1:] >= cu_seqlens[:-1]])
