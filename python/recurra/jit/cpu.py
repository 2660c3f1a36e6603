"""A cell that the system's compiler has made a library of, called through C."""

from __future__ import annotations

import ctypes
import threading

import torch
from torch import Tensor

from recurra.jit import compile as compiling
from recurra.jit import source as text
from recurra.jit.call import Sequences, call_of
from recurra.ops.rnn import CellInfo

_MOST_HELD = 32  # rows that csrc/rnn/backward.simd.cpp has room for


class Library:
    """A compiled cell.

    Args:
        source: its text.
        struct: the name of its struct.
        info: its names.

    Raises:
        CompileError: the text does not compile.
        ValueError: its derivatives are not those of its step.
    """

    def __init__(self, source: str, struct: str, info: CellInfo) -> None:
        program = text.program(source, struct, info)
        engine = '#include "recurra/rnn/jit.cpp"\n'
        self.info = info
        self._library = ctypes.CDLL(str(compiling.library(program, engine, source)))
        for name in ("held", "parts"):
            getattr(self._library, f"recurra_jit_{name}").restype = ctypes.c_int64
        self._lock = threading.Lock()
        held = self._library.recurra_jit_held()
        if held > _MOST_HELD:
            most = _MOST_HELD - len(info.states)
            raise ValueError(
                f"jit.cell: the step of {info.name} must have at most {most} elementary functions, "
                f"got {held - len(info.states)}"
            )
        self._check()

    def _call(self, name: str, sequences: Sequences, **tensors: Tensor | None) -> int | None:
        call = call_of(sequences, **tensors)
        offsets = sequences.offsets
        if offsets is not None:
            offsets = (ctypes.c_int64 * len(offsets))(*offsets)
            call.offsets = ctypes.addressof(offsets)
        call.threads = torch.get_num_threads()
        return getattr(self._library, f"recurra_jit_{name}")(ctypes.byref(call))

    def forward(self, sequences: Sequences, x, params, h0, y, h_last, saved) -> None:
        """Writes y, h_last and, where it is not None, saved."""
        given = {"x": x, "params": params, "h0": h0, "saved": saved}
        self._call("forward", sequences, y=y, h_last=h_last, **given)

    def backward(self, sequences: Sequences, dy, dh_last, saved, x, params, h0):
        """dx, dparams and dh0."""
        given = {"x": x, "params": params, "h0": h0, "saved": saved}
        rows = self._call("parts", sequences, x=x, params=params)
        dx, dparams = torch.empty_like(x), torch.empty_like(params)
        shape = (sequences.count, len(self.info.states), x.shape[3])
        dh0 = saved.new_empty(shape) if h0 is None else torch.empty_like(h0)
        sums = saved.new_zeros(rows, params.shape[0], saved.shape[2])
        given |= {"y": dy, "h_last": dh_last}
        self._call("backward", sequences, dx=dx, dparams=dparams, dh0=dh0, sums=sums, **given)
        return dx, dparams, dh0

    def _check(self) -> None:
        """Holds the derivatives that the engine has against those of the step alone."""
        info, points = self.info, 16
        G, S, P = len(info.inputs), len(info.states), len(info.params)
        generator = torch.Generator().manual_seed(0)
        x, h, p = (
            torch.rand(n, points, dtype=torch.float64, generator=generator) + 0.1 for n in (G, S, P)
        )
        x[:, ::2].neg_()
        h[:, 1::4].neg_()
        out, J = torch.empty(points, S).double(), torch.empty(points, S, G + S + P).double()
        for n in range(points):
            at = [t[:, n].contiguous() for t in (x, h, p)]
            self._library.recurra_jit_jacobian(
                *(ctypes.c_void_p(t.data_ptr()) for t in (*at, out[n], J[n]))
            )
        one = Sequences(1, 1, None, None)
        saved = x.new_zeros(1, S, points)
        saved[0] = h
        for s in range(S):
            dh = torch.zeros(1, S, points).double()
            dh[0, s] = 1
            dx, dp, dh0 = self.backward(one, None, dh, saved, x[None, None], p, h[None])
            got = torch.cat([dx[0, 0], dh0[0], dp]).T
            if not torch.allclose(got, J[:, s], rtol=1e-6, atol=1e-9, equal_nan=True):
                raise ValueError(
                    f"jit.cell: the derivatives of {info.name} are not those of its step: a "
                    "statement must have at most one elementary function, and affine_params only "
                    "parameters that enter as (input + parameter * state)"
                )
