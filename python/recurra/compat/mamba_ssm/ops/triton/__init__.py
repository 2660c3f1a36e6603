"""Stands in for mamba_ssm.ops.triton."""

from recurra.compat._common import absent

__getattr__ = absent("mamba_ssm")
