"""The installed C++ headers are whole: a program of a user's own compiles with one folder named."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import recurra

COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
INCLUDE = Path(recurra.include_path())

PROGRAM = """
#include <cmath>
#include <cstdio>
EVERY_HEADER

namespace recurra::RECURRA_ISA {

struct Leaky {
  static constexpr const char* name = "leaky";
  static constexpr auto inputs = names("x");
  static constexpr auto states = names("h");
  static constexpr auto params = names("a");
  static constexpr auto affine_params = affine();
  static constexpr int output = 0;

  template <class X, class H, class P>
  RECURRA_FN static auto step(X inputs, H states, P params) {
    auto [x] = inputs;
    auto [h] = states;
    auto [a] = params;
    auto f = sigmoid(a);
    return pack(fma(f, h, (1 - f) * tanh(x)));
  }
};

}  // namespace recurra::RECURRA_ISA

int main() {
  using namespace recurra::RECURRA_ISA;
  const double x = 0.3, h = -0.7, a = 0.2;
  double next, J[1][3];
  jacobian<Leaky>(&x, &h, &a, &next, J);
  const double f = 1 / (1 + std::exp(-a)), t = std::tanh(x);
  const double want[] = {f * h + (1 - f) * t, (1 - f) * (1 - t * t), f, f * (1 - f) * (h - t)};
  const double got[] = {next, J[0][0], J[0][1], J[0][2]};
  for (int i = 0; i < 4; ++i)
    if (!(std::fabs(got[i] - want[i]) < 1e-14)) return i + 1;
  int cells = 0;
  for_each_cell([&](auto cell) { cells += with_cell(decltype(cell)::name, [](auto) {}); });
  std::printf("%d cells\\n", cells);
}
"""


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_a_cell_of_a_users_own(tmp_path):
    headers = sorted(str(path.relative_to(INCLUDE)) for path in INCLUDE.rglob("*.h"))
    # Those that nvcc alone understands, one of the three that "vec.h" selects, and what stands
    # before all others or nowhere.
    device = (
        "/cuda/",
        "/vec_avx",
        "/rnn/countable.h",
        "/rnn/chain.h",
        "/rnn/forward.h",
        "/rnn/newton.h",
        "/rnn/jit_kernels.h",
        "/rnn/backward.h",
    )
    headers = [name for name in headers if not any(part in name for part in device)]
    assert "recurra/cells/all.h" in headers and "recurra/linear_scan/linear_scan.h" in headers
    source = tmp_path / "cell.cpp"
    source.write_text(
        PROGRAM.replace("EVERY_HEADER", "\n".join(f'#include "{name}"' for name in headers))
    )
    command = [COMPILER, "-std=c++20", "-O1", "-Wall", "-Wno-psabi", "-DRECURRA_ISA=scalar"]
    subprocess.run(
        [*command, f"-I{INCLUDE}", str(source), "-o", str(tmp_path / "cell")],
        check=True,
        timeout=300,
        cwd=tmp_path,
    )
    ran = subprocess.run([tmp_path / "cell"], check=True, capture_output=True, text=True)
    assert ran.stdout.split() != ["0", "cells"]
