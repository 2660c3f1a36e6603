"""Mixers: what a block of a language model does along time.

A mixer is a module with ``forward(x, state=None, *, cu_seqlens=None) -> (y, state)`` and
``step(x, state) -> y``. Whole sequences, sequences in chunks with the state carried, and single
steps give the same results.
"""

from recurra.nn.mamba import Mamba, MambaConfig, MambaState
from recurra.nn.norm import RMSNorm

__all__ = ["Mamba", "MambaConfig", "MambaState", "RMSNorm"]
