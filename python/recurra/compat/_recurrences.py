"""The recurrences of transformers' models that have no hook, and the convolution before one."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from recurra import ops
from recurra.compat._common import parameter


class Recurrence(NamedTuple):
    """A function of a modelling file, by its name there, and what takes its place; or, without
    parameters, a module that a class of the file has under that name."""

    module: str
    name: str
    layer: str
    parameters: tuple[str, ...] | None
    make: Callable

    @property
    def file(self) -> str:
        return self.module.removeprefix("transformers.").replace(".", "/") + ".py"

    def patch(self, module: ModuleType) -> Callable[[], None]:
        """Replaces it; returns what puts it back."""
        *owner, name = self.name.split(".")
        place = getattr(module, owner[0]) if owner else module
        if self.parameters is None:
            # Found before the module, which stays where it is registered.
            setattr(place, name, property(lambda layer: self.make(layer._modules[name])))
            return lambda: delattr(place, name)
        original = getattr(place, name)
        setattr(place, name, self.make(original))
        return lambda: setattr(place, name, original)


class _Convolution:
    """A causal nn.Conv1d as its layer uses it: called, or asked for its parameters."""

    def __init__(self, module: nn.Conv1d):
        self._module = module

    def __getattr__(self, name: str):
        return getattr(self._module, name)

    def __call__(self, x: Tensor) -> Tensor:
        conv = self._module
        if (
            not x.is_cpu
            or conv.weight.shape[2] < 2
            or conv._forward_hooks
            or conv._forward_pre_hooks
        ):
            return conv(x)
        weight, bias = parameter(conv.weight[:, 0], x), parameter(conv.bias, x)
        return ops.causal_conv1d(x.transpose(1, 2), weight, bias)[0].transpose(1, 2)


def _rg_lru(original: Callable) -> Callable:
    def _rnn_scan(
        self,
        hidden_states: Tensor,
        recurrent_gate: Tensor,
        reset: Tensor,
        recurrent_states: Tensor | None,
        acc_dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        if not hidden_states.is_cpu or hidden_states.shape[1] == 1:
            return original(self, hidden_states, recurrent_gate, reset, recurrent_states, acc_dtype)
        gate = recurrent_gate * ~reset
        dtype = torch.promote_types(gate.dtype, hidden_states.dtype)
        h0 = recurrent_states
        if h0 is not None:
            h0 = h0.to(torch.float64 if dtype == torch.float64 else torch.float32)
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
        if not key.is_cpu:
            return original(time_decay, time_first, key, value, state, return_state)
        wide = torch.float64 if key.dtype == torch.float64 else torch.float32
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
        "RecurrentGemmaRecurrentBlock.conv_1d",
        "RecurrentGemmaRecurrentBlock",
        None,
        _Convolution,
    ),
    Recurrence(
        "transformers.models.rwkv.modeling_rwkv",
        "rwkv_linear_attention_cpu",
        "RwkvSelfAttention",
        ("time_decay", "time_first", "key", "value", "state", "return_state"),
        _wkv,
    ),
)
