"""The installed C++ headers are whole: a program of a user's own compiles with one folder named."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import recurra
from support import ROOT

COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
INCLUDE = Path(recurra.include_path())
PAGE = ROOT / "docs" / "cpp.md"

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


def instruction_sets() -> list[str]:
    """The flags of those that this machine has, as kernels are compiled with."""
    flags = {}
    for line in (INCLUDE / "recurra" / "simd" / "flags.txt").read_text().splitlines():
        name, *words = line.split()
        flags[name] = " ".join(word for word in words if not word.startswith("-W"))
    return list(flags.values())[: list(flags).index(torch.ops.recurra._isa()) + 1]


def stepped(params: torch.Tensor, T: int) -> torch.Tensor:
    """The state after T steps of the page's formula, on its inputs."""
    a, rate = params
    f, h = torch.sigmoid(rate), torch.zeros((), dtype=params.dtype)
    for t in range(T):
        h = f * h + (1 - f) * torch.tanh(t % 7 - 3 + a * h)
    return h


@pytest.mark.skipif(not (shutil.which("c++") and PAGE.exists()), reason="needs c++ and the sources")
def test_the_program_of_the_page(tmp_path):
    """As it stands, by the commands as they stand, and with the same digits for other flags."""
    section = PAGE.read_text().split("## The headers alone")[1].split("\n## ")[0]
    (program,) = re.findall(r"```cpp\n(.*?)```", section, re.DOTALL)
    compile_it, run_it = re.findall(r"^    (\S.*)$", section.replace(program, ""), re.MULTILINE)
    (tmp_path / "formula.cpp").write_text(program)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def shell(command: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["sh", "-c", command],
            cwd=tmp_path,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            timeout=120,
        )

    params = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)
    h = stepped(params, 100)
    want = torch.cat([h[None], *torch.autograd.grad(h, params)]).tolist()
    again = re.sub(r"\$\(.*?\)\)'\)", str(INCLUDE), compile_it)  # Python takes a while to start
    again += " -Wall -Wextra -Werror"
    printed = set()
    for command in (compile_it, *(f"{again} {flags}" for flags in instruction_sets())):
        compiled = shell(command)
        assert compiled.returncode == 0, compiled.stderr
        printed.add(shell(run_it).stdout)
    (printed,) = printed
    assert [float(x) for x in printed.split()] == pytest.approx(want, rel=0, abs=1e-9)

    without = shell(again.replace("-DRECURRA_ISA=mine", ""))
    assert without.returncode == 1
    said = "RECURRA_ISA must name the namespace of these headers, as -DRECURRA_ISA=mine"
    assert said in without.stderr and said in PAGE.read_text()


# Cells of the library on vectors against those on numbers and those that are linked. Compiled once
# for each instruction set, in a namespace of its own.
LANES = """
#include <cstring>
#include <recurra/cells/evaluate.h>
#include <recurra/cells/jacobian.h>
#include <recurra/cells/mgu.h>
#include <recurra/cells/slstm.h>
#include <recurra/simd/vec.h>

namespace mine = recurra::RECURRA_ISA;

template <class Cell, class T>
int differs() {
  constexpr int G = mine::kInputs<Cell>, S = mine::kStates<Cell>, P = mine::kParams<Cell>;
  constexpr int K = G + S + P, L = mine::kLanes;
  using V = mine::Vec<T>;
  T x[G][L], h[S][L], p[P][L], next[S][L], J[S][K][L];
  const auto fill = [](T(*rows)[L], int count, int from) {
    for (int i = 0; i < count * L; ++i) rows[i / L][i % L] = T((i * 37 + from) % 101 - 50) / 32;
  };
  fill(x, G, 0), fill(h, S, 5), fill(p, P, 9);
  V vx[G], vh[S], vp[P], vnext[S], vJ[S][K];
  for (int g = 0; g < G; ++g) vx[g] = V::load(x[g]);
  for (int s = 0; s < S; ++s) vh[s] = V::load(h[s]);
  for (int k = 0; k < P; ++k) vp[k] = V::load(p[k]);
  mine::jacobian<Cell>(vx, vh, vp, vnext, vJ);
  for (int s = 0; s < S; ++s) {
    vnext[s].store(next[s]);
    for (int k = 0; k < K; ++k) vJ[s][k].store(J[s][k]);
  }
  int wrong = 0;
  const auto same = [](auto a, auto b) { return a == b || (a != a && b != b); };
  for (int i = 0; i < L; ++i) {
    T x1[G], h1[S], p1[P], next1[S], J1[S][K];
    for (int g = 0; g < G; ++g) x1[g] = x[g][i];
    for (int s = 0; s < S; ++s) h1[s] = h[s][i];
    for (int k = 0; k < P; ++k) p1[k] = p[k][i];
    mine::jacobian<Cell>(x1, h1, p1, next1, J1);
    for (int s = 0; s < S; ++s) {
      wrong += !same(next1[s], next[s][i]);
      for (int k = 0; k < K; ++k) wrong += !same(J1[s][k], J[s][k][i]);
    }
  }
  if constexpr (sizeof(T) == 8) {
    T linked[S][L], of[S][K][L];
    recurra::evaluate_cell(Cell::name, x[0], h[0], p[0], L, linked[0], of[0][0]);
    wrong += std::memcmp(linked, next, sizeof next) || std::memcmp(of, J, sizeof J);
  }
  return wrong;
}

int ENTRY() {
  return differs<mine::SLstm, float>() + differs<mine::Mgu, double>();
}
"""


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_cells_on_vectors(tmp_path):
    library = next(Path(recurra.cmake_prefix_path()).rglob("librecurra.so"))
    (tmp_path / "lanes.cpp").write_text(LANES)
    names = [f"mine{n}" for n in range(len(instruction_sets()))]
    objects = [str(tmp_path / f"{name}.o") for name in names]
    common = [COMPILER, "-std=c++20", f"-I{INCLUDE}"]
    for name, flags, out in zip(names, instruction_sets(), objects, strict=True):
        defined = [f"-DRECURRA_ISA={name}", f"-DENTRY={name}"]
        command = [*common, *defined, *flags.split(), "-O1", "-c", "lanes.cpp", "-o", out]
        subprocess.run(command, check=True, timeout=300, cwd=tmp_path)
    calls = "".join(f"int {name}();\n" for name in names)
    calls += f"int main() {{ return {' + '.join(f'{name}()' for name in names)}; }}\n"
    (tmp_path / "main.cpp").write_text(calls)
    linked = ["main.cpp", *objects, str(library), f"-Wl,-rpath,{library.parent}", "-o", "lanes"]
    subprocess.run([*common, *linked], check=True, timeout=300, cwd=tmp_path)
    assert subprocess.run([tmp_path / "lanes"]).returncode == 0
