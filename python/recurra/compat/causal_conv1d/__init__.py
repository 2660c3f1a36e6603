"""Stands in for the package causal_conv1d."""

from recurra.compat._common import absent
from recurra.compat.causal_conv1d.causal_conv1d_interface import (
    causal_conv1d_fn,
    causal_conv1d_update,
)

__version__ = "1.6.1"  # of the interface
__all__ = ["causal_conv1d_fn", "causal_conv1d_update"]
__getattr__ = absent("causal_conv1d")
