"""Every rule of ci/lint.py finds what it is for, and no more."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location(
    "lint", Path(__file__).resolve().parent.parent / "ci" / "lint.py"
)
lint = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(lint)

BAD = [
    ("csrc/torch/long.cpp", "x\n" * 601, "601 lines"),
    ("csrc/linear_scan/a.cpp", "__m256 x = _mm256_add_ps(a, b);", "csrc/simd"),
    ("csrc/tile.h", "#include <immintrin.h>", "csrc/simd"),
    ("csrc/parallel.cpp", "if (__builtin_cpu_supports(name)) {}", "csrc/simd"),
    ("CMakeLists.txt", "add_compile_options(-mavx2)", "-m flags"),
    ("CMakeLists.txt", "add_compile_options(-march=native)", "-m flags"),
    ("pyproject.toml", 'flags = "-ffast-math"', "-ffast-math"),
    ("csrc/linear_scan/a.cpp", '#include "torch/check.h"', "upward"),
    ("csrc/simd/vec.h", '#include "view.h"', "upward"),
    ("csrc/math/functions.h", '#include "cells/gru.h"', "upward"),
    ("csrc/cells/gru.h", '#include "tile.h"', "upward"),
    ("csrc/torch/check.cpp", '#include "python/module.h"', "upward"),
    ("csrc/tile.h", "#include <torch/csrc/stable/tensor.h>", "csrc/torch"),
    ("csrc/linear_scan/a.cu", "namespace {\nint x;\n}", "unnamed"),
    ("python/recurra/a.py", "import pickle", "pickle"),
    ("python/recurra/a.py", "x = torch.load(path)", "torch.load("),
    ("python/recurra/a.py", "x = eval(text)", "eval("),
    ("python/recurra/a.py", "exec(text)", "exec("),
    ("python/recurra/a.py", "yaml.load(text)", "yaml.load("),
    ("python/recurra/a.py", "run(command, shell=True)", "shell=True"),
    ("python/recurra/a.py", "load(name, trust_remote_code=True)", "trust_remote_code"),
    ("tests/test_a.py", "try:\n    f()\nexcept ValueError:\n    pass\n", "hides"),
    ("tests/test_a.py", "try: f()\nexcept: pass\n", "hides"),
    ("tests/test_a.py", "print(x)", "print("),
    ("tests/test_a.py", "@pytest.mark.xfail\n", "xfail"),
]

GOOD = [
    ("csrc/torch/long.cpp", "x\n" * 600),
    ("csrc/simd/vec.h", "#include <immintrin.h>\n__m256 x;"),
    ("CMakeLists.txt", "set(RECURRA_FLAGS_avx2 -mavx2 -mfma)"),
    ("csrc/linear_scan/a.cpp", '#include "tile.h"\n#include "math/functions.h"\n#include <cmath>'),
    ("csrc/torch/a.cpp", '#include <torch/csrc/stable/library.h>\n#include "linear_scan/a.h"'),
    ("python/recurra/a.py", "model.eval()\nrunner.exec(x)\nyaml.safe_load(text)"),
    ("tests/test_a.py", "try:\n    f()\nexcept ValueError:\n    raise\n"),
]


@pytest.mark.parametrize(("path", "text", "problem"), BAD)
def test_rule_finds(path, text, problem):
    assert any(problem in found for found in lint.check_text(path, text))


@pytest.mark.parametrize(("path", "text"), GOOD)
def test_rule_lets_pass(path, text):
    assert lint.check_text(path, text) == []


def test_objects():
    line = "0000000000000000 {} void {}f(recurra::View<3> const&)\n"
    ours = line.format("W", "recurra::avx2::")
    assert lint.check_object("a.o", "avx2", ours, "") == []
    assert lint.check_object("a.o", "avx2", line.format("T", "recurra::"), "") == []
    assert "weak" in lint.check_object("a.o", "avx2", line.format("W", "recurra::"), "")[0]
    assert "weak" in lint.check_object("a.o", "scalar", ours, "")[0]
    wide = "  0: vaddps %ymm1,%ymm2,%ymm3\n"
    assert lint.check_object("a.o", "avx2", "", wide) == []
    assert "any machine" in lint.check_object("a.o", None, "", wide)[0]
    assert "any machine" in lint.check_object("a.o", "scalar", "", wide)[0]
    assert lint.check_object("a.o", None, "", "  0: addps %xmm1,%xmm2\n") == []


def test_kernels_are_counted_once_an_instantiation():
    start = "0000000000000010 t recurra::avx2::parallel<recurra::avx2::{}>(long)\n"
    symbols = start.format("forward<float>") + start.format("forward<double>")
    assert len(lint.kernels("avx2", symbols + symbols)) == 2
    assert lint.kernels("scalar", symbols) == set()
