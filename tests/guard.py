"""Tensors that lie flush against a page that no one may touch."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_NOTHING_ALLOWED = 0  # PROT_NONE


def guarded(x: Tensor, end: bool) -> Tensor:
    """A copy with the same strides that ends where a forbidden page begins or, if not ``end``,
    begins where one ends; both neighbours are forbidden."""
    if x.numel() == 0:
        return x
    extent = sum(s * (n - 1) for s, n in zip(x.stride(), x.shape, strict=True)) + 1
    size = extent * x.element_size()
    page = mmap.PAGESIZE
    inner = -(-size // page) * page
    space = mmap.mmap(-1, inner + 2 * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    offset = page + (inner - size if end else 0)
    flat = torch.frombuffer(space, dtype=x.dtype, count=extent, offset=offset)
    copy = flat.as_strided(x.shape, x.stride()).copy_(x)
    start = flat.data_ptr() - offset
    for at in (start, start + page + inner):
        if _libc.mprotect(at, page, _NOTHING_ALLOWED):
            raise OSError(ctypes.get_errno(), "mprotect")
    return copy
