"""What the functions of the stand-ins share."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from recurra import ops, reference
from recurra._check import dtype_name, fail, state_dtype
from recurra._library import served


def absent(package: str) -> Callable[[str], object]:
    """The ``__getattr__`` of a module that stands in for one of ``package``: a name that recurra
    does not have is missing, so that callers fall back as they do where the package is missing."""

    def __getattr__(name: str) -> object:
        raise AttributeError(f"recurra, which stands in for {package}, does not have {name}")

    return __getattr__


def kernels(x: Tensor) -> ModuleType:
    """Where the functions for ``x`` are: the compiled ops, or plain torch where they do not serve
    it."""
    return ops if served(x) else reference


def readable(x: Tensor) -> bool:
    """Whether to look at values: there are some, and no kernel of ours has to be waited for."""
    if x.is_meta or torch.compiler.is_compiling():
        return False
    # is_fake takes as long as a small op, and what it looks for is always a subclass.
    if type(x) is not Tensor and is_fake(x):
        return False
    return x.is_cpu or not served(x)


def records_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd would record a function of these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def parameter(p: Tensor | None, x: Tensor) -> Tensor | None:
    """A parameter in a dtype that the ops take beside activations like ``x``."""
    return p if p is None or p.dtype == x.dtype else p.to(state_dtype(p.dtype))


def state(h: Tensor | None, x: Tensor) -> Tensor | None:
    """A state in the dtype that the ops keep beside activations like ``x``."""
    if h is None or h.is_complex():
        return h
    dtype = state_dtype(x.dtype)
    return h if h.dtype == dtype else h.to(dtype)


def check_shape(op: str, name: str, x: Tensor | None, letters: str, shape: tuple) -> None:
    """Refuses a shape in the caller's layout and words; the ops know others."""
    if x is not None and x.shape != shape:
        fail(op, f"{name} must have shape {letters} = {shape}, got {tuple(x.shape)}")


def check_dims(op: str, name: str, x: Tensor, letters: str) -> None:
    """Refuses what does not have as many dimensions as ``letters``, like ``"(dim, width)"``."""
    if x.dim() != letters.count(",") + 1:
        fail(op, f"{name} must have shape {letters}, got {tuple(x.shape)}")


def check_dtype(op: str, name: str, x: Tensor, right: bool, wanted: str) -> None:
    """Refuses a dtype where it is not ``right``."""
    if not right:
        fail(op, f"{name} must have dtype {wanted}, got {dtype_name(x.dtype)}")


def check_integers(op: str, name: str, x: Tensor) -> None:
    """Refuses what an index may not be."""
    check_dtype(op, name, x, x.dtype in (torch.int32, torch.int64), "int32 or int64")


def check_floating(op: str, name: str, x: Tensor, complex_too: bool = False) -> None:
    """Refuses what has no fractions."""
    right = x.is_floating_point() or (complex_too and x.is_complex())
    check_dtype(op, name, x, right, "float32, float64, bfloat16 or float16")


def check_indices(op: str, name: str, x: Tensor, rows: int, states: int | None = None) -> None:
    """Refuses what is not one integer a row, and with ``states`` what is not a place among so many
    of its own, or negative. Where values are not :func:`readable` it refuses no place that is
    repeated, and one that is too large in a compiled call on the CPU alone: see
    :func:`in_slots`."""
    check_integers(op, name, x)
    check_shape(op, name, x, "(batch,)", (rows,))
    if states is None:
        return
    if not readable(x):
        sentence = f"{op}: {name} must be less than the number of states"
        assert_compiled(x, lambda: x < states, sentence)
        return
    used = [i for i in x.tolist() if i >= 0]
    if any(i >= states for i in used):
        fail(op, f"{name} must be less than the number of states, {states}, got {max(used)}")
    if len(set(used)) < len(used):
        twice = next(i for i in used if used.count(i) > 1)
        fail(op, f"{name} must not repeat a state, got {twice} more than once")


def assert_compiled(x: Tensor, right: Callable[[], Tensor], sentence: str) -> None:
    """Makes a compiled call refuse the values of ``x``, which are not :func:`readable`, where not
    all of ``right()`` is true: on the CPU, where that is no waiting."""
    if x.is_cpu and torch.compiler.is_compiling():
        torch._assert_async(right().all(), sentence)


def in_slots(indices: Tensor, states: int) -> tuple[Tensor, Tensor]:
    """Which of ``states`` each row reads, and whether the row is one of its own: where its index is
    negative, or too large and nobody could look at it, it is skipped, as the steps of
    :mod:`recurra` do on a GPU, and reads the first."""
    used = (indices >= 0) & (indices < states)
    return torch.where(used, indices, 0).long(), used


def put_in_slots(pool: Tensor, rows: Tensor, used: Tensor, states: Tensor) -> None:
    """Writes the state of each row to its place in ``pool``, of the rows that have one.

    Picking these by ``used`` would wait for the device. The others write what the first of them
    writes, or, where there is none, the first state as it is; a gradient goes to one of them.
    """
    if not rows.shape[0]:
        return
    each, first = torch.arange(rows.shape[0], device=rows.device), used.int().argmax()
    row = torch.where(used, each, first)
    one = [-1, *[1] * (states.dim() - 1)]
    states = torch.where(used.view(one), states.to(pool.dtype), pool[rows])
    states = torch.where((row == each).view(one), states, states.detach()[row])
    pool.index_copy_(0, rows[row], states)


def check_written(op: str, name: str, x: Tensor) -> None:
    """Refuses what cannot be written in place or has no fractions."""
    check_floating(op, name, x, complex_too=True)
    steps = x.stride()
    if 0 in steps and any(s == 0 and n > 1 for s, n in zip(steps, x.shape, strict=True)):
        fail(op, f"{name} is written in place and must not be expanded, got strides {steps}")


def activation(op: str, name: str | None) -> str | None:
    """What our ops call an activation: ``"swish"`` is another name of ``"silu"``."""
    if name not in (None, "silu", "swish"):
        fail(op, f'activation must be None, "silu" or "swish", got "{name}"')
    return name and "silu"


def last_inputs(x: Tensor, cu_seqlens: Tensor, width: int, before: Tensor | None = None) -> Tensor:
    """The last ``width`` rows of each packed sequence, (total, D) -> (S, D, width).

    A sequence that is shorter is preceded by the last columns of ``before``, (S, D, width), or
    zeros. Whatever ``cu_seqlens`` holds, no row is read that is not there."""
    start, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    rows = end[:, None] - width + torch.arange(width, device=x.device)
    inside = rows >= start[:, None]
    last = x.shape[0] - 1
    taken = x[rows.clamp(0, last)] if last >= 0 else x.new_zeros(*rows.shape, x.shape[1])
    if before is None:
        rest = x.new_zeros(())
    else:
        columns = (width + rows - start[:, None]).clamp(0, width - 1)
        rest = before.gather(2, columns[:, None].expand_as(before)).transpose(1, 2)
    return torch.where(inside[..., None], taken, rest).transpose(1, 2)
