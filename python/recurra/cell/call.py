"""One call of rnn with a Python cell: all states, and the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_unflatten

from recurra._check import empty_ordered, fail, memory_order, state_dtype
from recurra.cell.solve import Report, Rows, Sequences, cut, newton, sequential, solve
from recurra.ops.rnn import CellInfo


def rows_of(step, structure: str, leaves: Sequence[Tensor], spec: TreeSpec, dtype) -> Rows:
    """The step with its parameters, in the dtype of arithmetic and along rows."""
    leaves = [p.to(dtype) if p.is_floating_point() else p for p in leaves]
    params = tree_unflatten(leaves, spec)
    return Rows(step, structure, params if structure == "dense" else params[:, None])


def no_autocast(x: Tensor):
    """A step computes in the dtype that it is given."""
    return torch.autocast(x.device.type, enabled=False)


@dataclass
class Call:
    """What is not a tensor of a call, or has no gradient.

    Attributes:
        step, structure, info: of the cell.
        spec: how to make the parameters of their tensors.
        sequences: of the rows.
        window: steps that Newton's method takes at once; None for the loop.
        most: passes of it.
        algorithm, on_fail, all_states: as they were asked for.
        warning: what is to be said afterwards, or nothing.
    """

    step: object
    structure: str
    info: CellInfo
    spec: TreeSpec
    sequences: Sequences
    window: int | None
    most: int
    algorithm: str
    on_fail: str
    all_states: bool
    warning: str = ""

    def _compute(
        self, x: Tensor, h0: Tensor | None, leaves: Sequence[Tensor]
    ) -> tuple[Rows, Tensor, Tensor]:
        """The step, x and h0, which are zeros for None, in the dtype of arithmetic."""
        dtype = state_dtype(x.dtype)
        if h0 is None:
            shape = (len(self.sequences.rows), len(self.info.states), x.shape[3])
            h0 = x.new_zeros(shape, dtype=dtype)
        return rows_of(self.step, self.structure, leaves, self.spec, dtype), x.to(dtype), h0

    def forward(self, x: Tensor, h0: Tensor | None, leaves: Sequence[Tensor]):
        """y, h_last, passes and mismatch as rnn returns them, and all states, (R, K, N)."""
        like = x
        rows, x, h0 = self._compute(x, h0, leaves)
        (B, T, _, N), K = x.shape, len(self.info.states)
        passes = torch.zeros((), dtype=torch.int32, device=x.device)
        mismatch = h0.new_zeros(())
        states = h0.new_zeros(B * T, K, N)
        if states.numel() and self.window is None:
            numbers = range(len(self.sequences.rows))
            at, values = self._walk(rows, x, h0, numbers, 0, T, states)
            states[at] = values
        elif states.numel():
            passes, mismatch = self._newton(rows, x, h0, states)
        h_last = h0.clone()
        h_last[self.sequences.filled] = states[self.sequences.last]
        order, shape = memory_order(like), (B, T, K, N)
        if not self.all_states:
            order, shape = [min(n, 2) for n in order if n != 2], (B, T, N)
        y = empty_ordered(like, shape, order)
        y.copy_(self._output(states).view(shape))
        return y, h_last, passes, mismatch, states

    def _output(self, states: Tensor) -> Tensor:
        return states if self.all_states else states[:, self.info.states.index(self.info.output)]

    def _walk(self, rows, x, h0, numbers, t, until, states) -> tuple[Tensor, Tensor]:
        """Of the sequences ``numbers`` the states from step ``t`` up to ``until``, by the loop.

        Args:
            states: (R, K, N), of which those before ``t`` are read.

        Returns:
            The numbers of rows, and their states.
        """
        pieces, before = [], []
        for s in numbers:
            first, length = self.sequences.rows[s]
            # Packed sequences share the steps from 0 to T; otherwise each has its own.
            base = 0 if self.sequences.packed else first
            begin, end = max(first, base + t), min(first + length, base + until)
            if begin < end:
                pieces.append((begin, end - begin))
                before.append(h0[s] if begin == first else states[begin - 1])
        reset = self.sequences.reset
        reset = None if reset is None else reset.flatten()
        return sequential(rows, x.flatten(0, 1), reset, pieces, torch.stack(before))

    def _newton(self, rows: Rows, x: Tensor, h0: Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Window after window, each from the states that the one before ended with.

        Writes the states into ``flat``, (R, K, N); returns passes and mismatch.
        """
        T, reports = x.shape[1], []
        states = flat.view(*x.shape[:2], *flat.shape[1:])
        before = states[:, :1]
        for t in range(0, T, self.window):
            steps = slice(t, min(t + self.window, T))
            h, report = newton(rows, self.sequences, x[:, steps], h0, before, t, self.most)
            states[:, steps] = h
            reports.append(report)
            failed = ~report.converged
            if failed.any():
                if self.on_fail == "raise":
                    fail("rnn", self._failures(reports))
                numbers = failed.any(1).nonzero()[:, 0].tolist()
                at, values = self._walk(rows, x, h0, numbers, t, steps.stop, flat)
                replaced = failed[self.sequences.number.flatten()[at]][:, None]
                flat[at] = torch.where(replaced, values, flat[at])
            before = states[:, steps.stop - 1 : steps.stop]
        if self.on_fail == "warn" and not all(r.converged.all() for r in reports):
            self.warning = f"rnn: {self._failures(reports)}; they were computed sequentially"
        passes = torch.stack([r.passes.amax() for r in reports]).amax()
        return passes, torch.stack([r.mismatch.amax() for r in reports]).amax()

    def _failures(self, reports: list[Report]) -> str:
        converged = torch.stack([r.converged for r in reports]).all(0)
        passes = max(int(r.passes.max()) for r in reports)
        mismatch = torch.stack([r.mismatch.amax() for r in reports]).amax()
        what = "sequences" if self.structure == "dense" else "sequences by channels"
        return (
            f"{self.algorithm} did not converge for {int((~converged).sum())} of "
            f"{converged.numel()} {what} in {passes} passes, the largest mismatch is "
            f"{float(mismatch):g}"
        )

    def backward(self, dy, dh_last, x, h0, states, leaves, needed):
        """The gradients of x, h0 and the leaves in the dtype of each; None where not needed.

        With J_t the Jacobian of the step t, mu_t = g_t + J_{t+1}^T mu_{t+1} is one scan; the rest
        is the vector-Jacobian product of the step with mu, at all rows together.
        """
        with_h0, dtype = h0 is not None, x.dtype
        rows, x, h0 = self._compute(x, h0, leaves)
        first, last, filled = (getattr(self.sequences, k) for k in ("first", "last", "filled"))
        g = torch.zeros_like(states)
        if dy is not None:
            output = self._output(g)
            output.copy_(dy.reshape(output.shape))
        dh0 = torch.zeros_like(h0)
        if dh_last is not None:
            g[last] += dh_last[filled]
            dh0.copy_(dh_last)  # h_last of a sequence without steps is h0
        h = states.view(*x.shape[:2], *states.shape[1:])
        prev = self.sequences.previous(h, h[:, :1], h0, 0).flatten(0, 1)
        inputs, starts = x.flatten(0, 1), self.sequences.starts.flatten()
        mu = g
        if states.numel():
            jacobian = cut(rows.linearised(inputs, prev)[1], starts)
            mu = solve(self.structure, jacobian, g.view_as(h), reverse=True).flatten(0, 1)
        wanted = [v.detach() for v in (inputs, prev, *leaves)]
        asked = [v.requires_grad_() for v, n in zip(wanted, needed, strict=True) if n]
        gradients = [torch.zeros_like(v) for v in asked]
        if states.numel():
            with torch.enable_grad():
                again = rows_of(self.step, self.structure, wanted[2:], self.spec, x.dtype)
                new = again(*wanted[:2])
            if new.requires_grad:
                gradients = torch.autograd.grad(
                    new, asked, mu, allow_unused=True, materialize_grads=True
                )
        gradients = iter(gradients)
        dx, dprev, *dleaves = (next(gradients) if n else None for n in needed)
        if dx is not None:
            dx = dx.view(x.shape).to(dtype)
        if not (with_h0 and needed[1]):
            return dx, None, *dleaves
        if self.sequences.reset is not None:
            dprev = dprev.masked_fill(self.sequences.reset.flatten()[:, None, None], 0)
        dh0[filled] = dprev[first]
        return dx, dh0, *dleaves


class Rnn(torch.autograd.Function):
    """``Rnn.apply(call, x, h0, *leaves) -> (y, h_last, passes, mismatch)``."""

    @staticmethod
    def forward(ctx, call: Call, x: Tensor, h0: Tensor | None, *leaves: Tensor):
        with no_autocast(x):
            *results, states = call.forward(x, h0, leaves)
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*results[2:])
        ctx.save_for_backward(x, h0, states, *leaves)
        return tuple(results)

    @staticmethod
    def backward(ctx, dy, dh_last, *_):
        needed = ctx.needs_input_grad[1:]
        return None, *RnnBackward.apply(ctx.call, needed, dy, dh_last, *ctx.saved_tensors)


class RnnBackward(torch.autograd.Function):
    """So that a second derivative raises by name."""

    @staticmethod
    def forward(ctx, call: Call, needed, dy, dh_last, x, h0, states, *leaves):
        with no_autocast(x):
            return call.backward(dy, dh_last, x, h0, states, leaves, needed)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("recurra: second derivative of rnn is not implemented")
