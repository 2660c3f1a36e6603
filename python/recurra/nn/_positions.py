"""Positions of inputs in their sequences, for mixers whose state counts what it has seen."""

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
