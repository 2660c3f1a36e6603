"""Stands in for the package fla, flash-linear-attention: its HGRN scans and its convolution."""

from recurra.compat._common import absent

__version__ = "0.4.1"  # of the interface
__getattr__ = absent("fla")
