#!/usr/bin/env bash
# Compiles tests/cpp/test_math_cuda.cu by nvcc alone: tests/cpp as a whole takes the CPU's kernels
# along. The CPU's side is for the vectors of this machine. Usage: ci/math_cuda.sh ARCHITECTURE
# PROGRAM, such as 90.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
nvcc -std=c++20 -O3 --fmad=false -arch="sm_$1" -Xcompiler=-march=native,-pthread \
  -Xcompiler=-ffp-contract=off,-fno-math-errno,-fno-trapping-math \
  -DRECURRA_ISA=cuda -Icsrc -o "$2" tests/cpp/test_math_cuda.cu csrc/cuda/context.cpp -ldl
