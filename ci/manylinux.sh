#!/usr/bin/env bash
# What the manylinux_2_28 containers of a release lack: nvcc and the CUDA runtime 12.9, whose
# libraries run with every driver from 525 on, ccache, and torch for its headers.
set -euo pipefail

machine="$(uname -m)"
case "$machine" in
  x86_64) repository=x86_64 ;;
  aarch64) repository=sbsa ;;
  *) echo "ci/manylinux.sh: no CUDA for $machine" >&2 && exit 1 ;;
esac
dnf -y -q install dnf-plugins-core epel-release
dnf config-manager --add-repo \
  "https://developer.download.nvidia.com/compute/cuda/repos/rhel8/$repository/cuda-rhel8.repo"
dnf -y -q install cuda-nvcc-12-9 cuda-cudart-devel-12-9 ccache
/usr/local/cuda-12.9/bin/nvcc --version
# Without what it needs at run time, which is gigabytes.
/opt/python/cp311-cp311/bin/python -m pip install -q --no-deps --target /opt/torch "torch==2.13.0"
