"""A cell that NVRTC has compiled, run on torch's current stream."""

from __future__ import annotations

import ctypes
import functools
import threading

import torch
from torch import Tensor

from recurra.jit import compile as compiling
from recurra.jit import source as text
from recurra.jit.call import Call, Sequences, call_of
from recurra.ops.rnn import CellInfo

# Of csrc/rnn/chain.h, backward.h and rnn.h.
_THREADS, _COLUMNS, _PARTS, _SPAN, _LANES = 64, 16, 8, 64, 16
_KERNELS = ("forward", "backward", "sums")

_lock = threading.Lock()


def program(source: str, struct: str, info: CellInfo) -> str:
    """What NVRTC compiles. Tapes come before the dual numbers that other headers bring."""
    cell = text.program(source, struct, info)
    first = '#include "recurra/rnn/countable.h"\n#include "recurra/math/taped.h"\n'
    return f'{first}{cell}#include "recurra/rnn/jit_kernels.h"\n'


def _name(kernel: str, wide: bool) -> str:
    """A kernel as C++ names it."""
    return f"recurra::cuda::rnn_detail::jit_{kernel}<{'double' if wide else 'float'}>"


def cubin(whole: str, arch: str) -> tuple[bytes, dict[str, str]]:
    """The machine code of all kernels of a program, and their names in it, by those of C++."""
    names = tuple(_name(kernel, wide) for wide in (False, True) for kernel in _KERNELS)
    return compiling.cubin(whole, arch, names)


def _check_driver() -> None:
    """Refuses code that the driver would: that of a later major version of CUDA than its own."""
    error, number = _driver().cuDriverGetVersion()
    _done(error)
    made = compiling.nvrtc_version()
    if made[0] <= number // 1000:
        return
    has = f"{number // 1000}.{number % 1000 // 10}"
    other = "a later driver" if number // 1000 != 12 else "pip install 'recurra[cuda12]'"
    raise RuntimeError(
        f"rnn: a cell of recurra.jit is compiled by NVRTC {made[0]}.{made[1]}, whose code the "
        f"driver, of CUDA {has}, does not load: {other}"
    )


# Never unloaded: a captured graph may replay kernels when no cell is left that has them. Equal
# cells share them.
@functools.cache
def _load(whole: str, index: int) -> dict:
    """The kernels of a program on the device of a number, which is current, by the names of C++.

    All at once, since a graph that captures the forward may go on to the backward, and loading
    cannot be captured.

    Raises:
        RuntimeError: a CUDA graph is being captured, or the driver is too old for NVRTC.
    """
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "rnn: a cell of recurra.jit must have run once before a CUDA graph is captured"
        )
    core = compiling.cuda_core()
    _check_driver()
    major, minor = torch.cuda.get_device_capability(index)
    code, found = cubin(whole, f"sm_{major}{minor}")
    library = core.ObjectCode.from_cubin(code)
    kernels = {name: library.get_kernel(symbol) for name, symbol in found.items()}
    driver = _driver()
    for kernel in kernels.values():
        # The driver may load a kernel as late as something is asked of it in a context.
        error, function = driver.cuKernelGetFunction(driver.CUkernel(int(kernel.handle)))
        _done(error)
        registers = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NUM_REGS
        _done(*driver.cuFuncGetAttribute(registers, function))
    return kernels


def _driver():
    from cuda.bindings import driver

    return driver


def _done(error, *_) -> None:
    if error != _driver().CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"rnn: the kernel of a cell of recurra.jit: {error!r}")


class Device:
    """Starts the kernels of a cell by the CUDA driver.

    Args:
        source: the text of the cell.
        struct: the name of its struct.
        info: its names.
    """

    def __init__(self, source: str, struct: str, info: CellInfo) -> None:
        self._cell = source, struct, info

    @functools.cached_property
    def program(self) -> str:
        """What :func:`program` returns for the cell."""
        return program(*self._cell)

    def launch(self, kernel: str, wide: bool, blocks: int, threads: int, call: Call, on) -> None:
        """Puts a kernel on the current stream of the device ``on``.

        Raises:
            RuntimeError: the driver refuses it, or the kernel is not loaded and a CUDA graph is
                being captured.
        """
        with torch.cuda.device(on):
            index = torch.cuda.current_device()
            # A thread of autograd has no context of the driver, and torch.cuda.device makes none
            # where the device is current already.
            torch.cuda.set_device(index)
            with _lock:  # or the kernels of the slower of two threads would be unloaded
                handle = _load(self.program, index)[_name(kernel, wide)].handle
            driver = _driver()
            argument = (ctypes.c_void_p * 1)(ctypes.addressof(call))
            _done(
                *driver.cuLaunchKernel(
                    driver.CUfunction(int(handle)),
                    *(blocks, 1, 1, threads, 1, 1, 0),
                    driver.CUstream(torch.cuda.current_stream(index).cuda_stream),
                    ctypes.addressof(argument),
                    0,
                )
            )


class Kernels:
    """The calls of a compiled cell, as :class:`recurra.jit.cpu.Library` has them.

    Args:
        info: its names.
        device: what starts its kernels.
    """

    def __init__(self, info: CellInfo, device: Device) -> None:
        self.info, self._device = info, device

    def _launch(self, kernel: str, x: Tensor, tasks: int, each: int, threads: int, call) -> None:
        blocks = min(-(-tasks // each), 2**31 - 1)
        if blocks > 0:
            wide = x.dtype == torch.float64
            self._device.launch(kernel, wide, blocks, threads, call, x.device)

    def forward(self, sequences: Sequences, x, params, h0, y, h_last, saved) -> None:
        """Writes y, h_last and, where it is not None, saved."""
        given = {"x": x, "params": params, "h0": h0, "saved": saved}
        call = call_of(sequences, y=y, h_last=h_last, **given)
        self._launch("forward", x, sequences.count * x.shape[3], _THREADS, _THREADS, call)

    def backward(self, sequences: Sequences, dy, dh_last, saved, x, params, h0):
        """dx, dparams and dh0."""
        N = x.shape[3]
        dx, dparams = torch.empty_like(x), torch.empty_like(params)
        shape = (sequences.count, len(self.info.states), N)
        dh0 = saved.new_empty(shape) if h0 is None else torch.empty_like(h0)
        sums = saved.new_empty(saved.shape[0], params.shape[0], saved.shape[2])
        given = {"x": x, "params": params, "h0": h0, "saved": saved, "y": dy, "h_last": dh_last}
        call = call_of(sequences, dx=dx, dparams=dparams, dh0=dh0, sums=sums, **given)
        call.parts = parts(sequences, N)
        self._launch("backward", x, sequences.count * N, _THREADS, _THREADS, call)
        blocks = params.shape[0] * -(-N // _COLUMNS)
        self._launch("sums", x, blocks, 1, _COLUMNS * _PARTS, call)
        return dx, dparams, dh0


def parts(sequences: Sequences, channels: int) -> int:
    """The runs of sequences that the backward sums by themselves, as rnn_parts of
    csrc/rnn/choose.h has them."""
    apart = sequences.packed or sequences.reset is not None or not 1 <= channels < _LANES
    together = 1 if apart else _SPAN // channels
    return min(max(-(-sequences.count // together), 1), _PARTS)
