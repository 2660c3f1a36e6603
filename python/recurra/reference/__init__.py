"""The ops in plain torch, readable as their equations: oracle of the tests and documentation.

Same arguments, shapes and results as the functions of :mod:`recurra`; slow on purpose, any dtype,
differentiable by torch itself.
"""

from recurra.reference import cells
from recurra.reference.block_scan import block_scan, block_scan_step
from recurra.reference.causal_conv1d import causal_conv1d, causal_conv1d_step
from recurra.reference.linear_scan import linear_scan, linear_scan_step
from recurra.reference.rnn import rnn, rnn_step
from recurra.reference.rtrl import rtrl_gradient, rtrl_update
from recurra.reference.selective_scan import selective_scan, selective_scan_step
from recurra.reference.softmax_scan import softmax_scan, softmax_scan_step

__all__ = [
    "block_scan",
    "block_scan_step",
    "causal_conv1d",
    "causal_conv1d_step",
    "cells",
    "linear_scan",
    "linear_scan_step",
    "rnn",
    "rnn_step",
    "rtrl_gradient",
    "rtrl_update",
    "selective_scan",
    "selective_scan_step",
    "softmax_scan",
    "softmax_scan_step",
]
