"""Stands in for causal_conv1d.causal_conv1d_interface: (B, D, L) in, (B, D, L) out.

Besides what the package does these run on the CPU, in float64, with any width and number of
channels, on any strides, and every gradient is right, that of the final states too. Where the
kernels of CUDA run, nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from recurra._check import fail, state_dtype
from recurra.compat import _common
from recurra.compat._common import (
    absent,
    check_dims,
    check_indices,
    check_integers,
    check_shape,
    check_written,
    in_slots,
    kernels,
    parameter,
    put_in_slots,
    readable,
    records_gradient,
    state,
)

__getattr__ = absent("causal_conv1d")


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise causal convolution; :func:`recurra.causal_conv1d` in causal_conv1d's layout.

    Args:
        x: (batch, dim, seqlen), any strides; float32, float64, bfloat16 or float16.
        weight: (dim, width) with width >= 2.
        bias: (dim,).
        seq_idx: (batch, seqlen), integers; neighbouring inputs of equal index are a sequence, and
            no sequence sees another. The output is zero where the index is negative. Where the
            kernels of CUDA run and under torch.compile, also on the CPU, nobody can count the
            sequences: it takes the memory of width - 1 times ``x`` in float32, or float64, for the
            time of the call, and again for that of the backward.
        initial_states: (batch, dim, width - 1), the inputs before the first.
        return_final_states: return the last width - 1 inputs too.
        final_states_out: (batch, dim, width - 1), where to write them.
        activation: None, ``"silu"`` or ``"swish"``.

    Returns:
        (batch, dim, seqlen), or that and the final states, (batch, dim, width - 1), both in the
        dtype of ``x``.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype or device, the activation is unknown,
            or ``seq_idx`` comes with initial or final states.
    """
    name = "causal_conv1d_fn"
    _check(name, x, weight, bias)
    before = x.shape[0], x.shape[1], weight.shape[1] - 1
    check_shape(name, "initial_states", initial_states, "(batch, dim, width - 1)", before)
    rows = x.transpose(1, 2)
    weight, bias = parameter(weight, x), parameter(bias, x)
    silu = _common.activation(name, activation)
    op = kernels(x).causal_conv1d
    if seq_idx is not None:
        if initial_states is not None or return_final_states:
            fail(name, "seq_idx must be None with initial or final states")
        return _packed(op, rows, weight, bias, seq_idx, silu).transpose(1, 2)
    h0 = None if initial_states is None else state(initial_states.transpose(1, 2), x)
    if return_final_states and final_states_out is not None:
        check_shape(name, "final_states_out", final_states_out, "(batch, dim, width - 1)", before)
        check_written(name, "final_states_out", final_states_out)
    y, h_last = op(rows, weight, bias, h0, activation=silu)
    if not return_final_states:
        return y.transpose(1, 2)
    final = h_last.to(x.dtype).transpose(1, 2)
    if final_states_out is not None:
        final = final_states_out.copy_(final)
    return y.transpose(1, 2), final


def _packed(op, rows: Tensor, weight, bias, seq_idx: Tensor, activation: str | None) -> Tensor:
    """The convolution of (B, T, D) within runs of equal ``seq_idx``: one packed row of them."""
    check_integers("causal_conv1d_fn", "seq_idx", seq_idx)
    wanted = tuple(rows.shape[:2])
    check_shape("causal_conv1d_fn", "seq_idx", seq_idx, "(batch, seqlen)", wanted)
    one_row = rows.reshape(1, -1, rows.shape[2])
    y, _ = op(one_row, weight, bias, activation=activation, cu_seqlens=_ends(seq_idx))
    return y.view(rows.shape).masked_fill(seq_idx[..., None] < 0, 0)


def _ends(seq_idx: Tensor) -> Tensor:
    """The cu_seqlens of the runs of ``seq_idx``, one after another. Where its values are not to be
    read there are as many sequences as inputs, the last ones empty."""
    starts = torch.ones_like(seq_idx, dtype=torch.bool)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    starts, count = starts.flatten(), seq_idx.numel()
    end = torch.full((1,), count, dtype=torch.int64, device=seq_idx.device)
    if readable(seq_idx):
        return torch.cat([starts.nonzero()[:, 0], end])
    each = torch.arange(count, device=seq_idx.device)
    # What starts nothing says at the end that nothing comes after it.
    place = torch.where(starts, starts.cumsum(0) - 1, count)
    return end.expand(count + 1).scatter(0, place, torch.where(starts, each, count))


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """The next inputs of running sequences; their states are updated in place.

    Args:
        x: (batch, dim) or (batch, dim, seqlen).
        conv_state: (batch, dim, state_len) with state_len >= width - 1, or (slots, dim, state_len)
            with ``conv_state_indices``: the last inputs, oldest first, or a ring with
            ``cache_seqlens``. Any dtype that ``x`` may have.
        weight: (dim, width).
        bias: (dim,).
        activation: None, ``"silu"`` or ``"swish"``.
        cache_seqlens: (batch,), how many inputs each sequence has had: ``conv_state`` is a ring
            whose next place is that, modulo state_len.
        conv_state_indices: (batch,), which state each row uses, none twice; a row whose index is
            negative changes nothing and returns zeros.

    Returns:
        The shape and dtype of ``x``. Where autograd records, gradients reach every argument.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype or device, or an index is too large
            or repeated. The state is as it was then.
    """
    name = "causal_conv1d_update"
    if x.dim() == 2:
        one = causal_conv1d_update(
            x[..., None], conv_state, weight, bias, activation, cache_seqlens, conv_state_indices
        )
        return one[..., 0]
    _check(name, x, weight, bias)
    _check_state(name, x, conv_state, cache_seqlens, conv_state_indices)
    length, before = conv_state.shape[2], weight.shape[1] - 1
    if length < before:
        fail(name, f"state_len must be at least width - 1 = {before}, got {length}")
    silu = _common.activation(name, activation)
    one = cache_seqlens is None and x.shape[2] == 1
    in_place = conv_state_indices is None or conv_state.dtype == state_dtype(x.dtype)
    if one and in_place and not records_gradient(x, conv_state, weight, bias):
        return _step(x, conv_state, weight, bias, silu, conv_state_indices)

    rows = used = None
    if conv_state_indices is not None:
        rows, used = in_slots(conv_state_indices, conv_state.shape[0])
    states = conv_state if rows is None else conv_state[rows]
    if rows is None and records_gradient(conv_state):
        states = states.clone()  # a backward may need it, and the state is about to change
    if cache_seqlens is None:
        h0 = states[..., length - before :].clone()
    else:
        places = cache_seqlens.long()[:, None] + torch.arange(-before, x.shape[2], device=x.device)
        places = places.remainder(length)[:, None].expand(-1, x.shape[1], -1)
        h0 = states.gather(2, places[..., :before])
    y, _ = kernels(x).causal_conv1d(
        x.transpose(1, 2),
        parameter(weight, x),
        parameter(bias, x),
        state(h0.transpose(1, 2), x),
        activation=silu,
    )
    y = y.transpose(1, 2)
    new = x[..., max(x.shape[2] - length, 0) :].to(states.dtype)
    if cache_seqlens is None:
        states = torch.cat([states[..., new.shape[2] :], new], -1)
    else:
        states = states.scatter(2, places[..., places.shape[2] - new.shape[2] :], new)
    if rows is None:
        conv_state.copy_(states)
        return y
    put_in_slots(conv_state, rows, used, states)
    return y.masked_fill(~used[:, None, None], 0)


def _check(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_dims(name, "x", x, "(batch, dim, seqlen)")
    check_dims(name, "weight", weight, "(dim, width)")
    if weight.shape[0] != x.shape[1]:
        dim, got = x.shape[1], tuple(weight.shape)
        fail(name, f"weight must have shape (dim, width) with dim = {dim} as in x, got {got}")
    check_shape(name, "bias", bias, "(dim,)", (x.shape[1],))


def _check_state(name: str, x: Tensor, conv_state: Tensor, cache_seqlens, indices) -> None:
    check_dims(name, "conv_state", conv_state, "(batch, dim, state_len)")
    slots, _, length = conv_state.shape
    if indices is None:
        wanted = x.shape[0], x.shape[1], length
        check_shape(name, "conv_state", conv_state, "(batch, dim, state_len)", wanted)
    else:
        wanted = slots, x.shape[1], length
        check_shape(name, "conv_state", conv_state, "(slots, dim, state_len)", wanted)
        check_indices(name, "conv_state_indices", indices, x.shape[0], slots)
    if cache_seqlens is not None:
        check_indices(name, "cache_seqlens", cache_seqlens, x.shape[0])
    check_written(name, "conv_state", conv_state)


def _step(x: Tensor, conv_state: Tensor, weight, bias, silu: str | None, slots) -> Tensor:
    """One input a row, (B, D, 1)."""
    rows = conv_state.transpose(1, 2)
    h = state(rows, x)
    y = kernels(x).causal_conv1d_step(
        h,
        x[..., 0],
        parameter(weight, x),
        parameter(bias, x),
        activation=silu,
        slots=slots,
    )
    if h is not rows:
        rows.copy_(h)
    return y[..., None]


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`causal_conv1d_fn` in plain torch."""
    dtype, wide = x.dtype, torch.promote_types(x.dtype, weight.dtype)
    before = weight.shape[1] - 1
    if initial_states is None:
        initial_states = x.new_zeros(*x.shape[:2], before)
    whole = torch.cat([initial_states.to(wide), x.to(wide)], -1)
    bias = None if bias is None else bias.to(wide)
    y = F.conv1d(whole, weight.to(wide)[:, None], bias, groups=x.shape[1])
    silu = _common.activation("causal_conv1d_ref", activation)
    y = (y if silu is None else F.silu(y)).to(dtype)
    if not return_final_states:
        return y
    final = whole[..., whole.shape[2] - before :].to(dtype)
    return y, final if final_states_out is None else final_states_out.copy_(final)


def causal_conv1d_update_ref(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
) -> Tensor:
    """:func:`causal_conv1d_update` in plain torch."""
    if x.dim() == 2:
        one = causal_conv1d_update_ref(
            x[..., None], conv_state, weight, bias, activation, cache_seqlens
        )
        return one[..., 0]
    _common.activation("causal_conv1d_update_ref", activation)  # before the state changes
    before, length = weight.shape[1] - 1, conv_state.shape[2]
    outputs = []
    for t in range(x.shape[2]):
        if cache_seqlens is None:
            recent = conv_state[..., length - before :].clone()
            conv_state.copy_(torch.cat([conv_state[..., 1:], x[..., t : t + 1]], -1))
        else:
            place = cache_seqlens.long()[:, None, None] + t
            ring = torch.arange(-before, 0, device=x.device)
            ring = (place + ring).remainder(length).expand(-1, x.shape[1], -1)
            recent = conv_state.gather(2, ring)
            here = place.remainder(length).expand(-1, x.shape[1], -1)
            conv_state.scatter_(2, here, x[..., t : t + 1].to(conv_state.dtype))
        args = (x[..., t : t + 1], weight, bias, recent)
        outputs.append(causal_conv1d_ref(*args, activation=activation))
    return torch.cat(outputs, -1)
