"""Stands in for mamba_ssm.utils.generation: what carries the states between calls."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from recurra.compat._common import absent

__getattr__ = absent("mamba_ssm")


@dataclass
class InferenceParams:
    """The states of all layers, by ``layer_idx``, and how far a generation is."""

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Back to the start, with the memory kept."""
        self.max_seqlen = max_seqlen
        self.max_batch_size = max_batch_size
        self.seqlen_offset = 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()
