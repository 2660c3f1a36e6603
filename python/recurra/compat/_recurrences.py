"""The recurrences of transformers' models that have no hook, and the convolution before one."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recurra import ops
from recurra._check import state_dtype
from recurra._library import served
from recurra.compat._common import parameter


class Recurrence(NamedTuple):
    """A function of a modelling file, by its name there, and what takes its place."""

    module: str
    name: str
    layer: str
    parameters: tuple[str, ...]
    make: Callable[[Callable], Callable]

    def patch(self, module: ModuleType) -> Callable[[], None]:
        """Replaces the function; returns what puts it back."""
        *owner, name = self.name.split(".")
        place = getattr(module, owner[0]) if owner else module
        original = getattr(place, name)
        setattr(place, name, self.make(original))
        return lambda: setattr(place, name, original)


def _recurrent_block(original: Callable) -> Callable:
    def forward(
        self,
        input_states: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        use_cache: bool = True,
        **kwargs,
    ) -> tuple[Tensor, None]:
        conv, length = self.conv_1d, input_states.shape[1]
        if not served(input_states) or length == 1 or not _is_plain(conv):
            args = (input_states, position_ids, attention_mask, use_cache)
            return original(self, *args, **kwargs)
        gate = self.act_fn(self.linear_y(input_states))
        x = self.linear_x(input_states)
        state = self.conv1d_state
        if not use_cache:
            self.conv1d_state = self.rg_lru.recurrent_states = None
        else:
            if state is None or state.shape[0] != x.shape[0]:
                self.rg_lru.recurrent_states = x.new_zeros(
                    x.shape[0], self.lru_width, dtype=torch.float32
                )
            recent = x.transpose(1, 2)
            self.conv1d_state = F.pad(recent, (self.conv1d_width - 1 - length, 0))
        x, _ = ops.causal_conv1d(x, parameter(conv.weight[:, 0], x), parameter(conv.bias, x))
        return self.linear_out(self.rg_lru(x, position_ids) * gate), None

    return forward


def _is_plain(conv: nn.Module) -> bool:
    """Whether a module is what its class says, neither wrapped nor hooked nor replaced."""
    hooks = (conv._forward_hooks, conv._forward_pre_hooks, conv._backward_hooks)
    return (
        type(conv) is nn.Conv1d
        and conv.weight.shape[2] > 1
        and "forward" not in vars(conv)
        and not any((*hooks, conv._backward_pre_hooks))
    )


def _rg_lru(original: Callable) -> Callable:
    def _rnn_scan(
        self,
        hidden_states: Tensor,
        recurrent_gate: Tensor,
        reset: Tensor,
        recurrent_states: Tensor | None,
        acc_dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        if not served(hidden_states) or hidden_states.shape[1] == 1:
            return original(self, hidden_states, recurrent_gate, reset, recurrent_states, acc_dtype)
        gate = recurrent_gate * ~reset
        dtype = torch.promote_types(gate.dtype, hidden_states.dtype)
        h0 = recurrent_states
        if h0 is not None:
            h0 = h0.to(state_dtype(dtype))
        h, h_last = ops.linear_scan(gate.to(dtype), hidden_states.to(dtype), h0)
        return h.to(hidden_states.dtype), h_last.to(acc_dtype)

    return _rnn_scan


def _wkv(original: Callable) -> Callable:
    def rwkv_linear_attention_cpu(
        time_decay: Tensor,
        time_first: Tensor,
        key: Tensor,
        value: Tensor,
        state: list[Tensor] | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, list[Tensor] | None]:
        if not served(key):
            return original(time_decay, time_first, key, value, state, return_state)
        wide = state_dtype(key.dtype)
        h0 = None
        if state is not None:
            total, normaliser, maximum = state
            h0 = torch.stack([maximum, normaliser, total], 1).to(wide)
        output, h_last = ops.softmax_scan(
            key, value.to(key.dtype), h0, decay=time_decay.to(wide).exp(), bonus=time_first.to(wide)
        )
        if return_state or state is not None:
            maximum, normaliser, total = h_last.unbind(1)
            state = [total, normaliser, maximum]
        return output, state

    return rwkv_linear_attention_cpu


ALL = (
    Recurrence(
        "transformers.models.recurrent_gemma.modeling_recurrent_gemma",
        "RecurrentGemmaRglru._rnn_scan",
        "RecurrentGemmaRglru",
        ("self", "hidden_states", "recurrent_gate", "reset", "recurrent_states", "acc_dtype"),
        _rg_lru,
    ),
    Recurrence(
        "transformers.models.recurrent_gemma.modeling_recurrent_gemma",
        "RecurrentGemmaRecurrentBlock.forward",
        "RecurrentGemmaRecurrentBlock",
        ("self", "input_states", "position_ids", "attention_mask", "use_cache", "kwargs"),
        _recurrent_block,
    ),
    Recurrence(
        "transformers.models.rwkv.modeling_rwkv",
        "rwkv_linear_attention_cpu",
        "RwkvSelfAttention",
        ("time_decay", "time_first", "key", "value", "state", "return_state"),
        _wkv,
    ),
)
