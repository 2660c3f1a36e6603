#!/usr/bin/env bash
# What to run where there is an NVIDIA GPU, nvcc and a torch with CUDA: builds for that GPU with what
# the machine has, without network or virtual environment, runs the op table on it, the bench, the
# functions of csrc/math on every float, and each kernel once or twice under
# compute-sanitizer. Nine minutes for all of it, or TIME seconds: what is late is cut short and what
# was found until then kept. Tables and their JSON files go to build/gpu/results, or to the folder
# named by OUT. It needs cmake, pytest and numpy.
# Arguments go to pytest.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
PYTHON="${PYTHON:-python3}"
BUILD="$ROOT/build/gpu"
SITE="$BUILD/site"
OUT="${OUT:-$BUILD/results}"
TIME="${TIME:-540}"
mkdir -p "$BUILD" "$OUT"
say() { printf '== %s (%d s)\n' "$*" "$SECONDS"; }
die() {
  printf 'ci/gpu.sh: %s\n' "$*" >&2
  exit 1
}

for tool in nvcc cmake "$PYTHON"; do
  command -v "$tool" > /dev/null || die "$tool is not on the PATH"
done
"$PYTHON" -c 'import torch, pytest, numpy' || die "$PYTHON lacks a package, see above"
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "ci/gpu.sh: skipped: torch $("$PYTHON" -c 'import torch; print(torch.__version__)') finds no GPU"
  exit 0
}
arch="$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')"
say "$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name())'), sm_$arch"

generator=()
if command -v ninja > /dev/null; then generator=(-G Ninja); fi
# recurra.jax needs the module for NumPy, and has something to test where JAX finds the GPU.
with_jax=OFF
export XLA_PYTHON_CLIENT_PREALLOCATE=false
if "$PYTHON" -c 'import pybind11, jax; jax.devices("cuda")' 2> /dev/null; then with_jax=ON; fi
cmake -S . -B "$BUILD/package" "${generator[@]}" -DRECURRA_CUDA_ARCHITECTURES="$arch-real" \
  -DRECURRA_PYBIND=$with_jax -DPython_EXECUTABLE="$(command -v "$PYTHON")" > "$BUILD/cmake.log" \
  || die "cmake failed: $(tail -n 20 "$BUILD/cmake.log")"
timeout "$((TIME - SECONDS))" cmake --build "$BUILD/package" --parallel "$(nproc)" > "$BUILD/build.log" \
  || die "the build failed: $(tail -n 40 "$BUILD/build.log")"
rm -rf "$SITE"
mkdir -p "$SITE"
cp -r python/recurra "$SITE/"
cmake --install "$BUILD/package" --prefix "$SITE/recurra" > "$BUILD/install.log"
export PYTHONPATH="$SITE" PYTHONUNBUFFERED=1
"$PYTHON" -m recurra info

# Everything runs, whatever fails before it, within its share of the time that is left. It is
# interrupted as by hand, so that it tells what it has.
failed=0
part() { # part SECONDS WHAT COMMAND...
  local limit="$1" what="$2" left="$((TIME - 10 - SECONDS))"
  shift 2
  if ((left < limit)); then limit="$left"; fi
  if ((limit <= 0)); then
    say "$what: no time is left"
    failed=1
    return
  fi
  say "$what"
  timeout -s INT -k 10 "$limit" "$@" || { echo "ci/gpu.sh: $what failed" >&2 && failed=1; }
}
on_gpu=(tests/test_cuda.py tests/test_cuda_library.py tests/test_compat_cuda.py tests/test_ops.py tests/test_rtrl.py
  tests/test_serving.py)
if [ "$with_jax" = ON ]; then on_gpu+=(tests/test_jax.py); else say "no JAX with a GPU: left out"; fi
part 150 "tests" "$PYTHON" -m pytest -q "${on_gpu[@]}" -m gpu --junitxml="$OUT/tests.xml" "$@"
part 120 "bench" bash -c '"$0" -m recurra bench --device cuda --json "$1/bench.json" \
  | tee "$1/bench.txt"; exit "${PIPESTATUS[0]}"' "$PYTHON" "$OUT"
part 90 "functions" bash -c 'ci/math_cuda.sh "$0" "$1" && "$1"' \
  "$arch" "$BUILD/test_math_cuda"
if command -v compute-sanitizer > /dev/null; then
  # Blocks that torch keeps would hide what is read and written beside a tensor.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck; do
    part 90 "compute-sanitizer $tool" compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$PYTHON" -m pytest -q tests/test_cuda.py -k test_two_shapes
  done
else
  say "compute-sanitizer is not installed: left out"
fi
say "done, results in $OUT"
exit "$failed"
