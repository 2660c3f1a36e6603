"""Stands in for mamba_ssm.ops.triton.layernorm, an earlier name of layer_norm."""

from recurra.compat._common import absent
from recurra.compat.mamba_ssm.ops.triton.layer_norm import (
    RMSNorm,
    layer_norm_fn,
    layer_norm_ref,
    rms_norm_fn,
    rms_norm_ref,
)

__all__ = ["RMSNorm", "layer_norm_fn", "layer_norm_ref", "rms_norm_fn", "rms_norm_ref"]
__getattr__ = absent("mamba_ssm")
