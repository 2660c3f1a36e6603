#!/usr/bin/env bash
# The quick tier, on a fresh Linux machine with Python 3.10 or later and a C++ compiler: sets up an
# environment of its own, builds and installs the package and runs lint, the C++ programs under
# AddressSanitizer and UBSan, and pytest. Arguments go to pytest.
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

setup_environment
# One CUDA architecture is enough to know that the sources compile.
install_package test -C cmake.define.RECURRA_CUDA_ARCHITECTURES=90-real
say "lint"
python ci/lint.py
python ci/lint.py --objects "$BUILD/package"
python ci/cuda_budget.py "$BUILD/package"
if command -v nvcc > /dev/null; then ci/math_cuda.sh 90 "$BUILD/test_math_cuda"; fi
build_cpp_tests asan address,undefined
ctest --test-dir "$CPP" -j 2 --no-tests=error --output-on-failure
say "pytest"
# A process for each core, with one thread each; tests of threads ask for theirs themselves.
exec env OMP_NUM_THREADS=1 python -m pytest -n auto --maxprocesses 8 --dist worksteal "$@"
