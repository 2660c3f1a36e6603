"""``rms_norm``: root mean square layer normalization in one pass over memory each way."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from recurra._check import check, fail, state_dtype
from recurra._library import served
from recurra.ops import _register

_op = torch.ops.recurra._rms_norm.default
_backward_op = torch.ops.recurra._rms_norm_backward.default


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    r"""Root mean square layer normalization over the last dimension.

    .. math::
        y = \frac{x}{\sqrt{\frac{1}{D} \sum_d x_d^2 + \epsilon}} \odot w

    Zhang and Sennrich, "Root mean square layer normalization" (2019).

    On the CPU and on CUDA, where it is one op that reads ``x`` once from memory; elsewhere it is
    :func:`torch.nn.functional.rms_norm`. As an op a row of ``y`` depends to the bit on its row of
    ``x`` and on ``weight`` alone, and neither it nor a gradient on the number of threads, the
    instruction set or the memory layout. The backward keeps ``x``, ``weight`` and one number a
    row; differentiating it again raises. Under autocast nothing is cast.

    Args:
        x: input, (B, D) or (B, T, D); float32, float64, bfloat16 or float16, any strides.
            Arithmetic is in float32, or in float64 where ``x`` is.
        weight: (D,), the dtype of ``x`` or float32.
        eps: added to the mean square.

    Returns:
        y, the shape, dtype and memory order of ``x``.

    Raises:
        RuntimeError: wrong shape, dtype or device; also when differentiated twice.
    """
    if not served(x):
        return functional.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    return _op(x, weight, eps)[0]


@_register.fake("_rms_norm")
def _(x, weight, eps):
    check("_rms_norm", x=x, weight=weight)
    return torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=state_dtype(x.dtype))


@_register.fake("_rms_norm_backward")
def _(dy, x, weight, rstd):
    op = "_rms_norm_backward"
    check(op, x=x, weight=weight, dy=dy, rstd=rstd)
    shape = tuple(x.shape)
    if tuple(dy.shape) != shape:
        fail(op, f"dy must have the shape of x, {shape}, got {tuple(dy.shape)}")
    if tuple(rstd.shape) != shape[:-1]:
        fail(
            op,
            f"rstd must have the shape of x, {shape}, without its last dimension, got "
            f"{tuple(rstd.shape)}",
        )
    return torch.empty_like(x), torch.empty_like(weight)


def _setup(ctx, inputs, output):
    rstd = output[1]
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(inputs["x"], inputs["weight"], rstd)


def _backward(ctx, dy, _):
    if dy is None:
        return {}
    dx, dweight = _backward_op(dy, *ctx.saved_tensors)
    return {"x": dx, "weight": dweight}


# No autocast: the dtype of x decides.
_register.autograd("_rms_norm", _setup, _backward)
_register.no_second_derivative("_rms_norm_backward", "rms_norm")
