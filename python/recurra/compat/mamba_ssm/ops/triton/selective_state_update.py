"""Stands in for mamba_ssm.ops.triton.selective_state_update: one step of decoding."""

from __future__ import annotations

import torch
from torch import Tensor

from recurra import reference
from recurra._check import fail
from recurra.compat._common import (
    absent,
    check_indices,
    check_shape,
    check_written,
    in_slots,
    kernels,
    parameter,
    put_in_slots,
    records_gradient,
    state,
)

__getattr__ = absent("mamba_ssm")
_NAME = "selective_state_update"
# Of a state with so many dimensions: what a row, the rates and the parameters have.
_LETTERS = {
    3: ("(batch, dim)", "(dim, dstate)", "(dim,)", "dim"),
    4: ("(batch, heads, dim)", "(heads, dim, dstate)", "(heads, dim)", "heads"),
}


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One step of Mamba's or Mamba-2's scan; ``state`` is updated in place.

    Args:
        state: (batch, dim, dstate), or (batch, heads, dim, dstate) for Mamba-2, or with the
            number of slots for batch where ``state_batch_indices`` is given. Any dtype that ``x``
            may have.
        x, dt, z: (batch, dim) or (batch, heads, dim); expanded views are welcome. Where their
            dtypes or those of B and C differ the step is computed in float32 or float64.
        A: (dim, dstate) or (heads, dim, dstate).
        B, C: (batch, dstate) or (batch, groups, dstate).
        D, dt_bias: (dim,) or (heads, dim).
        dt_softplus: apply softplus to ``dt + dt_bias``.
        state_batch_indices: (batch,), which state each row uses, none twice; a row whose index is
            negative changes nothing and returns zeros.

    Returns:
        The shape and dtype of ``x``. Where autograd records, gradients reach every argument.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype or device, or an index is too large
            or repeated. The state is as it was then.
    """
    return _update(
        kernels(x), state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices
    )


def selective_state_update_ref(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """:func:`selective_state_update` in plain torch."""
    return _update(reference, state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, None)


def _update(ops, whole, x, dt, A, B, C, D, z, dt_bias, dt_softplus, slots):
    _check(whole, x, dt, A, B, C, D, z, dt_bias, slots)
    shape, dtype = x.shape, x.dtype
    if not (dt.dtype == B.dtype == C.dtype == dtype and (z is None or z.dtype == dtype)):
        given = (None if t is None else t.dtype for t in (x, dt, B, C, z))
        wide = torch.float64 if torch.float64 in given else torch.float32
        x, dt, B, C, z = (None if t is None else t.to(wide) for t in (x, dt, B, C, z))
    if whole.dim() == 4:
        dim, N = whole.shape[2:]
        # A head's channels are neighbours, and so are the channels of a group of heads. A that
        # is one number a head, an expanded view, stays one number a channel.
        tied = A.stride(2) == 0
        A = (A[..., 0] if tied else A).flatten(0, 1)
        A = A[:, None].expand(-1, N) if tied else A
        x, dt, z = (None if t is None else t.flatten(1) for t in (x, dt, z))
        D, dt_bias = (None if t is None else t.flatten() for t in (D, dt_bias))
        states = whole.flatten(1, 2)
        viewed = whole.stride(1) == dim * whole.stride(2)
    else:
        states, viewed = whole, True
    arguments = [x, dt, parameter(A, x), B, C, parameter(D, x), z, parameter(dt_bias, x)]
    recording = records_gradient(whole, *arguments)
    if not recording and viewed and state(states[:0], x).dtype == states.dtype:
        y = ops.selective_scan_step(states, *arguments, delta_softplus=dt_softplus, slots=slots)
        return y.view(shape).to(dtype)
    # A copy of the rows: in another dtype, or because a backward needs what is about to change.
    rows, used = (slice(None), None) if slots is None else in_slots(slots, whole.shape[0])
    h = state(states[rows].clone(), x)
    if recording:
        u, delta, A, B, C, D, z, dt_bias = arguments
        u, delta, B, C, z = (None if t is None else t[:, None] for t in (u, delta, B, C, z))
        y, h = ops.selective_scan(
            u, delta, A, B, C, D, z, dt_bias, delta_softplus=dt_softplus, h0=h
        )
        y = y[:, 0]
    else:
        y = ops.selective_scan_step(h, *arguments, delta_softplus=dt_softplus)
    if slots is None:
        whole.copy_(h.view(whole.shape))
        return y.view(shape).to(dtype)
    put_in_slots(whole, rows, used, h.view(-1, *whole.shape[1:]))
    return y.masked_fill(~used[:, None], 0).view(shape).to(dtype)


def _check(whole, x, dt, A, B, C, D, z, dt_bias, slots) -> None:
    if whole.dim() not in (3, 4):
        fail(_NAME, f"state must have 3 or 4 dimensions, got {whole.dim()}")
    row, rates, parameters, of = _LETTERS[whole.dim()]
    states, *inner, N = whole.shape
    batch = states if slots is None else slots.shape[0] if slots.dim() else 1
    wanted = (batch, *inner)
    check_shape(_NAME, "x", x, row, wanted)
    check_shape(_NAME, "dt", dt, row, wanted)
    check_shape(_NAME, "z", z, row, wanted)
    check_shape(_NAME, "A", A, rates, (*inner, N))
    wanted = tuple(inner)
    check_shape(_NAME, "D", D, parameters, wanted)
    check_shape(_NAME, "dt_bias", dt_bias, parameters, wanted)
    if B.dim() == 3:
        groups = B.shape[1]
        check_shape(_NAME, "B", B, "(batch, groups, dstate)", (batch, groups, N))
        if groups == 0 or inner[0] % groups:
            fail(_NAME, f"the number of groups must divide {of} = {inner[0]}, got {groups}")
    else:
        check_shape(_NAME, "B", B, "(batch, dstate)", (batch, N))
    check_shape(_NAME, "C", C, "of B", tuple(B.shape))
    if slots is not None:
        check_indices(_NAME, "state_batch_indices", slots, batch, states)
    check_written(_NAME, "state", whole)
