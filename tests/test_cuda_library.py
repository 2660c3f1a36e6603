"""The CUDA libraries load on every torch, also on one that was built without CUDA, and that of JAX
without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import recurra

LIBRARY = Path(recurra.__file__).parent / "_ops_cuda.so"


@pytest.mark.skipif(not LIBRARY.exists(), reason="built without nvcc")
def test_loads_on_this_torch():
    program = (
        "import recurra, sys, torch\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "torch.ops.load_library(sys.argv[1])\n"
        "assert has('recurra::linear_scan', 'CUDA')\n"
        "a = torch.rand(2, 5, 3)\n"
        "assert torch.equal(recurra.linear_scan(a, a)[0][:, 0], a[:, 0])\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", program, str(LIBRARY)], check=True, timeout=120)


@pytest.mark.skipif(not LIBRARY.exists(), reason="built without nvcc")
def test_custom_calls_of_xla_load_without_torch():
    program = (
        "import ctypes, sys\n"
        "library = ctypes.CDLL(sys.argv[1])\n"
        "said = ctypes.create_string_buffer(200)\n"
        "assert library.recurra_cuda_status(-1, said, ctypes.c_size_t(200)) == 1\n"
        "assert said.value == b'recurra: no CUDA device has number -1', said.value\n"
        "maps = open('/proc/self/maps').read()\n"
        "assert 'lib/librecurra_cuda.so' in maps and 'torch' not in maps\n"
    )
    path = LIBRARY.with_name("_xla_cuda.so")
    subprocess.run([sys.executable, "-c", program, str(path)], check=True, timeout=120)


def test_without_the_library_cuda_tensors_are_told_why():
    """In a process of its own, whose ops are given to the CUDA key by hand."""
    program = (
        "import recurra, torch\n"
        "from recurra import _library\n"
        "if 'cuda' not in _library._loaded:\n"
        "    kept = _library.refuse_on_cuda()\n"
        "    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)\n"
        "    a = torch.rand(2, 5, 3)\n"
        "    try:\n"
        "        torch.ops.recurra.linear_scan.default.redispatch(cuda, a, a)\n"
        "    except RuntimeError as error:\n"
        "        told = 'linear_scan: the tensors are on a CUDA device, but the CUDA library is'\n"
        "        assert told in str(error), error\n"
        "    else:\n"
        "        raise AssertionError('no error')\n"
        "    assert torch.equal(recurra.linear_scan(a, a)[0][:, 0], a[:, 0])\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("log_a", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_gpu_has_the_bits_of_the_cpu(dtype, log_a, reverse):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(3, 65, 33, generator=generator).to(dtype) for _ in range(2))
    h0 = torch.rand(3, 33, generator=generator, dtype=torch.float64).to(
        torch.float64 if dtype == torch.float64 else torch.float32
    )
    on_cpu = recurra.linear_scan(a, b, h0, log_a=log_a, reverse=reverse)
    on_gpu = recurra.linear_scan(a.cuda(), b.cuda(), h0.cuda(), log_a=log_a, reverse=reverse)
    for cpu, gpu in zip(on_cpu, on_gpu, strict=True):
        assert torch.equal(cpu, gpu.cpu())
