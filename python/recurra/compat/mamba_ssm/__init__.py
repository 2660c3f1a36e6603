"""Stands in for the package mamba_ssm."""

from recurra.compat._common import absent
from recurra.compat.mamba_ssm.modules.mamba_simple import Mamba
from recurra.compat.mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, selective_scan_fn

__version__ = "2.3.2"  # of the interface
__all__ = ["Mamba", "mamba_inner_fn", "selective_scan_fn"]
__getattr__ = absent("mamba_ssm")
