"""Stands in for mamba_ssm.ops.selective_scan_interface: (B, D, L) in, (B, D, L) out.

Besides what the package does these run on the CPU and in float64, and the gradient of the last
state is right.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from recurra import reference
from recurra._check import fail, state_dtype
from recurra.compat._common import absent, check_dims, check_shape, kernels, parameter
from recurra.ops.rms_norm import rms_norm

__getattr__ = absent("mamba_ssm")


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba's scan; :func:`recurra.selective_scan` in mamba_ssm's layout.

    Args:
        u, delta: (batch, dim, seqlen), any strides.
        A: (dim, dstate), real or complex.
        B, C: (batch, dstate, seqlen), (batch, groups, dstate, seqlen), or constant in time,
            (dim, dstate). Where A is complex those that vary are real, real and imaginary parts
            alternating along (…, 2 seqlen), and constant ones complex. The gradient of a constant
            takes the memory of (batch, seqlen, dim, dstate) before it is summed.
        D, delta_bias: (dim,).
        z: gate, (batch, dim, seqlen).
        delta_softplus: apply softplus to ``delta + delta_bias``.
        return_last_state: return the last state too.

    Returns:
        (batch, dim, seqlen) in the dtype of ``u``, or that and the last state, (batch, dim,
        dstate), float32 or float64.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype or device.
    """
    return _scan(
        kernels(u).selective_scan, u, delta, A, B, C, D, z, delta_bias, delta_softplus,
        return_last_state,
    )  # fmt: skip


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`selective_scan_fn` as a loop in plain torch."""
    return _scan(
        reference.selective_scan, u, delta, A, B, C, D, z, delta_bias, delta_softplus,
        return_last_state,
    )  # fmt: skip


def _scan(op, u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state):
    _check_scan(u, delta, A, B, C, D, z, delta_bias)
    dtype = u.dtype
    if B.dim() == 2 or C.dim() == 2:
        # Constant ones are parameters and keep their precision.
        wide = state_dtype(dtype)
        u, delta = u.to(wide), delta.to(wide)
        z = None if z is None else z.to(wide)
        B, C = (x if x.is_complex() else x.to(wide) for x in (B, C))
    y, h_last = op(
        u.transpose(1, 2),
        delta.transpose(1, 2),
        parameter(A, u),
        _rows(B, u, A),
        _rows(C, u, A),
        parameter(D, u),
        None if z is None else z.transpose(1, 2),
        parameter(delta_bias, u),
        delta_softplus=delta_softplus,
    )
    y = y.transpose(1, 2).to(dtype)
    return (y, h_last) if return_last_state else y


def _check_scan(u, delta, A, B, C, D, z, delta_bias) -> None:
    op = "selective_scan_fn"
    check_dims(op, "u", u, "(batch, dim, seqlen)")
    batch, dim, L = u.shape
    for name, x in (("delta", delta), ("z", z)):
        check_shape(op, name, x, "(batch, dim, seqlen)", (batch, dim, L))
    check_dims(op, "A", A, "(dim, dstate)")
    N = A.shape[1]
    check_shape(op, "A", A, "(dim, dstate)", (dim, N))
    for name, x in (("D", D), ("delta_bias", delta_bias)):
        check_shape(op, name, x, "(dim,)", (dim,))
    last, long = ("2 seqlen", 2 * L) if A.is_complex() else ("seqlen", L)
    for name, x in (("B", B), ("C", C)):
        if x.dim() == 2:
            check_shape(op, name, x, "(dim, dstate)", (dim, N))
            if x.is_complex() != A.is_complex():
                kind = "complex" if A.is_complex() else "real"
                fail(op, f"{name} must be {kind} where it is constant and A is {kind}")
            continue
        if x.is_complex():
            fail(op, f"{name} must be real, parts alternating along 2 seqlen, got {x.dtype}")
        if x.dim() == 4:
            groups = x.shape[1]
            letters = f"(batch, groups, dstate, {last})"
            check_shape(op, name, x, letters, (batch, groups, N, long))
            if groups == 0 or dim % groups:
                fail(op, f"the number of groups of {name} must divide dim = {dim}, got {groups}")
        else:
            check_shape(op, name, x, f"(batch, dstate, {last})", (batch, N, long))
    on = u.device.type
    cast = torch.amp.is_autocast_available(on) and torch.is_autocast_enabled(on)
    if min(B.dim(), C.dim()) == 2 and not cast:
        # The op would say so, but for what is widened beside constants.
        for name, x in (("delta", delta), ("z", z), ("B", B), ("C", C)):
            if x is not None and x.dim() > 2 and x.dtype != u.dtype:
                fail(op, f"{name} must have the dtype of u, {u.dtype}, got {x.dtype}")


def _rows(x: Tensor, u: Tensor, A: Tensor) -> Tensor:
    """B or C of mamba_ssm as (B, L, N) or (B, L, G, N)."""
    if x.dim() == 2:  # a group of its own for every channel
        return x.expand(u.shape[0], u.shape[2], *x.shape)
    if A.is_complex():
        x = x.to(state_dtype(x.dtype))
        x = torch.view_as_complex(x.reshape(*x.shape[:-1], u.shape[2], 2))
    return x.transpose(1, 2) if x.dim() == 3 else x.permute(0, 3, 1, 2)


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """Everything of a Mamba mixer behind its first projection.

    Args:
        xz: (batch, 2 dim, seqlen), input and gate.
        conv1d_weight: (dim, 1, width); conv1d_bias: (dim,).
        x_proj_weight: (rank + 2 dstate, dim), with twice the dstate where A is complex.
        delta_proj_weight: (dim, rank).
        out_proj_weight: (d_model, dim); out_proj_bias: (d_model,).
        A: (dim, dstate), real or complex.
        B, C: as in :func:`selective_scan_fn`; projections of the input when None.
        D, delta_bias: (dim,).
        B_proj_bias, C_proj_bias: (dstate,), added to projected B and C.
        delta_softplus: apply softplus to the time step.
        checkpoint_lvl: 0 or 1. The package recomputes the convolution and the time step in the
            backward at 1; here both levels keep them.
        b_rms_weight, c_rms_weight, dt_rms_weight: (dstate,), (dstate,), (dim,); root mean square
            norms of B, C, projected or given in one group, and of the projected time step.
        b_c_dt_rms_eps: of these norms.

    Returns:
        (batch, seqlen, d_model).

    Raises:
        RuntimeError: an argument has the wrong shape, dtype or device.
    """
    return _inner(
        kernels(xz), xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight,
        out_proj_weight, out_proj_bias, A, B, C, D, delta_bias, B_proj_bias, C_proj_bias,
        delta_softplus, checkpoint_lvl, b_rms_weight, c_rms_weight, dt_rms_weight, b_c_dt_rms_eps,
    )  # fmt: skip


def mamba_inner_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """:func:`mamba_inner_fn` in plain torch."""
    return _inner(
        reference, xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight,
        out_proj_weight, out_proj_bias, A, B, C, D, delta_bias, B_proj_bias, C_proj_bias,
        delta_softplus,
    )  # fmt: skip


def _inner(
    ops,
    xz,
    conv1d_weight,
    conv1d_bias,
    x_proj_weight,
    delta_proj_weight,
    out_proj_weight,
    out_proj_bias,
    A,
    B,
    C,
    D,
    delta_bias,
    B_proj_bias,
    C_proj_bias,
    delta_softplus,
    checkpoint_lvl=1,
    b_rms_weight=None,
    c_rms_weight=None,
    dt_rms_weight=None,
    eps=1e-6,
):
    name = "mamba_inner_fn"
    if checkpoint_lvl not in (0, 1):
        fail(name, f"checkpoint_lvl must be 0 or 1, got {checkpoint_lvl}")
    if xz.dim() != 3 or xz.shape[1] % 2:
        fail(name, f"xz must have shape (batch, 2 dim, seqlen), got {tuple(xz.shape)}")
    dim = xz.shape[1] // 2
    check_dims(name, "conv1d_weight", conv1d_weight, "(dim, 1, width)")
    wanted = dim, 1, conv1d_weight.shape[2]
    check_shape(name, "conv1d_weight", conv1d_weight, "(dim, 1, width)", wanted)
    check_shape(name, "conv1d_bias", conv1d_bias, "(dim,)", (dim,))
    check_dims(name, "delta_proj_weight", delta_proj_weight, "(dim, rank)")
    check_dims(name, "A", A, "(dim, dstate)")
    rank = delta_proj_weight.shape[1]
    size = A.shape[1] * (2 if A.is_complex() else 1)
    states = "2 dstate" if A.is_complex() else "dstate"
    check_shape(name, "delta_proj_weight", delta_proj_weight, "(dim, rank)", (dim, rank))
    # With a B or a C given its rows may be missing.
    rows, least = rank + 2 * size, rank + size * ((B is None) + (C is None))
    got = tuple(x_proj_weight.shape)
    if len(got) != 2 or got[1] != dim or not least <= got[0] <= rows:
        wanted = f"(rank + 2 {states}, dim) = {(rows, dim)}"
        fail(name, f"x_proj_weight must have shape {wanted}, got {got}")
    check_dims(name, "out_proj_weight", out_proj_weight, "(d_model, dim)")
    width = out_proj_weight.shape[0]
    check_shape(name, "out_proj_weight", out_proj_weight, "(d_model, dim)", (width, dim))
    check_shape(name, "out_proj_bias", out_proj_bias, "(d_model,)", (width,))
    for what, p, length in (
        ("B_proj_bias", B_proj_bias, size),
        ("C_proj_bias", C_proj_bias, size),
        ("b_rms_weight", b_rms_weight, size),
        ("c_rms_weight", c_rms_weight, size),
    ):
        check_shape(name, what, p, f"({states},)", (length,))
    check_shape(name, "dt_rms_weight", dt_rms_weight, "(dim,)", (dim,))

    def project(x: Tensor, bias: Tensor | None) -> Tensor:
        """B or C out of the projection of the input, as selective_scan_fn takes it."""
        x = x if bias is None else x + bias.to(x.dtype)
        if A.is_complex():  # (B, L, 2 N) -> (B, N, 2 L)
            return x.unflatten(2, (A.shape[1], 2)).transpose(1, 2).flatten(2)
        return x.transpose(1, 2)

    def norm(what: str, x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return x
        shape = x.shape
        if x.dim() == 4 and x.shape[1] == 1:
            x = x[:, 0]
        if x.dim() != 3:
            got = tuple(shape)
            fail(name, f"{what} must be (batch, 1, dstate, seqlen) to be normed, got {got}")
        if A.is_complex():  # (B, N, 2 L) -> (B, L, 2 N)
            x = x.unflatten(2, (xz.shape[2], 2)).transpose(1, 2).flatten(2)
        else:
            x = x.transpose(1, 2)
        return project(_norm(x, weight, eps), None).view(shape)

    x, z = xz.chunk(2, dim=1)
    x, _ = ops.causal_conv1d(
        x.transpose(1, 2),
        parameter(conv1d_weight[:, 0], x),
        parameter(conv1d_bias, x),
        activation="silu",
    )
    projected = F.linear(x, x_proj_weight)
    delta = F.linear(projected[..., :rank], delta_proj_weight)
    if dt_rms_weight is not None:
        delta = _norm(delta, dt_rms_weight, eps)
    if B is None:
        B = project(projected[..., rank : rank + size], B_proj_bias)
    if C is None:
        C = project(projected[..., projected.shape[2] - size :], C_proj_bias)
    B, C = norm("B", B, b_rms_weight), norm("C", C, c_rms_weight)
    y = _scan(
        ops.selective_scan, x.transpose(1, 2), delta.transpose(1, 2), A, B, C, D, z, delta_bias,
        delta_softplus, False,
    )  # fmt: skip
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm(x, parameter(weight, x), eps)
