"""``block_scan``: the linear recurrence with a small matrix for each block of the state."""

from __future__ import annotations

import torch
from torch import Tensor

from recurra._check import check, check_slots, state_dtype
from recurra.ops import _register
from recurra.ops._previous import from_previous, previous

_op = torch.ops.recurra.block_scan.default
_backward_op = torch.ops.recurra._block_scan_backward.default
_step_op = torch.ops.recurra.block_scan_step.default


def block_scan(
    A: Tensor,
    b: Tensor,
    h0: Tensor | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Block-diagonal linear recurrence :math:`h_t = A_t h_{t-1} + b_t`, in blocks of k numbers.

    Differentiable to any order in ``A``, ``b`` and ``h0``, from ``h`` and from ``h_last``. Gu et
    al., "Combining recurrent, convolutional, and continuous-time models with linear state-space
    layers" (LSSL, 2021); with permutations as blocks it follows any finite automaton: Merrill et
    al., "The illusion of state in state-space models" (2024).

    Args:
        A: matrices, (B, T, N, k, k), or with any of B, T and N 1, which then is shared along it,
            never expanded, and whose gradient is summed over it in a fixed order. The dtype of
            ``b``.
        b: input, (B, T, N, k) with k from 1 to 16; float32, float64, bfloat16 or float16, any
            strides.
        h0: initial state, (B, N, k), or (S, N, k) with ``cu_seqlens``; zeros when None. float32
            for 16-bit ``b``, otherwise the dtype of ``b``.
        reverse: run from the last step to the first; ``h0`` then precedes the last step.
        cu_seqlens: (S + 1,) int32 or int64, the ends of S sequences packed along T, from 0 to T;
            B must be 1. Each has a state of its own.

    Returns:
        h: (B, T, N, k), the dtype and memory order of ``b``.
        h_last: the state after the last step walked, shape and dtype of ``h0``.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype or device, or ``cu_seqlens`` does not
            ascend from 0 to T.
    """
    return _op(A, b, h0, reverse=reverse, cu_seqlens=cu_seqlens)


def block_scan_step(h: Tensor, A: Tensor, b: Tensor, *, slots: Tensor | None = None) -> Tensor:
    r"""One step of :func:`block_scan`, :math:`h \leftarrow A h + b`, in place.

    Args:
        h: states, (B, N, k), or (slots, N, k) with ``slots``; updated in place. float32 for 16-bit
            ``b``, otherwise the dtype of ``b``. No element may lie twice in memory or in an input,
            but for a ``b`` that is ``h`` itself where there are no slots.
        A: matrices, (B, N, k, k), B and N may be 1.
        b: input, (B, N, k) with k from 1 to 16.
        slots: (B,) int32 or int64, which state each row uses, none twice; a row whose index is
            negative changes nothing and returns zeros.

    Returns:
        The new states of the rows, (B, N, k), in the dtype of ``b``.

    Raises:
        RuntimeError: wrong shape, dtype or device, a slot out of range or repeated, or gradients
            are enabled and an input requires one.
    """
    return _step_op(h, A, b, slots=slots)


@_register.fake("block_scan")
def _(A, b, h0=None, *, reverse=False, cu_seqlens=None):
    sizes = check("block_scan", A=A, b=b, h0=h0, cu_seqlens=cu_seqlens)
    h_last = b.new_empty(sizes["S"], sizes["N"], sizes["k"], dtype=state_dtype(b.dtype))
    return torch.empty_like(b), h_last


@_register.fake("_block_scan_backward")
def _(A, h, h0, dh, dh_last, *, reverse=False, cu_seqlens=None):
    sizes = check(
        "_block_scan_backward", A=A, h=h, h0=h0, dh=dh, dh_last=dh_last, cu_seqlens=cu_seqlens
    )
    if h0 is None:
        dh0 = h.new_empty(sizes["S"], sizes["N"], sizes["k"], dtype=state_dtype(h.dtype))
    else:
        dh0 = torch.empty_like(h0)
    return torch.empty_like(A), torch.empty_like(h), dh0


@_register.fake("block_scan_step")
def _(h, A, b, *, slots=None):
    check("block_scan_step", h=h, A=A, b=b, slots=slots)
    check_slots("block_scan_step", b.shape[0], h, slots)
    return torch.empty_like(b)


def _setup(ctx, inputs, output):
    ctx.reverse = inputs["reverse"]
    ctx.save_for_backward(inputs["A"], output[0], inputs["h0"], inputs["cu_seqlens"])


def _backward(ctx, dh, dh_last):
    A, h, h0, cu_seqlens = ctx.saved_tensors
    dA, db, dh0 = _backward_op(A, h, h0, dh, dh_last, reverse=ctx.reverse, cu_seqlens=cu_seqlens)
    return {"A": dA, "b": db, "h0": None if h0 is None else dh0}


def _setup_backward(ctx, inputs, output):
    ctx.reverse = inputs["reverse"]
    ctx.save_for_backward(*(inputs[k] for k in ("A", "h", "h0", "cu_seqlens")), output[1])


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]


def _double_backward(ctx, cdA, cdb, cdh0):
    # With g = db, the backward is g_t = dh_t + A_{t+1}^T g_{t+1}, dA_t = g_t h_{t-1}^T,
    # dh0 = A_1^T g_1. Its adjoint runs forwards from lambda_0 = cdh0, lambda_t = A_t lambda_{t-1}
    # + (cdb + cdA h_{t-1})_t, which is block_scan again, so every order follows.
    A, h, h0, cu_seqlens, g = ctx.saved_tensors
    source = torch.zeros_like(h) if cdb is None else cdb
    if cdA is not None:
        source = source + _times(cdA, previous(h, h0, ctx.reverse, cu_seqlens))
    lam, lam_last = _op(A, source, cdh0, reverse=ctx.reverse, cu_seqlens=cu_seqlens)
    lam_prev = previous(lam, cdh0, ctx.reverse, cu_seqlens)
    to_A = (g[..., :, None] * lam_prev[..., None, :]).sum_to_size(A.shape)
    to_h = to_h0 = None
    if cdA is not None:
        # dA_t reads h_{t-1}: its cotangent moves one step back, the first step's to h0.
        to_prev = _times(cdA.mT, g)
        to_h, to_h0 = from_previous(to_prev, h0, ctx.reverse, cu_seqlens)
    return {"A": to_A, "h": to_h, "h0": to_h0, "dh": lam, "dh_last": lam_last}


_register.autograd("block_scan", _setup, _backward)
_register.autograd("_block_scan_backward", _setup_backward, _double_backward)
_register.autocast("block_scan", activations=(0, 1))
_register.autocast("block_scan_step", activations=(1, 2))
_register.no_grad_step("block_scan_step", "block_scan")
