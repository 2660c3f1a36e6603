"""One step of every cell, in plain torch.

``cell(x, h, p) -> h``: inputs x (G, ...), states h (S, ...) and parameters p (P, ...), one row a
name; everything is pointwise in the other dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def paragru(x: Tensor, h: Tensor, p: Tensor) -> Tensor:
    """ParaGRU (arXiv 2510.21450): inputs update, reset, candidate."""
    x_z, x_r, x_n = x
    a_z, a_r, a_n = p
    (s,) = h
    z = torch.sigmoid(a_z * s + x_z)
    r = torch.sigmoid(a_r * s + x_r)
    n = torch.tanh(a_n * (r * s) + x_n)
    return (z * n + (1 - z) * s)[None]


def tanh(x: Tensor, h: Tensor, p: Tensor) -> Tensor:
    """The diagonal Elman cell."""
    return torch.tanh(p * h + x)
