"""The calls of compiled cells as ops of torch, which torch.compile takes as they are.

An op knows its cell by number, since a schema has no objects. The number comes from the text, so
that a graph that torch keeps on disk is never run with another cell by another process.
"""

from __future__ import annotations

import functools
import hashlib
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recurra._check import check_offsets, fail, state_dtype
from recurra.jit.call import Sequences
from recurra.ops import _register
from recurra.ops.rnn import _CHUNK, _LANES, _fake_forward

if TYPE_CHECKING:
    from recurra.jit import Cell

_ARGUMENTS = (
    "(Tensor x, Tensor params, Tensor? h0=None, *, int cell, bool return_states=False, "
    "Tensor? reset=None, Tensor? cu_seqlens=None)"
)
_register.LIBRARY.define(f"_jit_rnn{_ARGUMENTS} -> (Tensor, Tensor, Tensor, Tensor)")
_register.LIBRARY.define(f"_jit_rnn_save{_ARGUMENTS} -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
_register.LIBRARY.define(
    "_jit_rnn_backward(Tensor? dy, Tensor? dh_last, Tensor saved, Tensor x, Tensor params, "
    "Tensor? h0=None, *, int cell, Tensor? reset=None, Tensor? cu_seqlens=None) "
    "-> (Tensor, Tensor, Tensor)"
)
rnn = torch.ops.recurra._jit_rnn.default
_backward_op = torch.ops.recurra._jit_rnn_backward.default

# Cells of one text are alike: any that somebody has will do.
_cells: dict[int, weakref.WeakSet[Cell]] = {}


def number_of(cell: Cell) -> int:
    """A number by which ops find a cell as long as somebody has it, or another of its text."""
    number = int.from_bytes(hashlib.sha256(cell.source.encode()).digest()[:7], "big")
    _cells.setdefault(number, weakref.WeakSet()).add(cell)
    return number


def _cell(number: int) -> Cell:
    for cell in _cells.get(number, ()):
        return cell
    fail("rnn", "a compiled call needs its cell of recurra.jit, but there is none of its text")


def _outputs(save: bool, x, params, h0=None, *, cell, cu_seqlens=None, **options):
    info = _cell(cell).info
    out = _fake_forward("rnn", x, params, h0, cell=info, cu_seqlens=cu_seqlens, **options)
    if not save:
        return out
    h_last = out[1]
    chunks = Sequences(h_last.shape[0], x.shape[1], None, None, cu_seqlens).chunks(_CHUNK)
    padded = -(-x.shape[3] // _LANES) * _LANES
    return *out, h_last.new_empty(chunks, h_last.shape[1], padded)


def _sequences(count: int, x: Tensor, reset: Tensor | None, cu_seqlens: Tensor | None):
    offsets = None
    if cu_seqlens is not None and x.is_cpu:
        offsets, cu_seqlens = check_offsets("rnn", cu_seqlens, x.shape[1]), None
    return Sequences(count, x.shape[1], offsets, reset, cu_seqlens)


def _forward(save, x, params, h0=None, *, cell, reset=None, cu_seqlens=None, **options):
    given = {"cell": cell, "reset": reset, "cu_seqlens": cu_seqlens, **options}
    out = _outputs(save, x, params, h0, **given)
    y, h_last, passes, mismatch = out[:4]
    for report in (passes, mismatch):
        report.zero_()
    sequences = _sequences(h_last.shape[0], x, reset, cu_seqlens)
    engine = _cell(cell).engine(x.device)
    engine.forward(sequences, x, params, h0, y, h_last, out[4] if save else None)
    return out


def _backward_kernel(dy, dh_last, saved, x, params, h0=None, *, cell, reset=None, cu_seqlens=None):
    count = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    sequences = _sequences(count, x, reset, cu_seqlens)
    return _cell(cell).engine(x.device).backward(sequences, dy, dh_last, saved, x, params, h0)


for _save, _name in ((False, "_jit_rnn"), (True, "_jit_rnn_save")):
    _register.fake(_name)(functools.partial(_outputs, _save))
    for _key in ("CPU", "CUDA"):
        _register.LIBRARY.impl(_name, functools.partial(_forward, _save), _key)
for _key in ("CPU", "CUDA"):
    _register.LIBRARY.impl("_jit_rnn_backward", _backward_kernel, _key)


@_register.fake("_jit_rnn_backward")
def _(dy, dh_last, saved, x, params, h0=None, *, cell, reset=None, cu_seqlens=None):
    if h0 is not None:
        return torch.empty_like(x), torch.empty_like(params), torch.empty_like(h0)
    count = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (count, len(_cell(cell).info.states), x.shape[3])
    dh0 = x.new_empty(shape, dtype=state_dtype(x.dtype))
    return torch.empty_like(x), torch.empty_like(params), dh0


_SAVED = ("x", "params", "h0", "reset", "cu_seqlens")


def _setup(ctx, inputs, output):
    ctx.number, ctx.cell = inputs["cell"], _cell(inputs["cell"])  # which a backward needs
    _, _, passes, mismatch, saved = output
    ctx.mark_non_differentiable(passes, mismatch)
    ctx.save_for_backward(*(inputs[k] for k in _SAVED), saved)


def _backward(ctx, dy, dh_last, *_):
    x, params, h0, reset, cu_seqlens, saved = ctx.saved_tensors
    dx, dparams, dh0 = _backward_op(
        dy, dh_last, saved, x, params, h0, cell=ctx.number, reset=reset, cu_seqlens=cu_seqlens
    )
    gradients = {"x": dx, "params": dparams}
    return gradients if h0 is None else gradients | {"h0": dh0}


_register.autograd("_jit_rnn_save", _setup, _backward)
_register.autograd_through("_jit_rnn", "_jit_rnn_save", outputs=4)
_register.no_second_derivative("_jit_rnn_backward", "rnn")
