"""Finds out, by trying it, whether a step is what its declaration says."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.func import jvp
from torch.utils._pytree import tree_leaves, tree_map

from recurra._check import dtype_name
from recurra.cell.solve import Rows

STRUCTURES = ("diagonal", "block", "dense")  # from the narrowest on: each holds those before it

# A dense Jacobian is one block, and block_scan takes no larger ones.
MOST_DENSE = 16

_ROWS = 3

# Relative differences above these are none of rounding.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}


def returned(name: str, step: Callable, x: Tensor, h: Tensor, params: object) -> None:
    """Refuses what a step returns for one row where it is no new state, or holds a gradient.

    Args:
        name: of the cell.
        step: the user's function.
        x: (G, 1, N), or (G, N) for a dense cell.
        h: (K, 1, N) or (K, N), of the same dtype.
        params: what the step is given as ``p``, none of which requires a gradient.

    Raises:
        ValueError: in one sentence.
    """
    with torch.enable_grad():
        new = step(x, h, params)
    letters = "(K, N)" if h.dim() == 2 else "(K, rows, N)"
    wanted = f"a {dtype_name(h.dtype)} tensor of shape {letters} = {tuple(h.shape)}"
    if not isinstance(new, Tensor):
        raise ValueError(f"cell {name}: step must return {wanted}, got {type(new).__name__}")
    if new.shape != h.shape or new.dtype != h.dtype:
        got = f"{dtype_name(new.dtype)} of shape {tuple(new.shape)}"
        raise ValueError(f"cell {name}: step must return {wanted}, got {got}")
    if new.requires_grad:
        raise ValueError(
            f"cell {name}: step must take every tensor that requires a gradient from its arguments "
            "x, h and p, got a new state that requires one of another tensor"
        )


def structure(name: str, rows: Rows, x: Tensor, h: Tensor | None, h_like: Tensor) -> str:
    """The narrowest structure that the Jacobian has at all points that were tried.

    The generator is one of its own, so that the same is found every time and the global one stays
    where it is.

    Args:
        name: of the cell.
        rows: the step, with the parameters that it was given.
        x: (R, G, N), inputs that it was given, of which the first rows are tried too.
        h: (S, K, N), states that it was given, or None.
        h_like: (K, N), any state.

    Raises:
        ValueError: the step mixes rows, changes its arguments, gives another result when it is
            called again, or has a wider structure than is declared.
    """
    found = 0
    for at in _points(rows, x, h, h_like):
        found = max(found, STRUCTURES.index(_structure_at(name, *at)))
    right = STRUCTURES[found]
    if found > STRUCTURES.index(rows.structure):
        mixed = "the states of a channel" if right == "block" else "channels"
        also = f", of at most K·N = {MOST_DENSE}" if right == "dense" else ""
        raise ValueError(
            f'cell {name}: step mixes {mixed}, which the structure "{rows.structure}" that is '
            f'declared leaves out; the structure must be "{right}"{also}'
        )
    return right


def _points(
    rows: Rows, x: Tensor, h: Tensor | None, h_like: Tensor
) -> Iterator[tuple[Rows, Tensor, Tensor, torch.Generator]]:
    """Steps and arguments: near those that were given, and random ones."""
    own = torch.Generator().manual_seed(0)
    (K, N), G = h_like.shape, x.shape[1]
    dtype = _precise(rows, h_like.new_zeros(1, G, N), h_like[None])

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=own, dtype=torch.float64).to(x.device, dtype)

    def near(p: Tensor) -> Tensor:
        return p + 0.5 * normal(*p.shape) if p.is_floating_point() else p

    def cast(p: Tensor) -> Tensor:
        return p.to(dtype) if p.is_floating_point() else p

    given = tree_map(cast, rows.params)
    for number in range(4):
        params = tree_map(near, given) if number in (1, 2) else given
        some_x, some_h = normal(_ROWS, G, N), normal(_ROWS, K, N)
        if number == 3:
            for some, values in ((some_x, x), (some_h, h)):
                if values is not None:
                    some[: len(values)] = values[:_ROWS]
        yield Rows(rows.step, rows.structure, params), some_x, some_h, own


def _precise(rows: Rows, x: Tensor, h: Tensor) -> torch.dtype:
    """float64 where the step computes in it, so that weak mixing is told from rounding."""
    wide = Rows(rows.step, rows.structure, tree_map(_double, rows.params))
    with contextlib.suppress(RuntimeError):
        if wide(x.double(), h.double()).dtype == torch.float64:
            return torch.float64
    return h.dtype


def _double(p: Tensor) -> Tensor:
    return p.double() if p.is_floating_point() else p


def _structure_at(name: str, rows: Rows, x: Tensor, h: Tensor, own: torch.Generator) -> str:
    arguments = [x, h, *tree_leaves(rows.params)]
    kept = [a.clone() for a in arguments]
    new = rows(x, h)
    if not all(_same(a, b) for a, b in zip(kept, arguments, strict=True)):
        raise ValueError(f"cell {name}: step must leave its arguments as they are")
    tolerance = _TOLERANCE[h.dtype]
    if not _same(rows(x, h), new):
        raise ValueError(f"cell {name}: step must return the same for the same arguments")
    if rows.structure == "dense":
        return _pattern(rows.linearised(x, h)[1], *h.shape[1:], tolerance)
    apart = torch.cat([rows(x[r : r + 1], h[r : r + 1]) for r in range(len(h))])
    if not _close(apart, new, new.abs(), tolerance):
        raise ValueError(
            f"cell {name}: step mixes rows, which are the steps of all sequences and must be "
            "computed each by itself"
        )
    v = torch.randn(h.shape, generator=own, dtype=torch.float64).to(h)

    def along(tangent: Tensor) -> Tensor:
        return jvp(lambda h: rows(x, h), (h,), (tangent,))[1]

    exact = along(v)
    # What the Jacobian of each structure makes of v, if the step has that structure.
    diagonal = Rows(rows.step, "diagonal", rows.params).linearised(x, h)[1] * v
    if _close(exact, diagonal, exact.abs() + diagonal.abs(), tolerance):
        return "diagonal"
    blocks = Rows(rows.step, "block", rows.params).linearised(x, h)[1].permute(0, 2, 3, 1)
    terms = blocks * v[:, None]
    if _close(exact, terms.sum(2), exact.abs() + terms.abs().sum(2), tolerance):
        return "block"
    return "dense"


def _pattern(jacobian: Tensor, K: int, N: int, tolerance: float) -> str:
    """The narrowest structure of full Jacobians, (R, 1, K·N, K·N)."""
    J = jacobian.view(-1, K, N, K, N).abs().nan_to_num(0, 0, 0)
    least = tolerance * J.amax()
    same_channel = torch.eye(N, dtype=torch.bool, device=J.device)[:, None]
    same_state = torch.eye(K, dtype=torch.bool, device=J.device)[:, None, :, None]
    if (J.masked_fill(same_channel, 0) > least).any():
        return "dense"
    return "block" if (J.masked_fill(same_state, 0) > least).any() else "diagonal"


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num())


def _close(a: Tensor, b: Tensor, size: Tensor, tolerance: float) -> bool:
    """Whether two tensors differ by roundings of terms of that size, where both are finite."""
    finite = size.isfinite() & a.isfinite() & b.isfinite()
    a, b, size = (t.masked_fill(~finite, 0) for t in (a, b, size))
    if not finite.any():
        return True
    return bool(((a - b).abs() <= tolerance * (size + 1e-2 * size.amax())).all())
