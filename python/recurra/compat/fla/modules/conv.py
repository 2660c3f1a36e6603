"""Stands in for fla.modules.conv."""

from recurra.compat._common import absent
from recurra.compat.fla.modules.convolution import causal_conv1d

__all__ = ["causal_conv1d"]
__getattr__ = absent("fla")
