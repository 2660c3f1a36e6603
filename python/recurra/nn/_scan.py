"""What the mixers around one scan have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recurra.nn._mixer import Mixer
from recurra.ops.linear_step import linear_step

# How a linear layer is applied: to whole sequences, or to the rows of one step.
Apply = Callable[[nn.Linear, Tensor], Tensor]


def apply(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer over (B, T, K)."""
    return layer(x)


def apply_step(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer over the rows of a step, (B, K), without gradients."""
    return linear_step(x, layer.weight, layer.bias)


def see_nothing_(state: Tensor) -> None:
    """Makes zeros (B, 3, N) a state of ``softmax_scan`` that has seen nothing."""
    state[:, 0] = -1e38  # the maximum of no scores, -infinity, but a number


def channels(name: str, expand: float, d_model: int) -> int:
    """Channels inside a mixer, ``expand * d_model``."""
    inside = int(expand * d_model)
    if inside < 1:
        raise ValueError(f"{name}: expand * d_model must be at least 1, got {inside}")
    return inside


class ScanState(NamedTuple):
    """What a :class:`ScanMixer` remembers.

    Attributes:
        h: the state of its scan, batch first; float32 for 16-bit models, otherwise of the dtype
            of the model.
    """

    h: Tensor


class ScanMixer(Mixer):
    """A mixer of three parts: what each input alone gives the scan, the scan, and what becomes of
    each of its outputs alone.

    Subclasses say what the three parts are.
    """

    State = ScanState
    slotted = True

    def _before(self, x: Tensor, linear: Apply) -> tuple[Any, Any]:
        """What the scan is given, and what ``_after`` is given beside its output."""
        raise NotImplementedError

    def _scan(self, given: Any, h: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """The output of the scan and its last state."""
        raise NotImplementedError

    def _scan_step(self, given: Any, h: Tensor, slots: Tensor | None) -> Tensor:
        """The output of one step of the scan, which updates ``h``."""
        raise NotImplementedError

    def _after(self, h: Tensor, kept: Any, linear: Apply) -> Tensor:
        """The output of the mixer."""
        return linear(self.out_proj, h)

    def forward(
        self, x: Tensor, state: ScanState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, ScanState]:
        """Mixes whole sequences, or the next chunk of them.

        Args:
            x: (B, T, d_model).
            state: what the last call returned; the initial one when None. With ``cu_seqlens`` one
                row for each sequence.
            cu_seqlens: (S + 1,), the ends of S sequences packed along T; B must be 1.

        Returns:
            y, shape of ``x``, and the state after the last input. Gradients flow through both.

        Raises:
            ValueError: ``x`` is none of this mixer, or ``cu_seqlens`` or the state does not fit it.
        """
        rows = self.check(x, state, cu_seqlens)
        (h,) = state or self.initial_state(rows)
        given, kept = self._before(x, apply)
        y, h = self._scan(given, h, cu_seqlens)
        return self._after(y, kept, apply), ScanState(h)

    @torch.no_grad()
    def step(self, x: Tensor, state: ScanState, slots: Tensor | None = None) -> Tensor:
        """Mixes one input, (B, d_model), and updates ``state`` in place; without gradients."""
        self.check_step(x, state, slots)
        given, kept = self._before(x, apply_step)
        return self._after(self._scan_step(given, state.h, slots), kept, apply_step)
