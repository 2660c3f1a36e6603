"""Error bounds propagated along the recurrences, so that no test chooses a tolerance.

A `Rounded` is a float64 value with a bound of how far the kernel's number may be from the exact
one: every operation adds the errors that its operands bring and one rounding of its own
(reference: Higham, "Accuracy and stability of numerical algorithms", section 3.3, running error
analysis). A model below repeats what a kernel computes, forward and backward, in that arithmetic;
its values are float64 copies of the kernel's own path, its errors the tolerance of the tests.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Unit:
    """Half an ulp at 1 and the smallest subnormal, of arithmetic and of storage."""

    u: float
    tiny: float
    storage_u: float
    storage_tiny: float


def unit(dtype: torch.dtype) -> Unit:
    def of(d: torch.dtype) -> tuple[float, float]:
        info = torch.finfo(d)
        return info.eps / 2, info.tiny * info.eps

    return Unit(*of(torch.float32 if dtype in _HALF else dtype), *of(dtype))


class Rounded:
    """A float64 tensor with an elementwise error bound."""

    def __init__(self, unit: Unit, value: Tensor, error: Tensor | None = None):
        self.unit = unit
        self.value = value
        self.error = torch.zeros(value.shape, dtype=torch.float64) if error is None else error

    def _round(self, value: Tensor, error: Tensor, ulps: float = 1.0) -> Rounded:
        return Rounded(self.unit, value, error + ulps * self.unit.u * value.abs() + self.unit.tiny)

    def __add__(self, other: Rounded) -> Rounded:
        return self._round(self.value + other.value, self.error + other.error)

    def __sub__(self, other: Rounded) -> Rounded:
        return self._round(self.value - other.value, self.error + other.error)

    def __mul__(self, other: Rounded) -> Rounded:
        error = self.value.abs() * other.error + other.value.abs() * self.error
        return self._round(self.value * other.value, error + self.error * other.error)

    def __getitem__(self, index) -> Rounded:
        return Rounded(self.unit, self.value[index], self.error[index])

    def map(self, function) -> Rounded:
        """Moves elements without computing."""
        return Rounded(self.unit, function(self.value), function(self.error))

    def expand(self, *shape: int) -> Rounded:
        return self.map(lambda x: x.expand(*shape))

    def exact(self, value: Tensor) -> Rounded:
        return Rounded(self.unit, value)

    def exp(self) -> Rounded:
        # The kernels promise 2 ulp, which is 4 units.
        value = self.value.exp()
        return self._round(value, value.abs() * torch.expm1(self.error), 4)

    def sum_to(self, shape: tuple[int, ...]) -> Rounded:
        """Summed in whatever order: n terms bring n roundings of their absolute sum."""
        if tuple(self.value.shape) == tuple(shape):
            return self
        n = self.value.numel() // max(1, torch.Size(shape).numel())
        total = self.value.sum_to_size(shape)
        spread = self.value.abs().sum_to_size(shape)
        error = self.error.sum_to_size(shape)
        return Rounded(self.unit, total, error + n * (self.unit.u * spread + self.unit.tiny))

    def stored(self) -> Rounded:
        """Written to memory in the storage dtype and read back."""
        error = self.unit.storage_u * (self.value.abs() + self.error) + self.unit.storage_tiny
        return Rounded(self.unit, self.value, self.error + error)


def join(unit: Unit, parts: list[Rounded], dim: int, like: Tensor) -> Rounded:
    """Stacks; `like` is what an empty stack is."""
    if not parts:
        return Rounded(unit, like)
    stack = [torch.stack([getattr(p, f) for p in parts], dim) for f in ("value", "error")]
    return Rounded(unit, *stack)


def double(x: Tensor | None) -> Tensor | None:
    """The same numbers in float64, or complex128."""
    if x is None or not (x.is_floating_point() or x.is_complex()):
        return x
    return x.detach().to(torch.complex128 if x.is_complex() else torch.float64).contiguous()


def walks(batch: int, time: int, cu_seqlens: Tensor | None, reverse: bool = False):
    """(rows of B, rows of S, steps in order) of each sequence or, unpacked, of all at once."""
    if cu_seqlens is None:
        spans = [(slice(0, batch), slice(0, batch), range(time))]
    else:
        ends = cu_seqlens.tolist()
        spans = [
            (slice(0, 1), slice(n, n + 1), range(ends[n], ends[n + 1]))
            for n in range(len(ends) - 1)
        ]
    return [(b, s, list(reversed(t) if reverse else t)) for b, s, t in spans]


def linear_scan(dtype, cotangents, a, b, h0=None, *, log_a=False, reverse=False, cu_seqlens=None):
    """h_t = a_t h_{t-1} + b_t and its gradients, as csrc/linear_scan computes them."""
    u = unit(dtype)
    B, T, D = b.shape
    states = B if cu_seqlens is None else len(cu_seqlens) - 1
    a_in, x = Rounded(u, double(a)), Rounded(u, double(b))
    gate = (a_in.exp() if log_a else a_in).expand(B, T, D)
    first = Rounded(u, torch.zeros(states, D).double() if h0 is None else double(h0))
    dh, dh_last = (Rounded(u, double(c)) for c in cotangents)

    h = Rounded(u, torch.zeros(B, T, D).double())
    da, db = h.exact(torch.zeros(B, T, D).double()), h.exact(torch.zeros(B, T, D).double())
    last, dh0 = (h.exact(torch.zeros(states, D).double()) for _ in range(2))

    def put(to: Rounded, index, part: Rounded) -> None:
        to.value[index], to.error[index] = part.value, part.error

    for rows, n, steps in walks(B, T, cu_seqlens, reverse):
        state = first[n]
        before = []
        for t in steps:
            before.append(state.stored() if before else state)  # the backward reads what was kept
            state = gate[rows, t] * state + x[rows, t]
            put(h, (rows, t), state)
        put(last, n, state)
        carry = dh_last[n]
        for t in reversed(steps):
            g = dh[rows, t] + carry
            carry = gate[rows, t] * g
            put(db, (rows, t), g)
            put(da, (rows, t), (carry if log_a else g) * before.pop())
        put(dh0, n, carry)
    return [h, last], {"a": da.sum_to(a.shape), "b": db, "h0": dh0}
