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

    def __truediv__(self, other: Rounded) -> Rounded:
        value = self.value / other.value
        error = self.error + value.abs() * other.error
        return self._round(value, error / (other.value.abs() - other.error).clamp(min=0))

    def __neg__(self) -> Rounded:
        return Rounded(self.unit, -self.value, self.error)

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
        # The kernels promise 2 ulp, which is 4 units; a complex one has a cosine and a sine of the
        # same kind and one product more.
        value = self.value.exp()
        units = 12 if value.is_complex() else 4
        return self._round(value, value.abs() * torch.expm1(self.error), units)

    def exp_scaled(self) -> Rounded:
        """exp as a power of two: the argument is scaled, multiplied and reduced in one unit each,
        the result is within 3 ulp; a complex one has a cosine and a sine of the same kind."""
        value = self.value.exp()
        argument = self.error + 3 * self.unit.u * self.value.abs()
        return self._round(value, value.abs() * torch.expm1(argument), 12)

    def _function(self, value: Tensor, slope: float, units: float) -> Rounded:
        return self._round(value, slope * self.error, units)

    def sigmoid(self) -> Rounded:
        return self._function(self.value.sigmoid(), 0.25, 6)

    def softplus(self) -> Rounded:
        zero = torch.zeros_like(self.value)
        return self._function(torch.logaddexp(self.value, zero), 1, 6)

    def silu(self) -> Rounded:
        return self._function(torch.nn.functional.silu(self.value), 1.1, 6)

    def silu_slope(self) -> Rounded:
        one, s = self.exact(torch.ones_like(self.value)), self.sigmoid()
        slope = s * (one + self.exact(self.value) * (one - s))
        return Rounded(self.unit, slope.value, slope.error + 0.5 * self.error)

    def conj(self) -> Rounded:
        return self.map(lambda x: x.conj() if x.is_complex() else x)

    def real(self) -> Rounded:
        return self.map(lambda x: x.real if x.is_complex() else x)

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
        return x.map(_flipped)

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
    kind = x.value.dtype
    first = _zeros(u, S, D, dtype=kind) if h0 is None else Rounded(u, double(h0))
    dh, dh_last = (Rounded(u, double(c)) for c in cotangents)
    h, da, db = (_zeros(u, B, T, D, dtype=kind) for _ in range(3))
    last, dh0 = (_zeros(u, S, D, dtype=kind) for _ in range(2))
    for rows, n, steps in walks(B, T, cu_seqlens, reverse):
        states = scan(gate[rows][:, steps], x[rows][:, steps], first[n])
        g = scan_back(gate[rows][:, steps].conj(), dh[rows][:, steps], dh_last[n])
        _put(h, (rows, steps), states[:, 1:])
        _put(last, n, states[:, -1])
        _put(dh0, n, g[:, 0])
        _put(db, (rows, steps), g[:, 1:])
        before = states[:, :-1].stored()  # the backward reads what the forward has written
        if steps:
            _put(before, (slice(None), 0), first[n])
        to_gate = gate[rows][:, steps].conj() * g[:, 1:] if log_a else g[:, 1:]
        _put(da, (rows, steps), to_gate * before.conj())
    return [h, last], {"a": da.sum_to(a.shape), "b": db, "h0": dh0}


def _flipped(x: Tensor) -> Tensor:
    return x.flip(1)


def products(matrix: Rounded, source: Rounded, first: Rounded) -> Rounded:
    """h_t = matrix_t h_{t-1} + source_t along dimension 1, with `first` before the others: T + 1
    states. The matrices are exact; k products and sums, each rounded once."""
    k, u = matrix.value.shape[-1], matrix.unit
    sizes = matrix.value.abs()
    h, e = first.value, first.error
    states, errors = [h], [e]
    for t in range(source.value.shape[1]):
        carried = (sizes[:, t] @ e[..., None])[..., 0]
        # No partial sum is larger than the sum of all absolute terms.
        spread = source.value[:, t].abs() + (sizes[:, t] @ h.abs()[..., None])[..., 0]
        e = carried + source.error[:, t]
        e = e + (k + 1) * (u.u * (spread + e) + u.tiny)
        h = (matrix.value[:, t] @ h[..., None])[..., 0] + source.value[:, t]
        states.append(h)
        errors.append(e)
    return Rounded(u, torch.stack(states, 1), torch.stack(errors, 1))


def block_scan(dtype, cotangents, A, b, h0=None, *, reverse=False, cu_seqlens=None):
    """h_t = A_t h_{t-1} + b_t and its gradients, as csrc/block_scan computes them."""
    u = unit(dtype)
    B, T, N, k = b.shape
    S = B if cu_seqlens is None else len(cu_seqlens) - 1
    matrix, x = Rounded(u, double(A)).expand(B, T, N, k, k), Rounded(u, double(b))
    first = _zeros(u, S, N, k) if h0 is None else Rounded(u, double(h0))
    dh, dh_last = (Rounded(u, double(c)) for c in cotangents)
    h, db, dA = _zeros(u, B, T, N, k), _zeros(u, B, T, N, k), _zeros(u, B, T, N, k, k)
    last, dh0 = _zeros(u, S, N, k), _zeros(u, S, N, k)
    for rows, n, steps in walks(B, T, cu_seqlens, reverse):
        gate = matrix[rows][:, steps]
        states = products(gate, x[rows][:, steps], first[n])
        _put(h, (rows, steps), states[:, 1:])
        _put(last, n, states[:, -1])
        if not steps:
            _put(dh0, n, dh_last[n])
            continue
        # Backwards from dh_last: g_T = dh_T + it, g_t = dh_t + A_{t+1}^T g_{t+1}, dh0 = A_1^T g_1.
        turned = gate.map(lambda v: v.mT)
        one = gate.exact(torch.eye(k, dtype=torch.float64).expand_as(gate.value[:, :1]))
        given = dh[rows][:, steps]
        none = given[:, :1].map(torch.zeros_like)
        back = products(
            *(_joined(*parts).map(_flipped) for parts in ((turned, one), (none, given))), dh_last[n]
        )
        g = back[:, 1:].map(_flipped)
        _put(dh0, n, g[:, 0])
        _put(db, (rows, steps), g[:, 1:])
        seen = states[:, :-1].stored()  # the backward reads what the forward has written
        _put(seen, (slice(None), 0), first[n])
        column, row = g[:, 1:].map(lambda v: v[..., None]), seen.map(lambda v: v[..., None, :])
        _put(dA, (rows, steps), column * row)
    return [h, last], {"A": dA.sum_to(A.shape), "b": db, "h0": dh0}


def causal_conv1d(
    dtype, cotangents, x, weight, bias=None, h0=None, *, activation=None, cu_seqlens=None
):
    """y_t = act(bias + sum_j w_j x_{t-W+1+j}) and its gradients, as csrc/causal_conv1d."""
    u = unit(dtype)
    B, T, D = x.shape
    W = weight.shape[1]
    S = B if cu_seqlens is None else len(cu_seqlens) - 1
    taps = [Rounded(u, double(weight)[:, j]) for j in range(W)]
    first = _zeros(u, S, W - 1, D) if h0 is None else Rounded(u, double(h0))
    dy, dh_last = (Rounded(u, double(c)) for c in cotangents)
    y, dx = _zeros(u, B, T, D), _zeros(u, B, T, D)
    last, dh0 = _zeros(u, S, W - 1, D), _zeros(u, S, W - 1, D)
    to_taps, to_bias = [[] for _ in taps], []
    for rows, n, steps in walks(B, T, cu_seqlens):
        L = len(steps)
        inputs = Rounded(u, torch.cat([first.value[n], double(x)[rows][:, steps]], 1))
        s = _zeros(u, *inputs.value[:, W - 1 :].shape)
        if bias is not None:
            s = s + Rounded(u, double(bias).expand_as(s.value))
        for j in range(W):
            s = s + taps[j] * inputs[:, j : j + L]
        _put(y, (rows, steps), s.silu() if activation else s)
        _put(last, n, inputs[:, L:])
        ds = dy[rows][:, steps]
        if activation:
            ds = ds * s.silu_slope()
        g = inputs.exact(torch.zeros_like(inputs.value))
        for j in range(W):
            _put(g, (slice(None), slice(j, j + L)), g[:, j : j + L] + taps[j] * ds)
            to_taps[j].append((ds * inputs[:, j : j + L]).sum_to((1, 1, D)))
        _put(g, (slice(None), slice(L, L + W - 1)), g[:, L:] + dh_last[n])
        to_bias.append(ds.sum_to((1, 1, D)))
        _put(dh0, n, g[:, : W - 1])
        _put(dx, (rows, steps), g[:, W - 1 :])

    def total(parts: list[Rounded]) -> Rounded:
        if not parts:
            return _zeros(u, D)
        joined = Rounded(u, *(torch.cat([getattr(p, f) for p in parts], 1) for f in _FIELDS))
        return joined.sum_to((1, 1, D))[0, 0]

    columns = [total(parts) for parts in to_taps]
    dweight = Rounded(u, *(torch.stack([getattr(c, f) for c in columns], 1) for f in _FIELDS))
    return [y, last], {"x": dx, "weight": dweight, "bias": total(to_bias), "h0": dh0}


def selective_scan(
    dtype,
    cotangents,
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    *,
    delta_softplus=False,
    h0=None,
    cu_seqlens=None,
):
    """The equations at the head of csrc/selective_scan/selective_scan.h."""
    k = unit(dtype)
    rows, T, width = u.shape
    N = A.shape[1]
    S = rows if cu_seqlens is None else len(cu_seqlens) - 1

    def given(x: Tensor) -> Rounded:
        return Rounded(k, double(x))

    def per_channel(x: Tensor) -> Rounded:  # (B, T, D, N)
        x = double(x)
        grouped = x[:, :, None] if x.dim() == 3 else x
        return Rounded(k, grouped.repeat_interleave(width // max(1, grouped.shape[2]), 2))

    def to_groups(x: Rounded, like: Tensor) -> Rounded:
        """Sums the gradient of B or C over the channels of each group."""
        groups = 1 if like.dim() == 3 else like.shape[2]
        apart = x.map(lambda v: v.reshape(rows, T, groups, width // groups, N))
        total = apart.sum_to((rows, T, groups, 1, N)).map(lambda v: v.reshape(like.shape))
        return total if like.is_complex() else total.real()

    weight = given(torch.full((), 2.0 if A.is_complex() else 1.0))
    x, a, b, c = given(u), given(A), per_channel(B), per_channel(C)
    raw = given(delta) if delta_bias is None else given(delta) + given(delta_bias)
    dt = raw.softplus() if delta_softplus else raw
    gate = (dt[..., None] * a).exp_scaled()
    dtu = dt * x
    source = dtu[..., None] * b
    dy, dh_last = (given(v) for v in cotangents)

    state = torch.complex128 if A.is_complex() else torch.float64
    before, after, g = (_zeros(k, rows, T, width, N, dtype=state) for _ in range(3))
    last, dh0 = (_zeros(k, S, width, N, dtype=state) for _ in range(2))
    first = _zeros(k, S, width, N, dtype=state) if h0 is None else given(h0)
    Y = dy * given(z).silu() if z is not None else dy
    to_h = (weight * Y)[..., None] * c.conj()
    for r, n, steps in walks(rows, T, cu_seqlens):
        states = scan(gate[r][:, steps], source[r][:, steps], first[n])
        back = scan_back(gate[r][:, steps].conj(), to_h[r][:, steps], dh_last[n])
        _put(before, (r, steps), states[:, :-1])
        _put(after, (r, steps), states[:, 1:])
        _put(last, n, states[:, -1])
        _put(dh0, n, back[:, 0])
        _put(g, (r, steps), back[:, 1:])

    def over_states(v: Rounded) -> Rounded:
        return v.real().sum_to((rows, T, width, 1))[..., 0]

    y = weight * over_states(c * after)
    if D is not None:
        y = y + given(D) * x
    p = over_states(g * b.conj())
    q = g * (gate * before).conj()
    ddt = x * p + over_states(a.conj() * q)
    ddelta = ddt * raw.sigmoid() if delta_softplus else ddt
    du = dt * p
    if D is not None:
        du = du + given(D) * Y
    grads = {
        "u": du,
        "delta": ddelta,
        "A": (dt[..., None] * q).sum_to((1, 1, width, N))[0, 0],
        "B": to_groups(g * dtu[..., None], B),
        "C": to_groups((weight * Y)[..., None] * after.conj(), C),
        "D": (Y * x).sum_to((1, 1, width))[0, 0],
        "delta_bias": ddelta.sum_to((1, 1, width))[0, 0],
        "h0": dh0,
    }
    if z is not None:
        grads["z"] = dy * y * given(z).silu_slope()
        y = y * given(z).silu()
    return [y, last], grads


def _joined(*parts: Rounded) -> Rounded:
    return Rounded(parts[0].unit, *(torch.cat([getattr(p, f) for p in parts], 1) for f in _FIELDS))


def _weights(x: Rounded, y: Rounded) -> tuple[Rounded, Rounded, Tensor]:
    """e^{x - q} and e^{y - q} for q = max(x, y), one of which is 1, and where the kernel may take
    the smaller for the larger."""
    apart = x - y
    unsure = (apart.value.abs() <= x.error + y.error) & (x.error + y.error > 0)
    value = (-apart.value.abs()).exp()
    # Beyond 80 it is 0 whatever its error.
    small = x._round(value, value * torch.expm1(apart.error.clamp(max=80)), 4)
    small.error += unsure * (1 - value)
    one = torch.ones_like(value)
    above = y.value > x.value
    doubt = torch.where(unsure, small.error, 0.0)

    def pick(mask: Tensor) -> Rounded:
        return Rounded(
            x.unit, torch.where(mask, small.value, one), torch.where(mask, small.error, doubt)
        )

    return pick(above), pick(~above), unsure


def _output_weights(f: Rounded, g: Rounded, factors, exact) -> tuple[Rounded, Rounded]:
    """Those of the state times e^decay and e^bonus over the larger, or by exponentials of their own
    where the kernel takes these. No sample comes so near to the limits that it might go either
    way."""
    inside = torch.minimum(factors[0].value, factors[1].value) >= 1e-10
    quick = (f * factors[0], g * factors[1])
    holds = inside & (torch.minimum(quick[0].value, quick[1].value) >= 1e-24)

    def pick(one: Rounded, other: Rounded) -> Rounded:
        value = torch.where(holds, one.value, other.value)
        return Rounded(one.unit, value, torch.where(holds, one.error, other.error))

    return pick(quick[0], exact[0]), pick(quick[1], exact[1])


def softmax_scan(dtype, cotangents, s, v, h0=None, *, decay=None, bonus=None, cu_seqlens=None):
    """The equations at the head of csrc/softmax_scan/softmax_scan.h."""
    u = unit(dtype)
    B, T, D = v.shape
    S = B if cu_seqlens is None else len(cu_seqlens) - 1
    score, x = Rounded(u, double(s)).expand(B, T, D), Rounded(u, double(v))
    first = _zeros(u, S, 3, D) if h0 is None else Rounded(u, double(h0))
    # Lower than any score that a sample has.
    first.value[:, 0].clamp_(min=-1e30) if h0 is not None else first.value[:, 0].fill_(-1e30)
    do, dh_last = (Rounded(u, double(c)) for c in cotangents)
    o, ds, dv, to_decay, to_bonus = (_zeros(u, B, T, D) for _ in range(5))
    last, dh0 = (_zeros(u, S, 3, D) for _ in range(2))
    slower = torch.zeros(D, dtype=torch.float64) if decay is None else double(decay)
    more = None if bonus is None else Rounded(u, double(bonus))
    factors = None if more is None else _weights(more.exact(slower), more)
    for rows, n, steps in walks(B, T, cu_seqlens):
        k, val, dk, start, end = (
            score[rows][:, steps],
            x[rows][:, steps],
            do[rows][:, steps],
            first[n],
            dh_last[n],
        )
        m, e = start.value[:, 0], start.error[:, 0]
        moved, tops = [], [(m, e)]
        for t in range(len(steps)):
            y = m - slower
            e = e + (0 if decay is None else u.u * y.abs())
            moved.append((y, e))
            m, e = torch.maximum(y, k.value[:, t]), torch.where(y + e < k.value[:, t], 0.0, e)
            tops.append((m, e))
        if not steps:
            _put(last, n, start)
            _put(dh0, n, end)
            continue

        def stacked(pairs) -> Rounded:
            return Rounded(u, *(torch.stack(each, 1) for each in zip(*pairs, strict=True)))

        top, old = stacked(tops), stacked(moved)
        f, g, unsure = _weights(old, k)
        c, a = scan(f, g, start[:, 1]), scan(f, g * val, start[:, 2])
        _put(last, (n, 0), top[:, -1])
        _put(last, (n, 1), c[:, -1])
        _put(last, (n, 2), a[:, -1])
        c0, a0, zero = c[:, :-1], a[:, :-1], _zeros(u, *k[:, :1].value.shape)
        if more is None:
            weight, total = c[:, 1:], a[:, 1:]
        else:
            p, r = _output_weights(f, g, factors, _weights(top[:, :-1], k + more))
            weight, total = p * c0 + r, p * a0 + r * val
        mean = total / weight
        _put(o, (rows, steps), mean)
        inverse = weight.exact(torch.ones_like(weight.value)) / weight
        y = dk * inverse
        if more is None:
            to_a, to_c = y, -(y * (total * inverse))
        else:  # the output has read the state before its step
            older, now = p * inverse, r * inverse
            middle = older * a0 + now * val
            past_a = older * dk
            past_c = -(past_a * middle)
            to_a, to_c = _joined(past_a[:, 1:], zero), _joined(past_c[:, 1:], zero)
        A, C = scan_back(f, to_a, end[:, 2]), scan_back(f, to_c, end[:, 1])

        # What the last maximum has of its own goes to the score that set it.
        rest = end[:, 0] - (C[:, -1] * c[:, -1] + A[:, -1] * a[:, -1])
        through = f * C[:, 1:] * c0 + f * A[:, 1:] * a0
        # A state between two calls holds the sum of both: one rounding more, wherever the cut.
        sizes = through.value.abs().amax(1) + rest.value.abs()
        E, err = rest.value, rest.error + 4 * u.u * torch.where(rest.value == 0, 0.0, sizes)
        # The oracle finds what each maximum has of its own as the rest of sums, in float64.
        noise = 2.0**-49 * ((C[:, 1:] * c[:, 1:]).value.abs() + (A[:, 1:] * a[:, 1:]).value.abs())
        read = torch.zeros_like(noise)
        if more is not None:
            read = 2.0**-49 * (y.value * total.value / weight.value).abs() * (1 + val.value.abs())
        own, passed = [], []
        for t in reversed(range(len(steps))):
            gap = k.value[:, t] - old.value[:, t]
            share = torch.where(gap > 0, 1.0, torch.where(gap == 0, 0.5, 0.0)).double()
            doubt = torch.where(unsure[:, t], E.abs() + err, 0.0) + noise[:, t]
            own.append((share * E, share * err + doubt + read[:, t]))
            E, err = (1 - share) * E, (1 - share) * err + doubt + read[:, t]
            passed.append((E, err))
        own, passed = stacked(own[::-1]), stacked(passed[::-1])
        dk_s, dk_v = g * (C[:, 1:] + val * A[:, 1:]) + own, g * A[:, 1:]
        if more is not None:
            now = now * dk
            extra = now * (val - middle)
            dk_s, dk_v = dk_s + extra, dk_v + now
            _put(to_bonus, (rows, steps), extra)
        _put(ds, (rows, steps), dk_s)
        _put(dv, (rows, steps), dk_v)
        _put(to_decay, (rows, steps), -(through + passed))
        C_first, A_first = C[:, 0], A[:, 0]
        if more is not None:
            C_first, A_first = C_first + past_c[:, 0], A_first + past_a[:, 0]
        _put(dh0, (n, 0), C_first * start[:, 1] + A_first * start[:, 2] + passed[:, 0])
        _put(dh0, (n, 1), C_first)
        _put(dh0, (n, 2), A_first)
    grads = {
        "s": ds.sum_to(s.shape),
        "v": dv,
        "h0": dh0,
        "decay": to_decay.sum_to((1, 1, D))[0, 0],
        "bonus": to_bonus.sum_to((1, 1, D))[0, 0],
    }
    return [o, last], grads
