"""Stands in for fla.ops."""

from recurra.compat._common import absent
from recurra.compat.fla.ops.hgrn import chunk_hgrn, fused_recurrent_hgrn

__all__ = ["chunk_hgrn", "fused_recurrent_hgrn"]
__getattr__ = absent("fla")
