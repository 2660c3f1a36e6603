"""RWKV-4: the mixer of time and, as a feed-forward layer, that of channels."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from recurra._check import state_dtype
from recurra.nn._config import MixerConfig, check_fields
from recurra.nn._mixer import Mixer
from recurra.nn._positions import earlier
from recurra.nn._scan import Apply, apply, apply_step, see_nothing_


@dataclasses.dataclass(frozen=True)
class RWKV4Config(MixerConfig):
    """Sizes of an :class:`RWKV4` mixer. It has no ``eig_range``: its decays, as weights
    of a softmax, are positive by construction.

    Attributes:
        expand: channels inside, N, as a multiple of the width of the model.

    Raises:
        ValueError: a size is out of range.
    """

    kind: ClassVar[str] = "rwkv4"
    letter: ClassVar[str] = "W"

    expand: float = 1

    def __post_init__(self) -> None:
        check_fields(self, expand=(1e-3, 1024.0))

    def channels(self, d_model: int) -> int:
        """N at this width of the model."""
        return round(self.expand * d_model)

    def make(self, d_model: int) -> RWKV4:
        """The mixer."""
        return RWKV4(d_model, self)


@dataclasses.dataclass(frozen=True)
class RWKV4ChannelConfig(RWKV4Config):
    """Sizes of an :class:`RWKV4Channel` layer.

    Attributes:
        expand: channels inside, N, as a multiple of the width of the model.

    Raises:
        ValueError: a size is out of range.
    """

    kind: ClassVar[str] = "rwkv4_channel"

    expand: float = 4

    def make(self, d_model: int) -> RWKV4Channel:
        """The layer."""
        return RWKV4Channel(d_model, self)


class RWKV4State(NamedTuple):
    """What an :class:`RWKV4` remembers.

    Attributes:
        shift: the last input, (B, d_model).
        wkv: the state of the scan, (B, 3, N), see :func:`recurra.softmax_scan`.

    Both are float32 for 16-bit models, otherwise of the dtype of the model.
    """

    shift: Tensor
    wkv: Tensor


class RWKV4ChannelState(NamedTuple):
    """What an :class:`RWKV4Channel` remembers.

    Attributes:
        shift: the last input, (B, d_model); float32 for 16-bit models, otherwise of the dtype of
            the model.
    """

    shift: Tensor


def token_shift(x: Tensor, last: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """The input before each of ``x`` (B, T, d_model), and the last of all; ``last`` (B or S,
    d_model) is the one before the first of each sequence."""
    (before,), last = earlier(x, last[:, None], cu_seqlens)
    return before, last[:, 0]


def mixed(x: Tensor, before: Tensor, ratio: Tensor) -> Tensor:
    """Each input, (..., d_model), with the one before it, by a ratio (1, 1, d_model)."""
    return torch.lerp(before, x, ratio[0, 0].to(x.dtype))


def _fill_ratios(mix: Tensor, power: float, plus: float = 0.0) -> None:
    channels = torch.arange(mix.shape[-1], dtype=torch.float64) / mix.shape[-1]
    mix.copy_(channels**power + plus)


class RWKV4(Mixer):
    """Time mixing of RWKV-4, Peng et al., "RWKV: Reinventing RNNs for the transformer era" (2023),
    section 3.1, equations 11 to 13, 16 and 17.

    Parameters have the names and shapes of transformers' RwkvSelfAttention, whose ``output`` is
    ``out_proj``.

    Args:
        d_model: width of the inputs and outputs.
        config: the sizes inside.
    """

    State = RWKV4State
    # Which layer of how many this is: initial weights differ by it. That in the middle.
    place = (1, 3)

    def __init__(self, d_model: int, config: RWKV4Config | None = None):
        super().__init__(d_model)
        N = (config or RWKV4Config()).channels(d_model)
        if N < 1:
            raise ValueError(f"RWKV4: expand * d_model must be at least 1, got {N}")
        self.state_shapes = ((d_model,), (3, N))
        self.time_decay = nn.Parameter(torch.empty(N))
        self.time_first = nn.Parameter(torch.empty(N))
        self.time_mix_key = nn.Parameter(torch.empty(1, 1, d_model))
        self.time_mix_value = nn.Parameter(torch.empty(1, 1, d_model))
        self.time_mix_receptance = nn.Parameter(torch.empty(1, 1, d_model))
        self.key = nn.Linear(d_model, N, bias=False)
        self.value = nn.Linear(d_model, N, bias=False)
        self.receptance = nn.Linear(d_model, N, bias=False)
        self.out_proj = nn.Linear(N, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As the authors' code: decays from slow to fast over the channels, bonuses in a zigzag,
        ratios by channel and layer; only the values' projection is not zero."""
        if self.time_decay.is_meta:  # takes its time even where there is nothing to fill
            return
        layer, layers = self.place
        depth, left = layer / max(layers - 1, 1), 1 - layer / layers
        N = self.time_decay.shape[0]
        channels = torch.arange(N, dtype=torch.float64)
        self.time_decay.copy_(8 * (channels / max(N - 1, 1)) ** (0.7 + 1.3 * depth) - 5)
        self.time_first.copy_(math.log(0.3) + 0.5 * ((channels + 1) % 3 - 1))
        _fill_ratios(self.time_mix_key, left)
        _fill_ratios(self.time_mix_value, left, 0.3 * depth)
        _fill_ratios(self.time_mix_receptance, left / 2)
        nn.init.orthogonal_(self.value.weight, gain=max(1, N / self.value.in_features) ** 0.5)
        for layer in (self.key, self.receptance, self.out_proj):
            nn.init.zeros_(layer.weight)

    def initial_state(self, batch: int) -> RWKV4State:
        """The state before the first input of ``batch`` sequences: zeros, and a scan that has seen
        nothing."""
        state = super().initial_state(batch)
        see_nothing_(state.wkv)
        return state

    def _inputs(self, x: Tensor, before: Tensor, linear: Apply) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and what they are received by."""
        k = linear(self.key, mixed(x, before, self.time_mix_key))
        v = linear(self.value, mixed(x, before, self.time_mix_value))
        r = linear(self.receptance, mixed(x, before, self.time_mix_receptance))
        return k, v, torch.sigmoid(r)

    def _decay(self) -> Tensor:
        return self.time_decay.to(state_dtype(self.time_decay.dtype)).exp()

    def forward(
        self, x: Tensor, state: RWKV4State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, RWKV4State]:
        """Mixes whole sequences, or the next chunk of them.

        Args:
            x: (B, T, d_model).
            state: what the last call returned; the initial state when None. With ``cu_seqlens`` one
                row for each sequence.
            cu_seqlens: (S + 1,), the ends of S sequences packed along T; B must be 1.

        Returns:
            y, shape of ``x``, and the state after the last input. Gradients flow through both.

        Raises:
            ValueError: ``x`` is none of this mixer, or ``cu_seqlens`` or the state does not fit it.
        """
        rows = self.check(x, state, cu_seqlens)
        shift, wkv = state or self.initial_state(rows)
        before, shift = token_shift(x, shift, cu_seqlens)
        k, v, r = self._inputs(x, before, apply)
        y, wkv = self.ops.softmax_scan(
            k, v, wkv, decay=self._decay(), bonus=self.time_first, cu_seqlens=cu_seqlens
        )
        return self.out_proj(r * y), RWKV4State(shift, wkv)

    @torch.no_grad()
    def step(self, x: Tensor, state: RWKV4State) -> Tensor:
        """Mixes one input, (B, d_model), and updates ``state`` in place; without gradients."""
        self.check_step(x, state)
        k, v, r = self._inputs(x, state.shift.to(x.dtype), apply_step)
        y = self.ops.softmax_scan_step(state.wkv, k, v, decay=self._decay(), bonus=self.time_first)
        state.shift.copy_(x)
        return apply_step(self.out_proj, r * y)


class RWKV4Channel(Mixer):
    """Channel mixing of RWKV-4, Peng et al. (2023), equations 14, 15 and 18: what follows an
    :class:`RWKV4` mixer in its block. It remembers the last input.

    Parameters have the names and shapes of transformers' RwkvFeedForward, whose ``value`` is
    ``out_proj``.

    Args:
        d_model: width of the inputs and outputs.
        config: the sizes inside.
    """

    stateful = True
    State = RWKV4ChannelState
    place = (1, 3)

    def __init__(self, d_model: int, config: RWKV4ChannelConfig | None = None):
        super().__init__(d_model)
        N = (config or RWKV4ChannelConfig()).channels(d_model)
        if N < 1:
            raise ValueError(f"RWKV4Channel: expand * d_model must be at least 1, got {N}")
        self.state_shapes = ((d_model,),)
        self.time_mix_key = nn.Parameter(torch.empty(1, 1, d_model))
        self.time_mix_receptance = nn.Parameter(torch.empty(1, 1, d_model))
        self.key = nn.Linear(d_model, N, bias=False)
        self.receptance = nn.Linear(d_model, d_model, bias=False)
        self.out_proj = nn.Linear(N, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As the authors' code: ratios by channel and layer; only the keys' projection is not
        zero."""
        if self.time_mix_key.is_meta:
            return
        layer, layers = self.place
        for mix in (self.time_mix_key, self.time_mix_receptance):
            _fill_ratios(mix, 1 - layer / layers)
        N, d_model = self.key.weight.shape
        nn.init.orthogonal_(self.key.weight, gain=max(1, N / d_model) ** 0.5)
        nn.init.zeros_(self.receptance.weight)
        nn.init.zeros_(self.out_proj.weight)

    def _channels(self, x: Tensor, before: Tensor, linear: Apply) -> Tensor:
        k = linear(self.key, mixed(x, before, self.time_mix_key))
        r = linear(self.receptance, mixed(x, before, self.time_mix_receptance))
        return torch.sigmoid(r) * linear(self.out_proj, torch.relu_(k).square())

    def forward(
        self, x: Tensor, state: RWKV4ChannelState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, RWKV4ChannelState]:
        """(B, T, d_model) to the same; arguments and results as those of :class:`RWKV4`."""
        rows = self.check(x, state, cu_seqlens)
        (shift,) = state or self.initial_state(rows)
        before, shift = token_shift(x, shift, cu_seqlens)
        return self._channels(x, before, apply), RWKV4ChannelState(shift)

    @torch.no_grad()
    def step(self, x: Tensor, state: RWKV4ChannelState) -> Tensor:
        """(B, d_model) to the same; updates ``state`` in place."""
        self.check_step(x, state)
        y = self._channels(x, state.shift.to(x.dtype), apply_step)
        state.shift.copy_(x)
        return y
