#!/usr/bin/env bash
# What to run where there is an NVIDIA GPU and nvcc: a build for that GPU, the tests, which then use
# it as well as the CPU, and the bench. Takes a torch with CUDA, several gigabytes the first time.
export RECURRA_VENV="${RECURRA_VENV:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv-gpu}"
export RECURRA_TORCH="${RECURRA_TORCH:-torch>=2.11}"
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

command -v nvcc > /dev/null || die "nvcc is not on the PATH"
setup_environment
python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
  || die "torch $(python -c 'import torch; print(torch.__version__)') finds no GPU"
arch="$(python -c 'import torch; print("%d%d-real" % torch.cuda.get_device_capability())')"
say "$(python -c 'import torch; print(torch.cuda.get_device_name())'), sm_$arch"
install_package test -C "cmake.define.RECURRA_CUDA_ARCHITECTURES=$arch"
recurra info
python -m pytest "$@"
say "bench"
recurra bench
