"""Stands in for fla.ops.hgrn.fused_recurrent."""

from recurra.compat._common import absent
from recurra.compat.fla.ops.hgrn import fused_recurrent_hgrn

__all__ = ["fused_recurrent_hgrn"]
__getattr__ = absent("fla")
