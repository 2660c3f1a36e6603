"""Stands in for mamba_ssm.modules.mamba_simple."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recurra._check import fail
from recurra.compat._common import absent
from recurra.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from recurra.compat.mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from recurra.compat.mamba_ssm.ops.triton.selective_state_update import selective_state_update
from recurra.compat.mamba_ssm.utils.generation import InferenceParams
from recurra.nn.mamba import decay_rates, init_time_steps_

__getattr__ = absent("mamba_ssm")


class Mamba(nn.Module):
    """Selective state space mixer with mamba_ssm's arguments, parameters and cache.

    Gu and Dao, "Mamba: linear-time sequence modeling with selective state spaces" (2023), section
    3.4. :class:`recurra.nn.Mamba` is the same with states that carry gradients.

    Args:
        d_model: width of the inputs and outputs.
        d_state, d_conv, expand: states a channel, width of the convolution, inner over outer width.
        dt_rank: of the time step's projection; ``"auto"`` is d_model / 16.
        dt_min, dt_max, dt_init, dt_scale, dt_init_floor: the time step's initialisation.
        conv_bias, bias: whether the convolution, the projections have one.
        use_fast_path: accepted; there is one path.
        layer_idx: names this layer's states in ``inference_params``.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        place = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.use_fast_path, self.layer_idx = use_fast_path, layer_idx
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **place)
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1,
            bias=conv_bias, **place,
        )  # fmt: skip
        self.activation, self.act = "silu", nn.SiLU()
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **place)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, **place)
        spread = self.dt_rank**-0.5 * dt_scale
        if dt_init == "constant":
            nn.init.constant_(self.dt_proj.weight, spread)
        elif dt_init == "random":
            nn.init.uniform_(self.dt_proj.weight, -spread, spread)
        else:
            raise NotImplementedError(f'dt_init must be "random" or "constant", got "{dt_init}"')
        init_time_steps_(self.dt_proj.bias, dt_min, dt_max, dt_init_floor)
        self.dt_proj.bias._no_reinit = True
        rates = torch.arange(1, d_state + 1, dtype=torch.float32, device=device).log()
        self.A_log = nn.Parameter(rates.repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner, device=device))
        self.A_log._no_weight_decay = self.D._no_weight_decay = True
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **place)

    def forward(
        self, hidden_states: Tensor, inference_params: InferenceParams | None = None
    ) -> Tensor:
        """Mixes (batch, seqlen, d_model); with ``inference_params`` fills this layer's states, or
        goes on from them by one input where ``seqlen_offset`` is positive."""
        if inference_params is None:
            return self._mix(hidden_states, None, None)
        states = self._get_states_from_cache(inference_params, hidden_states.shape[0])
        if inference_params.seqlen_offset > 0:
            return self.step(hidden_states, *states)[0]
        return self._mix(hidden_states, *states)

    def _mix(self, x: Tensor, conv_state: Tensor | None, ssm_state: Tensor | None) -> Tensor:
        u, z = self.in_proj(x).transpose(1, 2).chunk(2, dim=1)
        if conv_state is not None:
            # A negative padding cuts: the last d_conv inputs, behind zeros where there are fewer.
            conv_state.copy_(F.pad(u, (self.d_conv - u.shape[2], 0)))
        u = causal_conv1d_fn(u, self.conv1d.weight[:, 0], self.conv1d.bias, activation="silu")
        dt, B, C = self._split(self.x_proj(u.transpose(1, 2)))
        y = selective_scan_fn(
            u,
            F.linear(dt, self.dt_proj.weight).transpose(1, 2),
            decay_rates(self.A_log),
            B.transpose(1, 2),
            C.transpose(1, 2),
            self.D,
            z,
            self.dt_proj.bias,
            delta_softplus=True,
            return_last_state=ssm_state is not None,
        )
        if ssm_state is not None:
            y, last = y
            ssm_state.copy_(last)
        return self.out_proj(y.transpose(1, 2))

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.split((self.dt_rank, self.d_state, self.d_state), dim=-1)

    def step(
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mixes one input, (batch, 1, d_model); the states are updated in place and returned."""
        if hidden_states.shape[1] != 1:
            fail("Mamba.step", f"hidden_states must be one input, got {hidden_states.shape[1]}")
        u, z = self.in_proj(hidden_states[:, 0]).chunk(2, dim=-1)
        u = causal_conv1d_update(
            u, conv_state, self.conv1d.weight[:, 0], self.conv1d.bias, activation="silu"
        )
        dt, B, C = self._split(self.x_proj(u))
        y = selective_state_update(
            ssm_state,
            u,
            F.linear(dt, self.dt_proj.weight),
            decay_rates(self.A_log),
            B,
            C,
            self.D,
            z=z,
            dt_bias=self.dt_proj.bias,
            dt_softplus=True,
        )
        return self.out_proj(y)[:, None], conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype=None, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Zeros for both states, (batch, d_inner, d_conv) and (batch, d_inner, d_state)."""
        like = self.conv1d.weight
        dtype = like.dtype if dtype is None else dtype
        return (
            like.new_zeros(batch_size, self.d_inner, self.d_conv, dtype=dtype),
            like.new_zeros(batch_size, self.d_inner, self.d_state, dtype=dtype),
        )

    def _get_states_from_cache(
        self, inference_params: InferenceParams, batch_size: int, initialize_states: bool = False
    ) -> tuple[Tensor, Tensor]:
        if self.layer_idx is None:
            fail("Mamba.forward", "layer_idx must be given where inference_params are used")
        memory = inference_params.key_value_memory_dict
        if self.layer_idx not in memory:
            memory[self.layer_idx] = self.allocate_inference_cache(batch_size, 0)
        elif initialize_states:
            for state in memory[self.layer_idx]:
                state.zero_()
        return memory[self.layer_idx]
