"""Configurations of language models, and the named ones."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections import Counter
from typing import Any

import torch
from torch import nn

from recurra._files import shown
from recurra.nn import (
    FFNS,
    MIXERS,
    AarenConfig,
    AttentionConfig,
    GLUConfig,
    HGRNConfig,
    LRNNConfig,
    LRUConfig,
    LSSLConfig,
    MambaConfig,
    MixerConfig,
    QRNNConfig,
    RGLRUConfig,
    RNNConfig,
    RWKV4ChannelConfig,
    RWKV4Config,
    S4DConfig,
    S5Config,
    SCRNConfig,
)
from recurra.nn._config import check_fields
from recurra.nn.norm import NORMS


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """What makes a :class:`recurra.LM`.

    Attributes:
        vocab_size: tokens; 256 for bytes.
        d_model: width of the residual stream.
        n_layers: blocks.
        mixer: the mixer of every block, or a tuple of those that the pattern names.
        pattern: a letter for each block, begun anew where there are more blocks, such as "RRA";
            letters are those of ``recurra.nn.MIXERS``, and a mixer that ``mixer`` does not hold
            has its default configuration. Empty where all blocks have the same mixer. It names
            every mixer that is given; MambaConfig() by itself stands for none.
        ffn: what each block does after its mixer, a configuration of ``recurra.nn.FFNS``; None
            for nothing.
        norm: rms; gemma, whose weight is 1 more than the parameter; or layer.
        norm_eps: added to the mean square in the norms.
        final_norm_eps: that of the last norm; ``norm_eps`` when None.
        rescale_every: what the norms add grows fourfold after every so many blocks, so that
            logits are those of a residual stream that is halved there, as transformers does
            with RWKV-4's against overflow; 0 for never.
        embed_norm: whether the embedding is normed before the first block.
        embed_scale: factor of the embedding.
        logits_soft_cap: c of c tanh(logits / c); 0 for none.
        tie_embeddings: whether the head is the transposed embedding.
        residual_in_fp32: whether the residual stream of a 16-bit model is float32.
        eos_token_ids: tokens that end a text.

    Raises:
        ValueError: a value is of the wrong type or out of range.
    """

    vocab_size: int = 256
    d_model: int = 256
    n_layers: int = 4
    mixer: MixerConfig | tuple = MambaConfig()
    pattern: str = ""
    ffn: MixerConfig | None = None
    norm: str = "rms"
    norm_eps: float = 1e-5
    final_norm_eps: float | None = None
    rescale_every: int = 0
    embed_norm: bool = False
    embed_scale: float = 1.0
    logits_soft_cap: float = 0.0
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
            final_norm_eps=(0.0, 1.0),
            rescale_every=(0, 1 << 31),
            embed_scale=(0.0, 1e6),
            logits_soft_cap=(0.0, 1e6),
        )
        if self.rescale_every and self.n_layers // self.rescale_every > 60:
            raise ValueError(
                f"LMConfig: rescale_every must halve at most 60 times, got {self.rescale_every} "
                f"in {self.n_layers} layers"
            )
        if self.norm not in NORMS:
            raise ValueError(
                f"LMConfig: norm must be one of {', '.join(NORMS)}, got {self.norm:.100}"
            )
        if self.ffn is not None and type(self.ffn) not in FFNS:
            raise ValueError(
                f"LMConfig: ffn must be None or one of {', '.join(f.__name__ for f in FFNS)}, "
                f"got {shown(self.ffn)}"
            )
        self._check_mixers()
        for token in self.eos_token_ids:
            if type(token) is not int or not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"LMConfig: eos_token_ids must be from 0 to {self.vocab_size - 1}, "
                    f"got {shown(token)}"
                )

    @property
    def _given(self) -> tuple:
        return self.mixer if isinstance(self.mixer, tuple) else (self.mixer,)

    def _check_mixers(self) -> None:
        for mixer in self._given:
            if type(mixer) not in MIXERS:
                raise ValueError(
                    f"LMConfig: mixer must be one of {', '.join(m.__name__ for m in MIXERS)}, "
                    f"got {shown(mixer)}"
                )
        if not self.pattern:
            if isinstance(self.mixer, tuple):
                raise ValueError("LMConfig: several mixers need a pattern of their letters")
            return
        if len(self.pattern) > 4096:
            raise ValueError(
                f"LMConfig: pattern must have at most 4096 letters, got {len(self.pattern)}"
            )
        for letter in self.pattern:
            if letter not in _LETTERS:
                known = ", ".join(f"{k} ({m.kind})" for k, m in _LETTERS.items())
                raise ValueError(
                    f"LMConfig: pattern must be of the letters {known}, got {shown(letter)}"
                )
        if isinstance(self.mixer, tuple) and len({m.letter for m in self._given}) < len(
            self._given
        ):
            raise ValueError("LMConfig: mixer must not hold two of one letter")
        for mixer in () if self.mixer == MambaConfig() else self._given:
            if mixer.letter not in self.pattern:
                raise ValueError(
                    f"LMConfig: pattern must have the letter of every mixer, "
                    f"{mixer.letter} ({mixer.kind}), got {shown(self.pattern)}"
                )

    def mixers(self) -> list[MixerConfig]:
        """The mixer of each block."""
        if not self.pattern:
            return [self.mixer] * self.n_layers
        by_letter = {m.letter: m for m in self._given}
        made = {x: by_letter.get(x) or _LETTERS[x]() for x in set(self.pattern)}
        return [made[self.pattern[i % len(self.pattern)]] for i in range(self.n_layers)]

    def make_norm(self, layer: int = 0) -> nn.Module:
        """A norm of the residual stream in a block; the last norm where ``layer`` is n_layers."""
        last = layer == self.n_layers and self.final_norm_eps is not None
        eps = self.final_norm_eps if last else self.norm_eps
        halved = layer // self.rescale_every if self.rescale_every else 0
        return NORMS[self.norm](self.d_model, eps=eps * 4**halved)

    def make_shared(self) -> nn.ModuleDict:
        """What mixers of one kind have in common, by their kind."""
        counts = Counter(self.mixers()).items()
        made = {mixer.kind: mixer.shared(self.d_model, count) for mixer, count in counts}
        return nn.ModuleDict({kind: module for kind, module in made.items() if module is not None})

    def parameter_count(self) -> int:
        """Numbers in a model of this configuration, the tied head counted once."""
        norm = (2 if self.norm == "layer" else 1) * self.d_model
        total = (1 if self.tie_embeddings else 2) * self.vocab_size * self.d_model
        total += norm * (1 + self.embed_norm + self.n_layers * (1 + (self.ffn is not None)))
        if self.ffn is not None:
            total += self.n_layers * self.ffn.parameter_count(self.d_model)
        for mixer, count in Counter(self.mixers()).items():
            total += count * mixer.parameter_count(self.d_model)
        with torch.device("meta"):
            return total + sum(p.numel() for p in self.make_shared().parameters())

    def states(self, dtype: torch.dtype = torch.float32) -> list[Any]:
        """The state of one sequence, on the meta device, in a model of parameters of this dtype;
        the same objects in layers of the same mixer."""
        mixers = self.mixers()
        made = {mixer: mixer.state(self.d_model, dtype) for mixer in set(mixers)}
        ffn = None if self.ffn is None else self.ffn.state(self.d_model, dtype)
        parts = (part for mixer in mixers for part in (made[mixer], ffn))
        return [part for part in parts if part is not None]

    def state_bytes(self, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of the state of one sequence, in a model of parameters of this dtype."""
        return _state_bytes(self, dtype)

    def check_memory(self, bytes_per_parameter: int = 4) -> None:
        """Raises ValueError where the parameters alone, or the state of one sequence, exceed the
        memory of this machine."""
        needed = bytes_per_parameter * self.parameter_count()
        check_fits(
            needed, f"LMConfig: a model of these sizes has {needed / 2**30:.4g} GiB of parameters"
        )
        self.check_state_memory()

    def check_state_memory(self, batch: int = 1, dtype: torch.dtype = torch.float32) -> None:
        """Raises ValueError where the state of so many sequences exceeds the memory of this
        machine."""
        needed = batch * self.state_bytes(dtype)
        check_fits(
            needed, f"LMConfig: the state of a batch of {batch} has {needed / 2**30:.4g} GiB"
        )


_LETTERS = {mixer.letter: mixer for mixer in MIXERS}


@functools.lru_cache(32)
def _state_bytes(config: LMConfig, dtype: torch.dtype) -> int:
    return sum(x.nbytes for part in config.states(dtype) for x in part)


def check_fits(needed: int, sentence: str) -> None:
    """Raises ValueError, which begins with the sentence, where so many bytes exceed the memory of
    this machine."""
    there = _machine_memory()
    if needed > there:
        raise ValueError(f"{sentence}, this machine has {there / 2**30:.4g} GiB of memory")


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


def gemma_scale(d_model: int) -> float:
    """The ``embed_scale`` of RecurrentGemma: the root of the width, rounded to bfloat16."""
    return torch.tensor(d_model**0.5, dtype=torch.bfloat16).item()


def _griffin(pattern: str, d_model: int = 256, n_layers: int = 6) -> LMConfig:
    # Shaped as RecurrentGemma.
    mixers = RGLRUConfig(), AttentionConfig(window=256)
    return LMConfig(
        d_model=d_model,
        n_layers=n_layers,
        mixer=tuple(m for m in mixers if m.letter in pattern),
        pattern=pattern,
        ffn=GLUConfig(activation="gelu_tanh", bias=True),
        norm="gemma",
        norm_eps=1e-6,
        embed_scale=gemma_scale(d_model),
        logits_soft_cap=30.0,
        residual_in_fp32=False,
    )


def _rwkv4(**sizes: int) -> LMConfig:
    return LMConfig(
        mixer=RWKV4Config(),
        ffn=RWKV4ChannelConfig(),
        norm="layer",
        embed_norm=True,
        tie_embeddings=False,
        **sizes,
    )


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
    "griffin": _griffin("RRA"),
    "hawk": _griffin("R", n_layers=4),
    "rwkv4": _rwkv4(),
    "rwkv4-169m": _rwkv4(vocab_size=50277, d_model=768, n_layers=12),
    "lrnn": LMConfig(mixer=LRNNConfig()),
    "mingru": _rnn("mingru"),
    "minlstm": _rnn("minlstm"),
    "lru": LMConfig(mixer=LRUConfig()),
    "hgrn": LMConfig(mixer=HGRNConfig()),
    "qrnn": LMConfig(mixer=QRNNConfig()),
    "scrn": LMConfig(mixer=SCRNConfig()),
    "s4d": LMConfig(mixer=S4DConfig()),
    "s5": LMConfig(mixer=S5Config()),
    "lssl": LMConfig(mixer=LSSLConfig()),
    "aaren": LMConfig(mixer=AarenConfig(), ffn=GLUConfig()),
}
