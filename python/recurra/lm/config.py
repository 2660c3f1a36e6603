"""Configurations of language models, and the named ones."""

from __future__ import annotations

import dataclasses
import math
import os

from recurra._files import shown
from recurra.nn import MambaConfig, RNNConfig
from recurra.nn._config import check_fields


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """What makes a :class:`recurra.LM`.

    Attributes:
        vocab_size: tokens; 256 for bytes.
        d_model: width of the residual stream.
        n_layers: blocks.
        mixer: the mixer of every block.
        norm_eps: added to the mean square in the norms.
        tie_embeddings: whether the head is the transposed embedding.
        residual_in_fp32: whether the residual stream of a 16-bit model is float32.
        eos_token_ids: tokens that end a text.

    Raises:
        ValueError: a value is of the wrong type or out of range.
    """

    vocab_size: int = 256
    d_model: int = 256
    n_layers: int = 4
    mixer: MambaConfig | RNNConfig = MambaConfig()
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    residual_in_fp32: bool = True
    eos_token_ids: tuple = ()

    def __post_init__(self) -> None:
        check_fields(
            self,
            vocab_size=(1, 1 << 31),
            d_model=(1, 1 << 20),
            n_layers=(1, 4096),
            norm_eps=(0.0, 1.0),
        )
        for token in self.eos_token_ids:
            if type(token) is not int or not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"LMConfig: eos_token_ids must be from 0 to {self.vocab_size - 1}, "
                    f"got {shown(token)}"
                )

    def parameter_count(self) -> int:
        """Numbers in a model of this configuration, the tied head counted once."""
        block = self.d_model + self.mixer.parameter_count(self.d_model)
        ends = (1 if self.tie_embeddings else 2) * self.vocab_size * self.d_model + self.d_model
        return self.n_layers * block + ends

    def check_memory(self, bytes_per_parameter: int = 4) -> None:
        """Raises ValueError where the parameters alone exceed the memory of this machine."""
        needed = bytes_per_parameter * self.parameter_count()
        there = _machine_memory()
        if needed > there:
            raise ValueError(
                f"LMConfig: a model of these sizes has {needed / 2**30:.4g} GiB of parameters, "
                f"this machine has {there / 2**30:.4g} GiB of memory"
            )


def _machine_memory() -> float:
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):
        return math.inf


def _mamba(d_model: int, n_layers: int) -> LMConfig:
    # The published models round their vocabulary of 50,277 up to this.
    return LMConfig(vocab_size=50280, d_model=d_model, n_layers=n_layers)


def _rnn(cell: str) -> LMConfig:
    return LMConfig(mixer=RNNConfig(cell))


CONFIGS: dict[str, LMConfig] = {
    "tiny": LMConfig(),
    "small": LMConfig(d_model=512, n_layers=8),
    "mamba-130m": _mamba(768, 24),
    "mamba-370m": _mamba(1024, 48),
    "mamba-790m": _mamba(1536, 48),
    "mamba-1.4b": _mamba(2048, 48),
    "mamba-2.8b": _mamba(2560, 64),
    "paragru": _rnn("paragru"),
    "paralstm": _rnn("paralstm"),
    "elstm": _rnn("elstm"),
    "indrnn": _rnn("indrnn"),
    "sru": _rnn("sru"),
    "lem": _rnn("lem"),
    "slstm": _rnn("slstm"),
}
