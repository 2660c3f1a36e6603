"""What all mixers have in common: the state, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from recurra import ops
from recurra._check import check_offsets, dtype_name, state_dtype

T = TypeVar("T")


class Mixer(nn.Module):
    """A module with ``forward(x, state=None, *, cu_seqlens=None) -> (y, state)``,
    ``step(x, state) -> y`` and ``out_proj``, its last layer.

    Subclasses set ``State``, a named tuple, and ``state_shapes``, the shapes of its tensors
    without their rows, one for each sequence. Where ``slotted``, ``step(x, state, slots)`` takes
    a state of any number of rows and which of them each input has, (B,), where a negative one
    changes nothing.
    """

    slotted: ClassVar[bool] = False

    # Where the ops come from; an instance may be given recurra.reference instead.
    ops = ops
    State: ClassVar[type[tuple]]
    state_shapes: tuple[tuple[int, ...], ...]
    out_proj: nn.Linear

    def __init__(self, d_model: int):
        super().__init__()
        self.d_model = d_model

    @property
    def dtype(self) -> torch.dtype:
        """Of the inputs and outputs."""
        return self.out_proj.weight.dtype

    def state_dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
        """Of the tensors of a state of a mixer of ``dtype``: float32 for 16 bits, otherwise the
        same."""
        return (state_dtype(dtype),) * len(self.state_shapes)

    def initial_state(self, batch: int) -> Any:
        """Zeros: the state before the first input of ``batch`` sequences."""
        zeros, each = (
            self.out_proj.weight.new_zeros,
            zip(self.state_shapes, self.state_dtypes(self.dtype), strict=True),
        )
        return self.State(*(zeros((batch, *shape), dtype=dtype) for shape, dtype in each))

    def check(self, x: Tensor, state: Any, cu_seqlens: Tensor | None = None) -> int:
        """How many sequences ``x`` holds, and so how many rows their state has, in a call of
        ``forward``.

        Raises:
            ValueError: ``x`` is none of this mixer, or ``cu_seqlens`` or the state is not one of
                ``x``.
        """
        dtype = self._check_input(x, "B, T")
        rows = x.shape[0] if cu_seqlens is None else self._packed(x, cu_seqlens)
        if state is not None:
            self._check_state(state, rows, dtype)
        return rows

    def check_step(self, x: Tensor, state: Any, slots: Tensor | None = None) -> None:
        """Of a call of ``step``, before it changes anything.

        Raises:
            ValueError: ``x`` is none of this mixer, or the state is not one of ``x``.
        """
        dtype = self._check_input(x, "B")
        self._check_state(state, x.shape[0] if slots is None else None, dtype)

    def check_state(self, state: Any, rows: int | None) -> None:
        """A state of this mixer with so many rows; with any number of them when None.

        Raises:
            ValueError: it is not that.
        """
        self._check_state(state, rows, self.dtype)

    def _check_state(self, state: Any, rows: int | None, dtype: torch.dtype) -> None:
        if not isinstance(state, tuple):
            self._fail(f"the state must be {self.State.__name__}, got {type(state).__name__}")
        if len(state) != len(self.state_shapes):
            self._fail(f"the state must have {len(self.state_shapes)} tensors, got {len(state)}")
        if rows is None:
            rows = state[0].shape[0]
        names, dtypes = self.State._fields, self.state_dtypes(dtype)
        for name, got, shape, wanted in zip(names, state, self.state_shapes, dtypes, strict=True):
            if got.shape != (rows, *shape):
                self._fail(
                    f"{name} of the state must have shape {(rows, *shape)}, got {tuple(got.shape)}"
                )
            if got.dtype != wanted:
                self._fail(
                    f"{name} of the state must have dtype {dtype_name(wanted)}, "
                    f"got {dtype_name(got.dtype)}"
                )

    def _check_input(self, x: Tensor, rows: str) -> torch.dtype:
        """The dtype of this mixer."""
        if x.dim() != 2 + rows.count(",") or x.shape[-1] != self.d_model:
            self._fail(f"x must have shape ({rows}, {self.d_model}), got {tuple(x.shape)}")
        dtype = self.dtype
        if x.dtype != dtype and not self._cast(x, dtype):
            self._fail(f"x must have dtype {dtype_name(dtype)}, got {dtype_name(x.dtype)}")
        return dtype

    @staticmethod
    def _cast(x: Tensor, dtype: torch.dtype) -> bool:
        """Whether autocast makes ``x`` an input of a mixer of ``dtype``: in a step, where nothing
        is cast, one of float32 alone."""
        device = x.device.type
        if x.is_meta or not torch.is_autocast_enabled(device):  # meta tensors have no autocast
            return False
        both = {torch.float32, torch.get_autocast_dtype(device)}
        return {x.dtype, dtype} <= both and (x.dim() == 3 or dtype == torch.float32)

    def _packed(self, x: Tensor, cu_seqlens: Tensor) -> int:
        if not isinstance(cu_seqlens, Tensor):
            self._fail(f"cu_seqlens must be a tensor, got {type(cu_seqlens).__name__}")
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            got = dtype_name(cu_seqlens.dtype)
            self._fail(f"cu_seqlens must have dtype int32 or int64, got {got}")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
            self._fail(f"cu_seqlens must have shape (S + 1,), got {tuple(cu_seqlens.shape)}")
        if x.shape[0] != 1:
            self._fail(f"x must have batch size B = 1 with cu_seqlens, got {tuple(x.shape)}")
        # Where values cannot be read, the ops read them when they run.
        if readable(cu_seqlens):
            try:
                check_offsets(type(self).__name__, cu_seqlens, x.shape[1])
            except RuntimeError as error:
                raise ValueError(*error.args) from None
        return cu_seqlens.shape[0] - 1

    def _fail(self, message: str) -> None:
        raise ValueError(f"{type(self).__name__}: {message}")


def readable(x: Tensor) -> bool:
    """Whether there are values to look at: not in a graph, under torch.func, of a fake tensor or on
    "meta"."""
    return type(x) is Tensor and not (
        x.is_meta or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    )


class Kept:
    """What steps make of parameters alone, kept until one of them changes.

    It lies beside copies of the parameters: neither identity nor version of one tells of every
    change, such as an optimizer's. A copy of the module keeps nothing.
    """

    def __init__(self) -> None:
        self._kept: tuple[list[Tensor], Any] | None = None

    def __call__(self, make: Callable[[], T], *parameters: Tensor) -> T:
        """``make()``, or what it returned for equal parameters."""
        kept, now = self._kept, [p.detach() for p in parameters]
        # Comparing would wait for another device.
        if not all(p.is_cpu and readable(p) for p in now):
            return make()
        if kept is None or not all(map(_same, kept[0], now)):
            # Copied first: what changes in between is seen at the next step.
            kept = self._kept = [p.clone() for p in now], make()
        return kept[1]

    def __reduce__(self) -> tuple:
        return Kept, ()


def _same(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and torch.equal(x, y)
