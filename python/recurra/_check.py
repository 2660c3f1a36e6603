"""The checks of csrc/torch/check.h for fake tensors, in the same words.

What an op requires is text that lives beside its schema in csrc/torch/schemas.cpp; this reads it.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)
_REAL = (torch.float32, torch.float64, *_HALF)
_COMPLEX = (torch.complex64, torch.complex128)


class _Dim(NamedTuple):
    name: str
    value: int
    minus: int
    minimum: int
    maximum: int | None
    or_one: bool


class _Rule(NamedTuple):
    name: str
    kind: str
    complex: bool
    shapes: list[list[_Dim]]
    shape_text: str


def fail(op: str, message: str) -> NoReturn:
    # An op of our own is called by the name that the user called: _OP_save is OP with grad enabled.
    if op.startswith("_"):
        op = op[1:].removesuffix("_save")
    raise RuntimeError(f"{op}: {message}")


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a state: float32 for 16-bit activations, otherwise theirs."""
    return torch.float32 if dtype in _HALF else dtype


def _parse_dim(text: str) -> _Dim:
    match = re.fullmatch(r"(\w+?)(-\d+)?(>=\d+)?(?:=(\d+)\.\.(\d+))?(\|1)?", text)
    name, minus, minimum, first, last, or_one = match.groups()
    number = name.isdigit()
    return _Dim(
        "" if number else name,
        int(name) if number else 0,
        int(minus[1:]) if minus else 0,
        int(minimum[2:]) if minimum else int(first or 0),
        int(last) if last else None,
        or_one is not None,
    )


@functools.cache
def _rules(op: str) -> list[_Rule]:
    rules = []
    for word in torch.ops.recurra._requirements(op).split():
        name, kind, star, shapes = re.fullmatch(r"(\w+):(\w+)(\*?)\??(.*)", word).groups()
        text = shapes.replace(",", ", ").replace("|1", " or 1").replace("/", " or ")
        rules.append(
            _Rule(
                name,
                kind,
                bool(star),
                [[_parse_dim(d) for d in s[1:-1].split(",")] for s in shapes.split("/") if s],
                text.replace(">=", " >= "),
            )
        )
    return rules


def dtype_name(dtype: torch.dtype) -> str:
    known = (*_REAL, *_COMPLEX, torch.complex32, torch.int64, torch.int32, torch.int16)
    if dtype in (*known, torch.int8, torch.uint8, torch.bool):
        return str(dtype).removeprefix("torch.")
    return "another dtype"


def _device_name(tensor: Tensor) -> str:
    device = tensor.device
    return {"cpu": "cpu", "cuda": f"cuda:{device.index}"}.get(device.type, "another device")


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _check_dtype(op: str, rule: _Rule, tensor: Tensor, lead: _Rule, leader: Tensor) -> None:
    got = dtype_name(tensor.dtype)
    if rule.kind == "index":
        if tensor.dtype not in (torch.int32, torch.int64):
            fail(op, f"{rule.name} must have dtype int32 or int64, got {got}")
        return
    if rule.kind == "mask":
        if tensor.dtype != torch.bool:
            fail(op, f"{rule.name} must have dtype bool, got {got}")
        return
    if rule is lead:
        if tensor.dtype not in _REAL and not (rule.complex and tensor.dtype in _COMPLEX):
            or_complex = ", or be complex" if rule.complex else ""
            fail(
                op,
                f"{rule.name} must have dtype float32, float64, bfloat16 or float16{or_complex}, "
                f"got {got}",
            )
        return
    act = leader.dtype
    allowed = [state_dtype(act) if rule.kind == "state" else act]
    if rule.kind == "param" and act != torch.float32:
        allowed.append(torch.float32)
    if rule.complex and not act.is_complex:
        allowed.append(torch.complex128 if act == torch.float64 else torch.complex64)
    if tensor.dtype not in allowed:
        wanted = " or ".join(dtype_name(d) for d in allowed)
        fail(
            op,
            f"{rule.name} must have dtype {wanted} where {lead.name} has {dtype_name(act)}, "
            f"got {got}",
        )


def _check_shape(op: str, rule: _Rule, tensor: Tensor, sizes: dict[str, int]) -> None:
    if not rule.shapes:
        return
    shape = next((s for s in rule.shapes if len(s) == tensor.dim()), None)
    good = shape is not None
    fresh: dict[str, int] = {}
    for dim, size in zip(shape or (), tensor.shape, strict=False):
        if not good:
            break
        if dim.or_one and size == 1:
            continue
        if not dim.name:
            good = size == dim.value
        elif dim.name in sizes:
            good = size == sizes[dim.name] - dim.minus
        else:
            full = size + dim.minus
            good = bool(full >= dim.minimum) and (dim.maximum is None or bool(full <= dim.maximum))
            good = good and fresh.setdefault(dim.name, full) == full
    if good:
        sizes.update(fresh)
        return
    names = dict.fromkeys(d.name for s in rule.shapes for d in s if d.name in sizes)
    where = ", ".join(f"{name} = {sizes[name]}" for name in names)
    fail(
        op,
        f"{rule.name} must have shape {rule.shape_text}{' with ' if where else ''}{where}, "
        f"got {_shape(tensor)}",
    )


def check(op: str, **arguments: Tensor | None) -> dict[str, int]:
    """Checks arguments against the requirements of ``op`` and returns the sizes by name.

    Raises:
        RuntimeError: one sentence with the argument, what is required and what came.
    """
    rules = _rules(op)
    sizes: dict[str, int] = {}
    leader: Tensor | None = None
    packed = arguments.get("cu_seqlens")
    for rule in rules:
        tensor = arguments.get(rule.name)
        if tensor is None:
            continue
        if leader is None:
            leader = tensor
        if _device_name(tensor) != _device_name(leader):
            fail(
                op,
                f"{rule.name} must be on the device of {rules[0].name}, "
                f"{_device_name(leader)}, got {_device_name(tensor)}",
            )
        _check_dtype(op, rule, tensor, rules[0], leader)
        _check_shape(op, rule, tensor, sizes)
        if rule is rules[0] and packed is not None:
            if packed.dim() != 1 or packed.shape[0] < 1:
                fail(op, f"cu_seqlens must have shape (S + 1,), got {_shape(packed)}")
            if packed.shape[0] == 1 and sizes.get("T", 0) > 0:
                steps = sizes["T"]
                fail(
                    op,
                    f"cu_seqlens must have shape (S + 1,) with S >= 1 where T = {steps}, got (1,)",
                )
            if "B" in sizes and sizes["B"] != 1:
                fail(
                    op,
                    f"{rule.name} must have batch size B = 1 with cu_seqlens, got {_shape(tensor)}",
                )
            sizes["S"] = packed.shape[0] - 1
        elif rule is rules[0] and "B" in sizes:
            sizes["S"] = sizes["B"]
    return sizes


def check_layout(op: str, name: str, x: Tensor, parameter: str, p: Tensor, also: str = "") -> None:
    """Refuses an x (B, D, L) where (B, T, D) is meant, which a parameter (D, ...) gives away."""
    if x.dim() == 3 and p.dim() == 2 and p.shape[0] != x.shape[2] and p.shape[0] == x.shape[1]:
        fail(
            op,
            f"{name} must have shape (B, T, D) with D = {p.shape[0]} as in {parameter}, "
            f"got {_shape(x)}, which looks like (B, D, L): pass {name}.swapaxes(1, 2){also}",
        )


def check_offsets(op: str, cu_seqlens: Tensor, time: int) -> list[int]:
    """The ends of packed sequences, which must ascend from 0 to T."""
    ends = cu_seqlens.tolist()
    if ends[0] != 0:
        fail(op, f"cu_seqlens must start at 0, got {ends[0]}")
    for i in range(1, len(ends)):
        if ends[i] < ends[i - 1]:
            fail(op, f"cu_seqlens must ascend, got {ends[i]} after {ends[i - 1]} at index {i}")
    if ends[-1] != time:
        fail(op, f"cu_seqlens must end at T = {time}, got {ends[-1]}")
    return ends


def check_slots(op: str, rows: int, h: Tensor, slots: Tensor | None) -> None:
    """Without slots, row i has state i, so there must be as many; ``h`` is written in place."""
    for dim, (size, stride) in enumerate(zip(h.shape, h.stride(), strict=True)):
        if size > 1 and stride == 0 and h.numel() > 0:
            fail(
                op,
                f"h is written in place and must not be expanded, got stride 0 in dimension {dim}",
            )
    states = h.shape[0]
    if slots is None and rows != states:
        fail(
            op,
            f"h must have as many states as there are rows, {rows}, or slots must be given, "
            f"got {states}",
        )


def memory_order(x: Tensor) -> list[int]:
    """The dimensions of a tensor from the outermost in memory to the innermost, as torch finds it;
    see csrc/torch/check.cpp."""
    order = list(reversed(range(x.dim())))  # from the innermost out
    sizes, strides = x.shape, x.stride()
    for i in range(1, len(order)):
        at = i
        for before in reversed(range(i)):
            inner, outer = order[before], order[at]
            a, b = strides[inner], strides[outer]
            if a == 0 or b == 0:
                continue
            if a < b:
                break
            if a == b and sizes[inner] <= sizes[outer]:
                continue
            order[before], order[at] = outer, inner
            at = before
    return order[::-1]


def empty_ordered(like: Tensor, sizes: tuple[int, ...], order: list[int]) -> Tensor:
    """An uninitialised tensor that lies in memory in that order."""
    outer = like.new_empty([sizes[n] for n in order])
    return outer.permute([order.index(n) for n in range(len(order))])
