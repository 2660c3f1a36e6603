"""``linear_scan``: the gated linear recurrence."""

from __future__ import annotations

import torch
from torch import Tensor

from recurra._check import check, check_slots, state_dtype
from recurra.ops import _register
from recurra.ops._previous import from_previous, previous

_op = torch.ops.recurra.linear_scan.default
_backward_op = torch.ops.recurra._linear_scan_backward.default
_step_op = torch.ops.recurra.linear_scan_step.default


def linear_scan(
    a: Tensor,
    b: Tensor,
    h0: Tensor | None = None,
    *,
    log_a: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Gated linear recurrence :math:`h_t = a_t \odot h_{t-1} + b_t`.

    Differentiable to any order in ``a``, ``b`` and ``h0``, from ``h`` and from ``h_last``.
    Blelloch, "Prefix sums and their applications" (1990); Martin and Cundy, "Parallelizing
    linear recurrent neural nets over sequence length" (ICLR 2018).

    Args:
        a: gate, (B, T, D), or with any of its dimensions 1, which then is shared along it and
            whose gradient is summed over it in a fixed order. Any sign. The dtype of ``b``.
        b: input, (B, T, D); float32, float64, bfloat16, float16, complex64 or complex128, any
            strides. A constant gate (1, 1, D) is read once, not at every step.
        h0: initial state, (B, D), or (S, D) with ``cu_seqlens``; zeros when None. float32 for
            16-bit ``b``, otherwise the dtype of ``b``.
        log_a: ``a`` is the logarithm of the gate.
        reverse: run from the last step to the first; ``h0`` then precedes the last step.
        cu_seqlens: (S + 1,) int32 or int64, the ends of S sequences packed along T, from 0 to T;
            B must be 1. Each has a state of its own.

    Returns:
        h: (B, T, D), the dtype and memory order of ``b``.
        h_last: the state after the last step walked, shape and dtype of ``h0``.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype or device, or ``cu_seqlens`` does not
            ascend from 0 to T.
    """
    return _op(a, b, h0, log_a=log_a, reverse=reverse, cu_seqlens=cu_seqlens)


def linear_scan_step(
    h: Tensor, a: Tensor, b: Tensor, *, log_a: bool = False, slots: Tensor | None = None
) -> Tensor:
    r"""One step of :func:`linear_scan`, :math:`h \leftarrow a \odot h + b`, in place.

    In a graph of torch.compile a complex state is written by a copy of the new one: inductor
    compiles no op that writes complex numbers, such as ``torch.ops.recurra.linear_scan_step``.

    Args:
        h: states, (B, D), or (slots, D) with ``slots``; updated in place. float32 for 16-bit ``b``,
            otherwise the dtype of ``b``. No element may lie twice in memory or in an input, but for
            ``a`` and ``b`` that are ``h`` itself where there are no slots.
        a: gate, (B, D) or with dimensions of 1.
        b: input, (B, D).
        log_a: ``a`` is the logarithm of the gate.
        slots: (B,) int32 or int64, which state each row uses, none twice; a row whose index is
            negative changes nothing and returns zeros.

    Returns:
        The new states of the rows, (B, D), in the dtype of ``b``.

    Raises:
        RuntimeError: wrong shape, dtype or device, a slot out of range or repeated, or gradients
            are enabled and an input requires one.
    """
    step = _complex_step if h.is_complex() and torch.compiler.is_compiling() else _step_op
    return step(h, a, b, log_a=log_a, slots=slots)


@_register.fake("linear_scan")
def _(a, b, h0=None, *, log_a=False, reverse=False, cu_seqlens=None):
    sizes = check("linear_scan", a=a, b=b, h0=h0, cu_seqlens=cu_seqlens)
    return torch.empty_like(b), b.new_empty(sizes["S"], sizes["D"], dtype=state_dtype(b.dtype))


@_register.fake("_linear_scan_backward")
def _(a, h, h0, dh, dh_last, *, log_a=False, reverse=False, cu_seqlens=None):
    sizes = check(
        "_linear_scan_backward", a=a, h=h, h0=h0, dh=dh, dh_last=dh_last, cu_seqlens=cu_seqlens
    )
    if h0 is None:
        dh0 = h.new_empty(sizes["S"], sizes["D"], dtype=state_dtype(h.dtype))
    else:
        dh0 = torch.empty_like(h0)
    return torch.empty_like(a), torch.empty_like(h), dh0


@_register.fake("linear_scan_step")
def _(h, a, b, *, log_a=False, slots=None):
    check("linear_scan_step", h=h, a=a, b=b, slots=slots)
    check_slots("linear_scan_step", b.shape[0], h, slots)
    return torch.empty_like(b)


def _setup(ctx, inputs, output):
    ctx.options = {k: inputs[k] for k in ("log_a", "reverse")}
    ctx.save_for_backward(inputs["a"], output[0], inputs["h0"], inputs["cu_seqlens"])


def _backward(ctx, dh, dh_last):
    a, h, h0, cu_seqlens = ctx.saved_tensors
    da, db, dh0 = _backward_op(a, h, h0, dh, dh_last, cu_seqlens=cu_seqlens, **ctx.options)
    return {"a": da, "b": db, "h0": None if h0 is None else dh0}


def _setup_backward(ctx, inputs, output):
    ctx.options = {k: inputs[k] for k in ("log_a", "reverse")}
    a, h, h0, cu_seqlens = (inputs[k] for k in ("a", "h", "h0", "cu_seqlens"))
    ctx.save_for_backward(a, h, h0, cu_seqlens, output[1])


def _conj(x):
    return x.conj().resolve_conj() if x.is_complex() else x


def _double_backward(ctx, cda, cdb, cdh0):
    # With g = db, the backward is g_t = dh_t + a_{t+1}* g_{t+1}, da_t = g_t h_{t-1}*,
    # dh0 = a_1* g_1. Its adjoint runs forwards: lambda_t = a_t lambda_{t-1} + (cdb + cda h_{t-1})_t
    # from lambda_0 = cdh0, which is linear_scan again, so every order follows. A star is the
    # conjugate, through which a cotangent goes as its own conjugate.
    a, h, h0, cu_seqlens, g = ctx.saved_tensors
    log_a, reverse = ctx.options["log_a"], ctx.options["reverse"]
    gate = a.exp() if log_a else a
    full = None if cda is None else (cda * gate if log_a else cda).expand_as(h)
    h_prev = previous(h, h0, reverse, cu_seqlens)
    source = torch.zeros_like(h)
    if cdb is not None:
        source = source + cdb
    if full is not None:
        source = source + full * h_prev
    lam, lam_last = _op(a, source, cdh0, cu_seqlens=cu_seqlens, **ctx.options)
    lam_prev = previous(lam, cdh0, reverse, cu_seqlens)
    to_a = _conj(lam_prev) * g
    if log_a:
        to_a = to_a * _conj(gate)
        if cda is not None:
            to_a = to_a + _conj(cda * gate * h_prev) * g
    to_a = to_a.sum_to_size(a.shape)
    to_h = to_h0 = None
    if full is not None:
        # da_t reads h_{t-1}: its cotangent moves one step back, the first step's to h0.
        to_prev = _conj(full) * g
        to_h, to_h0 = from_previous(to_prev, h0, reverse, cu_seqlens)
    return {"a": to_a, "h": to_h, "h0": to_h0, "dh": lam, "dh_last": lam_last}


_register.autograd("linear_scan", _setup, _backward)
_register.autograd("_linear_scan_backward", _setup_backward, _double_backward)
_register.autocast("linear_scan", activations=(0, 1))
_register.autocast("linear_scan_step", activations=(1, 2))
_register.no_grad_step("linear_scan_step", "linear_scan")
_complex_step = _register.functional_step("linear_scan_step", "linear_scan")
