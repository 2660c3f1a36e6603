"""The language model: an embedding, blocks of norms, mixers and residuals, a head."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recurra.lm.config import CONFIGS, LMConfig
from recurra.nn import MixerConfig
from recurra.ops.linear_step import linear_step

# One entry for each mixer and each feed-forward layer that remembers something, in their order; a
# tuple of tensors by name.
LMState = list[Any]


def _remembers(part: nn.Module) -> bool:
    return getattr(part, "stateful", True)


class Block(nn.Module):
    """x + mixer(norm(x)), and the same with a feed-forward layer where there is one."""

    def __init__(self, config: LMConfig, mixer: MixerConfig, layer: int = 0):
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = config.make_norm(layer)
        self.mixer = mixer.make(config.d_model)
        if config.ffn is not None:
            self.ffn_norm = config.make_norm(layer)
            self.ffn = config.ffn.make(config.d_model)
        for _, part in self.parts():
            part.place = layer, config.n_layers  # RWKV begins otherwise in every layer

    def parts(self) -> list[tuple[nn.Module, nn.Module]]:
        """Each norm with what follows it."""
        first = (self.norm, self.mixer)
        return [first, (self.ffn_norm, self.ffn)] if hasattr(self, "ffn") else [first]

    def stateful(self) -> list[nn.Module]:
        """What remembers something."""
        return [part for _, part in self.parts() if _remembers(part)]

    def _residual(self, x: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
        normed = norm(x.to(norm.weight.dtype))
        return (x.float() if self.residual_in_fp32 and x.dtype.itemsize == 2 else x), normed

    def forward(
        self, x: Tensor, states: Iterator[Any], cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LMState]:
        after = []
        for norm, part in self.parts():
            x, normed = self._residual(x, norm)
            before = next(states) if _remembers(part) else None
            y, state = part(normed, before, cu_seqlens=cu_seqlens)
            x = x + y
            if _remembers(part):
                after.append(state)
        return x, after

    def step(self, x: Tensor, states: Iterator[Any], slots: Tensor | None) -> Tensor:
        for norm, part in self.parts():
            x, normed = self._residual(x, norm)
            state = next(states) if _remembers(part) else None
            given = () if state is None or slots is None else (slots,)
            x = x + part.step(normed, state, *given)
        return x


class LM(nn.Module):
    """A causal language model on recurrent mixers.

    Whole sequences, chunks with the state carried, and single steps give the same logits.

    Args:
        config: the configuration, or the name of one in ``recurra.lm.CONFIGS``.

    Raises:
        ValueError: the name is unknown, or the model does not fit this machine's memory.
    """

    def __init__(self, config: LMConfig | str = "tiny"):
        super().__init__()
        if isinstance(config, str):
            if config not in CONFIGS:
                raise ValueError(f"unknown configuration {config}; known are {', '.join(CONFIGS)}")
            config = CONFIGS[config]
        if torch.get_default_device().type == "cpu":
            config.check_memory(torch.get_default_dtype().itemsize)
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.d_model)
        if config.embed_norm:
            self.embed_norm = config.make_norm()
        mixers = config.mixers()
        self.layers = nn.ModuleList(Block(config, mixer, n) for n, mixer in enumerate(mixers))
        self.shared = config.make_shared()
        for kind, module in self.shared.items():
            same = [b.mixer for b, m in zip(self.layers, mixers, strict=True) if m.kind == kind]
            for index, mixer in enumerate(same):
                mixer.share(module, index)
        self.norm_f = config.make_norm(config.n_layers)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.reset_parameters()
        if config.tie_embeddings:
            self.lm_head.weight = self.embeddings.weight

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Embedding and head normal with deviation 0.02; projections back into the residual stream
        smaller by the root of their number, as in GPT-2; the rest as the mixers say."""
        if self.norm_f.weight.is_meta:  # takes its time even where there is nothing to fill
            return
        parts = [part for block in self.layers for part in block.parts()]
        for norm, part in parts:
            norm.reset_parameters()
            part.reset_parameters()
            part.out_proj.weight.div_(math.sqrt(len(parts)))
        for module in self.shared.values():
            module.reset_parameters()
        if self.config.embed_norm:
            self.embed_norm.reset_parameters()
        self.norm_f.reset_parameters()
        for weight in (self.embeddings.weight, self.lm_head.weight):
            nn.init.normal_(weight, std=0.02)

    def initial_state(self, batch: int) -> LMState:
        """The state before the first token of ``batch`` sequences.

        Raises:
            ValueError: it does not fit this machine's memory.
        """
        self._check_memory(batch)
        return [part.initial_state(batch) for part in self.stateful()]

    def stateful(self) -> list[nn.Module]:
        """What remembers something, in the order of the state."""
        return [part for block in self.layers for part in block.stateful()]

    def _check_memory(self, batch: int) -> None:
        weight = self.embeddings.weight
        if weight.is_cpu and not torch.compiler.is_compiling():
            self.config.check_state_memory(batch, weight.dtype)

    def _check_state(self, state: Any) -> None:
        wanted = [part.State for part in self.stateful()]
        if not isinstance(state, (list, tuple)):
            raise ValueError(f"LM: the state must be a list, got {type(state).__name__}")
        if len(state) != len(wanted):
            raise ValueError(f"LM: the state must have {len(wanted)} layers, got {len(state)}")
        for n, (given, kind) in enumerate(zip(state, wanted, strict=True)):
            if not isinstance(given, kind):
                raise ValueError(
                    f"LM: the state of layer {n} must be {kind.__name__}, "
                    f"got {type(given).__name__}"
                )

    def _embed(self, tokens: Tensor | None, inputs_embeds: Tensor | None = None) -> Tensor:
        x = self.embeddings(tokens) if inputs_embeds is None else inputs_embeds
        if self.config.embed_scale != 1:
            x = x * self.config.embed_scale
        return self.embed_norm(x) if self.config.embed_norm else x

    def _logits(self, x: Tensor, linear: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        weight, cap = self.lm_head.weight, self.config.logits_soft_cap
        x = x.to(weight.dtype)
        # Divided before the product, where there is less of it.
        return linear(x / cap, weight).tanh_() * cap if cap else linear(x, weight)

    def use_ops(self, ops: object) -> None:
        """Computes with the functions of another namespace, such as ``recurra.reference``."""
        # The functions alone: a module cannot be copied with the model.
        names = (name for name in vars(ops) if callable(getattr(ops, name)))
        chosen = SimpleNamespace(**{name: getattr(ops, name) for name in names})
        for part in self.stateful():
            part.ops = chosen

    def forward(
        self,
        tokens: Tensor | None = None,
        state: LMState | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        last_only: bool = False,
        return_hidden: bool = False,
    ) -> tuple:
        """Logits of the next token at every position.

        Args:
            tokens: (B, T), integers.
            state: what the last call returned, to go on where it stopped; None at the beginning.
            inputs_embeds: (B, T, d_model), instead of tokens.
            cu_seqlens: (S + 1,), the ends of S sequences packed along T; B must be 1, and the
                state has S rows.
            last_only: only the logits at the end of each sequence, which must not be empty.
            return_hidden: also return the residual stream.

        Returns:
            logits: (B, T, vocab_size), or with ``last_only`` (B or S, 1, vocab_size).
            state: after the last token. Gradients flow through it.
            hidden: with ``return_hidden``, a tuple of the outputs of the blocks and the last norm,
                n_layers + 1 tensors (B, T, d_model).

        Raises:
            ValueError: not exactly one of tokens and inputs_embeds, a state of another model, or
                one that does not fit this machine's memory.
            IndexError: a token that is not in the vocabulary.
        """
        if (tokens is None) == (inputs_embeds is None):
            raise ValueError("LM: give either tokens or inputs_embeds")
        if state is not None:
            self._check_state(state)
        else:
            x = inputs_embeds if tokens is None else tokens
            self._check_memory(
                len(x) if cu_seqlens is None else torch.as_tensor(cu_seqlens).numel() - 1
            )
        x = self._embed(tokens, inputs_embeds)
        before = repeat(None) if state is None else iter(state)
        states: LMState = []
        hidden = []
        for block in self.layers:
            x, after = block(x, before, cu_seqlens)
            states += after
            if return_hidden:
                hidden.append(x)
        if last_only:
            x = x[:, -1:] if cu_seqlens is None else x[0, cu_seqlens[1:] - 1, None]
        x = self.norm_f(x)
        logits = self._logits(x, F.linear)
        if return_hidden:
            hidden.append(x)
            return logits, states, tuple(hidden)
        return logits, states

    @torch.no_grad()
    def step(self, tokens: Tensor, state: LMState, slots: Tensor | None = None) -> Tensor:
        """Logits after one more token of each sequence; the fastest way to decode.

        Args:
            tokens: (B,).
            state: of B sequences, or with ``slots`` of any number; updated in place.
            slots: (B,) int32 or int64, which row of the state each token has, none twice; where
                negative the token changes nothing, and its logits mean nothing.

        Returns:
            (B, vocab_size).

        Raises:
            ValueError: a state of another model, or slots for a mixer that has none.
        """
        self._check_state(state)
        x = self._embed(tokens)
        for part, given in zip(self.stateful(), state, strict=True):
            if slots is not None and not part.slotted:
                raise ValueError(f"LM: a step of {type(part).__name__} takes no slots")
            # All of them, before one is changed.
            part.check_state(given, x.shape[0] if slots is None else None)
        states = iter(state)
        for block in self.layers:
            x = block.step(x, states, slots)
        return self._logits(self.norm_f(x), linear_step)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, dtype: torch.dtype | None = None) -> LM:
        """Loads a checkpoint as :meth:`save_pretrained` and transformers write it.

        Args:
            folder: with config.json and model.safetensors, whole or in shards.
            dtype: of the parameters; as stored when None.

        Raises:
            FileNotFoundError: there is no such folder, or no checkpoint in it.
            ValueError: a file is damaged, or is of another architecture.
        """
        from recurra.lm import pretrained

        return pretrained.load(Path(folder), dtype)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors; transformers loads those of its models.

        Each is written beside its final name and renamed, the configuration last: an interrupted
        call leaves whole files, but over another model perhaps one of each.

        Raises:
            OSError: the folder cannot be written.
        """
        from recurra.lm import pretrained

        pretrained.save(self, Path(folder))

    def generate(self, *args, **kwargs):
        """See :func:`recurra.lm.generate`."""
        from recurra.lm.generation import generate

        return generate(self, *args, **kwargs)
