"""``causal_conv1d``: the short depthwise convolution in front of most recurrent mixers."""

from __future__ import annotations

import torch
from torch import Tensor

from recurra._check import check, check_layout, check_slots, fail, state_dtype
from recurra.ops import _register

_op = torch.ops.recurra.causal_conv1d.default
_backward_op = torch.ops.recurra._causal_conv1d_backward.default
_step_op = torch.ops.recurra.causal_conv1d_step.default
_INPUTS = ("x", "weight", "bias", "h0")


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Causal depthwise convolution,
    :math:`y_t = \mathrm{act}(b + \sum_{j<W} w_j \odot x_{t-W+1+j})`.

    Differentiable to any order in ``x``, ``weight``, ``bias`` and ``h0``, from ``y`` and from
    ``h_last``. Gu and Dao, "Mamba: linear-time sequence modeling with selective state spaces"
    (2023) puts it in front of its scan.

    Args:
        x: input, (B, T, D); float32, float64, bfloat16 or float16, any strides. A (B, D, T)
            tensor comes in as ``x.swapaxes(1, 2)``.
        weight: (D, W) with W >= 2; ``weight[:, W - 1]`` multiplies the current input. The dtype
            of ``x`` or float32.
        bias: (D,), the dtype of ``x`` or float32; zeros when None.
        h0: the W - 1 inputs before the first one, oldest first, (B, W-1, D), or (S, W-1, D) with
            ``cu_seqlens``; zeros when None. float32 for 16-bit ``x``, otherwise its dtype.
        activation: None or ``"silu"``.
        cu_seqlens: (S + 1,) int32 or int64, the ends of S sequences packed along T, from 0 to T;
            B must be 1. No input of one sequence reaches another.

    Returns:
        y: (B, T, D), the dtype and memory order of ``x``.
        h_last: the last W - 1 inputs, shape and dtype of ``h0``.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype or device, the activation is unknown,
            or ``cu_seqlens`` does not ascend from 0 to T.
    """
    return _op(x, weight, bias, h0, activation=activation, cu_seqlens=cu_seqlens)


def causal_conv1d_step(
    h: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    r"""One step of :func:`causal_conv1d`; shifts ``x`` into ``h`` in place.

    Args:
        h: the last L >= W - 1 inputs, oldest first, (B, L, D), or (slots, L, D) with ``slots``; any
            strides. float32 for 16-bit ``x``, otherwise its dtype. No element may lie twice in
            memory or in an input, but for an ``x`` that is part of ``h`` where there are no slots.
        x: input, (B, D).
        weight: (D, W), as in :func:`causal_conv1d`.
        bias: (D,); zeros when None.
        activation: None or ``"silu"``.
        slots: (B,) int32 or int64, which state each row uses, none twice; a row whose index is
            negative changes nothing and returns zeros.

    Returns:
        The outputs of the rows, (B, D), in the dtype of ``x``.

    Raises:
        RuntimeError: wrong shape, dtype or device, an unknown activation, a slot out of range or
            repeated, or gradients are enabled and an input requires one.
    """
    return _step_op(h, x, weight, bias, activation=activation, slots=slots)


def _check_activation(op: str, activation: str | None) -> None:
    if activation not in (None, "silu"):
        fail(op, f'activation must be None or "silu", got "{activation}"')


@_register.fake("causal_conv1d")
def _(x, weight, bias=None, h0=None, *, activation=None, cu_seqlens=None):
    op = "causal_conv1d"
    check_layout(op, "x", x, "weight", weight)
    sizes = check(op, x=x, weight=weight, bias=bias, h0=h0, cu_seqlens=cu_seqlens)
    _check_activation(op, activation)
    shape = sizes["S"], sizes["W"] - 1, sizes["D"]
    return torch.empty_like(x), x.new_empty(shape, dtype=state_dtype(x.dtype))


@_register.fake("_causal_conv1d_backward")
def _(dy, dh_last, x, weight, bias=None, h0=None, *, activation=None, cu_seqlens=None):
    op = "_causal_conv1d_backward"
    sizes = check(
        op,
        dy=dy,
        dh_last=dh_last,
        x=x,
        weight=weight,
        bias=bias,
        h0=h0,
        cu_seqlens=cu_seqlens,
    )
    _check_activation(op, activation)
    dbias = weight.new_empty(sizes["D"]) if bias is None else torch.empty_like(bias)
    if h0 is None:
        dh0 = x.new_empty((sizes["S"], sizes["W"] - 1, sizes["D"]), dtype=state_dtype(x.dtype))
    else:
        dh0 = torch.empty_like(h0)
    return torch.empty_like(x), torch.empty_like(weight), dbias, dh0


@_register.fake("causal_conv1d_step")
def _(h, x, weight, bias=None, *, activation=None, slots=None):
    op = "causal_conv1d_step"
    check(op, h=h, x=x, weight=weight, bias=bias, slots=slots)
    if h.shape[1] < weight.shape[1] - 1:
        needed, got = weight.shape[1] - 1, tuple(h.shape)
        fail(op, f"h must have shape (M, L, D) with L >= W-1 = {needed}, got {got}")
    _check_activation(op, activation)
    check_slots(op, x.shape[0], h, slots)
    return torch.empty_like(x)


def _setup(ctx, inputs, output):
    ctx.activation = inputs["activation"]
    ctx.save_for_backward(*(inputs[k] for k in (*_INPUTS, "cu_seqlens")))


def _backward(ctx, dy, dh_last):
    x, weight, bias, h0, cu_seqlens = ctx.saved_tensors
    gradients = _backward_op(
        dy, dh_last, x, weight, bias, h0, activation=ctx.activation, cu_seqlens=cu_seqlens
    )
    return dict(zip(_INPUTS, gradients, strict=True))


def _setup_backward(ctx, inputs, output):
    ctx.activation = inputs["activation"]
    ctx.save_for_backward(*(inputs[k] for k in ("dy", *_INPUTS, "cu_seqlens")))


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _double_backward(ctx, to_dx, to_dweight, to_dbias, to_dh0):
    # The backward is linear in ds = dy act'(s): dx and dh0 also in the weight, dweight also in the
    # inputs. So its adjoint is made of convolutions of the cotangents and of the backward itself
    # with a cotangent in the place of the weight or the inputs, and every order follows.
    dy, x, weight, bias, h0, cu_seqlens = ctx.saved_tensors
    packed = {"cu_seqlens": cu_seqlens}
    total: dict[str, Tensor | None] = dict.fromkeys(_INPUTS)

    def add(gradients, names=_INPUTS) -> None:
        for name, gradient in zip(_INPUTS, gradients, strict=True):
            if name in names:
                total[name] = _add(total[name], gradient)

    silu = ctx.activation is not None and dy is not None
    ds = dy
    if silu:
        s = _op(x, weight, bias, h0, **packed)[0]
        sigmoid = torch.sigmoid(s)
        slope = sigmoid * (1 + s * (1 - sigmoid))
        ds = dy * slope
    to_ds = to_dh_last = None
    if to_dx is not None or to_dbias is not None or to_dh0 is not None:
        inputs = torch.zeros_like(x) if to_dx is None else to_dx
        to_ds, to_dh_last = _op(inputs, weight, to_dbias, to_dh0, **packed)
        if ds is not None:
            add(_backward_op(ds, None, inputs, weight, None, to_dh0, **packed), ("weight",))
    if to_dweight is not None and ds is not None:
        to_ds = _add(to_ds, _op(x, to_dweight, None, h0, **packed)[0])
        add(_backward_op(ds, None, x, to_dweight, None, h0, **packed), ("x", "h0"))
    to_dy = to_ds
    if silu and to_ds is not None:
        to_dy = to_ds * slope
        to_s = to_ds * dy * (sigmoid * (1 - sigmoid) * (2 + s * (1 - 2 * sigmoid)))
        add(_backward_op(to_s, None, x, weight, bias, h0, **packed))
    return {"dy": to_dy, "dh_last": to_dh_last, **total}


# No autocast: x alone sets the dtype, and parameters and states keep theirs.
_register.autograd("causal_conv1d", _setup, _backward)
_register.autograd("_causal_conv1d_backward", _setup_backward, _double_backward)
_register.no_grad_step("causal_conv1d_step", "causal_conv1d")
