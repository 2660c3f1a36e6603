"""Exact real-time recurrent learning: learning from a stream while it goes by, without truncation.

:func:`recurra.rtrl_update` and :func:`recurra.rtrl_gradient` are the mathematics;
:class:`OnlineLearner` feeds a stream to a :class:`Layer`, or to a stack of them, and learns.
"""

from __future__ import annotations

from recurra.ops.rtrl import Gradients, Sensitivities, initial, recurrences
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
