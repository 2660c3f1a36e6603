"""Stands in for mamba_ssm.modules."""

from recurra.compat._common import absent

__getattr__ = absent("mamba_ssm")
