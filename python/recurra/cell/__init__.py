"""Cells that users write in Python, which :func:`recurra.rnn` runs along time like its own.

A cell of the library is compiled from one C++ function; a :class:`Cell` is a plain torch function
and what its Jacobian looks like. torch.func differentiates it, and Newton's method and the gradient
solve their linear recurrences by the compiled scans (DEER: Lim et al., arXiv 2309.12252; ParaRNN:
Danieli et al., arXiv 2510.21450).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from recurra._check import check, check_offsets, dtype_name, fail, state_dtype
from recurra.cell import probe
from recurra.cell.call import Call, Rnn, no_autocast, rows_of
from recurra.cell.solve import MAX_PASSES, Sequences
from recurra.ops import _register
from recurra.ops.rnn import CellInfo, check_options, check_sizes

__all__ = ["Cell"]

# Steps of a window of "newton": enough that the calls of torch are few beside their work, and few
# enough that a guess which knows nothing of the state is near.
CHUNK = 2048


def _names(argument: str, given: int | str | Iterable[str], letter: str) -> tuple[str, ...]:
    if isinstance(given, int):
        return tuple(f"{letter}{n}" for n in range(given))
    names = (given,) if isinstance(given, str) else tuple(given)
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"Cell: {argument} must be names or their number, got {given!r}")
    return names


class Cell:
    r"""A nonlinear recurrence :math:`h_t = f(x_t, h_{t-1}, p)` by a plain torch function.

    For "diagonal" and "block", where channels do not mix, ``step(x, h, p)`` computes many rows at
    once, which are the steps of all sequences: x (G, rows, N), h (K, rows, N) and p (P, 1, N), one
    entry of the first dimension for each name, and returns the new states like h. For "dense" it
    computes a single step: x (G, N), h (K, N), and p whatever ``params`` of :func:`recurra.rnn` is,
    a tensor or tuples, lists and dicts of tensors. Arguments are float32 where activations have 16
    bits. It must be a pure function: no randomness, no change of its arguments, and no tensor that
    requires a gradient but its arguments.

    On first use for a size and dtype the step is tried at a few points (:meth:`check`).

    Args:
        step: the function.
        inputs: names of the inputs, the rows of x, or their number.
        states: names of the states, or their number.
        params: names of the parameters, or their number; not given for "dense".
        output: the state that y holds, by name or number; the last one when None.
        structure: what a new state depends on. "diagonal": its own old value alone. "block": all
            states of its channel. "dense": everything; then K·N must be at most 16.
        name: of the cell, as errors call it; the name of ``step`` when None.

    Raises:
        ValueError: a name or number is out of range.
    """

    def __init__(
        self,
        step: Callable[[Tensor, Tensor, object], Tensor],
        *,
        inputs: int | Iterable[str],
        states: int | Iterable[str] = 1,
        params: int | Iterable[str] | None = None,
        output: int | str | None = None,
        structure: str = "diagonal",
        name: str | None = None,
    ) -> None:
        if not callable(step):
            raise ValueError(f"Cell: step must be callable, got {type(step).__name__}")
        if structure not in probe.STRUCTURES:
            known = ", ".join(f'"{s}"' for s in probe.STRUCTURES)
            raise ValueError(f'Cell: structure must be one of {known}, got "{structure}"')
        if (params is None) != (structure == "dense"):
            rule = 'must not be given for the structure "dense", which takes any tensors'
            if params is None:
                rule = f'must be given for the structure "{structure}"'
            raise ValueError(f"Cell: params {rule}, got {params!r}")
        names = _names("states", states, "h")
        if not names:
            raise ValueError("Cell: states must be at least one, got none")
        index = len(names) - 1 if output is None else output
        if isinstance(index, str) and index in names:
            index = names.index(index)
        if index not in range(len(names)):
            raise ValueError(
                f"Cell: output must be one of {', '.join(names)}, its number from 0 or None, "
                f"got {output!r}"
            )
        self.step = step
        self.structure = structure
        self.info = CellInfo(
            name or getattr(step, "__name__", type(step).__name__),
            _names("inputs", inputs, "x"),
            names,
            _names("params", params or (), "p"),
            names[index],
            {},
        )
        self._tried: set[tuple] = set()

    def __repr__(self) -> str:
        info = self.info
        lists = ", ".join(
            f"{what}=({', '.join(names)})"
            for what, names in (("inputs", info.inputs), ("states", info.states))
        )
        return f'Cell({info.name}, {lists}, structure="{self.structure}")'

    def check(self, x: Tensor, params: object, h: Tensor | None = None) -> str:
        """Tries the step at a few points: at the values given and at random ones near them.

        The true derivative along random vectors is compared with what a Jacobian of each structure
        makes of them, in float64 where the step computes in it. Nothing is proved by it: what mixes
        for some values alone may be missed.

        Args:
            x: (B, T, G, N), as for :func:`recurra.rnn`.
            params: as for :func:`recurra.rnn`.
            h: states, (S, K, N), or None.

        Returns:
            The narrowest structure that fits: "diagonal", "block" or "dense". A wider one may be
            declared, which is only slower.

        Raises:
            ValueError: the step returns something that is not a new state, needs a wider structure
                than the declared one, mixes rows, changes its arguments, is not deterministic, or
                uses a tensor that requires a gradient and is not among its arguments.
            RuntimeError: an argument has the wrong shape, dtype or device.
        """
        leaves, spec, _ = self._arguments(x, params, h)
        self._first_row(x, leaves, spec)
        return self._try(x, leaves, spec, h)

    def _try(self, x: Tensor, leaves: list[Tensor], spec, h: Tensor | None) -> str:
        if x.shape[3] == 0:
            return self.structure
        dtype = state_dtype(x.dtype)
        with torch.no_grad(), no_autocast(x):
            leaves = [p.detach() for p in leaves]
            rows = rows_of(self.step, self.structure, leaves, spec, dtype)
            states = x.new_zeros(len(self.info.states), x.shape[3], dtype=dtype)
            x = x.detach().flatten(0, 1).to(dtype)
            return probe.structure(self.info.name, rows, x, h, states)

    def _first_row(self, x: Tensor, leaves: list[Tensor], spec) -> None:
        """What is cheap enough to look at in every call."""
        dtype = state_dtype(x.dtype)
        with no_autocast(x):
            leaves = [p.detach() for p in leaves]
            rows = rows_of(self.step, self.structure, leaves, spec, dtype)
            shape = (x.shape[3],) if self.structure == "dense" else (1, x.shape[3])
            row, state = (
                x.new_zeros(len(names), *shape, dtype=dtype)
                for names in (self.info.inputs, self.info.states)
            )
            probe.returned(self.info.name, self.step, row, state, rows.params)

    def _arguments(self, x, params, h0, reset=None, cu_seqlens=None):
        """The tensors of ``params``, how to put them together, and the sizes by letter."""
        info, given = self.info, {"reset": reset, "cu_seqlens": cu_seqlens}
        if self.structure != "dense":
            if params is None and not info.params:
                params = x.new_empty(0, x.shape[-1])
            sizes = check("rnn", x=x, params=params, h0=h0, **given)
            check_sizes("rnn", info, x, params, "h0", h0)
        else:
            sizes = check("rnn", x=x, h0=h0, **given)
            check_sizes("rnn", info, x, None, "h0", h0)
        leaves, spec = tree_flatten(() if params is None else params)
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                kind = type(leaf).__name__
                fail("rnn", f"params must be tensors for the cell {info.name}, got {kind}")
            if leaf.is_floating_point() and leaf.dtype not in (x.dtype, torch.float32):
                names = dict.fromkeys((dtype_name(x.dtype), "float32"))
                fail(
                    "rnn",
                    f"params must have dtype {' or '.join(names)} where x has "
                    f"{dtype_name(x.dtype)}, got {dtype_name(leaf.dtype)}",
                )
        K, N = len(info.states), x.shape[3]
        if self.structure == "dense" and K * N > probe.MOST_DENSE:
            fail(
                "rnn",
                f"x must have at most {probe.MOST_DENSE} states in all, K·N, for the dense cell "
                f"{info.name}, got K = {K} and N = {N}",
            )
        return leaves, spec, sizes

    def rnn(
        self,
        x: Tensor,
        params: object,
        h0: Tensor | None = None,
        *,
        algorithm: str = "auto",
        chunk: int | None = None,
        max_passes: int | None = None,
        on_fail: str = "sequential",
        return_states: bool = False,
        reset: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What :func:`recurra.rnn` does for a ``cell`` that is a :class:`Cell`."""
        leaves, spec, sizes = self._arguments(x, params, h0, reset, cu_seqlens)
        check_options("rnn", algorithm, on_fail, chunk, max_passes)
        offsets = None if cu_seqlens is None else check_offsets("rnn", cu_seqlens, x.shape[1])
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                "recurra: rnn with a Cell under torch.func is not implemented; use torch.autograd"
            )
        _register.differentiated("rnn", (x, h0, *leaves))
        self._first_row(x, leaves, spec)
        key = (state_dtype(x.dtype), x.device, x.shape[3], *(p.shape for p in leaves))
        if key not in self._tried:
            self._try(x, leaves, spec, h0)
            self._tried.add(key)
        if algorithm == "auto":
            algorithm = "newton" if self._prefers_newton(x, sizes["S"]) else "sequential"
        if reset is not None:
            reset = reset.clone()  # the backward reads it, whatever was written there since
        window = {"sequential": None, "newton": chunk or CHUNK, "newton-global": max(x.shape[1], 1)}
        call = Call(
            step=self.step,
            structure=self.structure,
            info=self.info,
            spec=spec,
            sequences=Sequences(x, offsets, reset),
            window=window[algorithm],
            most=max_passes or MAX_PASSES,
            algorithm=algorithm,
            on_fail=on_fail,
            all_states=return_states,
        )
        results = Rnn.apply(call, x, h0, *leaves)
        if call.warning:
            warnings.warn(call.warning, stacklevel=3)  # at the caller of recurra.rnn
        return results

    def _prefers_newton(self, x: Tensor, sequences: int) -> bool:
        """Where a step of the loop is all overhead, and there are many; measured on a CPU, where
        the loop takes about 40 us a step of 10 calls of torch and a pass 1.4 ms in all and 40 ns a
        number of a Jacobian."""
        K, N = len(self.info.states), x.shape[3]
        size = {"diagonal": K * N, "block": K * K * N, "dense": (K * N) ** 2}[self.structure]
        return sequences * size <= 128 and x.shape[0] * x.shape[1] >= 512 * sequences
