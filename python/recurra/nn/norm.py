"""The norms in front of mixers."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from recurra.ops.rms_norm import rms_norm


class RMSNorm(nn.RMSNorm):
    """Root mean square norm over the last dimension, in one pass over memory each way where
    the kernels run.

    Zhang and Sennrich, "Root mean square layer normalization" (2019). Parameters are those of
    :class:`torch.nn.RMSNorm`.

    Args:
        width: of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Norms (B, T, width) or (B, width), in the dtype of ``x``."""
        weight = self.weight
        # Beside a 16-bit weight a wider residual stream stays as it is.
        return rms_norm(x, weight if weight.dtype == x.dtype else weight.to(x.dtype), self.eps)


class GemmaNorm(RMSNorm):
    """The same with 1 added to the weight, which begins at 0, as in Gemma and RecurrentGemma."""

    def reset_parameters(self) -> None:
        """Zeros."""
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Norms (B, T, width) or (B, width), in the dtype of ``x``."""
        # 1 + weight would lose most bits of a 16-bit weight.
        weight = (self.weight.float() if x.dtype.itemsize < 8 else self.weight) + 1
        return rms_norm(x, weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """That of torch, where a wider residual stream stays as it is beside 16-bit parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """Norms (..., width), in the dtype of ``x``."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


# By what a configuration calls them; each is made of a width and what is added to the mean square.
NORMS: dict[str, Callable[..., nn.Module]] = {
    "rms": RMSNorm,
    "gemma": GemmaNorm,
    "layer": LayerNorm,
}
