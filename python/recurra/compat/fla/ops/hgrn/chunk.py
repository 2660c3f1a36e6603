"""Stands in for fla.ops.hgrn.chunk."""

from recurra.compat._common import absent
from recurra.compat.fla.ops.hgrn import chunk_hgrn

__all__ = ["chunk_hgrn"]
__getattr__ = absent("fla")
