"""Stands in for mamba_ssm.ops.triton.layernorm_gated: norms with a SiLU gate, in groups."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recurra._check import fail, state_dtype
from recurra.compat._common import absent, check_shape
from recurra.compat.mamba_ssm.ops.triton.layer_norm import _norm, check_norm

__getattr__ = absent("mamba_ssm")


def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """``norm(x) silu(z)``, or ``norm(x silu(z))`` where not ``norm_before_gate``.

    Args:
        x: (..., dim); z: the same shape, no gate when None.
        weight, bias: (dim,).
        eps: added to the variance.
        group_size: norm each group of so many neighbours by itself; it divides dim.
        norm_before_gate: whether the gate comes after the norm.
        is_rms_norm: by the root mean square, without the mean.

    Returns:
        The shape and dtype of ``x``.

    Raises:
        RuntimeError: an argument has the wrong shape or dtype, or ``group_size`` does not divide
            dim.
    """
    dtype, width = x.dtype, x.shape[-1]
    op = "rmsnorm_fn" if is_rms_norm else "layernorm_fn"
    check_norm(op, x, weight=weight, bias=bias)
    check_shape(op, "z", z, "of x", tuple(x.shape))
    if group_size is not None and (group_size < 1 or width % group_size):
        fail(op, f"group_size must divide dim = {width}, got {group_size}")
    wide = state_dtype(dtype)
    x, weight = x.to(wide), weight.to(wide)
    gate = None if z is None else F.silu(z.to(wide))
    if gate is not None and not norm_before_gate:
        x = x * gate
    if group_size in (None, width):
        y = _norm(x, weight, None, eps, is_rms_norm)
    else:
        groups = x.unflatten(-1, (-1, group_size))
        y = _norm(groups, torch.ones_like(weight[:group_size]), None, eps, is_rms_norm)
        y = y.flatten(-2) * weight
    if bias is not None:
        y = y + bias
    if gate is not None and norm_before_gate:
        y = y * gate
    return y.to(dtype)


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """:func:`layernorm_fn` by the root mean square."""
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, True)


def rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    upcast: bool = True,
) -> Tensor:
    """:func:`rmsnorm_fn` in plain torch."""
    dtype = x.dtype
    if upcast:
        x, weight, bias, z = (None if t is None else t.float() for t in (x, weight, bias, z))
    if z is not None and not norm_before_gate:
        x = x * F.silu(z)
    groups = x.unflatten(-1, (-1, group_size or x.shape[-1]))
    y = (groups * (groups.square().mean(-1, keepdim=True) + eps).rsqrt()).flatten(-2) * weight
    y = y if bias is None else y + bias
    return (y * F.silu(z) if z is not None and norm_before_gate else y).to(dtype)


class _Norm(nn.Module):
    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Norms (..., hidden_size), with the gate ``z``; see :func:`layernorm_fn`."""
        return layernorm_fn(
            x,
            self.weight,
            self.bias,
            z,
            self.eps,
            self.group_size,
            self.norm_before_gate,
            self._rms,
        )


class RMSNorm(_Norm):
    """Gated root mean square norm in groups; see :func:`layernorm_fn`."""

    _rms = True


class LayerNorm(_Norm):
    """Gated layer norm in groups; see :func:`layernorm_fn`."""

    _rms = False

    def __init__(self, hidden_size: int, *args, device=None, dtype=None, **kwargs):
        super().__init__(hidden_size, *args, device=device, dtype=dtype, **kwargs)
        self.bias = nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype))
