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
_FIELDS = ("value", "error")


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

    def _round(self, value: Tensor, error: Tensor, units: float = 1.0) -> Rounded:
        return Rounded(self.unit, value, error + units * self.unit.u * value.abs() + self.unit.tiny)

    def __add__(self, other: Rounded) -> Rounded:
        return self._round(self.value + other.value, self.error + other.error)

    def __sub__(self, other: Rounded) -> Rounded:
        return self._round(self.value - other.value, self.error + other.error)

    def __mul__(self, other: Rounded) -> Rounded:
        value = self.value * other.value
        error = self.value.abs() * other.error + other.value.abs() * self.error
        # A complex product rounds twice a part: at most 2 sqrt(2) units of its absolute value.
        return self._round(value, error + self.error * other.error, 3 if value.is_complex() else 1)

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


def scan(gate: Rounded, source: Rounded, first: Rounded) -> Rounded:
    """h_t = gate_t h_{t-1} + source_t along dimension 1, with `first` before the others: T + 1
    states."""
    T = source.value.shape[1]
    u, tiny = gate.unit.u, gate.unit.tiny
    a, x = gate.value, source.value
    size, grow = a.abs(), gate.error
    h, e = first.value, first.error
    states, errors = [h], [e]
    units = 3 if a.is_complex() else 1
    for t in range(T):
        product = a[:, t] * h
        e = (size[:, t] + grow[:, t]) * e + grow[:, t] * h.abs() + source.error[:, t]
        h = product + x[:, t]
        e = e + u * (units * product.abs() + h.abs()) + 2 * tiny
        states.append(h)
        errors.append(e)
    return Rounded(gate.unit, torch.stack(states, 1), torch.stack(errors, 1))


def scan_back(gate: Rounded, source: Rounded, last: Rounded) -> Rounded:
    """g_t = source_t + gate_{t+1} g_{t+1}, with `last` added to the last: T states, and before
    them gate_1 g_1, the cotangent of the state before the first step."""

    def backwards(x: Rounded) -> Rounded:
        return x.map(lambda v: v.flip(1))

    if source.value.shape[1] == 0:
        return last.map(lambda v: v[:, None])
    one = gate[:, :1].map(torch.zeros_like)
    one = gate.exact(one.value + 1)
    shifted = Rounded(
        gate.unit,
        *(torch.cat([getattr(x, f) for x in (one, backwards(gate[:, 1:]))], 1) for f in _FIELDS),
    )
    g = backwards(scan(shifted, backwards(source), last)[:, 1:])
    before = gate[:, 0] * g[:, 0]
    return Rounded(
        gate.unit, *(torch.cat([getattr(before, f)[:, None], getattr(g, f)], 1) for f in _FIELDS)
    )


def _put(to: Rounded, index, part: Rounded) -> None:
    to.value[index], to.error[index] = part.value, part.error


def _zeros(u: Unit, *shape: int, dtype=torch.float64) -> Rounded:
    return Rounded(u, torch.zeros(shape, dtype=dtype))


def linear_scan(dtype, cotangents, a, b, h0=None, *, log_a=False, reverse=False, cu_seqlens=None):
    """h_t = a_t h_{t-1} + b_t and its gradients, as csrc/linear_scan computes them."""
    u = unit(dtype)
    B, T, D = b.shape
    S = B if cu_seqlens is None else len(cu_seqlens) - 1
    a_in, x = Rounded(u, double(a)), Rounded(u, double(b))
    gate = (a_in.exp() if log_a else a_in).expand(B, T, D)
    first = _zeros(u, S, D) if h0 is None else Rounded(u, double(h0))
    dh, dh_last = (Rounded(u, double(c)) for c in cotangents)
    h, da, db = (_zeros(u, B, T, D) for _ in range(3))
    last, dh0 = (_zeros(u, S, D) for _ in range(2))
    for rows, n, steps in walks(B, T, cu_seqlens, reverse):
        states = scan(gate[rows][:, steps], x[rows][:, steps], first[n])
        g = scan_back(gate[rows][:, steps], dh[rows][:, steps], dh_last[n])
        _put(h, (rows, steps), states[:, 1:])
        _put(last, n, states[:, -1])
        _put(dh0, n, g[:, 0])
        _put(db, (rows, steps), g[:, 1:])
        before = states[:, :-1].stored()  # the backward reads what the forward has written
        if steps:
            _put(before, (slice(None), 0), first[n])
        to_gate = gate[rows][:, steps] * g[:, 1:] if log_a else g[:, 1:]
        _put(da, (rows, steps), to_gate * before)
    return [h, last], {"a": da.sum_to(a.shape), "b": db, "h0": dh0}
