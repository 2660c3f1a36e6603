"""The norm in front of every mixer."""

from __future__ import annotations

from torch import Tensor, nn

from recurra.ops.rms_norm import rms_norm


class RMSNorm(nn.RMSNorm):
    """Root mean square norm over the last dimension, in one pass over memory each way on the CPU.

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
