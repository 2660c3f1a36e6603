"""``softmax_scan``: the running softmax-weighted mean of Aaren and RWKV-4."""

from __future__ import annotations

import torch
from torch import Tensor

from recurra._check import check, check_slots, state_dtype
from recurra.ops import _register

_op = torch.ops.recurra.softmax_scan.default
_backward_op = torch.ops.recurra._softmax_scan_backward.default
_step_op = torch.ops.recurra.softmax_scan_step.default

# Of csrc/softmax_scan/softmax_scan.h and of a vector: they set the size of what the forward saves.
_CHUNK, _LANES = 32, 16


def softmax_scan(
    s: Tensor,
    v: Tensor,
    h0: Tensor | None = None,
    *,
    decay: Tensor | None = None,
    bonus: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Mean of all values so far, weighted by :math:`e^{s_i - (t - i)\,\mathrm{decay}}`.

    Without ``decay`` and ``bonus`` it is attention with one fixed query, as a recurrence: Feng et
    al., "Attention as an RNN" (2024). With both it is the WKV of RWKV-4: Peng et al., "RWKV:
    Reinventing RNNs for the transformer era" (2023). Scores of any size are safe. Differentiable
    once, in every argument, from ``o`` and from ``h_last``.

    Args:
        s: scores, (B, T, D), or with any of its dimensions 1, which then is shared along it and
            whose gradient is summed over it in a fixed order; (B, T, 1) is one score a step. The
            dtype of ``v``. -infinity leaves a step out.
        v: values, (B, T, D); float32, float64, bfloat16 or float16, any strides.
        h0: initial state, (B, 3, D), or (S, 3, D) with ``cu_seqlens``: the largest logarithm of a
            weight, and the sums of the weights and of the weighted values relative to it. An empty
            one when None, which is -1e38 and zeros; -infinity and zeros do as well. float32 for
            16-bit ``v``, otherwise the dtype of ``v``.
        decay: (D,), by how much the logarithm of every weight falls in a step. Below 0 weights grow
            with age, relative to newer ones. The dtype of ``v`` or float32.
        bonus: (D,), added to the score of a step in its own output, which is then made of the
            state before the step; without it the output is that of the state after the step. The
            dtype of ``v`` or float32.
        cu_seqlens: (S + 1,) int32 or int64, the ends of S sequences packed along T, from 0 to T;
            B must be 1. Each has a state of its own.

    Returns:
        o: (B, T, D), the dtype and memory order of ``v``; 0 where all weights are 0.
        h_last: the state after the last step, shape and dtype of ``h0``.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype or device, or ``cu_seqlens`` does not
            ascend from 0 to T.
    """
    return _op(s, v, h0, decay=decay, bonus=bonus, cu_seqlens=cu_seqlens)


def softmax_scan_step(
    h: Tensor,
    s: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    bonus: Tensor | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """One step of :func:`softmax_scan`, updating the state in place.

    Args:
        h: states, (B, 3, D), or (slots, 3, D) with ``slots``; updated in place. float32 for 16-bit
            ``v``, otherwise the dtype of ``v``. No element may lie twice in memory or in an input,
            but for ``s`` and ``v`` that are parts of ``h`` where there are no slots.
        s: scores, (B, D) or with dimensions of 1.
        v: values, (B, D).
        decay, bonus: as for :func:`softmax_scan`.
        slots: (B,) int32 or int64, which state each row uses, none twice; a row whose index is
            negative changes nothing and returns zeros.

    Returns:
        o, (B, D), in the dtype of ``v``.

    Raises:
        RuntimeError: wrong shape, dtype or device, a slot out of range or repeated, or gradients
            are enabled and an input requires one.
    """
    return _step_op(h, s, v, decay=decay, bonus=bonus, slots=slots)


def _fake_forward(op, s, v, h0, decay, bonus, cu_seqlens):
    sizes = check(op, s=s, v=v, h0=h0, decay=decay, bonus=bonus, cu_seqlens=cu_seqlens)
    return torch.empty_like(v), v.new_empty(sizes["S"], 3, sizes["D"], dtype=state_dtype(v.dtype))


@_register.fake("softmax_scan")
def _(s, v, h0=None, *, decay=None, bonus=None, cu_seqlens=None):
    return _fake_forward("softmax_scan", s, v, h0, decay, bonus, cu_seqlens)


@_register.fake("_softmax_scan_save")
def _(s, v, h0=None, *, decay=None, bonus=None, cu_seqlens=None):
    o, h_last = _fake_forward("_softmax_scan_save", s, v, h0, decay, bonus, cu_seqlens)
    batch, time, channels = v.shape
    if cu_seqlens is None:
        chunks = batch * ((time + _CHUNK - 1) // _CHUNK)
    else:
        chunks = time // _CHUNK + h_last.shape[0]
    padded = (channels + _LANES - 1) // _LANES * _LANES
    return o, h_last, v.new_empty(chunks, 3, padded, dtype=state_dtype(v.dtype))


@_register.fake("_softmax_scan_backward")
def _(do, dh_last, saved, s, v, h0=None, *, decay=None, bonus=None, cu_seqlens=None):
    given = {"do": do, "dh_last": dh_last, "s": s, "v": v, "h0": h0}
    sizes = check(
        "_softmax_scan_backward", **given, decay=decay, bonus=bonus, cu_seqlens=cu_seqlens
    )
    if h0 is None:
        dh0 = v.new_empty(sizes["S"], 3, sizes["D"], dtype=state_dtype(v.dtype))
    else:
        dh0 = torch.empty_like(h0)
    ddecay, dbonus = (v.new_empty(0) if p is None else torch.empty_like(p) for p in (decay, bonus))
    return torch.empty_like(s), torch.empty_like(v), dh0, ddecay, dbonus


@_register.fake("softmax_scan_step")
def _(h, s, v, *, decay=None, bonus=None, slots=None):
    op = "softmax_scan_step"
    check(op, h=h, s=s, v=v, decay=decay, bonus=bonus, slots=slots)
    check_slots(op, v.shape[0], h, slots)
    return torch.empty_like(v)


_INPUTS = ("s", "v", "h0", "decay", "bonus")


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*(inputs[k] for k in (*_INPUTS, "cu_seqlens")), output[2])


def _backward(ctx, do, dh_last, _):
    s, v, h0, decay, bonus, cu_seqlens, saved = ctx.saved_tensors
    gradients = _backward_op(
        do, dh_last, saved, s, v, h0, decay=decay, bonus=bonus, cu_seqlens=cu_seqlens
    )
    given = zip(_INPUTS, gradients, (s, v, h0, decay, bonus), strict=True)
    return {name: gradient for name, gradient, x in given if x is not None}


_register.autograd("_softmax_scan_save", _setup, _backward)
_register.autograd_through("softmax_scan", "_softmax_scan_save", outputs=2)
_register.no_second_derivative("_softmax_scan_backward", "softmax_scan")
_register.autocast("softmax_scan", activations=(0, 1))
_register.autocast("softmax_scan_step", activations=(1, 2))
_register.no_grad_step("softmax_scan_step", "softmax_scan")
