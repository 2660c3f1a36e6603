"""Exact real-time recurrent learning: learning from a stream while it goes by, without truncation.

:func:`recurra.rtrl_update` and :func:`recurra.rtrl_gradient` are the mathematics;
:class:`OnlineLearner` feeds a stream to a :class:`Layer`, or to a stack of them, and learns.
"""

from __future__ import annotations

import torch

from recurra._check import fail
from recurra.ops.rtrl import Gradients, Sensitivities, recurrence, recurrences
from recurra.rtrl.layer import Layer
from recurra.rtrl.learner import Fed, OnlineLearner

__all__ = [
    "Fed",
    "Gradients",
    "Layer",
    "OnlineLearner",
    "Sensitivities",
    "initial",
    "recurrences",
]


def initial(
    cell: str,
    batch: int,
    inputs: int,
    channels: int,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Sensitivities:
    """Sensitivities of states that do not depend on the parameters: zeros.

    Args:
        cell: one of :func:`recurrences`.
        batch: samples, B.
        inputs: of the layer, D.
        channels: of the recurrence, N.
        dtype: float32 or float64; torch's default when None.
        device: where.

    Raises:
        RuntimeError: ``cell`` is unknown, or a size is negative.
    """
    info = recurrence(cell, "initial")
    for name, size in (("batch", batch), ("inputs", inputs), ("channels", channels)):
        if size < 0:
            fail("initial", f"{name} must be at least 0, got {size}")
    K, G, P = len(info.states), len(info.inputs), len(info.params)
    shapes = (
        (batch, K, G, channels, inputs),
        (batch, K, G, channels),
        (batch, K, P, channels),
    )
    return Sensitivities(*(torch.zeros(shape, dtype=dtype, device=device) for shape in shapes))
