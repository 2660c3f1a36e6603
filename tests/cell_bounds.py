"""The bound of ``rnn``: how far the kernel may be from the exact recurrence of any cell.

A cell is pointwise, so that the exact states give its first and second derivatives at all steps at
once, by autograd through the oracle. Errors then go along the recurrence: those of a state by the
Jacobian, those of the Jacobian by the second derivatives along the states, which alone are not
exact, and every step and every derivative adds its own roundings: `ulps` of the table, in units of
the largest number in play, once more for each factor that a derivative brings.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bounds import Rounded, double, unit, walks
from recurra import cells, reference


def _step_along(step, x: Tensor, h: Tensor, p: Tensor):
    """New states (S, ...), derivatives (S, K, ...) and second ones (S, K, S, ...) at every point;
    K counts inputs, states and parameters."""
    rows = [r.detach().clone().requires_grad_() for a in (x, h, p) for r in a]
    G, S = x.shape[0], h.shape[0]
    split = (rows[:G], rows[G : G + S], rows[G + S :])
    new = step(*(torch.stack(part) for part in split))

    def along(y: Tensor, wanted) -> Tensor:
        found = torch.autograd.grad(
            y.sum(), wanted, create_graph=True, allow_unused=True, materialize_grads=True
        )
        return torch.stack(found)

    first = torch.stack([along(state, rows) for state in new])
    second = torch.stack(
        [
            torch.stack(
                [
                    along(d, split[1]).detach() if d.requires_grad else torch.zeros_like(h)
                    for d in derivatives
                ]
            )
            for derivatives in first
        ]
    )
    return new.detach(), first.detach(), second


def rnn(
    dtype,
    cotangents,
    x,
    params,
    h0=None,
    *,
    cell,
    ulps,
    algorithm="auto",
    return_states=False,
    reset=None,
    cu_seqlens=None,
):
    """Values and bounds of y and h_last, and of the gradients of x, params and h0."""
    u = unit(dtype)
    info, step = cells()[cell], getattr(reference.cells, cell)
    B, T, G, N = x.shape
    S, P = len(info.states), len(info.params)
    sequences = B if cu_seqlens is None else len(cu_seqlens) - 1
    inputs, p = double(x), double(params)
    first = inputs.new_zeros(sequences, S, N) if h0 is None else double(h0)
    dy, dh_last = (double(c) for c in cotangents)
    out, dx = Rounded(u, inputs.new_zeros(B, T, S, N)), Rounded(u, torch.zeros_like(inputs))
    last, dh0 = Rounded(u, first.clone()), Rounded(u, dh_last.clone())
    totals = []
    for rows, n, steps in walks(B, T, cu_seqlens):
        if not steps:
            continue
        keep = None if reset is None else (~reset[rows][:, steps]).double()
        # (S, b, N) states before and after every step, and the bound of both.
        h, before = first[n].transpose(0, 1), []
        for t in range(len(steps)):
            h = h if keep is None else h * keep[:, t, None]
            before.append(h)
            h = step(inputs[rows, steps[t]].transpose(0, 1), h, p[:, None])
        h_before = torch.stack(before, 1)
        points = (
            inputs[rows][:, steps].permute(2, 1, 0, 3),
            h_before,
            p[:, None, None].expand(-1, *h_before.shape[1:]),
        )
        new, J, H = _step_along(step, *points)
        largest = 1 + torch.cat([*points, points[2][:1] * 0]).abs().amax(0)
        unit_step = ulps * u.u * largest
        J_state = J[:, G : G + S].abs()
        e, e_before, e_new = torch.zeros_like(h_before[:, 0]), [], []
        for t in range(len(steps)):
            e = e if keep is None else e * keep[:, t, None]
            e_before.append(e)
            e = (J_state[:, :, t] * e).sum(1) + unit_step[t]
            e_new.append(e)
        e_before, e_new = torch.stack(e_before, 1), torch.stack(e_new, 1)
        value, error = new.permute(2, 1, 0, 3), e_new.permute(2, 1, 0, 3)
        out.value[rows, steps], out.error[rows, steps] = value, error
        last.value[n], last.error[n] = value[:, -1], error[:, -1]

        E = (H.abs() * e_before).sum(2) + unit_step * largest
        mu, e_mu = dh_last[n].transpose(0, 1).clone(), torch.zeros_like(h_before[:, 0])
        g, e_g = [], []
        for t in reversed(range(len(steps))):
            cotangent = dy[rows, steps[t]]
            if return_states:
                mu = mu + cotangent.transpose(0, 1)
            else:
                mu = mu.clone()
                mu[info.states.index(info.output)] += cotangent
            e_mu = e_mu + u.u * mu.abs()
            d = (mu[:, None] * J[:, :, t]).sum(0)
            size = mu.abs()[:, None] * J[:, :, t].abs()
            e_d = (e_mu[:, None] * J[:, :, t].abs() + mu.abs()[:, None] * E[:, :, t]).sum(0)
            e_d = e_d + (S + 2) * u.u * size.sum(0) + u.tiny
            g.append(d)
            e_g.append(e_d)
            mu, e_mu = d[G : G + S], e_d[G : G + S]
            if keep is not None:
                mu, e_mu = mu * keep[:, t, None], e_mu * keep[:, t, None]
        g, e_g = torch.stack(g[::-1], 1), torch.stack(e_g[::-1], 1)
        dx.value[rows, steps] = g[:G].permute(2, 1, 0, 3)
        dx.error[rows, steps] = e_g[:G].permute(2, 1, 0, 3)
        dh0.value[n], dh0.error[n] = mu.transpose(0, 1), e_mu.transpose(0, 1)
        # A parameter's gradient may be its input's times a state, which is not exact either.
        extra = torch.zeros_like(g[G + S :])
        for name, (of, state) in info.affine.items():
            i = info.inputs.index(of)
            if state is not None:
                s = info.states.index(state)
                extra[info.params.index(name)] = (
                    e_g[i] * h_before[s].abs() + (g[i].abs() + e_g[i]) * e_before[s]
                )
        totals.append(Rounded(u, g[G + S :], e_g[G + S :] + extra).map(lambda v: v.flatten(1, 2)))
    if totals:
        joined = Rounded(
            u, *(torch.cat([getattr(r, f) for r in totals], 1) for f in ("value", "error"))
        )
        dparams = joined.sum_to((P, 1, N))[:, 0]
    else:
        dparams = Rounded(u, torch.zeros_like(p))
    y = out if return_states else out[:, :, info.states.index(info.output)]
    return [y, last], {"x": dx, "params": dparams, "h0": dh0}
