"""What a compiled cell is called with, on the CPU and on a GPU: JitCall of csrc/rnn/jit_call.h."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

# Of csrc/view.h.
_DTYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int32: 6,
    torch.int64: 7,
    torch.bool: 8,
}
_TENSORS = [
    *("x", "params", "h0", "reset", "y", "h_last", "saved"),
    *("dx", "dparams", "dh0", "sums", "cu_seqlens"),
]


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
        ("size", ctypes.c_int64 * 4),
        ("stride", ctypes.c_int64 * 4),
    ]


class Call(ctypes.Structure):
    """One call; what is not set is null or zero."""

    _fields_ = [
        *((name, _Tensor) for name in _TENSORS),
        ("count", ctypes.c_int64),
        ("time", ctypes.c_int64),
        ("offsets", ctypes.c_void_p),
        ("threads", ctypes.c_int64),
        ("parts", ctypes.c_int64),
    ]


@dataclass
class Sequences:
    """What the kernels are told of the sequences.

    Attributes:
        count: how many.
        time: the steps of a batch.
        offsets: the ends of packed ones, on the CPU.
        reset: (B, T), or None.
        cu_seqlens: the ends of packed ones, on a GPU.
    """

    count: int
    time: int
    offsets: list[int] | None
    reset: Tensor | None
    cu_seqlens: Tensor | None = None

    @property
    def packed(self) -> bool:
        """Whether they follow one another along time."""
        return self.offsets is not None or self.cu_seqlens is not None

    def chunks(self, length: int) -> int:
        """The rows of states that are kept, as Sequences::chunk_rows has them."""
        if self.packed:
            return self.time // length + self.count
        return -(-self.time // length) * self.count


def call_of(sequences: Sequences, **tensors: Tensor | None) -> Call:
    """A call with tensors by the names of JitCall; y may be (B, T, N)."""
    tensors |= {"reset": sequences.reset, "cu_seqlens": sequences.cu_seqlens}
    y = tensors.get("y")
    if y is not None and y.dim() == 3:
        tensors["y"] = y.unsqueeze(2)
    call = Call(count=sequences.count, time=sequences.time)
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        to = getattr(call, name)
        to.data, to.dtype = tensor.data_ptr(), _DTYPES[tensor.dtype]
        to.size[: tensor.dim()], to.stride[: tensor.dim()] = tensor.shape, tensor.stride()
    return call
