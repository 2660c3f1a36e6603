"""Cells that users write in C++, compiled when they are made.

The text is that of a header of the library's own cells, and it runs under the same engines, with
the bits that the cell would have in the library: on the CPU through the system's C++ compiler, on
a GPU through NVRTC.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recurra._check import fail
from recurra.jit import compile as compiling
from recurra.jit import gpu, op
from recurra.jit import source as text
from recurra.jit.compile import CompileError
from recurra.jit.cpu import Library
from recurra.ops.rnn import check_options

__all__ = ["Cell", "CompileError", "cell"]


class Cell:
    """A compiled cell, made by :func:`cell`.

    It is called like :func:`recurra.rnn`, or given to it as ``cell``.

    Attributes:
        source: its text.
        info: its names.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._struct, self.info = text.read(source)
        self._libraries: dict[str, Library] = {}
        self._kernels = gpu.Kernels(self.info, gpu.Device(source, self._struct, self.info))
        if compiling.compiler() is not None:
            self._library()
        self._number = op.number_of(self)

    def __repr__(self) -> str:
        info = self.info
        return f"jit.Cell({info.name}, inputs=({', '.join(info.inputs)}))"

    def _library(self) -> Library:
        isa = torch.ops.recurra._isa()
        if isa not in self._libraries:
            self._libraries[isa] = Library(self.source, self._struct, self.info)
        return self._libraries[isa]

    def engine(self, device: torch.device) -> Library | gpu.Kernels:
        """What computes with tensors on a device."""
        return self._library() if device.type == "cpu" else self._kernels

    def cubin(self, arch: str = "sm_90") -> bytes:
        """The machine code of the forward and the backward for a GPU, by NVRTC.

        Needs the extra ``cuda`` or ``cuda12`` of the package and no GPU. What it compiles is kept,
        so that the first call on a GPU of that architecture only loads it.

        Args:
            arch: the architecture, such as "sm_80", "sm_90" or "sm_120".

        Raises:
            CompileError: the source does not compile.
            RuntimeError: ``cuda.core`` or NVRTC is not installed, or too old, or does not know
                ``arch``.
        """
        return gpu.cubin(gpu.program(self.source, self._struct, self.info), arch)[0]

    def __call__(self, x: Tensor, params: Tensor, h0: Tensor | None = None, **options):
        return self.rnn(x, params, h0, **options)

    def rnn(
        self,
        x: Tensor,
        params: Tensor,
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
        """What :func:`recurra.rnn` does for this cell; ``algorithm`` is "auto" or "sequential"."""
        check_options("rnn", algorithm, on_fail, chunk, max_passes)
        if algorithm not in ("auto", "sequential"):
            fail(
                "rnn",
                'algorithm must be "auto" or "sequential" for a cell of recurra.jit, got '
                f'"{algorithm}"',
            )
        if x.device.type not in ("cpu", "cuda"):
            fail("rnn", f"x must be on cpu or cuda for a cell of recurra.jit, got {x.device.type}")
        return op.rnn(
            x,
            params,
            h0,
            cell=self._number,
            return_states=return_states,
            reset=reset,
            cu_seqlens=cu_seqlens,
        )


def cell(source: str) -> Cell:
    """Compiles a cell.

    ``source`` is the struct of a cell as in a header of csrc/cells, with or without what stands
    around it there: ``name``, ``inputs``, ``states``, ``params``, ``affine_params`` and ``output``,
    and ``step`` in the functions of csrc/math. On a machine with a C++ compiler that happens here
    and takes some seconds; the result is kept in a folder of the user's, by all that it is made of.

    Compiling runs the compiler on ``source`` and using the cell runs what it says: it must be text
    that you would also build as a program.

    Args:
        source: the text in C++.

    Returns:
        A cell to be called like :func:`recurra.rnn`, or to be given to it.

    Raises:
        CompileError: it does not compile; the message has the compiler's own, in which ``cell.h``
            is ``source``.
        ValueError: it is not plain text, it does not hold one cell with its names, or the
            derivatives that the engines take are not those of its step.
        RuntimeError: the folder of compiled cells cannot be used, or what CXX names is no compiler.
    """
    if not isinstance(source, str):
        raise ValueError(f"jit.cell: source must be text, got {type(source).__name__}")
    return Cell(source)
