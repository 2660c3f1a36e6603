"""A case for an op that has none of its own: inputs of the shapes that the op says it requires."""

from __future__ import annotations

import torch
from torch import Tensor

import recurra
from recurra._check import _rules

_SIZES = {"B": 4, "T": 512, "D": 256, "N": 16, "G": 1, "W": 4, "S": 4}


def public_ops() -> list[str]:
    """Every whole-sequence op of the package."""
    return [name for name in recurra.ops.__all__ if not name.endswith("_step")]


def inputs(op: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Every tensor argument of ``op`` but index tensors, uniform in [0, 1)."""
    torch.manual_seed(0)
    made = {}
    for rule in _rules(op):
        if rule.kind == "index":
            continue
        shape = [
            (_SIZES.get(dim.name, 4) if dim.name else dim.value) - dim.minus
            for dim in rule.shapes[0]
        ]
        made[rule.name] = torch.rand(shape, dtype=dtype)
    return made


def verify(op: str) -> float:
    """Compares the op in float64 with its reference; the largest relative difference."""
    arguments = inputs(op, torch.float64)
    got = getattr(recurra, op)(**arguments)
    wanted = getattr(recurra.reference, op)(**arguments)
    worst = 0.0
    for x, y in zip(_tuple(got), _tuple(wanted), strict=True):
        worst = max(worst, ((x - y).abs().max() / y.abs().max()).item())
    if not worst < 1e-10:
        raise AssertionError(f"{op} differs from its reference by {worst:.3g} of the largest value")
    return worst / 1e-10


def _tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def moved_bytes(op: str) -> int:
    """Bytes of all arguments and results: the least that the memory has to move."""
    arguments = inputs(op)
    results = _tuple(getattr(recurra, op)(**arguments))
    return sum(t.numel() * t.element_size() for t in (*arguments.values(), *results))
