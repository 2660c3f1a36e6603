"""The kernels that recurra.jit compiles for a GPU, started by the same Python over the emulator of
tests/cpp, on memory of the CPU: what is handed to them, and their bits."""

from __future__ import annotations

import ctypes
import subprocess

import pytest
import torch

import recurra
from recurra.jit import compile as compiling
from recurra.jit import gpu
from recurra.jit.call import Sequences
from support import LEAKY_CELL, ROOT, same_bits

pytestmark = pytest.mark.skipif(compiling.compiler() is None, reason="no C++ compiler")

# How tests/cpp starts kernels: what a rule of CUDA that is broken throws comes back as text.
ENTRY = """
#include <cstdio>
#include <exception>
#include "recurra/rnn/jit_kernels.h"
extern "C" const char* start(const char* kernel, int wide, unsigned blocks, unsigned threads,
                             const recurra::JitCall* call) {
  namespace at = recurra::cuda::rnn_detail;
  static char text[200];
  text[0] = 0;
  const auto run = [&](auto in_float, auto in_double) {
    recurra::cuda::emulate(wide ? in_double : in_float, blocks, threads, *call);
  };
  try {
    switch (kernel[0]) {
      case 'f': run(at::jit_forward<float>, at::jit_forward<double>); break;
      case 'b': run(at::jit_backward<float>, at::jit_backward<double>); break;
      case 's': run(at::jit_sums<float>, at::jit_sums<double>); break;
    }
  } catch (const std::exception& error) {
    std::snprintf(text, sizeof text, "%s", error.what());
  }
  return text;
}
"""


class Emulated:
    """As gpu.Device."""

    def __init__(self, cell, folder) -> None:
        (folder / "cell.cpp").write_text(gpu.program(LEAKY_CELL, cell._struct, cell.info) + ENTRY)
        include = recurra.include_path()
        (folder / "recurra").mkdir()  # where the headers of the package look for it
        shim = f'#include "{ROOT}/tests/cpp/cuda_emulator.h"\n'
        (folder / "recurra/cuda_emulator.h").write_text(shim)
        subprocess.run(
            [
                *(*compiling.compiler(), "-std=c++20", "-O1", "-fPIC", "-shared", "-w"),
                *("-ffp-contract=off", "-DRECURRA_ISA=cuda", "-DRECURRA_CUDA_EMULATOR"),
                *(f"-I{include}", f"-I{include}/recurra", f"-I{ROOT}/tests/cpp", "-I."),
                *("cell.cpp", str(ROOT / "tests/cpp/cuda_emulator.cpp"), "-o", "cell.so"),
            ],
            cwd=folder,
            check=True,
            timeout=300,
        )
        self._library = ctypes.CDLL(str(folder / "cell.so"))
        self._library.start.restype = ctypes.c_char_p
        self.started = []

    def launch(self, kernel, wide, blocks, threads, call, on) -> None:
        self.started.append((kernel, wide, blocks, threads))
        said = self._library.start(kernel.encode(), wide, blocks, threads, ctypes.byref(call))
        assert said == b"", said.decode()


@pytest.fixture(scope="module")
def leaky(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECURRA_JIT_CACHE", str(tmp_path_factory.mktemp("cells")))
        cell = recurra.jit.cell(LEAKY_CELL)
        device = Emulated(cell, tmp_path_factory.mktemp("emulated"))
        yield cell._library(), gpu.Kernels(cell.info, device), device


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["plain", "narrow", "packed", "reset", "states", "empty"])
def test_the_bits_are_those_of_the_cpu(leaky, kind, dtype):
    cpu, kernels, device = leaky
    generator = torch.Generator().manual_seed(3)

    def normal(*size, of=dtype):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(of)

    B, T, N = {"narrow": (9, 40, 5), "packed": (1, 90, 20), "empty": (2, 0, 3)}.get(
        kind, (2, 70, 33)
    )
    held = torch.float64 if dtype == torch.float64 else torch.float32
    ends = [0, 7, 7, 60, T]
    S = len(ends) - 1 if kind == "packed" else B
    reset = torch.rand(B, T, generator=generator) < 0.1 if kind == "reset" else None
    of_cpu = Sequences(S, T, ends if kind == "packed" else None, reset)
    packed = torch.tensor(ends, dtype=torch.int32) if kind == "packed" else None
    of_gpu = Sequences(S, T, None, reset, packed)
    x, params = normal(B, T, 2, N).transpose(2, 3).contiguous().transpose(2, 3), normal(2, N)
    h0 = normal(S, 2, N, of=held) if kind != "plain" else None
    wanted = (2, N) if kind == "states" else (N,)
    padded = -(-N // 16) * 16
    results = []
    for engine, sequences in ((cpu, of_cpu), (kernels, of_gpu)):
        y, h_last = torch.full((B, T, *wanted), 7.0, dtype=dtype), torch.zeros(S, 2, N, dtype=held)
        saved = torch.zeros(sequences.chunks(32), 2, padded, dtype=held)
        engine.forward(sequences, x, params, h0, y, h_last, saved)
        grads = engine.backward(sequences, 2 * y, h_last, saved, x, params, h0)
        results.append((y, h_last, saved[..., :N], *grads))
    for got, want in zip(results[1], results[0], strict=True):
        assert same_bits(got, want)
    wide = dtype == torch.float64
    blocks = -(-S * N // 64)
    assert device.started[-3:] == [
        ("forward", wide, blocks, 64),
        ("backward", wide, blocks, 64),
        ("sums", wide, 2 * -(-N // 16), 128),
    ]
