"""How recurra.jit loads and starts kernels, on a driver that only notes what it is told."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch

import recurra
from recurra.jit import compile as compiling
from recurra.jit import gpu

SOURCE = """
struct Sum {
  static constexpr auto inputs = names("x");
  static constexpr auto states = names("h");
  static constexpr auto params = names("a");
  static constexpr auto affine_params = affine();
  static constexpr int output = 0;
  template <class X, class H, class P>
  RECURRA_FN static auto step(X inputs, H states, P params) {
    return pack(fma(get<0>(params), get<0>(states), get<0>(inputs)));
  }
};
"""


class Machine:
    """A GPU whose driver notes calls. A thread has a context once its device was set."""

    def __init__(self) -> None:
        self.told, self.libraries, self.capturing = [], [], False
        self._context = threading.local()

    def set_device(self, index) -> None:
        self._context.of = index

    def _here(self, what: str):
        if getattr(self._context, "of", None) is None:
            return 201  # CUDA_ERROR_INVALID_CONTEXT
        self.told.append(what)
        return 0

    def from_cubin(self, code):
        assert code == b"code"

        class Library:
            def get_kernel(self, symbol):
                return SimpleNamespace(handle=int(symbol), of=self)

        library = Library()
        self._here("library")
        self.libraries.append(weakref.ref(library))
        return library

    def launch(self, function, *rest):
        return (self._here(f"launch {function}"),)


@pytest.fixture
def machine(monkeypatch):
    here = Machine()
    driver = SimpleNamespace(
        CUresult=SimpleNamespace(CUDA_SUCCESS=0),
        CUfunction_attribute=SimpleNamespace(CU_FUNC_ATTRIBUTE_NUM_REGS="registers"),
        CUkernel=int,
        CUfunction=int,
        CUstream=int,
        cuKernelGetFunction=lambda kernel: (here._here(f"kernel {kernel}"), kernel),
        cuFuncGetAttribute=lambda what, function: (here._here(f"{what} {function}"), 1),
        cuLaunchKernel=here.launch,
        cuDriverGetVersion=lambda: (0, 13000),
    )
    core = SimpleNamespace(ObjectCode=SimpleNamespace(from_cubin=here.from_cubin))
    monkeypatch.setattr(gpu, "_driver", lambda: driver)
    monkeypatch.setattr(compiling, "cuda_core", lambda: core)
    monkeypatch.setattr(
        compiling,
        "cubin",
        lambda whole, arch, names: (b"code", {name: str(n) for n, name in enumerate(names)}),
    )
    monkeypatch.setattr(compiling, "nvrtc_version", lambda: (13, 0))
    monkeypatch.setattr(compiling, "compiler", lambda: None)
    for name, function in {
        "device": lambda on: contextlib.nullcontext(),
        "current_device": lambda: 0,
        "set_device": here.set_device,
        "get_device_capability": lambda index: (9, 0),
        "is_current_stream_capturing": lambda: here.capturing,
        "current_stream": lambda index: SimpleNamespace(cuda_stream=5),
    }.items():
        monkeypatch.setattr(torch.cuda, name, function)
    gpu._load.cache_clear()
    yield here
    gpu._load.cache_clear()


def launch(cell, kernel="forward", wide=False) -> None:
    cell._kernels._device.launch(kernel, wide, 1, 64, gpu.Call(), torch.device("cuda", 0))


def test_all_kernels_are_loaded_before_the_first_runs(machine):
    cell = recurra.jit.cell(SOURCE)
    launch(cell)
    loaded = [f"{what} {n}" for n in range(6) for what in ("kernel", "registers")]
    assert machine.told == ["library", *loaded, "launch 0"]
    machine.told.clear()
    launch(cell, "backward", True)
    launch(cell, "sums", True)
    assert machine.told == ["launch 4", "launch 5"]


def test_a_thread_without_a_context(machine):
    """As those of autograd, where the forward was another's."""
    cell, failed = recurra.jit.cell(SOURCE), []

    def run(kernel) -> None:
        try:
            launch(cell, kernel)
        except RuntimeError as error:
            failed.append(error)

    for kernel in ("forward", "backward"):
        thread = threading.Thread(target=run, args=(kernel,))
        thread.start()
        thread.join()
    assert not failed and machine.told[-2:] == ["launch 0", "launch 1"]


def test_equal_cells_share_kernels_that_outlive_them(machine):
    for _ in range(2):
        cell = recurra.jit.cell(SOURCE)
        launch(cell)
        del cell
        gc.collect()
    assert len(machine.libraries) == 1 and machine.libraries[0]() is not None
    launch(recurra.jit.cell(SOURCE + "// another"))
    assert len(machine.libraries) == 2


def test_two_threads_load_once(machine, monkeypatch):
    cell, together = recurra.jit.cell(SOURCE), threading.Barrier(2)
    code = compiling.cubin

    def slowly(*args):
        with contextlib.suppress(threading.BrokenBarrierError):
            together.wait(0.2)
        return code(*args)

    monkeypatch.setattr(compiling, "cubin", slowly)
    threads = [threading.Thread(target=launch, args=(cell, k)) for k in ("forward", "backward")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(machine.libraries) == 1


def test_nothing_is_loaded_while_a_graph_is_captured(machine):
    cell = recurra.jit.cell(SOURCE)
    machine.capturing = True
    with pytest.raises(RuntimeError, match="rnn: a cell of recurra.jit must have run once before"):
        launch(cell)
    assert not machine.told
    machine.capturing = False
    launch(cell)
    machine.capturing = True
    launch(cell, "backward")
    assert machine.told[-1] == "launch 1"


def test_what_the_driver_refuses(machine):
    cell = recurra.jit.cell(SOURCE)
    gpu._driver().cuLaunchKernel = lambda *_: ("CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES",)
    with pytest.raises(RuntimeError, match="rnn: the kernel of a cell.*OUT_OF_RESOURCES"):
        launch(cell)


@pytest.mark.parametrize(
    "nvrtc, driver, message",
    [
        ((13, 5), 13000, None),
        ((12, 9), 13000, None),
        ((12, 9), 12020, None),  # code of a later minor version is taken
        ((13, 5), 12080, r"NVRTC 13.5, .* of CUDA 12.8, .*: pip install 'recurra\[cuda12\]'"),
        ((14, 0), 13010, r"NVRTC 14.0, .* of CUDA 13.1, does not load: a later driver"),
    ],
)
def test_nvrtc_must_fit_the_driver(machine, monkeypatch, nvrtc, driver, message):
    monkeypatch.setattr(compiling, "nvrtc_version", lambda: nvrtc)
    gpu._driver().cuDriverGetVersion = lambda: (0, driver)
    cell = recurra.jit.cell(SOURCE)
    if message is None:
        launch(cell)
        return
    with pytest.raises(RuntimeError, match=message):
        launch(cell)
    assert not machine.told


@pytest.mark.parametrize("cuda, extra", [("12.8", "cuda12"), ("13.0", "cuda"), (None, "cuda")])
def test_an_old_nvrtc(monkeypatch, cuda, extra):
    nvrtc = SimpleNamespace(nvrtcVersion=lambda: (0, 12, 4))
    for name, module in {
        "cuda": SimpleNamespace(),
        "cuda.bindings": SimpleNamespace(nvrtc=nvrtc),
        "cuda.bindings.nvrtc": nvrtc,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    said = rf"NVRTC must be that of CUDA 12.6 or later, got 12.4: pip install 'recurra\[{extra}\]'"
    with pytest.raises(RuntimeError, match=said):
        compiling.nvrtc_version.__wrapped__()
