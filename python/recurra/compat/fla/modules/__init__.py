"""Stands in for fla.modules."""

from recurra.compat._common import absent

__getattr__ = absent("fla")
