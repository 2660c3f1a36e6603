"""``linear_step``: a linear layer over the few rows of a decoding step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from recurra._check import check
from recurra._library import served
from recurra.ops import _register

_op = torch.ops.recurra._linear_step.default

# Rows for which a GPU reads the weights once (kRows of csrc/linear_step/linear_step.cu). Of more of
# them the product is one for its matrix units.
_ROWS_ON_CUDA = 4


def linear_step(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""A linear layer, :math:`y = x W^\top + b`, as fast as the weights can be read from memory.

    For a few rows on the CPU, and up to four on CUDA; of more of them there, all of one dtype, and
    elsewhere it is :func:`torch.nn.functional.linear`. As an op a row of ``y`` depends to the bit
    on its row of ``x`` alone, not on the other rows, the number of threads, the instruction set or
    the memory layout. Under autocast nothing is cast.

    Args:
        x: input, (B, K); float32, float64, bfloat16 or float16, any strides. Arithmetic is in
            float32, or in float64 where ``x`` is.
        weight: (N, K), the dtype of ``x`` or float32; any strides, fastest where rows are
            contiguous.
        bias: (N,), the dtype of ``x`` or float32; zeros when None.

    Returns:
        y, (B, N), in the dtype of ``x``.

    Raises:
        RuntimeError: wrong shape, dtype or device, or gradients are enabled and an input requires
            one.
    """
    if not served(x):
        return functional.linear(x, weight, bias)
    if x.is_cuda and x.shape[0] > _ROWS_ON_CUDA and _same_in_torch(x, weight, bias):
        with torch.autocast("cuda", enabled=False):
            return functional.linear(x, weight, bias)
    return _op(x, weight, bias)


def _same_in_torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether torch takes these as the op does; what it takes otherwise, the op is to refuse."""
    if x.dim() != 2 or weight.dim() != 2 or weight.dtype != x.dtype:
        return False
    if bias is not None and (bias.dtype != x.dtype or bias.shape != weight.shape[:1]):
        return False
    return x.is_floating_point() and not _register.differentiated("linear_step", (x, weight, bias))


@_register.fake("_linear_step")
def _(x, weight, bias=None):
    sizes = check("_linear_step", x=x, weight=weight, bias=bias)
    return x.new_empty(sizes["B"], sizes["N"])


_register.no_grad("_linear_step", "torch.nn.functional.linear")
