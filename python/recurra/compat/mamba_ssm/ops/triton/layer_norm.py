"""Stands in for mamba_ssm.ops.triton.layer_norm: dropout, residual and norm in one call."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recurra._check import fail, state_dtype
from recurra.compat._common import absent, check_floating, check_shape
from recurra.ops.rms_norm import rms_norm

__getattr__ = absent("mamba_ssm")


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
):
    """``norm(dropout(x rowscale) + dropout(x1) + residual)`` over the last dimension.

    Args:
        x: (..., dim); x1 and residual: the same shape.
        weight, bias: (dim,), of the norm; weight1, bias1: of a second one of the same sum.
        eps: added to the variance.
        dropout_p: probability of a zero, in ``x`` and in ``x1``.
        rowscale: (...) or flat, factors of the rows of ``x``; not beside ``x1``.
        prenorm: return the sum too, the next residual.
        residual_in_fp32: the sum is float32 where no ``residual`` says its dtype.
        is_rms_norm: by the root mean square, without the mean.
        return_dropout_mask: return what dropout kept, of ``x`` and of ``x1`` (or None), too.

    Returns:
        The norm in the dtype of ``x``, and in this order what was asked for beside it: the norm
        with ``weight1``, the sum, the masks.

    Raises:
        RuntimeError: an argument has the wrong shape or dtype, ``rowscale`` comes with ``x1``, or
            ``dropout_p`` is no probability.
    """
    op = "rms_norm_fn" if is_rms_norm else "layer_norm_fn"
    check_norm(op, x, weight=weight, bias=bias, weight1=weight1, bias1=bias1)
    for name, t in (("x1", x1), ("residual", residual)):
        check_shape(op, name, t, "of x", tuple(x.shape))
    if rowscale is not None:
        if x1 is not None:
            fail(op, "rowscale must be None beside x1")
        rows = tuple(x.shape[:-1])
        if rowscale.shape not in (rows, (math.prod(rows),)):
            got = tuple(rowscale.shape)
            fail(op, f"rowscale must have shape {rows}, one factor a row of x, got {got}")
        rowscale = rowscale.reshape(rows)
    if not 0 <= dropout_p <= 1:
        fail(op, f"dropout_p must be between 0 and 1, got {dropout_p}")
    wide = state_dtype(x.dtype)
    total = x.to(wide)
    if rowscale is not None:
        total = total * rowscale[..., None]
    total, mask = _dropout(total, dropout_p)
    mask1 = None
    if x1 is not None:
        other, mask1 = _dropout(x1.to(wide), dropout_p)
        total = total + other
    if residual is not None:
        total = total + residual
    norms = [_norm(total, weight, bias, eps, is_rms_norm).to(x.dtype)]
    if weight1 is not None:
        norms.append(_norm(total, weight1, bias1, eps, is_rms_norm).to(x.dtype))
    if prenorm:
        alone = torch.float32 if residual_in_fp32 else x.dtype
        norms.append(total.to(alone if residual is None else residual.dtype))
    if return_dropout_mask:
        norms += [mask, mask1]
    return tuple(norms) if len(norms) > 1 else norms[0]


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
):
    """:func:`layer_norm_fn` by the root mean square."""
    return layer_norm_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm,
        residual_in_fp32, True, return_dropout_mask,
    )  # fmt: skip


class RMSNorm(nn.Module):
    """Root mean square norm with optional dropout and residual.

    Args:
        hidden_size: of the last dimension.
        eps: added to the mean square.
        dropout_p: probability of a zero in front of the residual, in training.
    """

    def __init__(
        self, hidden_size: int, eps: float = 1e-5, dropout_p: float = 0.0, device=None, dtype=None
    ):
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0.0 else None
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ):
        """Norms (..., hidden_size); see :func:`layer_norm_fn`."""
        return rms_norm_fn(
            x,
            self.weight,
            self.bias,
            residual=residual,
            eps=self.eps,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )


def layer_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None,
    upcast: bool = False,
):
    """:func:`layer_norm_fn` in plain torch, with what dropout keeps where that is given."""
    return _ref(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm,
        dropout_mask, dropout_mask1, upcast, False,
    )  # fmt: skip


def rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None,
    upcast: bool = False,
):
    """:func:`rms_norm_fn` in plain torch, with what dropout keeps where that is given."""
    return _ref(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm,
        dropout_mask, dropout_mask1, upcast, True,
    )  # fmt: skip


def _ref(
    x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm,
    dropout_mask, dropout_mask1, upcast, rms,
):  # fmt: skip
    dtype = x.dtype
    if upcast:
        x, weight, bias, residual, x1, weight1, bias1 = (
            None if t is None else t.float()
            for t in (x, weight, bias, residual, x1, weight1, bias1)
        )
    if x1 is not None and rowscale is not None:
        fail("layer_norm_ref", "rowscale must be None beside x1")
    total = x if rowscale is None else x * rowscale[..., None]
    total, _ = _dropout(total, dropout_p, dropout_mask)
    if x1 is not None:
        total = total + _dropout(x1, dropout_p, dropout_mask1)[0]
    if residual is not None:
        total = (total + residual).to(total.dtype)

    def norm(weight: Tensor, bias: Tensor | None) -> Tensor:
        if not rms:
            y = F.layer_norm(total.to(weight.dtype), weight.shape, weight, bias, eps)
            return y.to(dtype)
        y = total * (total.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
        return (y if bias is None else y + bias).to(dtype)

    outputs = [norm(weight, bias)]
    if weight1 is not None:
        outputs.append(norm(weight1, bias1))
    if prenorm:
        outputs.append(total)
    return tuple(outputs) if len(outputs) > 1 else outputs[0]


def check_norm(op: str, x: Tensor, **parameters: Tensor | None) -> None:
    """Refuses what has no fractions, and parameters that are not (dim,)."""
    check_floating(op, "x", x)
    for name, parameter in parameters.items():
        check_shape(op, name, parameter, "(dim,)", (x.shape[-1],))


def _dropout(x: Tensor, p: float, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    if p == 0.0:
        return x, None
    if mask is None:
        mask = torch.rand_like(x) >= p
    return x.masked_fill(~mask, 0) * (1 / (1 - p) if p < 1 else 0), mask


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool) -> Tensor:
    """Of (..., D) in float32 or float64."""
    weight = weight.to(x.dtype)
    if not rms:
        return F.layer_norm(
            x, weight.shape, weight, None if bias is None else bias.to(x.dtype), eps
        )
    y = rms_norm(x.reshape(-1, x.shape[-1]), weight, eps).view(x.shape)
    return y if bias is None else y + bias
