"""A call of everything in recurra.compat that computes, for tests that loop over devices."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from recurra.compat import _hooks, _recurrences, causal_conv1d
from recurra.compat.causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states
from recurra.compat.fla.modules.convolution import causal_conv1d as fla_conv
from recurra.compat.fla.ops.hgrn import fused_recurrent_hgrn
from recurra.compat.mamba_ssm import mamba_inner_fn, selective_scan_fn
from recurra.compat.mamba_ssm.modules.mamba_simple import Mamba
from recurra.compat.mamba_ssm.ops.triton.layer_norm import layer_norm_fn
from recurra.compat.mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
from recurra.compat.mamba_ssm.ops.triton.selective_state_update import selective_state_update
from recurra.ops.linear_step import linear_step


class Call(NamedTuple):
    """A function of tensors, as a user calls it.

    Attributes:
        name: for people.
        ops: the ops of recurra that it must run, without those of its backward.
        shapes: its arguments that have fractions, by name.
        function: takes them, and the others, by name; what it returns includes states that it
            wrote.
        others: integers, by name.
        narrow: arguments that stay float32 in float64.
        step: whether it keeps no graph for a backward.
        former: whether it is put in the place of a function, which keeps what is not served.
    """

    name: str
    ops: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    function: Callable
    others: dict[str, list] = {}
    narrow: tuple[str, ...] = ()
    step: bool = False
    former: bool = False

    def make(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """Its arguments on the CPU."""
        generator = torch.Generator().manual_seed(7)
        made = {}
        for name, shape in self.shapes.items():
            x = torch.randn(*shape, generator=generator, dtype=torch.float64)
            x = -x.abs() if name in ("A", "g") else x
            made[name] = x.to(torch.float32 if name in self.narrow else dtype)
        integers = {name: torch.tensor(values) for name, values in self.others.items()}
        return made | integers

    def run(self, arguments: dict[str, Tensor]) -> list[Tensor]:
        """What comes out."""
        out = self.function(**arguments)
        return [out] if isinstance(out, Tensor) else [x for x in out if x is not None]


class FormerError(Exception):
    """What was in the place of a hook or a recurrence has been called."""


def _former(*args, **kwargs):
    raise FormerError


def _hook(name: str) -> Callable:
    return _hooks.BY_NAME[name](_former, _former)


def _recurrence(name: str) -> Callable:
    return next(r for r in _recurrences.ALL if r.name.endswith(name)).make(_former)


def _updated(state: Tensor, function: Callable, *args, **kwargs) -> tuple[Tensor, Tensor]:
    """Also the state, a copy of which is written."""
    state = state.clone()
    return function(state, *args, **kwargs), state


def _conv_update(x, state, weight, bias, *rest) -> tuple[Tensor, Tensor]:
    def update(state):
        return causal_conv1d.causal_conv1d_update(x, state, weight, bias, "silu", *rest)

    return _updated(state, update)


def _ssm_update(state, x, dt, A, B, C, D, z, bias, slots=None) -> tuple[Tensor, Tensor]:
    args = (x, dt, A, B, C, D, z, bias, True, slots)
    return _updated(state, selective_state_update, *args)


def _mamba(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """A module all of whose weights are made of one row."""
    mixer = Mamba(4, d_state=3, d_conv=4, device=x.device, dtype=x.dtype)
    with torch.no_grad():
        for p in mixer.parameters():
            p.copy_(w[: p.shape[-1]].expand_as(p))
    states = mixer.allocate_inference_cache(x.shape[0], 9)
    y = mixer._mix(x, *states)
    with torch.no_grad():
        return y, *mixer.step(x[:, :1], *states)


def _block(x: Tensor, weight: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """RecurrentGemma's, with layers that do nothing but multiply."""
    conv = nn.Conv1d(3, 3, 4, groups=3, padding=3, device=x.device, dtype=x.dtype)
    del conv.weight, conv.bias  # the parameters, which are no functions of anything
    conv.weight, conv.bias = weight, w
    layer = SimpleNamespace(
        conv_1d=conv, conv1d_state=None, conv1d_width=4, lru_width=3, act_fn=torch.tanh,
        linear_x=lambda x: 2 * x, linear_y=lambda x: x, linear_out=lambda x: x, rg_lru=_RgLru(),
    )  # fmt: skip
    y, _ = _recurrence("RecurrentBlock.forward")(layer, x, None, None)
    return y, layer.conv1d_state


class _RgLru:
    def __call__(self, x: Tensor, positions: None) -> Tensor:
        return x


def _wkv(decay, first, key, value, state) -> tuple[Tensor, ...]:
    state = [state[0], state[1].exp(), state[2]]
    o, state = _recurrence("linear_attention_cpu")(decay, first, key, value, state, True)
    return o, *state


B, D, L, N, W = 2, 3, 9, 4, 4
ENDS = {"ends": [0, 3, 3, 9]}
_SCAN = {"u": (B, D, L), "delta": (B, D, L), "A": (D, N), "B": (B, N, L), "C": (B, N, L)}
_SCAN |= {"D": (D,), "z": (B, D, L), "bias": (D,)}
_CONV = {"x": (B, D, L), "weight": (D, W), "bias": (D,)}
_UPDATE = {"x": (4, D), "state": (4, D, 5), "weight": (D, W), "bias": (D,)}
_SSM = {"state": (4, D, N), "x": (4, D), "dt": (4, D), "A": (D, N), "B": (4, N), "C": (4, N)}
_SSM |= {"D": (D,), "z": (4, D), "bias": (D,)}
_HEADS = {"state": (4, 2, D, N), "x": (4, 2, D), "dt": (4, 2, D), "A": (2, D, N), "B": (4, 2, N)}
_HEADS |= {"C": (4, 2, N), "D": (2, D), "z": (4, 2, D), "bias": (2, D)}
SLOTS = {"slots": [5, -1, 0, 7]}  # of seven states: one row has none and one a wrong one
NO_SLOTS = {"slots": [-1, -1, -1, -1]}
CONV, CONV_STEP = ("causal_conv1d",), ("causal_conv1d_step",)
SCAN, SCAN_STEP = ("selective_scan",), ("selective_scan_step",)


def _scan(u, delta, A, B, C, D, z, bias):
    return selective_scan_fn(u, delta, A, B, C, D, z, bias, True, True)


def _hooked_scan(u, delta, A, B, C, D, z, bias):
    return _hook("selective_scan_fn")(u, delta, A, B, C, D, z, bias, True, True)


def _in_slots(**shapes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return shapes | {"state": (7, *shapes["state"][1:])}


CALLS = [
    Call("conv", CONV, _CONV | {"before": (B, D, W - 1)},
         lambda x, weight, bias, before: causal_conv1d.causal_conv1d_fn(
             x, weight, bias, None, before, True, activation="silu")),
    Call("conv of seq_idx", CONV, _CONV,
         lambda x, weight, bias, seq_idx: causal_conv1d.causal_conv1d_fn(
             x, weight, bias, seq_idx, activation="silu"),
         {"seq_idx": [[0, 0, 0, 1, 1, 2, 2, 2, -1], [5, 5, 5, 5, 5, -1, -1, 7, 7]]}),
    Call("conv update", CONV_STEP, _UPDATE, _conv_update, step=True),
    Call("conv update of two", CONV, _UPDATE | {"x": (4, D, 2)}, _conv_update),
    Call("conv update in a ring", CONV, _UPDATE,
         lambda past, **rest: _conv_update(*rest.values(), past),
         {"past": [0, 1, 4, 17]}),
    Call("conv update in slots", CONV_STEP, _in_slots(**_UPDATE),
         lambda x, state, weight, bias, slots: _conv_update(x, state, weight, bias, None, slots),
         SLOTS, step=True),
    Call("conv update in narrow slots", CONV, _in_slots(**_UPDATE),
         lambda x, state, weight, bias, slots: _conv_update(x, state, weight, bias, None, slots),
         SLOTS, narrow=("state",)),
    Call("conv update in no slots", CONV, _in_slots(**_UPDATE) | {"x": (4, D, 2)},
         lambda x, state, weight, bias, slots: _conv_update(x, state, weight, bias, None, slots),
         NO_SLOTS),
    Call("conv states", (), {"x": (9, D)},
         lambda x, ends: causal_conv1d_varlen_states(x, ends, W), ENDS),
    Call("scan", SCAN, _SCAN, _scan),
    Call("scan of constants", SCAN, _SCAN | {"B": (D, N), "C": (D, N)}, _scan),
    Call("inner", ("causal_conv1d", "selective_scan", "_rms_norm"),
         {"xz": (B, 2 * D, L), "conv1d_weight": (D, 1, W), "conv1d_bias": (D,),
          "x_proj_weight": (2 + 2 * N, D), "delta_proj_weight": (D, 2), "out_proj_weight": (5, D),
          "out_proj_bias": (5,), "A": (D, N), "b_rms_weight": (N,)}, mamba_inner_fn),
    Call("ssm update", SCAN_STEP, _SSM, _ssm_update, step=True),
    Call("ssm update of heads", SCAN_STEP, _HEADS, _ssm_update, step=True),
    Call("ssm update in slots", SCAN_STEP, _in_slots(**_SSM), _ssm_update, SLOTS, step=True),
    Call("ssm update in narrow slots", SCAN_STEP, _in_slots(**_HEADS), _ssm_update, SLOTS,
         narrow=("state",), step=True),
    Call("ssm update in no slots", SCAN_STEP, _in_slots(**_SSM), _ssm_update, NO_SLOTS,
         narrow=("state",), step=True),
    Call("norm", ("_rms_norm",),
         {"x": (B, L, D), "weight": (D,), "bias": (D,), "residual": (B, L, D)},
         lambda x, weight, bias, residual: layer_norm_fn(
             x, weight, bias, residual, prenorm=True, is_rms_norm=True)),
    Call("gated norm", ("_rms_norm",), {"x": (B, 6), "weight": (6,), "bias": (6,), "z": (B, 6)},
         lambda x, weight, bias, z: rmsnorm_fn(x, weight, bias, z, group_size=3)),
    Call("linear step", ("_linear_step",), {"x": (B, D), "weight": (5, D), "bias": (5,)},
         linear_step, step=True),
    Call("Mamba", ("causal_conv1d", "selective_scan", "causal_conv1d_step", "selective_scan_step"),
         {"x": (B, L, 4), "w": (32,)}, _mamba),
    Call("hgrn", ("linear_scan",), {"x": (1, L, D), "g": (1, L, D), "h0": (3, D)},
         lambda x, g, h0, ends: fused_recurrent_hgrn(x, g, h0, True, ends), ENDS),
    Call("conv of fla", CONV, {"x": (1, L, D), "weight": (D, W), "before": (3, D, W)},
         lambda x, weight, before, ends: fla_conv(
             x, weight, None, x, before, True, "silu", cu_seqlens=ends), ENDS),
    Call("hook: conv", CONV, _CONV,
         lambda x, weight, bias: _hook("causal_conv1d_fn")(x, weight, bias, "silu"), former=True),
    Call("hook: conv of sequences", CONV, _CONV | {"x": (1, D, L)},
         lambda x, weight, bias, ends: _hook("causal_conv1d_fn")(
             x, weight, bias, "silu", cu_seqlens=ends), ENDS),
    Call("hook: conv update", CONV_STEP, _UPDATE,
         lambda x, state, weight, bias: _updated(state, lambda s: _hook("causal_conv1d_update")(
             x, s, weight, bias, "silu")), step=True, former=True),
    Call("hook: scan", SCAN, _SCAN, _hooked_scan, former=True),
    Call("hook: ssm update", SCAN_STEP, _SSM,
         lambda state, **rest: _updated(
             state, _hook("selective_state_update"), *rest.values(), True), step=True, former=True),
    Call("RecurrentGemma", ("linear_scan",), {"x": (B, L, D), "gate": (B, L, D), "h0": (B, D)},
         lambda x, gate, h0, reset: _recurrence("_rnn_scan")(
             None, x, gate.sigmoid(), (reset == 1)[..., None], h0, h0.dtype),
         {"reset": [[1] + [0] * 8, [0] * 4 + [1] + [0] * 4]}, former=True),
    Call("RecurrentGemma block", CONV, {"x": (B, L, D), "weight": (D, 1, W), "w": (D,)}, _block,
         former=True),
    Call("RWKV", ("softmax_scan",),
         {"decay": (D,), "first": (D,), "key": (B, L, D), "value": (B, L, D), "state": (3, B, D)},
         _wkv, former=True),
]  # fmt: skip
