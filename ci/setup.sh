# Sourced by the scripts of this folder: the virtual environment with torch and the tools, and the
# build and installation of the package in it. Everything here may run again at no great cost.
#
#   RECURRA_VENV    the virtual environment, .venv in the repository by default
#   RECURRA_TORCH   the requirement for torch, such as "torch==2.12.0"
#   PYTHON          the interpreter to make the environment with

set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
VENV="${RECURRA_VENV:-$ROOT/.venv}"
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '== %s\n' "$*"; }
die() {
  printf 'ci: %s\n' "$*" >&2
  exit 1
}

# timed WHAT COMMAND...: says how long it took. Passes a failure on by hand, since in a condition,
# `timed ... || ...`, bash forgets -e within the function.
timed() {
  local what="$1" begin=$SECONDS
  shift
  "$@" || return
  say "$what: $((SECONDS - begin)) s"
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.11 python3.12 python3.13 python3.14 python3.10}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null; then
      echo "$candidate"
      return
    fi
  done
  die "no Python 3.10 or later among ${PYTHON:-python3 and python3.10 to python3.14}; name one in PYTHON"
}

# A newer cmake or ninja than the machine's comes from pip, and only where it is needed.
missing_tools() {
  command -v ninja > /dev/null || echo ninja
  local version
  version="$(cmake --version 2> /dev/null | sed -n 's/^cmake version //p')"
  if [ "$(printf '%s\n' 3.25 "${version:-0}" | sort -V | sed -n 1p)" != 3.25 ]; then echo cmake; fi
}

setup_environment() {
  local compiler="${CXX:-}" python tools
  if [ -z "$compiler" ]; then
    compiler="$(command -v g++ || command -v c++ || command -v clang++ || true)"
  fi
  if [ -z "$compiler" ] || ! command -v "$compiler" > /dev/null; then
    die "a C++20 compiler is missing (GCC 11 or later); on Debian and Ubuntu: apt-get install g++"
  fi
  if [ ! -x "$VENV/bin/python" ]; then
    python="$(find_python)"
    say "new virtual environment $VENV with $("$python" --version)"
    "$python" -m venv "$VENV" \
      || die "$python cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"
  fi
  export PATH="$VENV/bin:$PATH"
  python -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' \
    || die "the headers of $(python --version) are missing; on Debian and Ubuntu: apt-get install python3-dev"

  # Pinned where that is known to find a CPU build: a request without a version may fetch the
  # newest CUDA build, which is several gigabytes with its libraries. RECURRA_TORCH overrides it.
  local torch="torch>=2.11"
  if python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then torch="torch==2.13.0"; fi
  if [ -n "${RECURRA_TORCH:-}" ] || ! python -c 'import torch' 2> /dev/null; then
    timed "torch" python -m pip install -q "${RECURRA_TORCH:-$torch}" numpy
  fi
  tools="$(missing_tools)"
  # The pip that a distribution puts into environments may be too old for -C.
  # shellcheck disable=SC2086
  python -m pip install -q "pip>=23.1" "scikit-build-core>=0.10" "pybind11>=2.12" \
    "torch-abi-audit>=0.3" $tools
  # Warnings are errors with the compiler that the tree is kept clean for; others have others.
  WERROR=OFF
  if "$compiler" --version | sed -n 1p | grep -qE '^g\+\+.* 1[23]\.'; then WERROR=ON; fi
  say "$(python --version), torch $(python -c 'import torch; print(torch.__version__)'), $("$compiler" --version | sed -n 1p)"
  BUILD="$ROOT/build/ci-$(python -c 'import sys, torch; print(f"{sys.implementation.cache_tag}-{torch.__version__}")')"
}

# install_package EXTRA [PIP OPTION...]: builds the wheel, checks it and installs it with that extra.
install_package() {
  local extra="$1"
  shift
  rm -rf "$BUILD/wheel"
  timed "build" python -m pip wheel -q --no-build-isolation --no-deps --wheel-dir "$BUILD/wheel" \
    -C build-dir="$BUILD/package" -C "cmake.define.RECURRA_WERROR=$WERROR" "$@" .
  local wheel without=""
  wheel="$(ls "$BUILD"/wheel/recurra-*.whl)"
  command -v "${CUDACXX:-nvcc}" > /dev/null || without="--without-cuda"
  # shellcheck disable=SC2086
  timed "audit" python ci/audit_wheel.py "$wheel" --source "$ROOT" --build "$BUILD" $without
  python -m pip install -q "$wheel[$extra]"
  python -m pip install -q --no-deps --force-reinstall "$wheel"
}

# build_cpp_tests NAME SANITIZERS: builds tests/cpp in a folder of that name, whose path is in $CPP.
build_cpp_tests() {
  CPP="$BUILD/cpp-$1"
  cmake -S "$ROOT" -B "$CPP" -G Ninja -DRECURRA_CPP_TESTS=ON -DRECURRA_WERROR=$WERROR \
    -DRECURRA_SANITIZE="$2" > "$BUILD/cpp-$1.log" || die "cmake failed: $(tail -n 20 "$BUILD/cpp-$1.log")"
  timed "tests/cpp ($1)" cmake --build "$CPP" > "$BUILD/cpp-$1.log" || {
    cat "$BUILD/cpp-$1.log"
    die "tests/cpp does not build"
  }
  tail -n 1 "$BUILD/cpp-$1.log"
}
