"""The language model: an embedding, blocks of norm, mixer and residual, a head."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recurra.lm.config import CONFIGS, LMConfig
from recurra.nn import MambaState, RMSNorm, RNNState
from recurra.ops.linear_step import linear_step

MixerState = MambaState | RNNState
LMState = list[MixerState]


class Block(nn.Module):
    """x + mixer(norm(x))."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = config.mixer.make(config.d_model)

    def _residual(self, x: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.norm(x.to(self.norm.weight.dtype))
        return (x.float() if self.residual_in_fp32 and x.dtype.itemsize == 2 else x), normed

    def forward(
        self, x: Tensor, state: MixerState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, MixerState]:
        x, normed = self._residual(x)
        y, state = self.mixer(normed, state, cu_seqlens=cu_seqlens)
        return x + y, state

    def step(self, x: Tensor, state: MixerState) -> Tensor:
        x, normed = self._residual(x)
        return x + self.mixer.step(normed, state)


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
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm_f = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.reset_parameters()
        if config.tie_embeddings:
            self.lm_head.weight = self.embeddings.weight

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Embedding and head normal with deviation 0.02; projections back into the residual stream
        smaller by the root of the number of layers, as in GPT-2; the rest as the mixers say."""
        if self.norm_f.weight.is_meta:  # takes its time even where there is nothing to fill
            return
        for block in self.layers:
            block.norm.reset_parameters()
            block.mixer.reset_parameters()
            block.mixer.out_proj.weight.div_(math.sqrt(len(self.layers)))
        self.norm_f.reset_parameters()
        for weight in (self.embeddings.weight, self.lm_head.weight):
            nn.init.normal_(weight, std=0.02)

    def initial_state(self, batch: int) -> LMState:
        """The state before the first token of ``batch`` sequences."""
        return [block.mixer.initial_state(batch) for block in self.layers]

    def use_ops(self, ops: object) -> None:
        """Computes with the functions of another namespace, such as ``recurra.reference``."""
        # The functions alone: a module cannot be copied with the model.
        names = (name for name in vars(ops) if callable(getattr(ops, name)))
        chosen = SimpleNamespace(**{name: getattr(ops, name) for name in names})
        for block in self.layers:
            block.mixer.ops = chosen

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
            ValueError: not exactly one of tokens and inputs_embeds, or a state of another
                model.
            IndexError: a token that is not in the vocabulary.
        """
        if (tokens is None) == (inputs_embeds is None):
            raise ValueError("LM: give either tokens or inputs_embeds")
        if state is not None and len(state) != len(self.layers):
            raise ValueError(f"LM: the state must have {len(self.layers)} layers, got {len(state)}")
        x = self.embeddings(tokens) if inputs_embeds is None else inputs_embeds
        states: LMState = []
        hidden = []
        for i, block in enumerate(self.layers):
            x, after = block(x, state[i] if state else None, cu_seqlens)
            states.append(after)
            if return_hidden:
                hidden.append(x)
        if last_only:
            x = x[:, -1:] if cu_seqlens is None else x[0, cu_seqlens[1:] - 1, None]
        x = self.norm_f(x)
        logits = F.linear(x.to(self.lm_head.weight.dtype), self.lm_head.weight)
        if return_hidden:
            hidden.append(x)
            return logits, states, tuple(hidden)
        return logits, states

    @torch.no_grad()
    def step(self, tokens: Tensor, state: LMState) -> Tensor:
        """Logits after one more token of each sequence; the fastest way to decode.

        Args:
            tokens: (B,).
            state: of B sequences; updated in place.

        Returns:
            (B, vocab_size).
        """
        x = self.embeddings(tokens)
        for block, s in zip(self.layers, state, strict=True):
            x = block.step(x, s)
        return linear_step(self.norm_f(x).to(self.lm_head.weight.dtype), self.lm_head.weight)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, dtype: torch.dtype | None = None) -> LM:
        """Loads a checkpoint as :meth:`save_pretrained` and, for Mamba, transformers write it.

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
        """Writes config.json and model.safetensors, which transformers loads if the mixer is Mamba.

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
