"""Where inputs stand in their sequences, and what came before them."""

from __future__ import annotations

import torch
from torch import Tensor


def positions(seen: Tensor, length: int, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where each input stands in its sequence, and how many each sequence then has.

    Args:
        seen: how many came before, (B,), or (S,) with ``cu_seqlens``; int64.
        length: T, of these inputs.
        cu_seqlens: (S + 1,), the ends of S sequences packed along T.

    Returns:
        (B, T) or (1, T), and (B,) or (S,).
    """
    here = torch.arange(length, device=seen.device)
    if cu_seqlens is None:
        return seen[:, None] + here, seen + length
    lengths = cu_seqlens.diff().long()
    before = torch.repeat_interleave(seen - cu_seqlens[:-1], lengths, output_size=length)
    return (before + here)[None], seen + lengths


def earlier(
    x: Tensor, past: Tensor, cu_seqlens: Tensor | None = None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The K inputs before each input of its sequence.

    Args:
        x: (B, T, D).
        past: the K inputs before them, oldest first, (B, K, D), or (S, K, D) with ``cu_seqlens``.
        cu_seqlens: (S + 1,), the ends of S sequences packed along T.

    Returns:
        The inputs K, ..., 1 steps before each, (B, T, D) each, and the last K of each sequence, of
        the shape and dtype of ``past``.
    """
    K, T = past.shape[1], x.shape[1]
    if cu_seqlens is None:
        whole = torch.cat([past.to(x.dtype), x], 1)
        # Copied: a view would keep the whole.
        last = whole[:, T:].to(past.dtype, copy=True)
        return tuple(whole[:, n : n + T] for n in range(K)), last
    S, ends = past.shape[0], cu_seqlens.long()
    rows = torch.cat([past.to(x.dtype).flatten(0, 1), x[0]])

    def row(sequence: Tensor, n: Tensor) -> Tensor:
        """Of input ``n`` of a sequence, where those before its first are below 0."""
        return n + torch.where(n < 0, (sequence + 1) * K, S * K + ends[sequence])

    sequences = torch.arange(S, device=x.device)
    own = torch.repeat_interleave(sequences, ends.diff(), output_size=T)
    here = torch.arange(T, device=x.device) - ends[own]
    before = tuple(rows[row(own, here - n)][None] for n in range(K, 0, -1))
    steps = torch.arange(-K, 0, device=x.device)
    last = rows[row(sequences[:, None], ends.diff()[:, None] + steps)]
    return before, last.to(past.dtype)
