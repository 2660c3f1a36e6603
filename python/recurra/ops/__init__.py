"""The public functions over `torch.ops.recurra`, and what torch needs to know of each op."""

from recurra.ops.block_scan import block_scan, block_scan_step
from recurra.ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from recurra.ops.linear_scan import linear_scan, linear_scan_step
from recurra.ops.linear_step import linear_step as linear_step  # for the modules, not public
from recurra.ops.rms_norm import rms_norm as rms_norm  # for the modules, not public
from recurra.ops.rnn import cells, rnn, rnn_step
from recurra.ops.rtrl import rtrl_gradient as rtrl_gradient  # made of several ops: not one itself
from recurra.ops.rtrl import rtrl_update as rtrl_update
from recurra.ops.selective_scan import selective_scan, selective_scan_step
from recurra.ops.softmax_scan import softmax_scan, softmax_scan_step

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
    "selective_scan",
    "selective_scan_step",
    "softmax_scan",
    "softmax_scan_step",
]
