"""h_t = f(x_t, h_{t-1}) along time: the loop, Newton's method, and the linear recurrences of both.

Rows are the steps of all sequences, R = B·T of them; a state is (R, K, N) or, with its two
dimensions of time, (B, T, K, N). Everything here is in the dtype of arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import jvp, vmap

from recurra import ops

MAX_PASSES = 16

# csrc/rnn/converged.h: a step of this, relative to the size that the state had of late, is what the
# sequential steps round away, too.
_CONVERGED = {torch.float32: 1.9e-6, torch.float64: 3.6e-15}
_LATE = 16  # steps


@dataclass(frozen=True)
class Rows:
    """A step over rows of it, ``rows(x, h) -> h`` with x (R, G, N) and h (R, K, N).

    Attributes:
        step: the user's function.
        structure: of its Jacobian.
        params: what the step is given as ``p``.
    """

    step: Callable
    structure: str
    params: object

    def __call__(self, x: Tensor, h: Tensor) -> Tensor:
        if self.structure == "dense":
            # Randomness is for the probe to find, which says what is wrong with it.
            step = vmap(self.step, in_dims=(0, 0, None), randomness="different")
            return step(x, h, self.params)
        return self.step(x.movedim(1, 0), h.movedim(1, 0), self.params).movedim(1, 0)

    def linearised(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The new states and their Jacobian along ``h``.

        The Jacobian is (R, K, N) for "diagonal", (R, N, K, K) for "block" and (R, 1, K·N, K·N) for
        "dense".
        """

        def along(tangent: Tensor) -> tuple[Tensor, Tensor]:
            return jvp(lambda h: self(x, h), (h,), (tangent,))

        R, K, N = h.shape
        if self.structure == "diagonal":
            return along(torch.ones_like(h))
        if self.structure == "block":
            # Channels are apart, so one tangent serves all of them.
            basis = torch.eye(K, dtype=h.dtype, device=h.device)[:, None, :, None]
            new, columns = vmap(along, out_dims=(None, 0))(basis.expand(K, R, K, N))
            return new, columns.permute(1, 3, 2, 0)
        basis = torch.eye(K * N, dtype=h.dtype, device=h.device).view(K * N, 1, K, N)
        new, columns = vmap(along, out_dims=(None, 0))(basis.expand(K * N, R, K, N))
        return new, columns.flatten(2).permute(1, 2, 0)[:, None]


def solve(structure: str, A: Tensor, b: Tensor, reverse: bool = False) -> Tensor:
    """d_t = A_t d_{t-1} + b_t from zero, by the compiled scans.

    With ``reverse``, the transposed recurrence from the last step to the first,
    d_t = A_{t+1}^T d_{t+1} + b_t.

    Args:
        structure: of A.
        A: as :meth:`Rows.linearised` returns it, with R = B·T.
        b: (B, T, K, N).
    """
    B, T, K, N = b.shape
    if reverse:
        A = A.unflatten(0, (B, T)).roll(-1, 1).flatten(0, 1)
    if structure == "diagonal":
        return ops.linear_scan(A.reshape(B, T, -1), b.flatten(2), reverse=reverse)[0].view_as(b)
    if reverse:
        A = A.transpose(-1, -2)
    A = A.unflatten(0, (B, T))
    if structure == "block":
        return ops.block_scan(A, b.transpose(2, 3), reverse=reverse)[0].transpose(2, 3)
    return ops.block_scan(A, b.reshape(B, T, 1, K * N), reverse=reverse)[0].view_as(b)


def cut(jacobian: Tensor, starts: Tensor) -> Tensor:
    """Without what depends on the state before a start: no step of ours moves that."""
    return jacobian.masked_fill(starts.view(-1, *(1,) * (jacobian.dim() - 1)), 0)


class Sequences:
    """Where sequences begin and end among the rows, and which state precedes each row.

    Attributes:
        rows: (first row, length) of every sequence.
        number: (B, T) of int64, the sequence that a row belongs to.
        begins: (B, T) of bool, the first step of a sequence.
        starts: the same, and the steps before which there is a reset.
    """

    def __init__(self, like: Tensor, offsets: list[int] | None, reset: Tensor | None):
        B, T = like.shape[:2]
        device = like.device
        if offsets is None:
            self.rows = [(b * T, T) for b in range(B)]
            self.number = torch.arange(B, device=device)[:, None].expand(B, T)
        else:
            self.rows = [(a, b - a) for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
            lengths = torch.tensor([n for _, n in self.rows], dtype=torch.int64, device=device)
            self.number = torch.repeat_interleave(
                torch.arange(len(self.rows), device=device), lengths
            )[None]
        # Of the sequences that have steps, which an empty one has not.
        self.filled = [s for s, (_, length) in enumerate(self.rows) if length]
        self.first = [self.rows[s][0] for s in self.filled]
        self.last = [sum(self.rows[s]) - 1 for s in self.filled]
        begins = torch.zeros(B * T, dtype=torch.bool, device=device)
        begins[self.first] = True
        self.packed, self.reset, self.begins = offsets is not None, reset, begins.view(B, T)
        self.starts = self.begins if reset is None else self.begins | reset

    def previous(self, h: Tensor, before: Tensor, h0: Tensor, t: int) -> Tensor:
        """The state that precedes each of the steps t, t+1, ... whose states are ``h``.

        Args:
            h: (B, L, K, N).
            before: (B, 1, K, N), the states at t-1; any where t is 0.
            h0: (S, K, N).
            t: the first of these steps.
        """
        steps = slice(t, t + h.shape[1])
        prev = torch.cat([before, h[:, :-1]], 1)
        if self.packed or t == 0:
            begins = self.begins[:, steps]
            prev[begins] = h0[self.number[:, steps][begins]]
        if self.reset is not None:
            prev = prev.masked_fill(self.reset[:, steps, None, None], 0)
        return prev

    def largest(self, values: Tensor, t: int) -> Tensor:
        """(S, K, N), the largest of (B, L, K, N) in each sequence; not finite where one is not."""
        if not self.packed:
            return values.amax(1)
        number = self.number[0, t : t + values.shape[1], None, None].expand_as(values[0])
        out = values.new_zeros(len(self.rows), *values.shape[2:])
        return out.scatter_reduce(0, number, values[0], "amax")


def _of_late(size: Tensor) -> Tensor:
    """The largest of (B, L, K, N) over a few steps up to each: a state may cross zero, and may have
    been far larger long before."""
    B, L, K, N = size.shape
    flat = torch.nn.functional.pad(
        size.permute(0, 2, 3, 1).reshape(B * K * N, 1, L), (_LATE - 1, 0)
    )
    pooled = torch.nn.functional.max_pool1d(flat, _LATE, 1) if L and B * K * N else flat[..., :L]
    return pooled.reshape(B, K, N, L).permute(0, 3, 1, 2)


def sequential(
    rows: Rows, x: Tensor, reset: Tensor | None, pieces: list[tuple[int, int]], h: Tensor
) -> tuple[Tensor, Tensor]:
    """The loop over time, of several pieces of it side by side.

    Args:
        rows: the step.
        x: (R, G, N).
        reset: (R,) of bool, or None.
        pieces: (first row, length) of each.
        h: (pieces, K, N), the states before them.

    Returns:
        The numbers of the rows that were walked, and their states.
    """
    # The longest first: those that still run are then the first ones.
    order = sorted(range(len(pieces)), key=lambda n: -pieces[n][1])
    first = torch.tensor([pieces[n][0] for n in order], dtype=torch.int64, device=x.device)
    lengths = [pieces[n][1] for n in order]
    h, running = h[order], len(order)
    walked, states = [first[:0]], [h[:0]]
    for t in range(max(lengths, default=0)):
        while lengths[running - 1] <= t:
            running -= 1
        at, h = first[:running] + t, h[:running]
        if reset is not None:
            h = h.masked_fill(reset[at, None, None], 0)
        h = rows(x[at], h)
        walked.append(at)
        states.append(h)
    return torch.cat(walked), torch.cat(states)


class Report(NamedTuple):
    """Of Newton's method, for each sequence and channel, or each sequence of a dense cell, (S, N)
    or (S, 1).

    Attributes:
        converged: whether it has.
        passes: how many it took.
        mismatch: the largest residual that the last pass found; NaN where a state is not finite.
    """

    converged: Tensor
    passes: Tensor
    mismatch: Tensor


def newton(
    rows: Rows, sequences: Sequences, x: Tensor, h0: Tensor, before: Tensor, t: int, most: int
) -> tuple[Tensor, Report]:
    """All states of the steps t, t+1, ... at once, by Newton's method.

    A pass linearises the step at the states of the pass before and solves for the change of all
    states: d_t = J_t d_{t-1} + f(x_t, h_{t-1}) - h_t. It has converged for a sequence and channel
    where no state moves by more than sequential steps round away; from there on, and where a state
    is not finite, its states stay as they are.

    Args:
        rows: the step.
        sequences: of the whole.
        x: (B, L, G, N), the inputs of these steps.
        h0: (S, K, N).
        before: (B, 1, K, N), the states at t-1; any where t is 0.
        t: the first of these steps.
        most: how many passes there may be.

    Returns:
        The states, (B, L, K, N), and how each sequence and channel fared.
    """
    B, L, _, N = x.shape
    inputs = x.flatten(0, 1)
    starts = sequences.starts[:, t : t + L].flatten()
    number = sequences.number[:, t : t + L]
    dense = rows.structure == "dense"
    h = rows(inputs, x.new_zeros(B * L, *h0.shape[1:])).unflatten(0, (B, L))
    active = torch.ones(len(h0), 1 if dense else N, dtype=torch.bool, device=x.device)
    zeros = torch.zeros_like(active)
    report = Report(zeros, zeros.to(torch.int32), zeros.to(x.dtype))
    for number_of_pass in range(1, most + 1):
        prev = sequences.previous(h, before, h0, t)
        value, jacobian = rows.linearised(inputs, prev.flatten(0, 1))
        residual = value.unflatten(0, (B, L)) - h
        step = solve(rows.structure, cut(jacobian, starts), residual)
        moved = h + step
        size = moved.abs()
        if dense:
            step, size = (v.abs().amax(3, keepdim=True) for v in (step, size))
        excess = step.abs() - _CONVERGED[x.dtype] * _of_late(size)
        excess, off, size = (sequences.largest(v, t) for v in (excess, residual.abs(), size))
        if dense:
            off = off.amax(2, keepdim=True)
        finite = (excess.isfinite() & off.isfinite() & size.isfinite()).all(1)
        near = (excess <= 0).all(1) & finite
        off = off.amax(1).masked_fill(~finite, float("nan"))
        report = Report(
            torch.where(active, near, report.converged),
            torch.where(active, number_of_pass, report.passes),
            torch.where(active, off, report.mismatch),
        )
        h = torch.where(active[number][:, :, None], moved, h)
        active = active & finite & ~near
        if not active.any():
            break
    return h, report
