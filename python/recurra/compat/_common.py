"""What the functions of the stand-ins share."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from recurra import ops, reference

HALF = (torch.bfloat16, torch.float16)


def absent(package: str) -> Callable[[str], object]:
    """The ``__getattr__`` of a module that stands in for one of ``package``: a name that recurra
    does not have is missing, so that callers fall back as they do where the package is missing."""

    def __getattr__(name: str) -> object:
        raise AttributeError(f"recurra, which stands in for {package}, does not have {name}")

    return __getattr__


def kernels(x: Tensor) -> ModuleType:
    """Where the functions for ``x`` are: the compiled ops, or plain torch on other devices."""
    return ops if x.is_cpu or x.is_meta else reference


def records_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd would record a function of these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def parameter(p: Tensor | None, x: Tensor) -> Tensor | None:
    """A parameter in a dtype that the ops take beside activations like ``x``."""
    return p.float() if p is not None and p.dtype in HALF and p.dtype != x.dtype else p


def state(h: Tensor | None, x: Tensor) -> Tensor | None:
    """A state in the dtype that the ops keep beside activations like ``x``."""
    if h is None or h.is_complex():
        return h
    dtype = torch.float32 if x.dtype in HALF else x.dtype
    return h if h.dtype == dtype else h.to(dtype)


def activation(name: str | None) -> str | None:
    """``"swish"`` is another name of ``"silu"``; what else there is the ops refuse."""
    return "silu" if name == "swish" else name


def last_inputs(x: Tensor, cu_seqlens: Tensor, width: int, before: Tensor | None = None) -> Tensor:
    """The last ``width`` rows of each packed sequence, (total, D) -> (S, D, width).

    A sequence that is shorter is preceded by the last columns of ``before``, (S, D, width), or
    zeros."""
    start, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    rows = end[:, None] - width + torch.arange(width, device=x.device)
    inside = rows >= start[:, None]
    taken = x[rows.clamp(min=0)] if x.shape[0] else x.new_zeros(*rows.shape, x.shape[1])
    if before is None:
        rest = x.new_zeros(())
    else:
        columns = (width + rows - start[:, None]).clamp(0, width - 1)
        rest = before.gather(2, columns[:, None].expand_as(before)).transpose(1, 2)
    return torch.where(inside[..., None], taken, rest).transpose(1, 2)
