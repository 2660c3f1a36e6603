"""``selective_scan``: the recurrence of Mamba (S6)."""

from __future__ import annotations

import torch
from torch import Tensor

from recurra._check import check, check_layout, check_slots, fail, state_dtype
from recurra.ops import _register

_op = torch.ops.recurra.selective_scan.default
_save_op = torch.ops.recurra._selective_scan_save.default
_backward_op = torch.ops.recurra._selective_scan_backward.default
_step_op = torch.ops.recurra.selective_scan_step.default

_CHUNK = 32  # kScanChunk: steps between two saved states
_LANES = 16


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
    r"""Selective state space scan.

    .. math::
        \Delta_t &= \mathrm{softplus}(\delta_t + \mathrm{bias}) \\
        h_t &= e^{\Delta_t A} \odot h_{t-1} + \Delta_t u_t B_t \\
        y_t &= \left(\textstyle\sum_n C_t h_t + D u_t\right) \mathrm{silu}(z_t)

    and, where A is complex, :math:`2\,\mathrm{Re} \sum_n C_t h_t`. Gu and Dao, "Mamba:
    Linear-Time Sequence Modeling with Selective State Spaces" (2023), section 3.2.

    Gradients reach every tensor argument, ``h0`` included, from ``y`` and from ``h_last``; the
    backward recomputes the states from one in 32, and differentiating it again raises. Same bits
    for any number of threads.

    Warning:
        The layout is (B, T, D). mamba_ssm's (B, D, L) tensors are passed as transposed views,
        ``u.swapaxes(1, 2)``, at no cost; a call that forgets to raises unless D = T, which
        cannot be detected.

    Args:
        u: input, (B, T, D); float32, float64, bfloat16 or float16, any strides.
        delta: step size before bias and softplus, (B, T, D), the dtype of ``u``.
        A: (D, N), usually negative; real or complex, the dtype of ``u`` or float32 (complex64 or,
            for float64, complex128).
        B, C: (B, T, N), or (B, T, G, N) for G groups of D / G neighbouring channels; the dtype of
            ``u``, or complex where A is.
        D: skip connection, (D,), the dtype of ``u`` or float32.
        z: gate, (B, T, D), the dtype of ``u``.
        delta_bias: (D,), the dtype of ``u`` or float32.
        delta_softplus: apply softplus to ``delta + delta_bias``.
        h0: initial state, (B, D, N), or (S, D, N) with ``cu_seqlens``; zeros when None. float32
            for 16-bit ``u``, otherwise the dtype of ``u``; complex where A is.
        cu_seqlens: (S + 1,) int32 or int64, the ends of S sequences packed along T, from 0 to T;
            B must be 1. Each has a state of its own.

    Returns:
        y: (B, T, D), the dtype and memory order of ``u``.
        h_last: the last state, shape and dtype of ``h0``.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype or device, G does not divide D, or
            ``cu_seqlens`` does not ascend from 0 to T; also when differentiated twice.
    """
    return _op(
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        delta_softplus=delta_softplus,
        h0=h0,
        cu_seqlens=cu_seqlens,
    )


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
    """One step of :func:`selective_scan`, updating the state in place.

    In a graph of torch.compile a complex state is written by a copy of the new one: inductor
    compiles no op that writes complex numbers, such as ``torch.ops.recurra.selective_scan_step``.

    Args:
        h: states, (B, D, N), or (slots, D, N) with ``slots``; updated in place. The dtype of a
            state of :func:`selective_scan`. No element may lie twice in memory or in an input, but
            for ``u`` and ``delta`` that are parts of ``h`` where there are no slots.
        u, delta, z: (B, D).
        A, D, delta_bias: as for :func:`selective_scan`.
        B, C: (B, N) or (B, G, N).
        delta_softplus: apply softplus to ``delta + delta_bias``.
        slots: (B,) int32 or int64, which state each row uses, none twice; a row whose index is
            negative changes nothing and returns zeros.

    Returns:
        y, (B, D), in the dtype of ``u``.

    Raises:
        RuntimeError: wrong shape, dtype or device, a slot out of range or repeated, or gradients
            are enabled and an input requires one.
    """
    step = _complex_step if h.is_complex() and torch.compiler.is_compiling() else _step_op
    return step(h, u, delta, A, B, C, D, z, delta_bias, delta_softplus=delta_softplus, slots=slots)


def _check_rest(op: str, time_dims: int, A, B, C, state, state_name: str, channels: int) -> None:
    for name, x in (("B", B), ("C", C)):
        if x.dim() == time_dims + 3 and (x.shape[-2] < 1 or channels % x.shape[-2] != 0):
            fail(
                op,
                f"the number of groups G of {name} must divide D = {channels}, got {x.shape[-2]}",
            )
    for name, x in (("B", B), ("C", C)):
        if x.is_complex() and not A.is_complex():
            fail(op, f"{name} must be real where A is real")
    if state is not None and state.is_complex() != A.is_complex():
        kind = "complex" if A.is_complex() else "real"
        fail(op, f"{state_name} must be {kind} where A is {kind}")


def _state_dtype(u: Tensor, A: Tensor) -> torch.dtype:
    real = state_dtype(u.dtype)
    if not A.is_complex():
        return real
    return torch.complex128 if real == torch.float64 else torch.complex64


def _fake_forward(op, u, delta, A, B, C, D, z, delta_bias, h0, cu_seqlens):
    check_layout(op, "u", u, "A", A, ", and likewise delta, z, B and C")
    sizes = check(
        op,
        u=u,
        delta=delta,
        A=A,
        B=B,
        C=C,
        D=D,
        z=z,
        delta_bias=delta_bias,
        h0=h0,
        cu_seqlens=cu_seqlens,
    )
    _check_rest(op, 1, A, B, C, h0, "h0", sizes["D"])
    h_last = u.new_empty(sizes["S"], sizes["D"], sizes["N"], dtype=_state_dtype(u, A))
    return torch.empty_like(u), h_last


@_register.fake("selective_scan")
def _(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    *,
    delta_softplus=False,
    h0=None,
    cu_seqlens=None,
):
    return _fake_forward("selective_scan", u, delta, A, B, C, D, z, delta_bias, h0, cu_seqlens)


@_register.fake("_selective_scan_save")
def _(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    *,
    delta_softplus=False,
    h0=None,
    cu_seqlens=None,
):
    y, h_last = _fake_forward(
        "_selective_scan_save", u, delta, A, B, C, D, z, delta_bias, h0, cu_seqlens
    )
    batch, time, channels = u.shape
    if cu_seqlens is None:
        chunks = batch * ((time + _CHUNK - 1) // _CHUNK)
    else:
        chunks = time // _CHUNK + h_last.shape[0]
    groups = max(x.shape[2] if x.dim() == 4 else 1 for x in (B, C))
    padded = groups * ((channels // groups + _LANES - 1) // _LANES) * _LANES
    rows = A.shape[1] * (2 if A.is_complex() else 1)
    return y, h_last, u.new_empty(chunks, rows, padded, dtype=state_dtype(u.dtype))


@_register.fake("_selective_scan_backward")
def _(
    dy,
    dh_last,
    saved,
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    *,
    delta_softplus=False,
    h0=None,
    cu_seqlens=None,
):
    op = "_selective_scan_backward"
    sizes = check(
        op,
        u=u,
        delta=delta,
        A=A,
        B=B,
        C=C,
        D=D,
        z=z,
        delta_bias=delta_bias,
        dy=dy,
        dh_last=dh_last,
        h0=h0,
        cu_seqlens=cu_seqlens,
    )
    _check_rest(op, 1, A, B, C, dh_last, "dh_last", sizes["D"])
    like = [
        u.new_empty(0) if x is None else torch.empty_like(x)
        for x in (u, delta, A, B, C, D, z, delta_bias)
    ]
    if h0 is None:
        dh0 = u.new_empty(sizes["S"], sizes["D"], sizes["N"], dtype=_state_dtype(u, A))
    else:
        dh0 = torch.empty_like(h0)
    return *like, dh0


@_register.fake("selective_scan_step")
def _(h, u, delta, A, B, C, D=None, z=None, delta_bias=None, *, delta_softplus=False, slots=None):
    op = "selective_scan_step"
    check(
        op,
        h=h,
        u=u,
        delta=delta,
        A=A,
        B=B,
        C=C,
        D=D,
        z=z,
        delta_bias=delta_bias,
        slots=slots,
    )
    _check_rest(op, 0, A, B, C, h, "h", u.shape[1])
    check_slots(op, u.shape[0], h, slots)
    return torch.empty_like(u)


_INPUTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def _setup(ctx, inputs, output):
    ctx.delta_softplus = inputs["delta_softplus"]
    kept = (*_INPUTS, "h0", "cu_seqlens")
    ctx.save_for_backward(*(inputs[k] for k in kept), output[2])


def _backward(ctx, dy, dh_last, _):
    *inputs, h0, cu_seqlens, saved = ctx.saved_tensors
    options = {"delta_softplus": ctx.delta_softplus, "h0": h0, "cu_seqlens": cu_seqlens}
    *gradients, dh0 = _backward_op(dy, dh_last, saved, *inputs, **options)
    given = {
        name: gradient
        for name, gradient, x in zip(_INPUTS, gradients, inputs, strict=True)
        if x is not None
    }
    return given | ({} if h0 is None else {"h0": dh0})


_register.autograd("_selective_scan_save", _setup, _backward)
_register.autograd_through("selective_scan", "_selective_scan_save", outputs=2)
_register.no_second_derivative("_selective_scan_backward", "selective_scan")
_register.autocast("selective_scan", activations=(0, 1, 3, 4, 6))
_register.autocast("selective_scan_step", activations=(1, 2, 4, 5, 7))
_register.no_grad_step("selective_scan_step", "selective_scan")
_complex_step = _register.functional_step("selective_scan_step", "selective_scan")
